"""Layers that several models share. None works in place; each call site gets its own activation."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

Activation = Literal["relu", "gelu", "sigmoid", "tanh"]
Norm = Literal["batch", "group", "none"]

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def activation(name: Activation) -> nn.Module:
    """Return a new activation module."""
    return _ACTIVATIONS[name]()


def normalisation(name: Norm, channels: int) -> nn.Module:
    """Return a new normalisation of feature maps [B, channels, H, W].

    Group normalisation has 16 channels a group (Wu and He 2018, arXiv:1803.08494), or one group where 16 does
    not divide the channels.
    """
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "group":
        return nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels)
    return nn.Identity()


class GlobalAverage(nn.Module):
    """The mean over all positions: [B, C, H, W] to [B, C]."""

    def forward(self, features: Tensor) -> Tensor:
        """Average height and width away."""
        return features.mean((-2, -1))
