"""What a check finds, and how that is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Say = Callable[[str], None]
"""Told what is looked at now."""

SHOWN = 3
"""Things of a kind that are named before the rest is counted."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    ok: bool | None
    """None where it could not be checked here."""
    detail: str


Tell = Callable[[Finding], None]
"""Told what a check found, as soon as it has."""


@dataclass
class Findings:
    """What checks found, each told as it comes."""

    tell: Tell
    all: list[Finding] = field(default_factory=list)

    def add(self, *found: Finding) -> None:
        """Take in findings."""
        for each in found:
            self.all.append(each)
            self.tell(each)


def listed(found: Sequence[str]) -> str:
    """Name the first things, and say how many there are beyond."""
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


def judged(check: str, wrong: Sequence[str], right: str) -> Finding:
    """Return what was found wrong, or else what is right."""
    return Finding(check, not wrong, listed(wrong) if wrong else right)
