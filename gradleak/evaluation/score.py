"""The truth compared with the answers: one row an image."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.func import grad, vmap

from ..attack import Reconstruction
from ..board.store import ImageRow
from ..dataset import Data
from ..federation import client
from ..suite import AttackCell
from ..threat import Observation
from ..update import Network
from . import landscape, metrics
from .answer import Answer
from .losses import LossesOf
from .workshop import Workshop


def of_victims(rows: list[ImageRow], guesses: Tensor | None, size: int) -> tuple[list[ImageRow], Tensor | None]:
    """Keep of a sum's images the victim's own, the first `size`, and of its guesses [N, B, ...] those matched to them.

    The assignment was one of all images of the sum, so a guess at another client's image is no guess at the victim's.
    """
    rows = [row for row in rows if row.image < size]
    if guesses is None or guesses.shape[1] == size:
        return rows, guesses
    matched = torch.tensor([row.matched for row in rows], device=guesses.device).view(-1, size)
    victims = torch.arange(len(guesses), device=guesses.device)[:, None]
    return [replace(row, matched=row.image) for row in rows], guesses[victims, matched]


def rows_of(
    cell: AttackCell,
    data: Data,
    observation: Observation,
    sent: client.Sent,
    images: Tensor,
    labels: Tensor,
    given: Answer,
    workshop: Workshop,
    losses_of: LossesOf,
    isolated: bool = False,
) -> list[ImageRow]:
    """One row an image: the metrics of every reconstruction against its truth; an invalid one has none.

    Where a server isolated one image, the attack's loss is of that image alone, which has no counterpart at the truth.
    """
    norms = norms_of(sent.message)
    shared = [
        {"status": state, "seconds": given.seconds, "message_norm": norm}
        | ({} if given.width is None else {"width": given.width})
        for state, norm in zip(given.status, norms, strict=True)
    ]
    answer = given.reconstruction
    if answer is None:
        return [
            ImageRow.of({"victim": victim, "image": image, **shared[victim]})
            for victim in range(len(images))
            for image in range(images.shape[1])
        ]
    candidates = data.candidates(cell.candidates, cell.tuning)
    scored = metrics.score(answer.images, answer.labels, images, labels, candidates)
    marks, notes = (
        ({}, {}) if isolated else landscape.marks(cell, observation, sent, answer, data.mean, workshop, losses_of)
    )
    oracle = _oracle(answer, images)
    matched = torch.tensor([row["matched"] for row in scored]).view(len(images), -1)
    columns = {
        "loss": answer.loss,
        **marks,
        "contrast": landscape.contrast(cell, observation, sent, data.mean),
        "iterations": answer.iterations,
        "gradient_evaluations": answer.gradient_evaluations,
        **answer.details,
        **_guessed(answer, sent, observation.network, matched),
    }
    values = {name: column.tolist() for name, column in columns.items() if column is not None}
    rows = []
    for row in scored:
        victim, image = row["victim"], row["image"]
        own = {name: column[victim] for name, column in values.items()}
        best = {} if oracle is None else {"oracle_psnr": oracle[victim][image]}
        if victim in given.notes:
            row = {name: row[name] for name in ("victim", "image", "matched", "finite")}
            best = {"note": f"invalid answer: {given.notes[victim]}"}
        rows.append(ImageRow.of({**row, **shared[victim], **own, **notes, **best}))
    return rows


def _oracle(answer: Reconstruction, images: Tensor) -> list[list[float]] | None:
    """PSNR [N][B] of the restart that the truth would have picked: a ceiling."""
    if answer.candidates is None:
        return None
    best = []
    for tries, truth in zip(answer.candidates, images, strict=True):
        scores = []
        for attempt in tries:
            cleaned = metrics.clean(attempt)[0]
            order = metrics.assign(attempt, truth)
            scores.append(metrics.psnr(cleaned[order], truth.double()))
        best.append(max(scores, key=lambda values: float(values.mean())).tolist())
    return best


def _guessed(answer: Reconstruction, sent: client.Sent, network: Network, matched: Tensor) -> dict[str, Tensor]:
    """Accuracy [N] of recovered private randomness (dropout masks, a row an image), rounded, over its live units.

    A unit is live if the client's loss depends on its mask: of others (silent ones, and those that only feed such) no
    message can tell it. NaN where there is none. `matched` [N, B] is the reconstruction of each true image, whose
    order the rows follow.
    """
    shared = [name for name in answer.guessed if name in sent.buffers]
    if not shared:
        return {}
    victims = torch.arange(len(matched))[:, None]
    hits = [
        (answer.guessed[name].cpu()[victims, matched].round() == sent.buffers[name].cpu().round()).flatten(1)
        for name in shared
    ]
    slopes = vmap(grad(lambda drawn, batch, targets: network.loss(batch, targets, buffers=drawn)))(
        sent.buffers, sent.images, sent.targets
    )
    live = torch.cat([slopes[name].cpu().flatten(1) != 0 for name in shared], dim=1)
    return {"mask_accuracy": (torch.cat(hits, dim=1) & live).sum(1) / live.sum(1)}


def norms_of(message: dict[str, Tensor]) -> list[float]:
    """Return the Euclidean norm of each of N stacked messages."""
    squares = torch.stack([tensor.flatten(1).double().square().sum(1) for tensor in message.values()])
    norms: list[float] = squares.sum(0).sqrt().tolist()
    return norms
