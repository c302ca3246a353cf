"""Boards written for people and machines: terminal table, Markdown, CSV, JSON, LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..board.leaderboard import Board
from ..errors import unknown
from . import csv, json, latex, markdown, terminal

FORMATS: dict[str, Callable[[Sequence[Board]], str]] = {
    "table": terminal.write,
    "markdown": markdown.write,
    "csv": csv.write,
    "json": json.write,
    "latex": latex.write,
}
"""Writers by the name of their format. Each takes boards and returns text that ends with a newline."""


def render(boards: Sequence[Board], format: str = "table") -> str:
    """Return boards as text.

    Raises:
        GradleakError: no such format.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    return FORMATS[format](boards)
