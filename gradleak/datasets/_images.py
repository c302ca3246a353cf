"""What several datasets share: pixels to tensors, one seeded split, one crop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from .. import seeds
from ..dataset import Images


def from_bytes(pixels: NDArray[np.uint8], labels: Sequence[int] | NDArray[np.integer]) -> Images:
    """Images from 8-bit pixels, [K, H, W, C] or [K, H, W], and their labels [K]."""
    images = torch.from_numpy(np.ascontiguousarray(pixels))
    images = images.permute(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
    return Images(images.float().div_(255).contiguous(), torch.from_numpy(np.asarray(labels, dtype=np.int64)))


def divide(labels: Tensor, test_share: float, *seed: object) -> tuple[Tensor, Tensor]:
    """Ascending indices of a train and a test split; every class gives the same share, drawn by `seed`."""
    stream = seeds.generator("split", *seed)
    in_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        drawn = torch.randperm(len(members), generator=stream)[: round(test_share * len(members))]
        in_test[members[drawn]] = True
    return (~in_test).nonzero().flatten(), in_test.nonzero().flatten()


def square(image: Image.Image, size: int, channels: int) -> NDArray[np.uint8]:
    """The centre square of a picture, as 8-bit pixels [size, size, channels]; 1 channel is luminance."""
    image = image.convert("L" if channels == 1 else "RGB")
    fitted = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(fitted, dtype=np.uint8).reshape(size, size, channels)
