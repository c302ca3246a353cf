"""A file of chosen victims, for the reproduction of a paper's cases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge

from ..dataset import Dataset, Images, Split
from ..errors import GradleakError
from ..paths import RelativePath
from ._images import from_bytes
from ._npz import arrays
from ._tree import read_tree, without_copies


@dataclass(frozen=True, kw_only=True)
class Victims(Dataset):
    """Images of an .npz file: `images` uint8 [K, H, W, C] or [K, H, W], square, and integer `labels` [K].

    With `train`, every image of the file is private, in file order: half are victims, half tuning victims. The
    tree's copies of them (25 dB or closer) are left out, so that no victim is public. Without it, the file's
    last `public` images are the train split.
    """

    reference: ClassVar[str] = "the user's own file"

    path: RelativePath
    """The .npz file, relative to the data root."""
    train: RelativePath | None = None
    """A tree of class folders, relative too, whose train split is public; its classes number the file's labels."""
    public: Annotated[int, Ge(1)] = 16

    def read(self, root: Path | None, download: bool) -> Split:
        """Read the file; there is nothing to download.

        Raises:
            GradleakError: the file is missing, holds something else or too little, or a label has no class.
        """
        home = root or Path()
        file = home / self.path
        images, labels = arrays(file)
        private = from_bytes(images, labels)
        if self.train is not None:
            channels, size = private.images.shape[1:3]
            source = read_tree(home / self.train, size, channels)
            public, classes = without_copies(source.train, private, home / self.train), source.classes
        else:
            private, public = _apart(private, self.public, file)
            classes = tuple(str(label) for label in range(int(labels.max()) + 1))
        if labels.min() < 0 or labels.max() >= len(classes):
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise GradleakError(f"{file}: label {wrong} has no class (allowed: 0 to {len(classes) - 1})")
        return Split(public, private, classes)


def _apart(images: Images, public: int, file: Path) -> tuple[Images, Images]:
    if public >= len(images):
        raise GradleakError(f"{file}: public = {public} leaves none of {len(images)} images; allowed: fewer")
    return images[: len(images) - public], images[len(images) - public :]
