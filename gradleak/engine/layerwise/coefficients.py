"""Losses that are functions of <G, g> and |G|^2, and how they change with both, for stacked victims."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import _TINY as TINY

KNOWN = ("cosine", "squared", "relative-squared")
"""Names in `gradleak.engine.objectives` of those that are."""


class Coefficients(NamedTuple):
    """A loss [W], and its gradient by G as of_observed * g + of_own * G, coefficients [W]."""

    loss: Tensor
    of_observed: Tensor
    of_own: Tensor


def cosine(dot: Tensor, own: Tensor, size: Tensor) -> Coefficients:
    """Of `dot` <G, g>, `own` |G|^2 and `size` |g|^2."""
    root = (own + TINY).sqrt()
    norms = root * (size + TINY).sqrt()
    return Coefficients(1 - dot / norms, -1 / norms, dot / (norms * root.square()))


def squared(gap: Tensor, size: Tensor, relative: bool) -> Coefficients:
    """Of `gap` |G - g|^2 and `size` |g|^2."""
    scale = 1 / (size + TINY) if relative else torch.ones_like(size)
    return Coefficients(gap.to(size.dtype) * scale, -2 * scale, 2 * scale)


def factor(own: Tensor, clip: float) -> Tensor:
    """What clipping multiplies G by, from |G|^2."""
    return (clip / (own + TINY).sqrt()).clamp(max=1)


def factor_slope(own: Tensor, factor: Tensor) -> Tensor:
    """The slope of that factor by |G|^2."""
    return torch.where(factor < 1, -factor / (2 * (own + TINY)), torch.zeros_like(own))


def through_clip(found: Coefficients, dot: Tensor, own: Tensor, clip: float) -> Coefficients:
    """Coefficients for G of what was computed for c G, c = min(1, clip / |G|)."""
    factor_ = factor(own, clip)
    # The slope of the loss by c: <of_observed g + of_own c G, G>.
    by_factor = found.of_observed * dot + found.of_own * factor_ * own
    of_own = found.of_own * factor_.square() + 2 * factor_slope(own, factor_) * by_factor
    return Coefficients(found.loss, found.of_observed * factor_, of_own)
