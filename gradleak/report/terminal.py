"""Boards for a terminal: plain columns, the least important left out where the screen is too narrow."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..board.leaderboard import Board
from ..paths import printable
from .columns import Column, Shown, shown

_GAP = 2


def write(boards: Sequence[Board], width: int | None = None, colour: bool = False) -> str:
    """Return boards as aligned text, `width` characters wide, or as wide as it takes.

    Lines that are separably first are bold where `colour` allows escape codes.
    """
    return "\n".join(_board(board, width, colour) for board in boards)


def _board(board: Board, width: int | None, colour: bool) -> str:
    all_columns = shown(board)
    columns, left_out = _fit(all_columns, width)
    # One space of padding and one for the box's invisible edge make the gap.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for each in columns:
        right = each.column.right
        table.add_column(Text(each.column.heading), justify="right" if right else "left", overflow="fold")
    for line in range(len(board.table)):
        bold = line in board.strong
        table.add_row(*(Text(each.cells[line], "bold" if bold and each.column.strong else "") for each in columns))
    notes = list(map(printable, board.notes))
    headings = [each.column.heading for each in all_columns if each.column in left_out]
    if any(each not in all_columns for each in columns):
        notes.append("too narrow for all intervals")
    if headings:
        notes.append(f"too narrow for: {'; '.join(headings)}")
    natural = sum(each.width + _GAP for each in columns)
    console = Console(
        file=io.StringIO(),
        width=width or max(natural, *map(len, notes), len(board.title), 1),
        force_terminal=colour,
        no_color=True,
        highlight=False,
    )
    console.print(Text(printable(board.title), style="bold"))
    console.print()
    if columns:
        console.print(table)
        console.print()
    for note in notes:
        console.print(Text(note, style="dim"))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


_LEAST = 3
"""Columns of this rank or above are left out before intervals are."""


def _fit(columns: list[Shown], width: int | None) -> tuple[list[Shown], list[Column]]:
    """Split columns into those that fit and those left out; equal ranks go from the right.

    The least important columns go first, then the intervals of the others, then the others.
    """

    def is_fitting() -> bool:
        return not width or sum(each.width + _GAP for each in columns) - _GAP <= width

    def leave_out(least: int) -> list[Column]:
        left: list[Column] = []
        while not is_fitting():
            worst = max(columns, key=lambda each: (each.column.rank, columns.index(each)))
            if worst.column.rank < least:
                break
            columns.remove(worst)
            left.append(worst.column)
        return left

    columns = list(columns)
    left_out = leave_out(_LEAST)
    for each in sorted(columns, key=lambda each: -each.column.rank):
        if not is_fitting():
            columns[columns.index(each)] = each.shortened()
    return columns, left_out + leave_out(1)
