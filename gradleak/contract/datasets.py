"""What a dataset promises."""

from __future__ import annotations

from pathlib import Path

import torch

from ..dataset import Data, Dataset, Images
from .findings import require

# Datasets

DatasetCase = tuple[Dataset, str, Path | None]
"""A dataset, its name and the data root."""


def dataset_declares_itself(case: DatasetCase) -> None:
    """Declares its reference."""
    require(getattr(case[0], "reference", ""), "reference is missing")


def dataset_holds_images(case: DatasetCase) -> None:
    """Holds images of one shape, float32 in [0, 1], with labels of its classes."""
    data = Data(*case)
    for half, images in (("train", data.split.train), ("test", data.split.test)):
        _holds(images, half, data)


def _holds(images: Images, half: str, data: Data) -> None:
    require(len(images) > 0, f"{half}: no images")
    shape = tuple(images.images.shape)
    require(shape == (len(images), *data.shape), f"{half}: images {shape}, not {(len(images), *data.shape)}")
    kinds = images.images.dtype, images.labels.dtype
    require(kinds == (torch.float32, torch.int64), f"{half}: images and labels are {kinds}, not float32 and int64")
    require(images.images.is_contiguous(), f"{half}: images are not contiguous")
    require(0 <= images.images.min() and images.images.max() <= 1, f"{half}: images are not in [0, 1]")
    fits = 0 <= images.labels.min() and images.labels.max() < data.classes
    require(fits, f"{half}: labels are not in 0 to {data.classes - 1}")


def dataset_repeats_itself(case: DatasetCase) -> None:
    """Reads the same images in the same order every time, and leaves the global generator alone."""
    noise = torch.get_rng_state()
    first, second = (case[0].read(case[2], False).digest for _ in range(2))
    require(first == second, "two readings differ")
    require(torch.equal(torch.get_rng_state(), noise), "the global generator was used; see gradleak.seeds")


def dataset_keeps_victims_private(case: DatasetCase) -> None:
    """Shows no private image among the public ones, and has a victim."""
    data = Data(*case)
    public = {image.numpy().tobytes() for image in data.split.train.images}
    shared = sum(image.numpy().tobytes() in public for image in data.split.test.images)
    require(not shared, f"{shared} private images are public too")
    data.victim_indices(1, 1)
