"""Weight balance: the client refuses a model with a layer whose rows all have one balance of signs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ._detection import Detection, matrices

_ROWS = 8  # below which a balance says nothing
_EQUAL = 1e-12  # spread of what is equal up to rounding


@dataclass(frozen=True, kw_only=True)
class WeightBalance(Detection):
    """Takes, of each layer, the ratio of positive to negative weights' sums in every row, and how little it spreads.

    Trap weights have one ratio in all rows (Boenisch et al., EuroS&P 2023, arXiv:2112.02918); drawn or trained weights
    do not. The suspicion is one over the standard deviation of the ratios, of the layer where it is least. Rows of one
    sign and layers of fewer than eight rows are left out.
    """

    reference = "arXiv:2112.02918"

    def inspect(self, module: nn.Module, template: nn.Module, images: Tensor, targets: Tensor) -> float:
        """Return one over the least spread of any layer's balance."""
        found = 0.0
        for _, weight in matrices(module):
            positive, negative = weight.clamp(min=0).sum(1), weight.clamp(max=0).sum(1).neg()
            mixed = (positive > 0) & (negative > 0)
            if int(mixed.sum()) >= _ROWS:
                ratios = (positive[mixed] / negative[mixed]).log()
                found = max(found, 1 / (float(ratios.std()) + _EQUAL))
        return found
