"""Attacks on what a server has isolated of a message: one image (or a few) of a batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.func import grad, vmap

from ..attack import Attack, Reconstruction
from ..dataset import Images
from ..federation.serving import Round
from ..seeds import Generators
from ..server import Server
from ..threat import Observation
from ..update import Update, one_hot
from .answer import Answer, Asker, ask


def ask_isolated(
    name: str,
    attack: Attack,
    server: Server,
    round_: Round,
    seen: Observation,
    streams: Generators,
    public: Images,
    asker: Asker = ask,
) -> tuple[Answer, Observation | None]:
    """Let an attack answer what a server isolated; the other images of the batch are answered by the public mean.

    Returns the answer to the whole batch, and what the attack was shown (None where nothing could be isolated).
    """
    shown = server.isolate(seen, round_.queries)
    mean = public.images.mean(0).to(seen.device, seen.dtype)
    blank = mean.expand(seen.victims, seen.batch_size, *seen.shape).clone()
    if shown is None:
        return Answer(Reconstruction(images=blank), ["ok"] * seen.victims, 0.0), None
    given = asker(name, attack, shown, streams)
    found = given.reconstruction
    if found is None:
        return given, shown
    blank[:, : shown.batch_size] = found.images.detach().to(blank)
    # What else was answered is of the isolated images alone.
    whole = Reconstruction(
        images=blank,
        status=found.status,
        loss=found.loss,
        iterations=found.iterations,
        gradient_evaluations=found.gradient_evaluations,
        trace=found.trace,
        backend=found.backend,
        backend_reason=found.backend_reason,
        details=found.details,
    )
    return replace(given, reconstruction=whole), shown


def residue(shown: Observation, images: Tensor) -> tuple[float, int]:
    """Return how far what was isolated is from the gradient of the nearest of a batch's images, and which that is.

    Args:
        shown: one victim, one image.
        images: of the batch, [B, C, H, W].
    """
    assert shown.labels is not None
    targets = one_hot(shown.labels[0, :1], shown.classes, images.dtype)

    def gradient(image: Tensor) -> Update:
        found: Update = grad(lambda at: shown.network.loss(image[None], targets, at))(shown.network.parameters)
        return found

    gradients = vmap(gradient)(images)
    away = torch.stack([(rows - shown.update[name]).square().flatten(1).sum(1) for name, rows in gradients.items()])
    size = torch.stack([rows.square().flatten(1).sum(1) for rows in gradients.values()])
    shares = (away.sum(0) / size.sum(0).clamp(min=1e-300)).sqrt()
    nearest = int(shares.nan_to_num(torch.inf).argmin())
    return float(shares[nearest]), nearest
