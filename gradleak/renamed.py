"""Options that were renamed: taken under the old name until a release, with one line that names the new one.

A plugin says so in its class, `renamed = {"amount": Renamed("ratio", until="0.3")}`; keys of suites and options of the
command line are declared likewise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from . import __version__
from .errors import GradleakError

_T = TypeVar("_T")
log = logging.getLogger(__name__)
_told: set[str] = set()
"""What this process was told already."""


@dataclass(frozen=True)
class Renamed:
    """What an old name is called now."""

    new: str
    until: str
    """The first release that refuses the old name, as 0.3."""

    @property
    def ended(self) -> bool:
        """Whether that release is here.

        >>> Renamed("ratio", until="0.0.1").ended, Renamed("ratio", until="1000.0").ended
        (True, False)
        """
        return _numbers(__version__) >= _numbers(self.until)


def current(given: Mapping[str, _T], renamed: Mapping[str, Renamed], where: str) -> dict[str, _T]:
    """Return options under their names of today; `where` opens the line of a warning or an error.

    Raises:
        GradleakError: an old name is no longer taken, or stands beside the new one.

    >>> current({"amount": 0.1, "clip": 1.0}, {"amount": Renamed("ratio", until="1000.0")}, "defense 'mine'")
    {'ratio': 0.1, 'clip': 1.0}
    """
    found: dict[str, _T] = {}
    for name, value in given.items():
        new = name if name not in renamed else _new_name(name, renamed[name], where)
        if new in found or (new != name and new in given):
            raise GradleakError(f"{where}: {name!r} and {new!r} are the same option; write {new!r} only")
        found[new] = value
    return found


def arguments(given: Sequence[str], renamed: Mapping[str, Mapping[str, Renamed]]) -> list[str]:
    """Return a command line whose options have their names of today; the first word is the command.

    Raises:
        GradleakError: an old name is no longer taken.
    """
    options = renamed.get(given[0], {}) if given else {}
    found = []
    for word in given:
        flag, equals, value = word.partition("=")
        flag = _new_name(flag, options[flag], f"gradleak {given[0]}") if flag in options else flag
        found.append(f"{flag}{equals}{value}")
    return found


def _new_name(old: str, to: Renamed, where: str) -> str:
    if to.ended:
        raise GradleakError(f"{where}: {old!r} is now called {to.new!r}")
    line = f"{where}: {old!r} is now called {to.new!r}; the old name ends with release {to.until}"
    if line not in _told:
        _told.add(line)
        log.warning(line)
    return to.new


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
