"""Boards as Markdown tables, aligned in the source too."""

from __future__ import annotations

from collections.abc import Sequence

from ..board.leaderboard import Board
from ..paths import printable
from .columns import Column, fit, shown

WIDTH = 120
"""Characters of a line that a page shows; columns beyond are left out, least important first."""


def write(boards: Sequence[Board], chosen: Sequence[str] = ()) -> str:
    """Return boards as Markdown: a heading, a table and its notes each; separably first lines are bold.

    Without `chosen`, keys of columns, as many as fit a page are shown, the most important first.
    """
    return "\n".join(_board(board, chosen) for board in boards)


def _board(board: Board, chosen: Sequence[str]) -> str:
    columns = shown(board, chosen)
    columns, left_out = (columns, []) if chosen else fit(columns, WIDTH, gap=3)
    headings = [_escape(each.column.heading) for each in columns]
    lines = [
        [_strong(_escape(each.cells[line]), each.column.strong and line in board.strong) for each in columns]
        for line in range(len(board.table))
    ]
    widths = [max(3, *map(len, cells)) for cells in zip(headings, *lines, strict=True)]
    right = [each.column.right for each in columns]
    rule = ["-" * (width - 1) + ":" if last else "-" * width for width, last in zip(widths, right, strict=True)]
    rows = [
        " | ".join(
            cell.rjust(width) if last else cell.ljust(width)
            for cell, width, last in zip(cells, widths, right, strict=True)
        )
        for cells in (headings, rule, *lines)
    ]
    table = "".join(f"| {row} |\n" for row in rows) + "\n" if columns else ""
    notes = "".join(f"- {_escape(note)}\n" for note in (*board.notes, *_left_out(left_out)))
    return f"### {_escape(board.title)}\n\n{table}{notes}"


def _left_out(columns: Sequence[Column]) -> list[str]:
    return [f"left out: {', '.join(each.heading for each in columns)}"] if columns else []


def _strong(cell: str, strong: bool) -> str:
    return f"**{cell}**" if strong and cell else cell


def _escape(text: str) -> str:
    text = printable(text)
    for mark in "\\|*_<[`":
        text = text.replace(mark, f"\\{mark}")
    return text
