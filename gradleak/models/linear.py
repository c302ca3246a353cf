"""One linear layer with a bias."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from ..model import Model, Normalise


@dataclass(frozen=True, kw_only=True)
class Linear(Model):
    """Softmax regression on the pixels."""

    reference = "multinomial logistic regression"

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network; see `Model.build`."""
        return nn.Sequential(Normalise(shape[0]), nn.Flatten(), nn.Linear(math.prod(shape), classes))
