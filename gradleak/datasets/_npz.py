"""Images of an .npz file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import GradleakError


def arrays(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    """Return `images` uint8 [K, H, H, 1 or 3] or [K, H, H], and integer `labels` [K].

    Raises:
        GradleakError: the file is missing, or holds something else.
    """
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
