"""SVHN."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..dataset import Dataset, Split
from ._images import from_bytes
from ._torchvision import fetch


@dataclass(frozen=True, kw_only=True)
class Svhn(Dataset):
    """Street View house numbers, [3, 32, 32], 10 classes, 73,257 public and 26,032 private."""

    reference: ClassVar[str] = "Netzer et al. 2011, Reading Digits in Natural Images with Unsupervised Feature Learning"

    def read(self, root: Path | None, download: bool) -> Split:
        """Read through torchvision from the data root (`data/` if none is given).

        Raises:
            GradleakError: it is not there and may not be downloaded, or the download failed.
        """
        parts = [fetch("SVHN", root, download, split=split) for split in ("train", "test")]
        train, test = (from_bytes(part.data.transpose(0, 2, 3, 1), part.labels) for part in parts)
        return Split(train, test, tuple("0123456789"))
