"""How the attack on one victim ended. Imports no torch: boards read it too."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """What an attack may answer of a victim; all but `ok` are scored at the floor."""

    OK = "ok"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "oom"
    TIMEOUT = "timeout"
    INVALID = "invalid"
    """The answer was none: not finite, out of range, of another shape or type, or of classes that do not exist."""
    ERROR = "error"
