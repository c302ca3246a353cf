"""How far a guess's update is from the observed one; each takes one victim's two updates and returns a scalar."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..update import Update, dot, squared_norm

Objective = Callable[[Update, Update], Tensor]

_TINY = 1e-30
"""Keeps quotients and roots of a zero update finite; squared norms of real ones are far above, also in float32."""


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


def angular(guess: Update, observed: Update) -> Tensor:
    """Angle over all tensors at once, in units of pi: 0 for the same direction, 1 for the opposite one."""
    left, right = _unit(guess), _unit(observed)
    apart = squared(left, right)
    together = squared(left, {name: -tensor for name, tensor in right.items()})
    # Unlike the arc cosine, exact for small angles and of finite slope there.
    return 2 / torch.pi * torch.atan2((apart + _TINY).sqrt(), (together + _TINY).sqrt())


def masked_cosine(guess: Update, observed: Update) -> Tensor:
    """Cosine on the entries above 1e-6 of the largest observed one: those that a sparsified update kept."""
    largest = torch.stack([tensor.abs().amax() for tensor in observed.values()]).amax()
    kept = {name: (tensor.abs() > 1e-6 * largest).to(tensor) for name, tensor in observed.items()}
    return cosine(
        {name: guess[name] * mask for name, mask in kept.items()},
        {name: observed[name] * mask for name, mask in kept.items()},
    )


def layer_distances(guess: Update, observed: Update) -> Tensor:
    """Sum over tensors of the distance, not squared, over the sum of their norms (Yin et al., arXiv:2104.07586)."""
    gaps = torch.stack([_norm(guess[name] - tensor) for name, tensor in observed.items()]).sum()
    return gaps / torch.stack([_norm(tensor) for tensor in observed.values()]).sum()


def squared_absolute(guess: Update, observed: Update) -> Tensor:
    """Relative squared plus a tenth of the relative absolute distance (after Deng et al., arXiv:2103.06819)."""
    return relative_squared(guess, observed) + 0.1 * absolute(guess, observed)


def weigh(update: Update, weights: str) -> Update:
    """Scale tensors so that inner products weigh the l-th of n by `linear` 1 - l / n or `exp` e^-l; `equal` by 1."""
    if weights == "equal":
        return update
    count = len(update)
    factors = [1 - index / count if weights == "linear" else math.exp(-index) for index in range(count)]
    return {name: factor**0.5 * tensor for factor, (name, tensor) in zip(factors, update.items(), strict=True)}


def _unit(update: Update) -> Update:
    norm = (squared_norm(update) + _TINY).sqrt()
    return {name: tensor / norm for name, tensor in update.items()}


def _norm(tensor: Tensor) -> Tensor:
    return (tensor.square().sum() + _TINY).sqrt()


def minus_log(probability: Tensor, floor: float = 0.05) -> Tensor:
    """-log(p), continued below `floor` by its tangent, so that impossible guesses are still led back."""
    return -probability.clamp(min=floor).log() + (floor - probability).relu() / floor


OBJECTIVES: dict[str, Objective] = {
    "cosine": cosine,
    "squared": squared,
    "relative-squared": relative_squared,
    "absolute": absolute,
    "angular": angular,
    "masked-cosine": masked_cosine,
    "layer-distances": layer_distances,
    "squared-absolute": squared_absolute,
}
"""Objectives that an attack's `objective` option may name."""
