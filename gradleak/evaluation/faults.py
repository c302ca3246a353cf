"""Faults of the machine, which are no results: a cell that meets one is computed another time."""

from __future__ import annotations

import errno

from ..errors import GradleakError

_NUMBERS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EFBIG,
        errno.ESTALE,
    }
)
_SAID = (
    "no space left on device",
    "disk quota exceeded",
    "read-only file system",
    "input/output error",
    "too many open files",
    "file too large",
    "database or disk is full",
)
"""What libraries say that hide the number of an error of the system."""


class MachineFault(GradleakError):
    """The machine could not do what a cell asked of it: its disk is full, say. Nothing is known of the cell."""


def machine_fault(error: BaseException) -> str | None:
    """Return what the machine lacked, in one line, if an error or one that led to it is the machine's."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        number = found.errno if isinstance(found, OSError) else None
        if number in _NUMBERS or any(words in str(found).lower() for words in _SAID):
            return f"{type(found).__name__}: {' '.join(str(found).split())[:200]}"
        found = found.__cause__ or found.__context__
    return None
