"""A user's generator makes images like the victims'."""

from __future__ import annotations

import torch

from ...dataset import Data
from ...errors import GradleakError
from ...search.generators import Generator

_SAMPLES = 2


def check(generator: Generator, source: str, data: Data) -> None:
    """Let a generator make images and compare them with the data's.

    Raises:
        GradleakError: it makes none, images of another shape, not finite or outside [0, 1], or others when asked again.
    """
    where = f"prior {source!r}"
    targets = torch.zeros(_SAMPLES, generator.classes)
    try:
        with torch.no_grad():
            images, again = (generator.sample(targets, torch.Generator().manual_seed(0)) for _ in range(2))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise GradleakError(f"{where}: cannot make images ({type(error).__name__}: {reason})") from error
    if not isinstance(images, torch.Tensor) or images.shape != (_SAMPLES, *data.shape):
        found = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        allowed = [_SAMPLES, *data.shape]
        raise GradleakError(f"{where}: makes images {found} of {_SAMPLES} codes; dataset {data.name!r} has {allowed}")
    if not ((images >= 0) & (images <= 1)).all():
        low, high = float(images.min()), float(images.max())
        raise GradleakError(f"{where}: makes images in [{low:.4g}, {high:.4g}] (allowed: finite, in [0, 1])")
    if not torch.equal(images, again):
        raise GradleakError(f"{where}: makes other images of the same code (allowed: no randomness of its own)")
