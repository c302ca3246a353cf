"""Head check: the client refuses a model whose last layer silences classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak import structure

from ._detection import Detection

_LEAST = 1e-12  # of a row's norm: zero


@dataclass(frozen=True, kw_only=True)
class HeadCheck(Detection):
    """Compares the largest row or bias of the last layer with its smallest row.

    Fishing sets rows to zero and biases far above them (Wen et al., ICML 2022, arXiv:2202.00580). Models whose last
    layer is not linear are not looked at.
    """

    reference = "arXiv:2202.00580"

    def inspect(self, module: nn.Module, template: nn.Module, images: Tensor, targets: Tensor) -> float:
        """Return the ratio of the largest row's norm, or bias, to the smallest row's norm."""
        channels, height, width = images.shape[1:]
        head = structure.of(module, (channels, height, width)).head
        if head.weight is None:
            return 0.0
        weight = module.get_parameter(head.weight).detach().double()
        norms = (weight.mT if head.transposed else weight.flatten(1)).norm(dim=1)
        largest = norms.max()
        if head.bias is not None:
            largest = torch.maximum(largest, module.get_parameter(head.bias).detach().double().abs().max())
        return float(largest / norms.min().clamp(min=_LEAST))
