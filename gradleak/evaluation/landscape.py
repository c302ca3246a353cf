"""Where an answer lies between knowing nothing and the truth in the attacker's loss, and how far apart these are."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..attack import Reconstruction
from ..federation.client import Sent
from ..suite import AttackCell
from ..threat import Observation
from ..update import local_update
from .losses import LossesOf
from .workshop import Workshop

log = logging.getLogger(__name__)


def marks(
    cell: AttackCell,
    observation: Observation,
    sent: Sent,
    answer: Reconstruction,
    mean: Tensor,
    workshop: Workshop,
    losses_of: LossesOf,
) -> tuple[dict[str, Tensor | None], dict[str, str]]:
    """Return columns [N] of the attacker's loss at the truth and at the mean image, and a note where there are none.

    The loss is the attacker's own: a client's private randomness counts only where the attack guesses it or is told
    it, so that an attacker who runs another model than the client is not taken for an optimiser that failed. `mean`
    is the mean public image, [C, H, W].
    """
    attack = cell.built_attack
    if attack.observes_other_victim:
        return {}, {}
    told = observation.private is not None
    buffers = {name: tensor for name, tensor in sent.buffers.items() if told or name in answer.guessed}
    guesses = {"loss_at_truth": sent.images}
    if (means := mean_of(mean, sent)) is not None:
        guesses["loss_at_mean"] = means
    try:
        return dict(losses_of(observation, guesses, sent.targets, buffers)), {}
    except Exception as error:
        # A diagnostic: without it the answer still counts, so the rows say what is missing, and why.
        note = f"no loss at the truth: {workshop.described(error)}"
        log.warning("%s: %s", cell.attack.label, note)
        return {}, {"note": note}


def mean_of(mean: Tensor, sent: Sent) -> Tensor | None:
    """Return the mean public image [C, H, W] in every place of the clients' images; None for those of another shape."""
    return mean.to(sent.images).expand_as(sent.images).contiguous() if sent.images.shape[2:] == mean.shape else None


def contrast(cell: AttackCell, observation: Observation, sent: Sent, mean: Tensor) -> Tensor | None:
    """Return the cosine distance [N], in [0, 2], between each client's undefended update and that of the mean image.

    It tells how much of an update its image decides: near 0, a network hardly looks at the image, and matching
    gradients tells nothing. None for sums of clients and for encodings of another shape than images.
    """
    if cell.built_defense.cohort > 1 or sent.images.shape[2:] != mean.shape:
        return None
    guess = mean.to(sent.images).expand_as(sent.images[0])
    training, found = cell.setting.local_training, []
    for victim, targets in enumerate(sent.targets):
        buffers = {name: tensor[victim] for name, tensor in sent.buffers.items()}
        update = local_update(observation.network, guess, targets, training, buffers=buffers)
        pairs = [
            (update[name].flatten(), sent.update[name][victim].flatten()) for name in update if name in sent.update
        ]
        if not pairs:  # What each example sent is not in the space of the parameters.
            return None
        ours, theirs = (torch.cat(part).double() for part in zip(*pairs, strict=True))
        found.append(1 - ours @ theirs / (ours.norm() * theirs.norm()).clamp(min=1e-300))
    return torch.stack(found).detach()
