"""Paths: which of them a suite may name, and how those of this machine stay out of what is stored."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, TypeVar

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

_Given = TypeVar("_Given", str, Path)


def _relative(path: _Given) -> _Given:
    text: str = str(path)
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text.startswith("~"):
        raise PydanticCustomError("relative_path", "absolute paths name a machine; give it relative to --data-root")
    if ".." in (*PurePosixPath(text).parts, *PureWindowsPath(text).parts):
        raise PydanticCustomError("relative_path", "a path must stay below --data-root, without ..")
    return path


RelativePath = Annotated[str, AfterValidator(_relative)]
"""An option that is a path below the data root: keys, labels and bundles carry it, so no machine may be in it."""
RelativeFile = Annotated[Path, AfterValidator(_relative)]
"""The same, as a `Path`."""


def conceal(text: str, places: Mapping[str, Path | None]) -> str:
    """Return text with the paths of some places, and of this machine's usual ones, replaced by names.

    Args:
        text: an error, say, that is going to be stored.
        places: folders by the names that stand for them, e.g. `{"<data root>": Path("/data")}`.

    >>> conceal("/data/cats/1.png is no image", {"<data root>": Path("/data")})
    '<data root>/cats/1.png is no image'
    """
    usual = {"<temporary>": Path(tempfile.gettempdir()), "<here>": Path.cwd(), "~": Path.home()}
    known: dict[str, str] = {}
    for name, place in {**usual, **places}.items():
        for path in () if place is None else (place, place.resolve()):
            if path.is_absolute() and path != Path(path.anchor):
                known[str(path)] = name
    # A folder inside another comes first, or its name would never be used.
    for place_text in sorted(known, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.-]){re.escape(place_text)}(?![\w-])", lambda _, name=known[place_text]: name, text)  # type: ignore[misc]
    return text


_STEERING = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Unicode's categories of control, format, surrogate, private use, line and paragraph separators."""


def _written_out(mark: str) -> str:
    return mark.encode("unicode_escape").decode()


def printable(text: str, keep: str = "", form: Callable[[str], str] = _written_out) -> str:
    """Return text that a terminal shows as it is: what would steer it, or hide or turn other text, is written out.

    Such are control characters (ESC, BEL), marks that change the direction of writing, and line separators.

    Args:
        text: which may be a stranger's.
        keep: characters that stay.
        form: what is written for another.

    >>> printable("red: " + chr(27) + "[31m", form=lambda mark: "?")
    'red: ?[31m'
    """
    if text.isascii() and text.isprintable():
        return text
    steering = {mark for mark in set(text) if unicodedata.category(mark) in _STEERING} - set(keep)
    return text.translate({ord(mark): form(mark) for mark in steering})


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path beside a file; at the end of the block what was written there takes its place, or is deleted.

    So a file is there whole or not at all, whoever dies or however full the disk is.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
