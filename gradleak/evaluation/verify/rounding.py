"""What rounding explains: how far two honest computations of one cell may lie apart, measured and not assumed.

Machines round differently. Where an attack is stable its scores move by a thousandth of a decibel or less; where it is
chaotic (L-BFGS, say) by several decibels a victim. So a cell that was not met exactly is run again with every weight
of the model moved by at most one unit in its last place, which is what a differently rounded matrix product amounts to
(backward error analysis: Higham 2002, chapter 3). A difference that these twins show too is rounding; another is not.
What tips over once in hundreds of computations shows where weights are moved further, so that it tips over often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ... import seeds
from ...model import Model, initialise
from ...scales import METRICS
from ...suite import Cell
from ...training import networks
from ...update import copied
from ..workshop import Resources, Workshop

Floats = npt.NDArray[np.float64]
Ladder = Callable[[int], Floats]
"""The n-th own computation of some numbers [M]; the first is the plain one, the others are shaken."""

PIXEL = 2.0**-23
"""Rounding of a kept pixel, which is a float32 in [0, 1], there and here."""
LOSS = 1e-5
"""Rounding of a loss, as a share of the loss at a grey image; measured on all attacks: below 1e-6."""
NORM = 1e-5
"""Relative rounding of a message's norm; measured: below 1e-7."""
BYTES = 1e-3
"""Relative difference of bytes: rounding may decide a few entries of a sparse or entropy-coded message."""
TWINS = (2, 8)
"""Shaken computations: at first, and before anything is refused."""
MEAN, VICTIM = 4.0, 5.0
"""Standard deviations that a mean, and a single number, may lie from the own ones."""
LOUD, UNITS = 8, 64
"""Twins that are moved further, by so many units in the last place: made where single numbers lie apart."""


class Shaken(Workshop):
    """A workshop whose models have every weight moved by at most one unit in its last place; of the last, by `UNITS`.

    What is trained begins with such weights, too: training may amplify what rounding makes of them.
    """

    def __init__(self, resources: Resources, number: int) -> None:
        """Make the twin of some number."""
        super().__init__(resources)
        self._number = number

    def network(self, cell: Cell, epochs: int | None = None) -> tuple[nn.Module, float]:
        """Return the shaken model that an honest server sends, and the accuracy it was trained to."""
        module, accuracy = super().network(cell, epochs)
        return self._moved(module), accuracy

    def begun(self, cell: Cell, plugin: Model) -> Model:
        """Return a model with shaken initial weights where it is trained."""
        if not cell.setting.epochs and getattr(cell, "before", None) is None:
            return plugin
        weights = networks.initial_seed(plugin, cell.model.name, self.data(cell.dataset), cell.seed)
        return _Begun(model=plugin, weights=weights, move=self._moved)

    def _moved(self, module: nn.Module) -> nn.Module:
        shaken, stream = copied(module), seeds.generator("twin", self._number)
        most = 1 if self._number <= TWINS[-1] else UNITS
        with torch.no_grad():
            for weight in shaken.parameters():
                if weight.is_floating_point():
                    units = torch.randint(-most, most + 1, weight.shape, generator=stream).to(weight)
                    weight.mul_(1 + units * torch.finfo(weight.dtype).eps)
        return shaken


@dataclass(frozen=True, kw_only=True)
class _Begun(Model):
    """A model whose training begins beside the initial weights that it has."""

    reference = "gradleak"
    model: Model
    weights: tuple[str, ...]
    move: Callable[[nn.Module], nn.Module]

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        return self.move(initialise(self.model, shape, classes, *self.weights))


def pixels_apart(stored: float, here: float) -> bool:
    """Whether two mean squared errors of one kept image differ by more than the rounding of its pixels."""
    return not abs(stored**0.5 - here**0.5) <= PIXEL


def decibels(mse: float) -> float:
    """Return by how much a PSNR may differ where pixels are rounded; what is above its cap does not show."""
    least = math.pow(10, -METRICS["psnr"].high / 20)
    return 1e-6 + 20 / math.log(10) * PIXEL / max(math.sqrt(mse), least)


def unexplained(stored: Floats, own: Ladder, units: Iterable[float] | float) -> str | None:
    """Say how stored numbers [M] differ by more than rounding from the own ones; None where they do not.

    Numbers within a unit of the plain computation are the same. Else the spread of the twins is measured, pooled over
    the numbers, or of a number of its own where that is wider; beyond a unit the stored ones must have a mean within
    `MEAN` standard errors of the own mean, and lie within `VICTIM` standard deviations each. Of single numbers that lie
    further apart, the spread is measured among the loud twins.

    Args:
        stored: what is claimed, NaN where nothing is.
        own: computes them again.
        units: differences that are of no account, [M] or one for all.
    """
    unit = np.broadcast_to(np.asarray(units, dtype=float), stored.shape)
    found = [own(0)]
    if stored.shape != found[0].shape:
        return f"{len(stored)} numbers, {len(found[0])} here"
    if bool(np.all(_gaps(stored, found[0]) <= unit)):
        return None
    for twins in TWINS:
        found += [own(number) for number in range(len(found), twins + 1)]
        if _is_explained(stored, np.stack(found), unit):
            return None
    loud = [own(number) for number in range(TWINS[-1] + 1, TWINS[-1] + LOUD + 1)]
    return None if _is_explained(stored, np.stack(found), unit, np.stack(loud)) else _difference(stored, found)


def _is_explained(stored: Floats, own: Floats, unit: Floats, loud: Floats | None = None) -> bool:
    # What is missing on one side only is far away from everything.
    far = 1e3 * float(np.nanmax(np.abs(np.concatenate([own.ravel(), stored, unit])), initial=1.0))
    stored, own = np.nan_to_num(stored, nan=-far), np.nan_to_num(own, nan=-far)
    gaps, variance = stored - own.mean(0), own.var(0, ddof=1)
    variance = np.maximum(variance, variance.mean())
    if loud is not None:
        apart = np.abs(gaps) > unit + VICTIM * np.sqrt(variance)
        loud = np.nan_to_num(loud, nan=-far)
        gaps = np.where(apart, stored - loud.mean(0), gaps)
        variance = np.where(apart, np.maximum(variance, loud.var(0, ddof=1)), variance)
    if (np.abs(gaps) > unit + VICTIM * np.sqrt(variance)).any():
        return False
    error = float(np.sqrt(variance.mean() * (1 + 1 / len(own)) / len(stored)))
    return abs(float(gaps.mean())) <= float(unit.mean()) + MEAN * error


def _gaps(stored: Floats, here: Floats) -> Floats:
    both = np.isnan(stored) & np.isnan(here)
    gaps: Floats = np.where(both, 0.0, np.abs(stored - here))
    return np.nan_to_num(gaps, nan=np.inf)


def _difference(stored: Floats, own: Sequence[Floats]) -> str:
    means = [float(np.nanmean(values)) if np.isfinite(values).any() else float("nan") for values in (stored, *own)]
    twins = ", ".join(f"{mean:.6g}" for mean in sorted(means[2:])[:: max(1, len(means) - 3)])
    return f"mean {means[0]:.6g}, {means[1]:.6g} here ({twins} with weights moved in the last place)"
