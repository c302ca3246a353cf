"""Augmentation as a defense: clients train on images changed by a fixed policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor

from gradleak.mechanisms.encoding import Encoding, Latents

_Transformation = Literal["rotate", "shear", "translate", "flip", "invert", "contrast", "brightness"]


@dataclass(frozen=True, kw_only=True)
class Augmentation(Encoding):
    """Applies the transformations of a policy, in order, to every image.

    References: Gao et al., CVPR 2021, arXiv:2011.12505 (ATS), who search among policies of up to three AutoAugment
    transformations for one that makes gradients hard to match. Here the policy is chosen by hand. It is public,
    as all clients share it, so the adaptive answer searches for images through it. PSNR against the untouched
    image flatters policies that move pixels: an oblivious attack that finds the changed image scores badly.
    """

    reference = "arXiv:2011.12505"
    counter_attacks = ("encoding-inversion",)

    policy: tuple[_Transformation, ...] = ("rotate", "translate", "invert")
    """Transformations, first to last."""
    strength: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of the largest change: 45 degrees, shear by 0.5, shift by a quarter, half the contrast or light."""

    def draw(self, images: Tensor, generator: torch.Generator) -> Latents:
        """Nothing is drawn."""
        return {}

    def apply(self, images: Tensor, targets: Tensor, latents: Latents) -> tuple[Tensor, Tensor]:
        """Change the images."""
        for name in self.policy:
            images = _TRANSFORMATIONS[name](images, self.strength)
        return images, targets

    def encode_test(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Change the images: the policy is fixed, and part of the model."""
        return self.apply(images, images.new_empty(0), {})[0]


def _rotate(images: Tensor, strength: float) -> Tensor:
    angle = strength * math.pi / 4
    return _warp(images, ((math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))))


def _shear(images: Tensor, strength: float) -> Tensor:
    return _warp(images, ((1.0, 0.5 * strength), (0.0, 1.0)))


def _translate(images: Tensor, strength: float) -> Tensor:
    shift = max(1, round(strength * images.shape[-1] / 4))
    return torch.cat([torch.zeros_like(images[..., :shift]), images[..., :-shift]], dim=-1)


def _warp(images: Tensor, matrix: tuple[tuple[float, float], tuple[float, float]]) -> Tensor:
    """Linear map of coordinates about the centre, bilinear, black outside."""
    height, width = images.shape[-2:]
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64, device=images.device) - (height - 1) / 2,
        torch.arange(width, dtype=torch.float64, device=images.device) - (width - 1) / 2,
        indexing="ij",
    )
    (a, b), (c, d) = matrix
    x = (a * columns + b * rows + (width - 1) / 2).flatten()
    y = (c * columns + d * rows + (height - 1) / 2).flatten()
    flat = images.flatten(-2)
    warped = torch.zeros_like(flat)
    for row in (y.floor(), y.floor() + 1):
        for column in (x.floor(), x.floor() + 1):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = (1 - (y - row).abs()) * (1 - (x - column).abs()) * inside
            index = (row * width + column).long() * inside
            warped = warped + weight.to(flat) * flat[..., index.to(flat.device)]
    return warped.view_as(images)


_TRANSFORMATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "rotate": _rotate,
    "shear": _shear,
    "translate": _translate,
    "flip": lambda images, strength: images.flip(-1),
    "invert": lambda images, strength: 1 - images,
    "contrast": lambda images, strength: 0.5 + (1 - strength / 2) * (images - 0.5),
    "brightness": lambda images, strength: (1 - strength / 2) * images,
}
