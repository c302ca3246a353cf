"""Patches of the colour photographs that ship inside scikit-image and scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .. import seeds
from ..dataset import Dataset, Images, Split
from ._images import divide

_SIDE = 32
_MOST = 160  # patches of one photograph, so that no class dominates
_FLAT = 0.05  # standard deviation of a patch that shows nothing: bare sky, paper, black border

# class: package, file, integer factor by which the photograph is averaged down
_PHOTOGRAPHS = {
    "astronaut": ("skimage.data", "astronaut.png", 1),
    "cat": ("skimage.data", "chelsea.png", 1),
    "coffee": ("skimage.data", "coffee.png", 1),
    "galaxies": ("skimage.data", "hubble_deep_field.jpg", 2),
    "tissue": ("skimage.data", "ihc.png", 1),
    "motorcycle": ("skimage.data", "motorcycle_left.png", 1),
    "retina": ("skimage.data", "retina.jpg", 2),
    "rocket": ("skimage.data", "rocket.jpg", 1),
    "pagoda": ("sklearn.datasets.images", "china.jpg", 1),
    "flower": ("sklearn.datasets.images", "flower.jpg", 1),
}


@dataclass(frozen=True, kw_only=True)
class Photos(Dataset):
    """Colour patches, [3, 32, 32]; the class is one of 10 photographs, a third of each is private.

    Patches are the cells of one grid, so no two share a pixel. Flat cells (mean over channels of the standard
    deviation below 0.05) are left out, and at most 160 cells of a photograph are kept, by a seeded draw.
    """

    reference: ClassVar[str] = "photographs of scikit-image (data) and scikit-learn (load_sample_images)"

    def read(self, root: Path | None, download: bool) -> Split:
        """Read from the installed packages; `root` and `download` are not needed."""
        patches, labels = [], []
        for label, (name, source) in enumerate(_PHOTOGRAPHS.items()):
            cells = _cells(*source)
            cells = cells[cells.std(axis=(1, 2)).mean(axis=1) >= _FLAT]
            order = torch.randperm(len(cells), generator=seeds.generator("photos", self.version, name))
            kept = cells[order[:_MOST].sort().values.numpy()]
            patches.append(torch.from_numpy(kept).float().permute(0, 3, 1, 2))
            labels.append(torch.full((len(kept),), label))
        everything = Images(torch.cat(patches).contiguous(), torch.cat(labels))
        train, test = divide(everything.labels, 1 / 3, "photos", self.version)
        return Split(everything[train], everything[test], tuple(_PHOTOGRAPHS))


def _cells(package: str, file: str, factor: int) -> NDArray[np.float64]:
    """Every cell of a photograph's centred grid, [K, 32, 32, 3] in [0, 1]."""
    with resources.files(package).joinpath(file).open("rb") as stream, Image.open(stream) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.int64)
    pixels = _tiles(_centre(pixels, factor), factor).sum(axis=(2, 3))  # integers: exact on every machine
    cells = _tiles(_centre(pixels, _SIDE), _SIDE).reshape(-1, _SIDE, _SIDE, 3)
    return cells / (255.0 * factor**2)


def _centre(pixels: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """Cut the borders so that both sides are multiples."""
    top, left = (side % multiple // 2 for side in pixels.shape[:2])
    height, width = (side // multiple * multiple for side in pixels.shape[:2])
    return pixels[top : top + height, left : left + width]


def _tiles(pixels: NDArray[np.int64], side: int) -> NDArray[np.int64]:
    """[H, W, C] as tiles [H / side, W / side, side, side, C]."""
    height, width, channels = pixels.shape
    return pixels.reshape(height // side, side, width // side, side, channels).swapaxes(1, 2)
