"""What natural images look like: penalties on ONE victim's images [B, C, H, W] in [0, 1], each a scalar.

All are plain tensor operations: safe under `torch.func.vmap` and differentiable twice where they are smooth.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SMOOTHING = 1e-8  # keeps roots of zero differences differentiable


def total_variation(images: Tensor) -> Tensor:
    """Anisotropic total variation, mean |dx| + mean |dy| (Geiping et al. 2020, arXiv:2003.14053).

    Height and width are at least 2. Steps are in image units; normalising by s makes them 1 / s as large.
    """
    horizontal, vertical = _steps(images)
    return horizontal.abs().mean() + vertical.abs().mean()


def smooth_total_variation(images: Tensor, inner: float = 2.0, outer: float = 0.5, opponents: bool = False) -> Tensor:
    """Mean of (|dx|^inner + |dy|^inner)^outer over pixels and channels; by default isotropic total variation.

    dx and dy are the steps to the right and lower neighbour, 0 at the border. `opponents` adds the planes
    R - G, R - B, G - B of images with three channels, so that edges which differ between channels cost more.
    """
    if opponents and images.shape[-3] == 3:
        red, green, blue = images.unbind(-3)
        images = torch.cat([images, torch.stack([red - green, red - blue, green - blue], -3)], -3)
    horizontal, vertical = _steps(images)
    size = [
        (step.square() + _SMOOTHING**2) ** (inner / 2)
        for step in (F.pad(horizontal, (0, 1)), F.pad(vertical, (0, 0, 0, 1)))
    ]
    return ((size[0] + size[1]) ** outer).mean()


def l2_norm(images: Tensor) -> Tensor:
    """Euclidean norm of the whole batch (Yin et al. 2021, arXiv:2104.07586)."""
    norm: Tensor = torch.linalg.vector_norm(images)
    return norm


def clamp_to_box(images: Tensor) -> Tensor:
    """Project images onto the box [0, 1] that every true image lies in."""
    return images.clamp(0, 1)


def _steps(images: Tensor) -> tuple[Tensor, Tensor]:
    return images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]
