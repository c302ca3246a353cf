"""The Dataset contract: images in [0, 1], fixed victims, and the attacker's disjoint data."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from . import seeds
from .errors import GradleakError
from .options import Options


@dataclass(frozen=True)
class Images:
    """Labelled images: `images` [K, C, H, W] float32 in [0, 1], `labels` [K] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice | list[int]) -> Images:
        return Images(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Split:
    """A dataset's two disjoint halves.

    `train` is public: models are trained on it, and it is the auxiliary data an attacker may be granted.
    `test` is private: every victim, tuning victim and re-identification candidate comes from it.
    """

    train: Images
    test: Images
    classes: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every image and label, hexadecimal."""
        hasher = hashlib.sha256()
        for tensor in (self.train.images, self.train.labels, self.test.images, self.test.labels):
            hasher.update(str(tuple(tensor.shape)).encode())
            hasher.update(tensor.contiguous().numpy().data)
        return hasher.hexdigest()

    @cached_property
    def public(self) -> frozenset[bytes]:
        """SHA-256 of every train image."""
        return frozenset(map(_hash, self.train.images))

    def copies(self, indices: Tensor) -> Tensor:
        """Return those of these test images [K] that are in the train split too, byte for byte."""
        shared = [_hash(self.test.images[index]) in self.public for index in indices.tolist()]
        return indices[torch.tensor(shared, dtype=torch.bool)]


def _hash(image: Tensor) -> bytes:
    return hashlib.sha256(image.contiguous().numpy().data).digest()


@dataclass(frozen=True, kw_only=True)
class Dataset(Options, ABC):
    """A source of labelled images of one shape; a plugin implements `read`. Its options are hashable."""

    reference: ClassVar[str]
    """Where the images come from."""
    version: ClassVar[str] = "1"
    """Raised whenever images, splits or victims change; part of every cell's key."""

    @abstractmethod
    def read(self, root: Path | None, download: bool) -> Split:
        """Return both splits, images of one shape [C, H, W] in [0, 1], always in the same order.

        Args:
            root: the user's data root (`--data-root`), or None.
            download: whether the user allowed a download.

        Raises:
            GradleakError: the data is not there; the line says what is missing and how to get it.
        """


@lru_cache(maxsize=4)
def _read(dataset: Dataset, name: str, root: Path | None, download: bool) -> Split:
    """Read once a process: the cells of a suite share their datasets, and nobody writes to them."""
    split = dataset.read(root, download)
    wrong = next(_wrong(split), None)
    if wrong is not None:
        raise GradleakError(f"dataset {name!r}: {wrong}")
    return split


def _wrong(split: Split) -> Iterator[str]:
    """Say what keeps a split from being one, first things first."""
    if not isinstance(split, Split):
        yield f"read returned {type(split).__name__} (allowed: Split)"
        return
    for half, part in (("train", split.train), ("test", split.test)):
        yield from _wrong_tensors(half, part)
    shapes = [tuple(part.images.shape[1:]) for part in (split.train, split.test)]
    if shapes[0] != shapes[1]:
        yield f"train images are {shapes[0]}, test images {shapes[1]} (allowed: one shape)"
    classes = len(split.classes)
    if classes < 2:
        yield f"{classes} class, of which every gradient is zero (allowed: two classes or more)"
    for half, part in (("train", split.train), ("test", split.test)):
        low, high = int(part.labels.min()), int(part.labels.max())
        if low < 0 or high >= classes:
            yield f"{half} labels lie in {low} to {high} (allowed: 0 to {classes - 1}, as there are {classes} classes)"


def _wrong_tensors(half: str, part: Images) -> Iterator[str]:
    """Say what keeps one half from being images [K, C, H, W] float32 in [0, 1] with labels [K] int64."""
    if not all(isinstance(tensor, Tensor) for tensor in (part.images, part.labels)):
        kinds = [type(tensor).__name__ for tensor in (part.images, part.labels)]
        yield f"{half} images and labels are {' and '.join(kinds)} (allowed: tensors)"
        return
    images, labels = part.images, part.labels
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        yield (
            f"{half} images {list(images.shape)} and labels {list(labels.shape)} "
            "(allowed: [K, channels, height, width] and [K])"
        )
        return
    if not images.numel():
        yield f"no {half} images (allowed: one or more)"
    if images.dtype is not torch.float32:
        divided = "" if images.is_floating_point() else ", divided by the largest value"
        yield f"{half} images are {_name(images.dtype)} (allowed: float32 in [0, 1]{divided})"
    if labels.dtype is not torch.int64:
        yield f"{half} labels are {_name(labels.dtype)} (allowed: int64)"
    if any(tensor.device.type != "cpu" or tensor.requires_grad for tensor in (images, labels)):
        yield f"{half} images lie on {images.device} or want a gradient (allowed: detached, on the CPU)"
    odd = int((~images.isfinite()).flatten(1).any(1).sum())
    if odd:
        yield f"{odd} of {len(images)} {half} images hold NaN or infinity (allowed: finite numbers in [0, 1])"
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        yield f"{half} images lie in [{low:.4g}, {high:.4g}] (allowed: [0, 1]; models normalise by themselves)"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def victim_order(name: str, version: str, images: int) -> Tensor:
    """The order [K] in which so many test images are victims, from the front, and tuning victims, from the back."""
    return torch.randperm(images, generator=seeds.generator("victims", name, version))


class Data:
    """A dataset that has been read: its splits, its frozen victims, and its hash."""

    def __init__(self, dataset: Dataset, name: str, root: Path | None = None, download: bool = False):
        """Read the dataset (`name` is its registry name).

        Raises:
            GradleakError: as `Dataset.read`, or what was read is no `Split` of finite float32 images in [0, 1] of one
                shape with int64 labels from 0 of two or more classes.
        """
        self.name = name
        self.version = dataset.version
        self.split = _read(dataset, name, root, download)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Image shape (C, H, W)."""
        channels, height, width = self.split.train.images.shape[1:]
        return int(channels), int(height), int(width)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.split.classes)

    @cached_property
    def mean(self) -> Tensor:
        """Mean public image, [C, H, W] in [0, 1]."""
        return self.split.train.images.mean(0)

    @property
    def digest(self) -> str:
        """SHA-256 of every image and label: a changed copy of a dataset is never mistaken for another."""
        return self.split.digest

    def victim_indices(self, count: int, batch_size: int, tuning: bool = False) -> Tensor:
        """Frozen test-split indices of the first `count` victims of `batch_size` images, [count, batch_size].

        The test split is shuffled once by a seed that depends on name and version alone; victims are drawn
        from its front, tuning victims from its back, so the two never meet. Labels may repeat in a batch.

        Raises:
            GradleakError: more images are asked for than half of the test split holds.
        """
        total, half = count * batch_size, len(self.split.test) // 2
        if total > half:
            raise GradleakError(
                f"dataset {self.name!r}: {count} victims of {batch_size} images need {total} images; "
                f"it has {half} for {'tuning' if tuning else 'evaluation'}"
            )
        order = self._order().flip(0) if tuning else self._order()
        return order[:total].reshape(count, batch_size)

    def victims(self, count: int, batch_size: int, tuning: bool = False) -> tuple[Tensor, Tensor]:
        """Images [count, batch_size, C, H, W] and labels [count, batch_size] of the frozen victims."""
        indices = self.victim_indices(count, batch_size, tuning)
        return self.split.test.images[indices], self.split.test.labels[indices]

    def cohorts(self, count: int, batch_size: int, clients: int, tuning: bool = False) -> tuple[Tensor, Tensor]:
        """Images and labels of each victim and the `clients` - 1 others in its sum, [count * clients, batch_size, ...].

        The victim comes first; others come from the back of the victims' half, so that no image is met twice and
        a victim's others do not depend on how many victims there are.

        Raises:
            GradleakError: more images are asked for than half of the test split holds.
        """
        victims = self.victim_indices(count, batch_size, tuning)
        self.victim_indices(count * clients, batch_size, tuning)
        half = self.victim_indices(len(self.split.test) // 2 // batch_size, batch_size, tuning)
        others = half.flip(0)[: count * (clients - 1)].reshape(count, clients - 1, batch_size)
        indices = torch.cat([victims[:, None], others], dim=1).flatten(0, 1)
        return self.split.test.images[indices], self.split.test.labels[indices]

    def candidates(self, count: int, tuning: bool = False) -> Tensor:
        """Rivals of the true image for re-identification among `count`, [count - 1, C, H, W].

        They come from the half of the test split that holds the other victims (of tuning for evaluation, of
        evaluation for tuning), then from the train split: never a victim.

        Raises:
            GradleakError: the dataset is too small.
        """
        order = self._order().flip(0) if tuning else self._order()
        half = len(self.split.test) // 2
        pool = torch.cat([self.split.test.images[order[-half:]], self.split.train.images])
        if count - 1 > len(pool):
            raise GradleakError(
                f"dataset {self.name!r}: {count} candidates asked for; it has {len(pool) + 1} (see `candidates`)"
            )
        return pool[: count - 1]

    def _order(self) -> Tensor:
        """The test split's frozen shuffle, which name and version alone decide."""
        return victim_order(self.name, self.version, len(self.split.test))
