"""What a suite's grid leaves out, and why: an attack that does not apply, or a suite's own choice.

A board counts against a defense every attack that others faced and it did not, unless a reason is stored here.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import pandas as pd

from ..suite import LeftOut
from . import trust
from .schema import LEFT_OUT, LEFT_OUT_COLUMNS

Query = Callable[..., list[tuple[Any, ...]]]
_PLACE = LEFT_OUT_COLUMNS[:5]


class Noting(Protocol):
    """A store that notes are kept in (`gradleak.board.store.Store`, which imports this module)."""

    def query(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Read."""

    def cells(self) -> pd.DataFrame:
        """Return its cells."""

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """Write."""


def note(store: Noting, found: Iterable[LeftOut], ran: Iterable[Sequence[str]]) -> None:
    """Keep what a plan leaves out; what was noted before of the plan's combinations is forgotten.

    Args:
        store: made by any version.
        found: what is left out.
        ran: attack, defense, model, dataset and setting of what is not, by their labels.
    """
    wanted = {tuple(getattr(each, name) for name in LEFT_OUT_COLUMNS) for each in found}
    decided = {line[:5] for line in wanted} | {tuple(place) for place in ran}
    known = {line for line in all_lines(store.query) if line[:5] in decided}
    if known == wanted:
        return
    with store.transaction() as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'left_out'").fetchone():
            database.execute(LEFT_OUT)
        names = " AND ".join(f"{name} = ?" for name in LEFT_OUT_COLUMNS[:6])
        database.executemany(f"DELETE FROM left_out WHERE {names}", [line[:6] for line in known])
        marks = ", ".join("?" * len(LEFT_OUT_COLUMNS))
        database.executemany(f"INSERT OR REPLACE INTO left_out VALUES ({marks})", sorted(wanted))


def unsuited(query: Query, where: str) -> pd.DataFrame:
    """Return where attacks do not apply: attack, defense, model, dataset, setting, knowledge (empty: any), reason.

    What a suite leaves out by its own choice is not among them.

    Raises:
        GradleakError: a line is not as it has to be (`trust`).
    """
    lines = all_lines(query)
    trust.check_left_out(lines, where)
    return pd.DataFrame([line[:7] for line in lines if not line[7]], columns=list(LEFT_OUT_COLUMNS[:7]), dtype=str)


def lines_of(query: Query, where: str) -> int:
    """Return how many combinations are noted, after a look at each of them.

    Raises:
        GradleakError: as `unsuited`.
    """
    lines = all_lines(query)
    trust.check_left_out(lines, where)
    return len(lines)


def forget(store: Noting) -> None:
    """Drop the notes on defenses of which a store has no cell left in their context."""
    kept = store.cells()[list(_PLACE[1:])].drop_duplicates().itertuples(index=False, name=None)
    there = set(kept)
    gone = [line[:6] for line in all_lines(store.query) if line[1:5] not in there]
    if gone:
        names = " AND ".join(f"{name} = ?" for name in LEFT_OUT_COLUMNS[:6])
        with store.transaction() as database:
            database.executemany(f"DELETE FROM left_out WHERE {names}", gone)


def all_lines(query: Query) -> list[tuple[Any, ...]]:
    """Return all notes, in order, with the columns of `LEFT_OUT_COLUMNS`; a store of an older version has none."""
    if not query("SELECT 1 FROM sqlite_master WHERE name = 'left_out'"):
        return []
    return query(f"SELECT * FROM left_out ORDER BY {', '.join(LEFT_OUT_COLUMNS[:6])}")
