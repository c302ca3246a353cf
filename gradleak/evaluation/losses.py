"""An attack's own loss at images that it is not told of: at the truth, say. A plugin's is asked elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from .. import registry
from ..attack import Attack
from ..suite import AttackCell
from ..threat import Observation
from .apart import Apart
from .wire import Guesses, Losses, Tensors

LossesOf = Callable[[Observation, Guesses, Tensor, Tensors], Losses]
"""Returns an attack's losses at guesses, given the class probabilities [N, B, classes] and the private randomness."""


def losses(attack: Attack, observation: Observation, guesses: Guesses, targets: Tensor, buffers: Tensors) -> Losses:
    """Return an attack's own losses at some images."""
    return {name: attack.loss(observation, images, targets, dict(buffers)) for name, images in guesses.items()}


def losses_of(cell: AttackCell, apart: Apart | None) -> LossesOf:
    """Return what asks the attack of a cell for its losses: one that does not come along is asked elsewhere."""
    part = cell.attack
    if apart is None or part.name in registry.built_in("attacks"):
        return partial(losses, cell.built_attack)
    return partial(apart.losses, part.name, part.options, part.label)
