"""The 18-layer residual network with a stem for small images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from torch import nn

from ..model import Model
from ._layers import Norm
from ._residual import residual_network


@dataclass(frozen=True, kw_only=True)
class ResNet18(Model):
    """Four stages of two basic blocks with projection shortcuts and a 3x3 stem without max-pool."""

    reference = "He et al., Deep Residual Learning, CVPR 2016, arXiv:1512.03385"

    width: Annotated[int, Ge(1)] = 64
    """Channels of the first stage; each further stage has twice as many."""
    norm: Norm = "batch"

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network; see `Model.build`."""
        widths = (self.width, 2 * self.width, 4 * self.width, 8 * self.width)
        return residual_network(shape, classes, widths=widths, blocks=2, norm=self.norm, projection=True)
