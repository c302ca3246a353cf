"""Boards as one CSV file, every column, unrounded."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ..board.leaderboard import Board
from ..paths import printable

_FORMULA = ("=", "+", "-", "@")
"""What a text begins with that spreadsheets take for a formula."""


def write(boards: Sequence[Board]) -> str:
    """Return boards as CSV, the kind and title of its board on each line; what was not measured is empty.

    Labels may be a stranger's: control characters are written out, and what a spreadsheet would take for a formula
    gets an apostrophe in front.
    """
    tables = [_named(board) for board in boards]
    columns = list(dict.fromkeys(name for table in tables for name in table.columns))
    # Columns that a board lacks are added before joining, as text cells of nothing.
    wide = [table.reindex(columns=columns).astype(object) for table in tables]
    return pd.concat(wide, ignore_index=True).to_csv(index=False, lineterminator="\n") if wide else ""


def _named(board: Board) -> pd.DataFrame:
    table = board.table.copy()
    table.insert(0, "board", board.name)
    table.insert(1, "title", board.title)
    return table.map(_plain)


def _plain(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if value.lstrip()[:1] in _FORMULA or value[:1] in ("\t", "\r") else text
