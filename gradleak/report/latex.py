"""Boards as LaTeX tables for papers (booktabs), as wide as a page of text at most."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from ..board.leaderboard import Board
from ..paths import printable
from .columns import Shown, fit, shown

NEEDS = r"% \usepackage[T1]{fontenc} \usepackage{array,booktabs,graphicx}"
"""The packages that the tables need."""
WIDTH = 84
"""Characters of \\footnotesize that fit a line of article at 10 pt; the least important columns beyond are left out."""
LINES = 36
"""Lines of a table; a longer board goes on in another, as a float cannot break."""

_ESCAPES = {
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
    "\u00d7": r"$\times$",
    "\u2212": r"$-$",
    "\u2013": "--",
    "…": r"\dots{}",
    "ε": r"$\epsilon$",
    "\u03c3": r"$\sigma$",
}


def write(boards: Sequence[Board], chosen: Sequence[str] = ()) -> str:
    """Return boards as `table*` environments, with caption and label; separably first lines are bold.

    Without `chosen`, keys of columns, as many as fit a page are shown, the most important first.
    """
    tables = []
    for board, label in zip(boards, _labels(boards), strict=True):
        columns = shown(board, chosen)
        columns, left_out = (columns, []) if chosen else fit(columns, WIDTH)
        notes = [*board.notes, *([f"left out: {', '.join(each.heading for each in left_out)}"] if left_out else [])]
        tables += [_table(board, columns, label, lines, notes) for lines in _parts(columns, len(board.table))]
    return "\n".join([NEEDS + "\n", *tables]) if tables else ""


def _parts(columns: Sequence[Shown], count: int) -> list[range]:
    """Split lines into tables of at most `LINES` lines of text."""
    heights = [max((_lines(each, line) for each in columns), default=1) for line in range(count)]
    starts, height = [0], 0
    for line, own in enumerate(heights):
        height += own
        if height > LINES and line > starts[-1]:
            starts.append(line)
            height = own
    return [range(start, stop) for start, stop in itertools.pairwise([*starts, count])]


def _lines(each: Shown, line: int) -> int:
    return math.ceil(len(each.cells[line]) / (each.column.most or math.inf)) or 1


def _labels(boards: Sequence[Board]) -> list[str]:
    """Return a label for each board: its kind, for a board of the same kind its title too."""
    found: list[str] = []
    for board in boards:
        label = f"tab:gradleak-{board.name}"
        title = re.sub(r"[^a-z0-9]+", "-", board.title.partition(": ")[2].lower()).strip("-")
        label = f"{label}-{title}" if label in found else label
        found.append(label if label not in found else f"{label}-{len(found)}")
    return found


def _table(board: Board, columns: Sequence[Shown], label: str, lines: range, notes: Sequence[str]) -> str:
    rows = [" & ".join(_cell(board, each, line) for each in columns) + r" \\" for line in lines]
    more = f" (from line {lines.start + 1})" if lines.start else ""
    notes = notes if lines.stop == len(board.table) else []
    return "\n".join(
        [
            r"\begin{table*}",
            r"  \centering\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"  \caption{{{_escape(board.title + more)}}}",
            rf"  \label{{{label}{f'-{lines.start}' if lines.start else ''}}}",
            r"  \sbox0{%",
            rf"  \begin{{tabular}}{{{''.join(map(_form, columns)) or 'l'}}}",
            r"    \toprule",
            f"    {' & '.join(map(_heading, columns))} \\\\",
            r"    \midrule",
            *(f"    {row}" for row in rows),
            r"    \bottomrule",
            r"  \end{tabular}}%",
            # A table of long labels is made smaller rather than wider than the text.
            r"  \ifdim\wd0>\textwidth\resizebox{\textwidth}{!}{\usebox0}\else\usebox0\fi",
            *([rf"  \par\smallskip\parbox{{\textwidth}}{{\scriptsize\raggedright {_sentences(notes)}}}"] * bool(notes)),
            r"\end{table*}",
            "",
        ]
    )


def _cell(board: Board, each: Shown, line: int) -> str:
    text = _escape(each.cells[line])
    return rf"\textbf{{{text}}}" if text and each.column.strong and line in board.strong else text


def _heading(each: Shown) -> str:
    lines = list(map(_escape, each.heading.splitlines()))
    side = "r" if each.column.right else "l"
    return rf"\shortstack[{side}]{{" + r" \\ ".join(lines) + "}" if len(lines) > 1 else lines[0]


def _form(each: Shown) -> str:
    if each.column.most and max(map(len, each.cells), default=0) > each.column.most:
        return rf">{{\raggedright\arraybackslash}}p{{{0.5 * each.column.most:g}em}}"
    return "r" if each.column.right else "l"


def _sentences(notes: Sequence[str]) -> str:
    return " ".join(f"{_escape(note).rstrip('.')}." for note in notes)


def _escape(text: str) -> str:
    """Return text for pdfLaTeX, which knows Latin letters only; of another character its number is written."""
    # A line that opens with a bracket would be read as the option of the row break before it.
    text = "".join(_ESCAPES.get(mark, mark if mark < "ƀ" else f"U+{ord(mark):04X}") for mark in printable(text))
    return f"{{}}{text}" if text.startswith(("[", "*")) else text
