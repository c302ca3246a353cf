"""Any tree of image files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from ..dataset import Dataset, Split
from ..paths import RelativePath
from ._tree import read_tree


@dataclass(frozen=True, kw_only=True)
class Folder(Dataset):
    """Images of class folders, [channels, size, size]: shorter side resized (bicubic), then the centre.

    `path` (relative to the data root) holds CLASS/IMAGE files, or `train/` and `test/` (or `val/`) that do. A
    tree without splits is divided by a seeded draw, a third of each class private.
    """

    reference: ClassVar[str] = "the user's own images"

    path: RelativePath
    size: Annotated[int, Ge(1)] = 32
    channels: Literal[1, 3] = 3
    limit: Annotated[int, Ge(1)] | None = None
    """Images kept of each split: the first of a seeded draw."""

    def read(self, root: Path | None, download: bool) -> Split:
        """Read the tree; there is nothing to download.

        Raises:
            GradleakError: the folder is missing, holds no images, or a file is no 8-bit image.
        """
        return read_tree((root or Path()) / self.path, self.size, self.channels, self.limit)
