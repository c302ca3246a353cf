"""The door to torchvision's datasets: where they lie, and what to say when they are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchvision import datasets

from ..errors import GradleakError


def fetch(name: str, root: Path | None, download: bool, **options: Any) -> Any:
    """Return torchvision's dataset `name` found in `root` (`data/` where None), downloaded only if allowed.

    Raises:
        GradleakError: it is not in that folder and a download is not allowed, or the download failed.
    """
    folder = Path("data") if root is None else root
    try:
        return getattr(datasets, name)(str(folder), download=download, **options)
    except (RuntimeError, OSError) as error:
        if download:
            raise GradleakError(f"{name}: the download to {folder} failed: {error}") from error
        raise GradleakError(
            f"{name}: not found in {folder}; name its folder with --data-root, or allow --download"
        ) from error
