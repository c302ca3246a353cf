"""The residual networks for small images, of which resnet18 and resnet20 are two."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..model import Normalise
from ._layers import GlobalAverage, Norm, normalisation


class PaddedShortcut(nn.Module):
    """He et al.'s option A: keep every `stride`-th pixel and append `extra` zero channels. No parameters."""

    def __init__(self, stride: int, extra: int):
        super().__init__()
        self.stride = stride
        self.extra = extra

    def forward(self, features: Tensor) -> Tensor:
        """Subsample and pad features [B, C, H, W]."""
        kept = features[..., :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, 0, self.extra))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, projection: bool):
        super().__init__()
        self.body = nn.Sequential(
            _convolution(inputs, outputs, 3, stride, norm),
            normalisation(norm, outputs),
            nn.ReLU(),
            _convolution(outputs, outputs, 3, 1, norm),
            normalisation(norm, outputs),
        )
        self.shortcut: nn.Module
        if stride == 1 and inputs == outputs:
            self.shortcut = nn.Identity()
        elif projection:
            self.shortcut = nn.Sequential(_convolution(inputs, outputs, 1, stride, norm), normalisation(norm, outputs))
        else:
            self.shortcut = PaddedShortcut(stride, outputs - inputs)
        self.activation = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, inputs, H, W] to [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        return self.activation(self.body(features) + self.shortcut(features))  # type: ignore[no-any-return]


def residual_network(
    shape: tuple[int, int, int],
    classes: int,
    *,
    widths: tuple[int, ...],
    blocks: int,
    norm: Norm,
    projection: bool,
) -> nn.Module:
    """Return a 3x3 stem, one stage of `blocks` blocks for each width, a global average and a linear layer.

    Every stage after the first halves the image until its shorter side is 2 pixels, so that batch
    normalisation has more than one value to average even for one small image.
    """
    channels, height, width = shape
    size, inputs = min(height, width), widths[0]
    layers = [
        Normalise(channels),
        _convolution(channels, inputs, 3, 1, norm),
        normalisation(norm, inputs),
        nn.ReLU(),
    ]
    for stage, outputs in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 and size > 2 else 1
            size = -(-size // stride)
            layers.append(BasicBlock(inputs, outputs, stride, norm, projection))
            inputs = outputs
    return nn.Sequential(*layers, GlobalAverage(), nn.Linear(inputs, classes))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int, norm: Norm) -> nn.Conv2d:
    # A bias in front of a normalisation would be subtracted again.
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=norm == "none")
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer
