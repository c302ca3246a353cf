"""The read-out of trap weights: rows of the first layer that one image alone activates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradleak.defense import Defense
from gradleak.threat import Knowledge, Observation, Power, Setting

from .linear_leakage import LinearLeakage

_LEVELS = 256  # values of an 8-bit pixel
_NEAR = 1e-4  # how far rounding may bring a pixel from such a value
_SAME = 1e-3  # spread of the rows' balances that is rounding


@dataclass(frozen=True, kw_only=True)
class TrapReadout(LinearLeakage):
    """As linear leakage, and first those rows whose pixels all have values that public images have.

    A row that several images activate is a weighted mean of them and has other values; so has noise, under which it is
    linear leakage and no more. References: Boenisch, Dziedzic, Schuster, Shamsabadi, Shumailov, Papernot, EuroS&P 2023,
    arXiv:2112.02918.
    """

    reference = "arXiv:2112.02918"
    version = "1"
    needs = Knowledge(server=Power.PARAMETERS)
    ensembles: ClassVar[tuple[str, ...]] = ()

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs rows with one balance of signs, as trap weights have."""
        layer = self._first(module)
        if layer is None or layer.weight is None:
            return super().unsuited(module, setting, defense)
        rows = module.get_parameter(layer.weight).detach().double()
        balances = (rows.clamp(min=0).sum(1) / rows.clamp(max=0).sum(1).neg().clamp(min=1e-300)).log()
        # Rows that only differ in size are an imprint's.
        alike = torch.nn.functional.cosine_similarity(rows[:1], rows[1:2])
        trapped = bool(balances.std() < _SAME) and bool(alike < 1 - _SAME)
        return super().unsuited(module, setting, defense) if trapped else "needs a server that sets trap weights"

    def _compared(self, ratios: Tensor, observation: Observation) -> tuple[Tensor, Tensor]:
        points, outside = super()._compared(ratios, observation)
        if observation.auxiliary is None:
            return points, outside
        levels = observation.auxiliary.images.unique().to(points)
        if len(levels) > _LEVELS:
            return points, outside
        known = _nearest(points, levels) < _NEAR
        # Under noise no row has these values, and none is preferred.
        return points, outside | (known.any(1, keepdim=True) & ~known)


def _nearest(points: Tensor, levels: Tensor) -> Tensor:
    """Return how far the farthest pixel [N, O] of each candidate [N, O, P] is from the nearest of ascending levels."""
    place = torch.searchsorted(levels, points.contiguous()).clamp(1, max(len(levels) - 1, 1))
    below, above = levels[place - 1], levels[place.clamp(max=len(levels) - 1)]
    distance: Tensor = torch.minimum((points - below).abs(), (points - above).abs()).amax(-1)
    return distance
