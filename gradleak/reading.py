"""What stores hold, for notebooks: rows, boards and comparisons of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path

from .board import compare, leaderboard, results
from .board.bundle import open_all
from .board.results import Results
from .board.tables import Board
from .errors import GradleakError, unknown
from .report.columns import fit, shown

_WIDTH = 160
"""Characters of a line; columns beyond are left out, least important first."""


@dataclass(frozen=True)
class ShownBoard(Board):
    """A board that notebooks show as a table of its most important columns."""

    def _repr_html_(self) -> str:
        columns, left_out = fit(shown(self), _WIDTH, gap=3)
        head = "".join(f"<th>{escape(each.column.heading)}</th>" for each in columns)
        lines = []
        for line in range(len(self.table)):
            weight = ' style="font-weight:bold"' if line in self.strong else ""
            cells = "".join(f"<td>{escape(each.cells[line])}</td>" for each in columns)
            lines.append(f"<tr{weight}>{cells}</tr>")
        notes = [*self.notes, *([f"left out: {', '.join(each.heading for each in left_out)}"] if left_out else [])]
        listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
        return f"<h4>{escape(self.title)}</h4><table><tr>{head}</tr>{''.join(lines)}</table><ul>{listed}</ul>"


@dataclass(frozen=True)
class Stored(Results):
    """Everything that stores hold: `rows` has a line a true image, `cells` one a cell (pandas)."""

    def board(self, name: str = "defenses") -> ShownBoard:
        """Return the board of defenses, attacks, pareto or compute, as `gradleak leaderboard` prints it.

        Raises:
            GradleakError: there is no such board.
        """
        if name not in _BOARDS:
            raise unknown("board", name, _BOARDS)
        return _shown(_BOARDS[name](self))

    def compare(self, after: Results) -> ShownBoard:
        """Return what changed from these results to others, paired by victim, with intervals.

        Raises:
            GradleakError: they share no victims.
        """
        return _shown(compare.compare(self, after))

    def where(self, **labels: str | Iterable[str]) -> Stored:
        """Return the part with the given labels, e.g. `where(dataset="digits", model=["mlp", "lenet"])`.

        Raises:
            GradleakError: a label is not in the results.
        """
        return _stored(super().where(**labels))

    def _repr_html_(self) -> str:
        return self.board()._repr_html_()


_BOARDS: dict[str, Callable[[Results], Board]] = {
    "defenses": leaderboard.landing_board,
    "attacks": leaderboard.attack_board,
    "pareto": lambda found: leaderboard.pareto_board(leaderboard.landing_board(found)),
    "compute": lambda found: leaderboard.compute_board(leaderboard.attack_board(found)),
}


def read(store: str | Path, *others: str | Path) -> Stored:
    """Read stores of `gradleak run` and bundles of `gradleak publish` into one set of results.

    Raises:
        GradleakError: one of them is neither, or there is no cell in them.
    """
    for path in (store, *others):
        if not isinstance(path, str | Path):
            raise GradleakError(f"store: {type(path).__name__} (allowed: the path of a store or bundle)")
    with open_all([Path(path) for path in (store, *others)]) as opened:
        return _stored(results.read(*opened))


def _stored(found: Results) -> Stored:
    return Stored(**{item.name: getattr(found, item.name) for item in fields(Results)})


def _shown(board: Board) -> ShownBoard:
    return ShownBoard(**{item.name: getattr(board, item.name) for item in fields(Board)})
