"""What a matching attack may search instead of pixels; written for ONE victim, images [B, C, H, W].

Each has `initial` (variables of stacked victims) and `images` (one victim's variables to images in [0, 1] or, for
`low-resolution`, to the space of its variables).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..engine.optimisers import Variables
from ..seeds import Generators

_CHANNELS = 32  # of every hidden layer; with 3x3 kernels more weights than a small image has pixels
_SIDE = 4  # least side of the decoder's code


def enlarge(pixels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Bicubic enlargement of [B, C, h, w] to [B, C, H, W] (after Yue et al., arXiv:2206.04055)."""
    bigger: Tensor = F.interpolate(pixels, size=shape[1:], mode="bicubic", align_corners=False)
    return bigger


def decoder(generator: Generators, batch_size: int, shape: tuple[int, int, int]) -> Variables:
    """Random weights [N, ...] of an untrained decoder and its code, the deep image prior of one batch.

    A code of at least 4 pixels a side, doubled by nearest neighbours before each 3x3 convolution, then one more to
    the image and a sigmoid (Ulyanov et al., arXiv:1711.10925; for gradients Zhang et al., ICCV 2023).
    """
    channels, height, width = shape
    doublings = max(0, int(math.log2(min(height, width) / _SIDE)))
    side = [-(-length // 2**doublings) for length in (height, width)]
    # Keeps the size of features through ReLU layers of 9 * _CHANNELS inputs (He et al., arXiv:1502.01852).
    scale = (2 / (9 * _CHANNELS)) ** 0.5
    weights = {"code": generator.normal(batch_size, _CHANNELS, *side)}
    for index in range(doublings + 1):
        weights[f"layer{index}"] = scale * generator.normal(_CHANNELS, _CHANNELS, 3, 3)
    weights["output"] = scale * generator.normal(channels, _CHANNELS, 3, 3)
    return weights


def decoded(weights: Variables, shape: tuple[int, int, int]) -> Tensor:
    """Images [B, C, H, W] in [0, 1] of one decoder."""
    features = weights["code"]
    layers = [name for name in weights if name.startswith("layer")]
    for index, name in enumerate(layers):
        if index:
            features = features.repeat_interleave(2, -1).repeat_interleave(2, -2)
        features = F.conv2d(features, weights[name], padding=1)
        # Each image's own normalisation keeps the decoder alive whatever its weights do.
        spread, mean = torch.var_mean(features, dim=(-2, -1), keepdim=True, correction=0)
        features = F.leaky_relu((features - mean) / (spread + 1e-5).sqrt(), 0.2)
    return F.conv2d(features, weights["output"], padding=1)[..., : shape[1], : shape[2]].sigmoid()
