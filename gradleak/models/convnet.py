"""The convolutional network of Inverting Gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from torch import nn

from ..model import Model, Normalise
from ._layers import Norm, normalisation


@dataclass(frozen=True, kw_only=True)
class ConvNet(Model):
    """Eight 3x3 convolutions with normalisation and two 3x3 max-pools (ConvNet64 of Geiping et al. 2020)."""

    reference = "Geiping et al., Inverting Gradients, NeurIPS 2020, arXiv:2003.14053"

    width: Annotated[int, Ge(1)] = 64
    """Channels of the first convolution; the last has four times as many."""
    norm: Norm = "batch"

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network; see `Model.build`. A side shorter than 3 pixels is pooled as a whole."""
        inputs, height, width = shape
        layers: list[nn.Module] = [Normalise(inputs)]
        for index, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4)):
            outputs = factor * self.width
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), normalisation(self.norm, outputs), nn.ReLU()]
            inputs = outputs
            if index in (5, 7):
                kernel = min(3, height), min(3, width)
                layers.append(nn.MaxPool2d(kernel))
                height, width = height // kernel[0], width // kernel[1]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * height * width, classes))
