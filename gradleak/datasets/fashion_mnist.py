"""Fashion-MNIST."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..dataset import Dataset, Split
from ._images import from_bytes
from ._torchvision import fetch


@dataclass(frozen=True, kw_only=True)
class FashionMnist(Dataset):
    """Pictures of clothes, [1, 28, 28], 10 classes, 60,000 public and 10,000 private."""

    reference: ClassVar[str] = "Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747"

    def read(self, root: Path | None, download: bool) -> Split:
        """Read through torchvision from the data root (`data/` if none is given).

        Raises:
            GradleakError: it is not there and may not be downloaded, or the download failed.
        """
        parts = [fetch("FashionMNIST", root, download, train=train) for train in (True, False)]
        train, test = (from_bytes(part.data.numpy(), part.targets.numpy()) for part in parts)
        return Split(train, test, tuple(parts[0].classes))
