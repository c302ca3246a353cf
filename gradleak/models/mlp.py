"""A fully connected network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from torch import nn

from ..model import Model, Normalise
from ._layers import Activation, activation


@dataclass(frozen=True, kw_only=True)
class MLP(Model):
    """Linear layers with an activation after each but the last."""

    reference = "multilayer perceptron"

    widths: tuple[Annotated[int, Ge(1)], ...] = (256, 256)
    """Units of the hidden layers, first to last; empty for none."""
    activation: Activation = "relu"
    bias: bool = True
    """Whether the layers have biases."""

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network; see `Model.build`."""
        layers: list[nn.Module] = [Normalise(shape[0]), nn.Flatten()]
        inputs = math.prod(shape)
        for outputs in self.widths:
            layers += [nn.Linear(inputs, outputs, self.bias), activation(self.activation)]
            inputs = outputs
        return nn.Sequential(*layers, nn.Linear(inputs, classes, self.bias))
