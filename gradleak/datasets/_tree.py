"""Trees of image files, one folder a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import ImageFolder

from .. import seeds
from ..dataset import Images, Split
from ..errors import GradleakError, unknown
from ._images import divide, from_bytes, square


def read_tree(path: Path, size: int, channels: int, limit: int | None = None) -> Split:
    """Both splits of a tree of class folders, images [K, channels, size, size].

    With `train/` and `test/` (or `val/`) in it, these are the splits; a tree without them is divided, two
    thirds of each class for training. `limit` keeps the first images of a seeded draw of each split.

    Raises:
        GradleakError: the folder is missing, holds no images, or a file is no 8-bit image.
    """
    if not path.is_dir():
        raise GradleakError(f"folder {path}: no such folder")
    halves = [path / name for name in ("train", "test", "val") if (path / name).is_dir()][:2]
    if not halves:
        classes, files, labels = _files(path)
        train, test = (([files[i] for i in part], labels[part]) for part in divide(labels, 1 / 3, "folder"))
    elif len(halves) == 2 and halves[0].name == "train":
        classes, *_ = _files(halves[0])
        train, test = (_files_of(half, classes) for half in halves)
    else:
        raise GradleakError(f"folder {path}: {halves[0].name}/ stands alone; allowed: train/ with test/ or val/")
    return Split(_decode(*train, size, channels, limit), _decode(*test, size, channels, limit), classes)


def _files(path: Path) -> tuple[tuple[str, ...], list[str], Tensor]:
    """Class names, files in sorted order and labels of a folder of class folders."""
    nothing = GradleakError(f"folder {path}: no images; expected {path.name}/CLASS/IMAGE.png (or .jpg, …)")
    if not any(child.is_dir() for child in path.iterdir()):
        raise nothing
    tree = ImageFolder(str(path), allow_empty=True)
    if not tree.samples:
        raise nothing
    files, labels = zip(*tree.samples, strict=True)
    return tuple(tree.classes), list(files), torch.tensor(labels)


def _files_of(path: Path, classes: tuple[str, ...]) -> tuple[list[str], Tensor]:
    """Files and labels of one half; labels are numbered by the train half's classes."""
    own, files, labels = _files(path)
    for name in own:
        if name not in classes:
            raise unknown("class", name, classes, f"folder {path}")
    return files, torch.tensor([classes.index(name) for name in own])[labels]


def _decode(files: list[str], labels: Tensor, size: int, channels: int, limit: int | None) -> Images:
    chosen = torch.arange(len(files))
    if limit is not None:
        chosen = torch.randperm(len(files), generator=seeds.generator("limit", "folder"))[:limit]
    pixels = np.empty((len(chosen), size, size, channels), dtype=np.uint8)
    for row, index in enumerate(chosen.tolist()):
        pixels[row] = _open(files[index], size, channels)
    return from_bytes(pixels, labels[chosen].numpy())


def _open(file: str, size: int, channels: int) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":  # Pillow would clip 16-bit and float pixels, not scale them
                raise GradleakError(f"{file}: pixels of mode {image.mode!r}; allowed: 8-bit images")
            return square(image, size, channels)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise GradleakError(f"{file}: cannot be read as an image ({error})") from error
