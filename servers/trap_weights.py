"""Trap weights: rows of the first layer that few images activate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from gradleak import structure
from gradleak.dataset import Images
from gradleak.defense import Defense
from gradleak.errors import GradleakError
from gradleak.knowledge import Knowledge, Power, Setting
from gradleak.server import Server
from gradleak.structure import OnPixels
from gradleak.update import copied

_GRID = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99)
_BATCHES = 20  # of public images, on which each share is tried


@dataclass(frozen=True, kw_only=True)
class TrapWeights(Server):
    """Sets half of each row of the first linear layer to -|z|, the other half to +s |z|: few images activate a row.

    The same magnitudes z ~ N(0, sigma^2) are on both sides and the bias is 0, in terms of pixels in [0, 1]. A row that
    one image alone activates holds it. Where `share` is unset, s is tuned on batches of public images: the one by which
    most of them are alone in a row. References: Boenisch, Dziedzic, Schuster, Shamsabadi, Shumailov, Papernot,
    EuroS&P 2023, arXiv:2112.02918, where s is 0.95 for images; dark images want less.
    """

    surface = Power.PARAMETERS
    needs = Knowledge(auxiliary=True)
    reference = "arXiv:2112.02918"

    share: Annotated[float, Gt(0), Lt(1)] | None = None
    """s."""
    sigma: Annotated[float, Gt(0)] = 0.5
    batch: Annotated[int, Ge(1)] = 64
    """Images of a message that s is tuned for."""

    def tamper(
        self, module: nn.Module, auxiliary: Images | None, generator: torch.Generator, client: int = 0
    ) -> nn.Module:
        """Return the model with trapped rows."""
        assert auxiliary is not None
        layer = _first(module)
        if layer is None or layer.weight is None or layer.bias is None or layer.mean is None or layer.std is None:
            raise GradleakError(f"server 'trap-weights': {_NEEDS}")
        changed = copied(module)
        weight, bias = changed.get_parameter(layer.weight), changed.get_parameter(layer.bias)
        shape = structure.of(module).shape
        channels = torch.arange(shape[0]).repeat_interleave(shape[1] * shape[2])
        index = layer.index.flatten()
        mean, std = (part.flatten()[channels][index.clamp(min=0)] for part in (layer.mean, layer.std))
        reads = (index >= 0).double()
        pixels = auxiliary.images.double().flatten(1)[:, index.clamp(min=0)] * reads
        negative, positive = self._halves(weight.shape[0], len(index), generator)
        share = self._tuned(negative, positive, pixels, generator) if self.share is None else self.share
        rows = (negative + share * positive) * reads
        with torch.no_grad():
            weight.copy_(rows * std)
            bias.copy_(rows @ mean)
        return changed

    def _halves(self, rows: int, inputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw -|z| on one half of each row's inputs and |z| on the other, [rows, inputs] each, 0 elsewhere."""
        half = inputs // 2
        size = (torch.randn(rows, half, generator=generator, dtype=torch.float64) * self.sigma).abs()
        order = torch.rand(rows, inputs, generator=generator, dtype=torch.float64).argsort(1)
        nothing = torch.zeros(rows, inputs, dtype=torch.float64)
        return nothing.scatter(1, order[:, :half], -size), nothing.scatter(1, order[:, half : 2 * half], size)

    def _tuned(self, negative: Tensor, positive: Tensor, pixels: Tensor, generator: torch.Generator) -> float:
        """Return the share of the grid by which most public images are alone in a row."""
        below, above = pixels @ negative.mT, pixels @ positive.mT
        orders = [torch.randperm(len(pixels), generator=generator)[: self.batch] for _ in range(_BATCHES)]

        def alone(share: float) -> float:
            active = below + share * above > 0
            found = 0.0
            for batch in orders:
                rows = active[batch]
                found += float((rows & (rows.sum(0) == 1)).any(1).sum())
            return found

        return max(_GRID, key=alone)

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs a first layer that is linear on the pixels."""
        layer = _first(module)
        return None if layer is not None and layer.weight and layer.bias else _NEEDS


_NEEDS = "needs a model whose first layer is linear on the pixels with a bias and a ReLU (mlp), and is trained"


def _first(module: nn.Module) -> OnPixels | None:
    for layer in structure.of(module).on_pixels:
        if layer.linear and layer.plain and layer.whole and layer.rectified and layer.index.ndim == 1:
            return layer
    return None
