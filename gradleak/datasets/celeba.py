"""CelebA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Ge

from .. import seeds
from ..dataset import Dataset, Images, Split
from ..errors import unknown
from ._images import from_bytes, square
from ._torchvision import fetch


@dataclass(frozen=True, kw_only=True)
class Celeba(Dataset):
    """Faces of celebrities (centre square), [3, size, size]; the class is one of 40 binary attributes."""

    reference: ClassVar[str] = "Liu, Luo, Wang & Tang 2015, arXiv:1411.7766"

    size: Annotated[int, Ge(1)] = 64
    attribute: str = "Male"
    limit: Annotated[int, Ge(1)] | None = 10000
    """Images kept of each split: the first of a seeded draw (all of them need 8 GiB of memory at size 64)."""

    def read(self, root: Path | None, download: bool) -> Split:
        """Read through torchvision from the data root (`data/` if none is given).

        Raises:
            GradleakError: it is not there and may not be downloaded, or no attribute has that name.
        """
        train, test = (
            self._part(fetch("CelebA", root, download, split=split, target_type="attr")) for split in ("train", "test")
        )
        return Split(train, test, (f"not {self.attribute}", self.attribute))

    def _part(self, source: Any) -> Images:
        names = [name for name in source.attr_names if name]  # torchvision's list ends with an empty name
        if self.attribute not in names:
            raise unknown("attribute of dataset 'celeba'", self.attribute, names)
        chosen = torch.randperm(len(source), generator=seeds.generator("limit", "celeba"))[: self.limit]
        pixels = np.stack([square(source[index][0], self.size, 3) for index in chosen.tolist()])
        return from_bytes(pixels, source.attr[chosen, names.index(self.attribute)].numpy())
