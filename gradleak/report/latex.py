"""Boards as LaTeX tables for papers (booktabs)."""

from __future__ import annotations

from collections.abc import Sequence

from ..board.leaderboard import Board
from ..paths import printable
from .columns import shown

_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "≥": r"$\geq$",
        "≤": r"$\leq$",
        "·": r"$\cdot$",
    }
)


def write(boards: Sequence[Board]) -> str:
    """Return boards as `table*` environments that need the booktabs package; separably first lines are bold."""
    return "\n".join(map(_board, boards))


def _board(board: Board) -> str:
    columns = shown(board)
    lines = [[_escape(each.column.heading) for each in columns]]
    for line in range(len(board.table)):
        cells = [(_escape(each.cells[line]), each.column.strong and line in board.strong) for each in columns]
        lines.append([rf"\textbf{{{cell}}}" if strong else cell for cell, strong in cells])
    head, *body = [" & ".join(cells) + r" \\" for cells in lines]
    notes = [rf"  \par\footnotesize {_escape(note)}" for note in board.notes]
    return "\n".join(
        [
            r"\begin{table*}",
            r"  \centering",
            rf"  \caption{{{_escape(board.title)}}}",
            rf"  \begin{{tabular}}{{{''.join('r' if each.column.right else 'l' for each in columns)}}}",
            r"    \toprule",
            f"    {head}",
            r"    \midrule",
            *(f"    {row}" for row in body),
            r"    \bottomrule",
            r"  \end{tabular}",
            *notes,
            r"\end{table*}",
            "",
        ]
    )


def _escape(text: str) -> str:
    # A line that opens with a bracket would be read as the option of the row break before it.
    text = printable(text).translate(_ESCAPES)
    return f"{{}}{text}" if text.startswith("[") else text
