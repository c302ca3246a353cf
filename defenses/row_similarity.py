"""Row similarity: the client refuses a model with a layer whose rows read the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._detection import Detection, matrices


@dataclass(frozen=True, kw_only=True)
class RowSimilarity(Detection):
    """Takes the largest cosine between two rows of one layer: 1 where rows differ in their bias alone.

    Such rows cut images into bins (Fowl et al., ICLR 2022, arXiv:2110.13057). Rows of zeros and layers of one input
    are left out.
    """

    reference = "arXiv:2110.13057"

    def inspect(self, module: nn.Module, template: nn.Module, images: Tensor, targets: Tensor) -> float:
        """Return the largest cosine between two rows of one layer."""
        found = -1.0
        for _, weight in matrices(module):
            rows = weight[weight.norm(dim=1) > 0]
            if len(rows) < 2 or rows.shape[1] < 2:
                continue
            unit = rows / rows.norm(dim=1, keepdim=True)
            cosines = unit @ unit.mT - 2 * torch.eye(len(unit)).to(unit)
            found = max(found, float(cosines.max()))
        return found
