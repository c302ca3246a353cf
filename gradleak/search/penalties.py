"""What natural images look like: penalties on ONE victim's images [B, C, H, W] in [0, 1], each a scalar.

All are plain tensor operations: safe under `torch.func.vmap` and differentiable twice where they are smooth.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..structure import Head
from ..update import Network, Update
from .labels import gradients

_SMOOTHING = 1e-8  # keeps roots of zero differences differentiable


def total_variation(images: Tensor) -> Tensor:
    """Anisotropic total variation, mean |dx| + mean |dy| (Geiping et al. 2020, arXiv:2003.14053).

    Height and width are at least 2. Steps are in image units; normalising by s makes them 1 / s as large.
    """
    horizontal, vertical = _steps(images)
    return horizontal.abs().mean() + vertical.abs().mean()


def total_variation_rows(images: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """`weight` times the anisotropic total variation of every victim's images [W, B, C, H, W], and its gradient."""
    value, slope = images.new_zeros(len(images)), torch.zeros_like(images)
    for axis, step in zip((-1, -2), _steps(images), strict=True):
        share = weight / step[0].numel()
        value = value + step.abs().flatten(1).sum(1) * share
        sign = step.sign_().mul_(share)
        slope.narrow(axis, 1, sign.shape[axis]).add_(sign)
        slope.narrow(axis, 0, sign.shape[axis]).sub_(sign)
    return value, slope


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


def told_features(update: Update, head: Head, labels: Tensor) -> dict[str, Tensor]:
    """What the gradient of the head, a linear layer, tells of its inputs, for `feature_distance`.

    Row y of its weight gradient over entry y of its bias gradient is a weighted mean of its inputs, in which those of
    label y weigh most. Without a bias nothing is told.

    Args:
        update: gradients [N, ...] by parameter name.
        head: with a weight (`gradleak.structure`).
        labels: [N, B].

    Returns:
        `inputs` [N, B, F] and `known` [N, B], 0 where the bias gradient vanishes.
    """
    weight, bias = gradients(update, head)
    assert weight is not None
    if bias is None:
        bias = torch.zeros_like(weight[..., 0])
    rows = weight.gather(1, labels[..., None].expand(*labels.shape, weight.shape[-1]))
    scale = bias.gather(1, labels)[..., None]
    # Below it the quotient is one of rounding errors.
    known = scale.abs() > 1e-8
    inputs = torch.where(known, rows / torch.where(known, scale, torch.ones_like(scale)), torch.zeros_like(rows))
    return {"inputs": inputs, "known": known[..., 0].to(weight)}


def feature_distance(network: Network, layer: str, images: Tensor, told: dict[str, Tensor]) -> Tensor:
    """Mean squared distance between the inputs of the head's layer for images [B, C, H, W] and `told_features`."""
    noted: list[Tensor] = []
    handle = network.module.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: noted.append(inputs[0]))
    try:
        network.logits(images)
    finally:
        handle.remove()
    return ((noted[-1] - told["inputs"]).square().mean(-1) * told["known"]).mean()


def clamp_to_box(images: Tensor) -> Tensor:
    """Project images onto the box [0, 1] that every true image lies in."""
    return images.clamp(0, 1)


def _steps(images: Tensor) -> tuple[Tensor, Tensor]:
    return images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]
