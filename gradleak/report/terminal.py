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
from .columns import GAP, Shown, fit, shown


def write(boards: Sequence[Board], chosen: Sequence[str] = (), width: int | None = None, colour: bool = False) -> str:
    """Return boards as aligned text, `width` characters wide, or as wide as it takes.

    Lines that are separably first are bold where `colour` allows escape codes. With `chosen`, keys of columns, these
    are shown and no other.
    """
    return "\n".join(_board(board, chosen, width, colour) for board in boards)


def _board(board: Board, chosen: Sequence[str], width: int | None, colour: bool) -> str:
    all_columns = shown(board, chosen)
    columns, left_out = fit(all_columns, width)
    # One space of padding and one for the box's invisible edge make the gap.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for each in columns:
        right = each.column.right
        heading = Text(each.heading, justify="right" if right else "left")
        table.add_column(heading, justify="right" if right else "left", overflow="fold", width=_narrow(each, width))
    for line in range(len(board.table)):
        bold = line in board.strong
        table.add_row(*(Text(each.cells[line], "bold" if bold and each.column.strong else "") for each in columns))
    notes = list(map(printable, board.notes))
    headings = [each.column.heading for each in all_columns if each.column in left_out]
    if any(each not in all_columns for each in columns):
        notes.append("too narrow for every interval and long text")
    if headings:
        notes.append(f"too narrow for: {'; '.join(headings)}")
    natural = sum(each.width + GAP for each in columns)
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


def _narrow(each: Shown, width: int | None) -> int | None:
    """Return the width of a column whose text is broken into lines, where the screen has an edge."""
    return min(each.width, width) if width and each.column.most else None
