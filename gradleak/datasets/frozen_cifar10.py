"""Victims of CIFAR-10 that are the same for everybody."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from ..dataset import Dataset, Images, Split, victim_order
from ..errors import GradleakError
from ..paths import RelativePath
from ._cifar10_victims import EVALUATION, TUNING
from ._images import from_bytes
from ._torchvision import fetch
from ._tree import read_tree
from .victims import _arrays, _without_copies

log = logging.getLogger(__name__)

Found = tuple[NDArray[np.uint8], NDArray[np.integer]]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, kw_only=True)
class FrozenCifar10(Dataset):
    """64 images of CIFAR-10, [3, 32, 32], known by the SHA-256 of their pixels: 32 victims, and 32 for tuning.

    They are looked for in torchvision's CIFAR-10 and in the .npz files (`images` uint8 [K, 32, 32, 3], `labels`) of
    the data root. Public are CIFAR-10's own train images or, where only JPEG copies are at hand, the train split of a
    folder of these, without the copies of victims; keys of cells differ, so that both are never mixed.
    """

    reference: ClassVar[str] = "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images"

    copies: RelativePath | None = None
    """A tree of class folders with JPEG copies, relative to the data root, whose train split is public where CIFAR-10
    itself is not there."""
    limit: Annotated[int, Ge(1)] = 10_000
    """Public images kept: the first train images that are no victims, or the first of a seeded draw of the tree."""

    def read(self, root: Path | None, download: bool) -> Split:
        """Read what is there.

        Raises:
            GradleakError: a victim is missing, or there are no public images.
        """
        home = Path("data") if root is None else root
        whole = _whole(home, download)
        private = _chosen(home, [*whole, *_files(home)], self.version)
        if whole:
            return Split(_without(whole[0], self.limit), private, CLASSES)
        if self.copies is None:
            raise GradleakError(
                f"frozen-cifar10: no CIFAR-10 in {home} to take public images from; name its folder with "
                "--data-root, allow --download, or name a folder of JPEG copies with the option copies"
            )
        log.warning(
            "frozen-cifar10: public images are JPEG copies (%s), not CIFAR-10's own; victims are exact", self.copies
        )
        tree = read_tree(home / self.copies, 32, 3, self.limit + len(private))
        if tree.classes != CLASSES:
            raise GradleakError(f"folder {home / self.copies}: classes {', '.join(tree.classes)} are not CIFAR-10's")
        public = _without_copies(tree.train, private, home / self.copies)
        return Split(public[: self.limit], private, CLASSES)


def _whole(home: Path, download: bool) -> list[Found]:
    """Return torchvision's two splits, none where they are not there and may not be downloaded."""
    try:
        parts = [fetch("CIFAR10", home, download, train=train) for train in (True, False)]
    except GradleakError:
        if download:
            raise
        return []
    return [(part.data, np.asarray(part.targets)) for part in parts]


def _files(home: Path) -> Iterator[Found]:
    """Yield what .npz files of the data root and its folders hold, of those that look like it."""
    for file in sorted([*home.glob("*.npz"), *home.glob("*/*.npz")]):
        try:
            images, labels = _arrays(file)
        except GradleakError as error:
            log.debug("%s", error)
            continue
        if images.shape[1:] == (32, 32, 3):
            yield images, labels


def _digest(image: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def _chosen(home: Path, sources: list[Found], version: str) -> Images:
    """Return the 64 images, in places from which the frozen order draws victims and tuning victims as listed."""
    wanted = dict([*EVALUATION, *TUNING])
    pixels: dict[str, NDArray[np.uint8]] = {}
    for images, _ in sources:
        for image in images:
            if (digest := _digest(image)) in wanted:
                pixels[digest] = image
        if len(pixels) == len(wanted):
            break
    if len(pixels) < len(wanted):
        raise GradleakError(
            f"frozen-cifar10: {len(pixels)} of {len(wanted)} victims found in {home}; they are images of CIFAR-10 as "
            "it was published (JPEG copies are others): name its folder with --data-root, or allow --download"
        )
    listed = [digest for digest, _ in (*EVALUATION, *reversed(TUNING))]
    placed = sorted(zip(victim_order("frozen-cifar10", version, len(listed)).tolist(), listed, strict=True))
    return from_bytes(np.stack([pixels[digest] for _, digest in placed]), [wanted[digest] for _, digest in placed])


def _without(train: Found, limit: int) -> Images:
    wanted = {digest for digest, _ in (*EVALUATION, *TUNING)}
    kept = [place for place, image in enumerate(train[0][: limit + len(wanted)]) if _digest(image) not in wanted]
    return from_bytes(train[0][kept[:limit]], train[1][kept[:limit]])
