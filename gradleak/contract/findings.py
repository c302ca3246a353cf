"""What a check finds, and the comparisons that checks are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..plugins import at, said

_PLACED = re.compile(r"\.py:\d+\)")
"""What a line contains that says where."""


class Broken(Exception):
    """A promise that a plugin does not keep, in one line."""


class Unchecked(Exception):
    """Why a promise cannot be checked here, in one line."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    """The promise."""
    ok: bool | None
    """None where it could not be checked."""
    detail: str = ""
    warning: bool = False
    """Whether it is likely to be a mistake, and not a promise that is broken."""

    @property
    def state(self) -> str:
        """Return ok, BROKEN, warning, or not checked."""
        return "warning" if self.warning else {True: "ok", False: "BROKEN", None: "not checked"}[self.ok]


def found_by(run: Callable[[], None], promise: str, place: str = "", met: set[str] | None = None) -> Finding:
    """Run one check and say what it found, and where.

    Args:
        run: the check.
        promise: what it checks.
        place: where, if what it finds does not say so itself.
        met: where errors were met before, and are from now on: what one error keeps from being checked is no
            finding of its own.
    """
    met = set() if met is None else met
    try:
        run()
    except Unchecked as reason:
        return Finding(promise, None, str(reason))
    except Broken as error:
        return Finding(promise, False, _placed(" ".join(str(error).split()), place))
    except (Exception, SystemExit) as error:
        text = _placed(said(error), place)
        where = text.rpartition(" (")[2]
        if where in met:
            return Finding(promise, None, f"not reached ({where}")
        met.add(where)
        return Finding(promise, False, text)
    return Finding(promise, True)


def _placed(text: str, place: str) -> str:
    return text if _PLACED.search(text) else f"{text}{at(place)}"


def require(kept: object, otherwise: str) -> None:
    """Raise `Broken` unless a promise was kept."""
    if not kept:
        raise Broken(otherwise)


def close(left: Any, right: Any, otherwise: str, rtol: float | None = None, atol: float | None = None) -> None:
    """Raise `Broken` unless two trees of tensors are equal up to rounding."""
    try:
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol)
    except AssertionError as error:
        raise Broken(f"{otherwise}: {' '.join(str(error).split())}") from error


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two updates are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
