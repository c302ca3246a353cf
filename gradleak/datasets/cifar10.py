"""CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..dataset import Dataset, Split
from ._images import from_bytes
from ._torchvision import fetch


@dataclass(frozen=True, kw_only=True)
class Cifar10(Dataset):
    """Small colour photographs, [3, 32, 32], 10 classes, 50,000 public and 10,000 private."""

    reference: ClassVar[str] = "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images"

    def read(self, root: Path | None, download: bool) -> Split:
        """Read through torchvision from the data root (`data/` if none is given).

        Raises:
            GradleakError: it is not there and may not be downloaded, or the download failed.
        """
        parts = [fetch("CIFAR10", root, download, train=train) for train in (True, False)]
        train, test = (from_bytes(part.data, part.targets) for part in parts)
        return Split(train, test, tuple(parts[0].classes))
