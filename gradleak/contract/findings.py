"""What a check finds, and the comparisons that checks are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import GradleakError


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


def found_by(run: Callable[[], None], promise: str) -> Finding:
    """Run one check and say what it found."""
    promise = promise[:1].lower() + promise[1:]
    try:
        run()
    except Unchecked as reason:
        return Finding(promise, None, str(reason))
    except (Broken, GradleakError) as error:
        return Finding(promise, False, str(error))
    except Exception as error:
        return Finding(promise, False, " ".join(f"{type(error).__name__}: {error}".split()))
    return Finding(promise, True)


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
