"""How far a guess's update is from the observed one; each takes one victim's two updates and returns a scalar."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .update import Update, dot, squared_norm

Objective = Callable[[Update, Update], Tensor]

_TINY = 1e-30


def cosine(guess: Update, observed: Update) -> Tensor:
    """One minus the cosine over all tensors at once, in [0, 2]; blind to scale (Geiping et al., arXiv:2003.14053)."""
    norms = (squared_norm(guess) + _TINY).sqrt() * (squared_norm(observed) + _TINY).sqrt()
    return 1 - dot(guess, observed) / norms


def squared(guess: Update, observed: Update) -> Tensor:
    """Sum of squared differences (Zhu et al., arXiv:1906.08935)."""
    return torch.stack([(guess[name] - observed[name]).square().sum() for name in observed]).sum()


def relative_squared(guess: Update, observed: Update) -> Tensor:
    """Sum of squared differences over the squared norm of the observation: 1 for a guess of zero."""
    return squared(guess, observed) / (squared_norm(observed) + _TINY)


def absolute(guess: Update, observed: Update) -> Tensor:
    """Sum of absolute differences over the sum of absolute observations: 1 for a guess of zero."""
    difference = torch.stack([(guess[name] - observed[name]).abs().sum() for name in observed]).sum()
    return difference / (torch.stack([tensor.abs().sum() for tensor in observed.values()]).sum() + _TINY)


def minus_log(probability: Tensor, floor: float = 0.05) -> Tensor:
    """-log(p), continued below `floor` by its tangent, so that impossible guesses are still led back."""
    return -probability.clamp(min=floor).log() + (floor - probability).relu() / floor


OBJECTIVES: dict[str, Objective] = {
    "cosine": cosine,
    "squared": squared,
    "relative-squared": relative_squared,
    "absolute": absolute,
}
"""Objectives that an attack's `objective` option may name."""
