"""Handwritten digits that ship inside scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from sklearn.datasets import load_digits

from ..dataset import Dataset, Images, Split
from ._images import divide


@dataclass(frozen=True, kw_only=True)
class Digits(Dataset):
    """1,797 handwritten digits, [1, 8, 8], 17 grey levels, 10 classes; a third of each class is private."""

    reference: ClassVar[str] = "scikit-learn load_digits; Alpaydin & Kaynak 1998, UCI optical recognition, test part"

    def read(self, root: Path | None, download: bool) -> Split:
        """Read from the installed package; `root` and `download` are not needed."""
        source = load_digits()
        images = torch.from_numpy(source.images).float()[:, None] / 16
        everything = Images(images, torch.from_numpy(source.target).long())
        train, test = divide(everything.labels, 1 / 3, "digits", self.version)
        return Split(everything[train], everything[test], tuple("0123456789"))
