"""How a run ended; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    cells: int
    """Cells of the suite."""
    ran: int
    """Cells computed by this run."""
    stored: int
    """Cells of the suite that are in the store now, failed ones included."""
    failed: dict[str, str]
    """Errors of the suite's failed cells that are in the store, by their titles."""
    seconds: float
    interrupted: int = 0
    """Number of the signal that ended it early (2 for Ctrl-C), 0 for none."""
    pending: dict[str, str] = field(default_factory=dict)
    """Why cells could not be computed by this run, by their titles; nothing is wrong with them."""
