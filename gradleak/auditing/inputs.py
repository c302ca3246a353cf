"""A user's images and labels, whatever form they come in, as the benchmark's data."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .. import seeds
from ..dataset import Data, Dataset, Images, Split
from ..errors import GradleakError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
"""What counts as an image file."""
FEWEST = 8
"""Images that an audit needs: half of them are public, and a quarter is attacked."""

Shape = tuple[int, int, int]
Source = Path | str | tuple[Tensor, Tensor] | Iterable[tuple[Any, Any]]
"""A folder of image files, a tensor of images with one of labels, or pairs of image and label (a torch `Dataset`)."""
Labels = Path | str | Mapping[str, int | str] | Callable[[str], int | str] | None
"""Of a folder's files: a CSV of file and label, a mapping, a function of the file's name, or None for class folders."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Given(Dataset):
    """Images that are in memory."""

    reference: ClassVar[str] = "the user's own images"
    split: Any

    def read(self, root: Path | None, download: bool) -> Split:
        given: Split = self.split
        return given


def read(source: Source, labels: Labels, shape: Shape | None) -> tuple[Tensor, Tensor]:
    """Return a user's images [K, C, H, W] in [0, 1] and their labels [K].

    Args:
        source: see `Source`.
        labels: see `Labels`; of a folder only.
        shape: (C, H, W) to which files are fitted (shorter side, then the centre); by default their own, if all have
            one.

    Raises:
        GradleakError: images or labels are missing, or not what a model can take.
    """
    if isinstance(source, str | Path):
        images, numbers = _folder(Path(source), labels, shape)
    elif isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Tensor):
        images, numbers = source[0], torch.as_tensor(source[1])
    else:
        images, numbers = _pairs(source)
    return _checked(images, numbers)


def data_of(images: Tensor, labels: Tensor, classes: int, name: str = "own images") -> Data:
    """Return a user's images as data: a seeded half is public, the other private; copies are left out.

    Args:
        images: [K, C, H, W] in [0, 1].
        labels: [K].
        classes: what the model tells apart; labels are below it.
        name: what reports call them.

    Raises:
        GradleakError: a label is no class, or there are too few images.
    """
    if labels.max() >= classes:
        raise GradleakError(
            f"--data: labels {int(labels.min())} to {int(labels.max())}; the model tells {classes} classes apart "
            f"(allowed: 0 to {classes - 1})"
        )
    kept = _unique(images)
    images, labels = images[kept], labels[kept]
    if len(images) < FEWEST:
        raise GradleakError(f"--data: {len(images)} different images (allowed: {FEWEST} or more)")
    order = torch.randperm(len(images), generator=seeds.generator("audit", "halves"))
    public, private = order[: len(order) // 2], order[len(order) // 2 :]
    train, test = (Images(images[half].contiguous(), labels[half].contiguous()) for half in (public, private))
    return Data(_Given(split=Split(train, test, tuple(str(number) for number in range(classes)))), name)


def _checked(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        hint = "; of one-hot labels give labels.argmax(1)" if labels.ndim == 2 and images.ndim == 4 else ""
        found = f"{list(images.shape)} and labels {list(labels.shape)}"
        raise GradleakError(f"--data: images {found} (allowed: [K, C, H, W] and [K]){hint}")
    images, labels = images.detach().cpu().float(), labels.detach().cpu().long()
    if not len(images) or not images.isfinite().all() or images.min() < 0 or images.max() > 1:
        span = f" in [{float(images.min()):.3g}, {float(images.max()):.3g}]" if len(images) else ""
        bytes_ = bool(len(images)) and images.min() >= 0 and 1 < images.max() <= 255
        hint = "divide them by 255" if bytes_ else "if the model expects normalised images, give --mean and --std"
        raise GradleakError(f"--data: {len(images)} images{span} (allowed: finite, in [0, 1]; {hint})")
    if labels.min() < 0:
        raise GradleakError(f"--data: label {int(labels.min())} (allowed: 0 or more)")
    return images, labels


def _unique(images: Tensor) -> list[int]:
    first: dict[bytes, int] = {}
    for index, image in enumerate(images):
        first.setdefault(hashlib.sha256(image.contiguous().numpy().tobytes()).digest(), index)
    return list(first.values())


def _pairs(source: Any) -> tuple[Tensor, Tensor]:
    """Read pairs; what has a length and no end (a torch Dataset) is read by index."""
    try:
        pairs = [source[index] for index in range(len(source))] if hasattr(source, "__len__") else list(source)
        images = torch.stack([torch.as_tensor(pair[0]) for pair in pairs])
        labels = torch.tensor([int(pair[1]) for pair in pairs])
    except (TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        told = " ".join(str(error).split())[:160]
        raise GradleakError(
            f"--data: {type(source).__name__} holds no pairs of image tensor [C, H, W] and label ({told})"
        ) from error
    return images, labels


def _folder(path: Path, labels: Labels, shape: Shape | None) -> tuple[Tensor, Tensor]:
    if not path.is_dir():
        raise GradleakError(f"--data {path}: no such folder")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise GradleakError(f"--data {path}: holds no image files ({', '.join(SUFFIXES)})")
    named = [file.relative_to(path).as_posix() for file in files]
    found = _labels_of(path, named, labels)
    pixels = [_open(file, shape) for file in files]
    shapes = sorted({image.shape for image in pixels})
    if len(shapes) > 1:
        raise GradleakError(
            f"--data {path}: images of {len(shapes)} shapes, e.g. {shapes[0]} and {shapes[-1]}; say --shape C,H,W"
        )
    return torch.from_numpy(np.stack(pixels)).float() / 255, torch.tensor(found)


def _open(file: Path, shape: Shape | None) -> np.ndarray[Any, Any]:
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise GradleakError(f"--data {file}: pixels of mode {image.mode!r}; allowed: 8-bit images")
            channels = shape[0] if shape is not None else 1 if image.mode == "L" else 3
            picture: Image.Image = image.convert("L" if channels == 1 else "RGB")
            if shape is not None:
                picture = ImageOps.fit(picture, (shape[2], shape[1]), Image.Resampling.BICUBIC)
            values = np.asarray(picture, dtype=np.uint8)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise GradleakError(f"--data {file}: cannot be read as an image ({error})") from error
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _labels_of(path: Path, files: Sequence[str], labels: Labels) -> list[int]:
    """Numbers of the files' labels; names are numbered in their order."""
    if isinstance(labels, str | Path):
        labels = _csv(Path(labels))
    if labels is None:
        folders = [Path(file).parent.as_posix() for file in files]
        if "." in folders or len(set(folders)) < 2:
            raise GradleakError(
                f"--data {path}: no class folders; give --labels (a CSV of file and label, or module:function)"
            )
        given: list[int | str] = list(folders)
    elif isinstance(labels, Mapping):
        missing = [file for file in files if file not in labels and Path(file).name not in labels]
        if missing:
            raise GradleakError(
                f"--labels: no label for {missing[0]!r} ({len(missing)} of {len(files)} files have none)"
            )
        given = [labels[file] if file in labels else labels[Path(file).name] for file in files]
    else:
        given = [labels(file) for file in files]
    if all(str(label).strip().lstrip("-").isdigit() for label in given):
        return [int(label) for label in given]
    names = sorted({str(label) for label in given})
    return [names.index(str(label)) for label in given]


def _csv(path: Path) -> dict[str, str]:
    """Read a CSV of file and label, with or without a line of headings."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise GradleakError(f"--labels {path}: cannot be read ({error})") from error
    wrong = next((number for number, line in enumerate(lines, 1) if len(line) < 2), None)
    if wrong is not None or not lines:
        raise GradleakError(f"--labels {path}: line {wrong or 1}: a file and its label are needed, such as cat.png,3")
    # A line of headings names no image, and so is never looked up.
    return {Path(line[0].strip()).as_posix(): line[1].strip() for line in lines}
