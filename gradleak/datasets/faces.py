"""Face crops that ship inside scikit-image."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from ..dataset import Dataset, Images, Split
from ._images import divide


@dataclass(frozen=True, kw_only=True)
class Faces(Dataset):
    """100 faces and 100 background crops of Labeled Faces in the Wild, [1, 25, 25]; 40 % are private."""

    reference: ClassVar[str] = "scikit-image lfw_subset; Huang et al. 2007, Labeled Faces in the Wild"

    def read(self, root: Path | None, download: bool) -> Split:
        """Read from the installed package; `root` and `download` are not needed."""
        with resources.files("skimage.data").joinpath("lfw_subset.npy").open("rb") as file:
            images = torch.from_numpy(np.load(file)).float()[:, None]
        labels = torch.arange(len(images)) // 100  # the file holds the faces first
        train, test = divide(labels, 0.4, "faces", self.version)
        everything = Images(images, labels)
        return Split(everything[train], everything[test], ("face", "background"))
