"""Boards written for people and machines: terminal table, Markdown, CSV, JSON, LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..board.leaderboard import Board
from ..errors import GradleakError, unknown
from . import csv, json, latex, markdown, terminal
from .columns import keys

FOR_PEOPLE: dict[str, Callable[[Sequence[Board], Sequence[str]], str]] = {
    "table": terminal.write,
    "markdown": markdown.write,
    "latex": latex.write,
}
"""Writers of rounded numbers under headings, by format. Each takes boards and the keys of the columns to show (none:
what fits) and returns text that ends with a newline."""
FOR_MACHINES: dict[str, Callable[[Sequence[Board]], str]] = {"csv": csv.write, "json": json.write}
"""Writers of every column, unrounded."""
FORMATS = ("table", "markdown", "csv", "json", "latex")
"""All of them."""


def render(boards: Sequence[Board], format: str = "table", columns: Sequence[str] = ()) -> str:
    """Return boards as text, with the given columns and no other where there are any (`columns.keys`).

    Raises:
        GradleakError: no such format or column, or a format that has every column.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    check_columns(boards, columns)
    if format in FOR_PEOPLE:
        return FOR_PEOPLE[format](boards, columns)
    if columns:
        raise GradleakError(f"columns: format {format!r} always has every column (allowed: {', '.join(FOR_PEOPLE)})")
    return FOR_MACHINES[format](boards)


def check_columns(boards: Sequence[Board], columns: Sequence[str]) -> None:
    """Check that every column is one of at least one board.

    Raises:
        GradleakError: it is not.
    """
    known = dict.fromkeys(key for board in boards for key in keys(board.name))
    for column in columns:
        if boards and column not in known:
            raise unknown("column", column, known)
