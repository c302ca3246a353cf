"""Residuals in message space: vectors whose squared norm a second-order attack makes small."""

from __future__ import annotations

import torch
from torch import Tensor

from ..update import Update, squared_norm

_TINY = 1e-30


def difference(guess: Update, observed: Update) -> Tensor:
    """Guess minus observation over all tensors of the guess, [K]."""
    return torch.cat([(tensor - observed[name]).flatten() for name, tensor in guess.items()])


def relative_difference(guess: Update, observed: Update) -> Tensor:
    """`difference` over the norm of what is observed, [K]: of squared norm 1 for a guess of zero."""
    size = squared_norm({name: observed[name] for name in guess})
    return difference(guess, observed) / (size + _TINY).sqrt()


def entries(observed: Update) -> Tensor:
    """Number of entries, a scalar: the expected squared norm of as many residuals of unit variance."""
    first = next(iter(observed.values()))
    return first.new_tensor(float(sum(tensor.numel() for tensor in observed.values())))
