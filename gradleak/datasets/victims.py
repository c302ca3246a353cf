"""A file of chosen victims, for the reproduction of a paper's cases."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray

from ..dataset import Dataset, Images, Split
from ..errors import GradleakError
from ..paths import RelativePath
from ._images import from_bytes
from ._tree import read_tree

_COPY = 10**-2.5  # mean squared error at 25 dB; JPEG copies come closer, other images do not


@dataclass(frozen=True, kw_only=True)
class Victims(Dataset):
    """Images of an .npz file: `images` uint8 [K, H, W, C] or [K, H, W], square, and integer `labels` [K].

    With `train`, every image of the file is private, in file order: half are victims, half tuning victims. The
    tree's copies of them (25 dB or closer) are left out, so that no victim is public. Without it, the file's
    last `public` images are the train split.
    """

    reference: ClassVar[str] = "the user's own file"

    path: RelativePath
    """The .npz file, relative to the data root."""
    train: RelativePath | None = None
    """A tree of class folders, relative too, whose train split is public; its classes number the file's labels."""
    public: Annotated[int, Ge(1)] = 16

    def read(self, root: Path | None, download: bool) -> Split:
        """Read the file; there is nothing to download.

        Raises:
            GradleakError: the file is missing, holds something else or too little, or a label has no class.
        """
        home = root or Path()
        file = home / self.path
        images, labels = _arrays(file)
        private = from_bytes(images, labels)
        if self.train is not None:
            channels, size = private.images.shape[1:3]
            source = read_tree(home / self.train, size, channels)
            public, classes = _without_copies(source.train, private, home / self.train), source.classes
        else:
            private, public = _apart(private, self.public, file)
            classes = tuple(str(label) for label in range(int(labels.max()) + 1))
        if labels.min() < 0 or labels.max() >= len(classes):
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise GradleakError(f"{file}: label {wrong} has no class (allowed: 0 to {len(classes) - 1})")
        return Split(public, private, classes)


def _without_copies(public: Images, private: Images, tree: Path) -> Images:
    distances = torch.cdist(
        public.images.flatten(1), private.images.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    )
    errors = distances.square() / private.images[0].numel()
    own = (errors > _COPY).all(dim=1).nonzero().flatten()
    if not len(own):
        raise GradleakError(f"folder {tree}: every train image copies a victim; give another tree")
    return public[own]


def _apart(images: Images, public: int, file: Path) -> tuple[Images, Images]:
    if public >= len(images):
        raise GradleakError(f"{file}: public = {public} leaves none of {len(images)} images; allowed: fewer")
    return images[: len(images) - public], images[len(images) - public :]


def _arrays(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    if not file.is_file():
        raise GradleakError(f"{file}: no such file")
    try:
        with np.load(file) as archive:
            images, labels = archive["images"], archive["labels"]
    except (KeyError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise GradleakError(f"{file}: not an .npz file with the arrays images and labels") from error
    fits = images.dtype == np.uint8 and images.ndim in (3, 4) and images.shape[3:] in ((), (1,), (3,))
    square = fits and len(images) > 0 and images.shape[1] == images.shape[2]
    if not square or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        found = f"images {images.dtype} {images.shape}, labels {labels.dtype} {labels.shape}"
        allowed = "uint8 [K, H, H, 1 or 3] or [K, H, H], and integers [K]"
        raise GradleakError(f"{file}: found {found}; allowed: {allowed}")
    return images, labels
