"""The Model contract: builds a network for any image shape of the datasets, with normalisation inside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from . import seeds
from .options import Options


@dataclass(frozen=True, kw_only=True)
class Model(Options, ABC):
    """An architecture; a plugin implements `build`."""

    reference: ClassVar[str]
    """The paper or code the architecture comes from."""
    version: ClassVar[str] = "1"
    """Raised whenever its networks change; part of every cell's key."""

    @abstractmethod
    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network for images of shape (C, H, W) in [0, 1]; it returns logits [B, classes].

        The caller has seeded the global generator (see `initialise`), so torch's initialisers may be used.
        Every module must be twice differentiable on every device (no fused attention).

        Raises:
            GradleakError: the architecture cannot take images of this shape.
        """


class Normalise(nn.Module):
    """(x - mean) / std per channel, so that images stay in [0, 1] everywhere outside the model."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, mean: float | tuple[float, ...] = 0.5, std: float | tuple[float, ...] = 0.5):
        """Keep mean and standard deviation, one number or one a channel, as constants of the model."""
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).expand(channels).clone()[:, None, None])
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).expand(channels).clone()[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images [B, C, H, W] in [0, 1]."""
        return (images - self.mean) / self.std


def initialise(model: Model, shape: tuple[int, int, int], classes: int, *seed: object) -> nn.Module:
    """Build a network whose initial weights depend on `seed` alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive("model", *seed))
        return model.build(shape, classes)
