"""The small sigmoid network of Deep Leakage from Gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..model import Model, Normalise
from ._layers import Activation, activation


@dataclass(frozen=True, kw_only=True)
class LeNet(Model):
    """Three 5x5 convolutions of 12 channels and a linear layer, on raw pixels in [0, 1] (Zhu et al. 2019)."""

    reference = "Zhu et al., Deep Leakage from Gradients, NeurIPS 2019, arXiv:1906.08935"

    activation: Activation = "sigmoid"
    initialisation: Literal["uniform", "default"] = "uniform"
    """`uniform` draws every weight and bias from U(-0.5, 0.5) as the paper does, `default` is torch's."""

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network; see `Model.build`."""
        channels, height, width = shape
        layers: list[nn.Module] = [Normalise(channels, mean=0.0, std=1.0)]
        for stride in (2, 2, 1):
            layers += [nn.Conv2d(channels, 12, 5, stride, padding=2), activation(self.activation)]
            channels = 12
        positions = -(-height // 4) * -(-width // 4)
        network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * positions, classes))
        if self.initialisation == "uniform":
            for parameter in network.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5)
        return network
