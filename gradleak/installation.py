"""What is installed here, told without importing it: the files of gradleak, and which packages there are."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import registry

_MARKS = (".dist-info", ".egg-info", ".egg-link", ".pth")
"""How the entries end that say which packages lie in a folder."""


def own_files() -> list[Path]:
    """Return every file of gradleak and of the folders that hold its built-in plugins, sorted."""
    folders = [Path(__file__).parent, *(Path(place) for name in registry.GROUPS for place in registry.folders(name))]
    found = {path.resolve() for folder in folders for path in folder.rglob("*") if path.suffix != ".pyc"}
    return sorted(path for path in found if path.is_file())


def digest_of_files(files: Iterable[Path]) -> str:
    """Return the hash of the names and contents of files, and of the Python that reads them."""
    digest = hashlib.sha256(sys.version.encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def packages() -> Iterator[str]:
    """Yield a line for the machine, for each place on the path, and for each package there with its installation."""
    yield platform.platform()
    for place in sys.path:
        yield place
        try:
            entries = sorted(os.scandir(place or "."), key=lambda entry: entry.name)
        except OSError:  # An archive, or nothing at all.
            continue
        yield from (f"{each.name} {each.stat().st_mtime_ns}" for each in entries if each.name.endswith(_MARKS))


def moment(paths: Iterable[Path]) -> list[tuple[int, int, int, int, int]]:
    """Return of each file which one it is, its size, and when it and its entry were changed last."""
    found = (path.stat() for path in paths)
    return [(each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found]
