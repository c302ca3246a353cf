"""Defenses that train on encoded images: what the client draws, and what an attacker searches for in its place."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dataset import Images
from ..defense import Defense

Latents = dict[str, Tensor]
"""What an encoding depends on besides images and targets (coefficients, masks), for ONE victim."""


@dataclass(frozen=True, kw_only=True)
class Encoding(Defense):
    """A defense whose client trains on `apply(images, targets, latents)` with privately drawn latents."""

    family = "data"

    @abstractmethod
    def draw(self, images: Tensor, generator: torch.Generator) -> Latents:
        """Draw a client's latents for images [B, C, H, W]."""

    @abstractmethod
    def apply(self, images: Tensor, targets: Tensor, latents: Latents) -> tuple[Tensor, Tensor]:
        """Encode images [B, C, H, W] and class probabilities [B, classes], differentiably."""

    def unknowns(self, batch_size: int, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of the unconstrained numbers that an attacker searches over in place of the latents."""
        return {}

    def relax(self, numbers: Latents) -> Latents:
        """Turn these numbers into latents, differentiably."""
        return numbers

    def recover(self, encoded: Tensor, soft: Tensor, labels: Tensor, public: Images | None) -> Tensor | None:
        """Return the images behind encoded ones in closed form, or None where there is none.

        Args:
            encoded: what the client trained on, [B, C, H, W].
            soft: its class probabilities, in the same order, [B, classes].
            labels: of the images that are wanted, in their order, [B].
            public: labelled images of the same kind, where there are any.
        """
        return None

    def encode(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw latents and encode."""
        return self.apply(images, targets, self.draw(images, generator))
