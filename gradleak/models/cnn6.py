"""The invertible convolutional network of R-GAP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Lt, MultipleOf
from torch import nn

from ..model import Model, Normalise


@dataclass(frozen=True, kw_only=True)
class CNN6(Model):
    """Six convolutions without biases, a leaky ReLU after each, and a linear layer (Zhu and Blaschko 2021).

    Nothing in it loses information, so that a single image can be computed back from the logits down. The paper's
    network has one logit for two classes; this one has one a class.
    """

    reference = "Zhu and Blaschko, R-GAP: Recursive Gradient Attack on Privacy, ICLR 2021, arXiv:2010.07733"

    width: Annotated[int, Gt(0), MultipleOf(3)] = 12
    """Channels of the first convolution; the others have 3, 3, 3, 16/3 and 32/3 times as many."""
    slope: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Of the activation below zero."""

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network; see `Model.build`."""
        channels, height, width = shape
        layers: list[nn.Module] = [Normalise(channels)]
        plan = [(1, 4, 2), (3, 3, 2), (3, 3, 1), (3, 3, 1), (16 / 3, 3, 2), (32 / 3, 3, 1)]
        for times, kernel, stride in plan:
            outputs, padding = round(times * self.width), kernel // 2
            layers += [nn.Conv2d(channels, outputs, kernel, stride, padding, bias=False), nn.LeakyReLU(self.slope)]
            height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
            channels = outputs
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, classes, bias=False))
