"""How long cells take: planned work before anything is known, then what others of their kind have taken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from ..suite import AttackCell, Cell, TrainingCell

RATE = 1e-3
"""Seconds of one planned gradient evaluation of one image, before anything is known: a small network on one core."""
BASE = 0.3
"""Seconds of a cell that does nothing."""
_WEIGHT = 0.3
"""How many cells of a kind what is known of wider kinds counts for."""

Kind: TypeAlias = tuple[str, ...]


def cost(cell: Cell) -> float:
    """Rough work of a cell in gradients of one image; only ratios matter."""
    setting = cell.setting
    if isinstance(cell, TrainingCell):
        rounds = cell.recipe.rounds * len(cell.recipe.lr) * setting.local_steps
        return float(rounds * cell.recipe.clients * setting.batch_size)
    assert isinstance(cell, AttackCell)
    options = cell.attack.options
    steps = options.get("iterations", 1) * options.get("restarts", 1) * setting.local_steps
    return float(cell.victims * setting.batch_size * (20 + steps))


def kind_of(cell: Cell) -> Kind:
    """Return what cells of about one rate share: attack, model, dataset, setting, level; widest first."""
    if isinstance(cell, AttackCell):
        places = (cell.attack.label, cell.model.label, cell.dataset.label, cell.setting.name, cell.knowledge.value)
        return cell.attack.name, *places
    return ("", "", cell.model.label, cell.dataset.label, f"{cell.setting.batch_size} images")


class Pace:
    """Predicts the seconds of cells from those of others.

    A cell takes its planned work times the rate of its kind: attack, model, dataset, setting and level of knowledge.
    What is not known of a kind is taken from the wider one: without the level, …, the attack, all attacks.
    """

    def __init__(self, cells: Iterable[Cell], known: Mapping[str, float] | None = None) -> None:
        """Take the cells of a suite, and the seconds of those that were computed before, by key."""
        cells = list(cells)
        self._costs = {cell.key: cost(cell) for cell in cells}
        self._kinds = {cell.key: kind_of(cell) for cell in cells}
        self._taken: dict[str, float] = {}
        self._work: dict[Kind, float] = defaultdict(float)
        self._seconds: dict[Kind, float] = defaultdict(float)
        for key, seconds in (known or {}).items():
            if key in self._costs:
                self.note(key, seconds)

    def note(self, key: str, seconds: float) -> None:
        """Learn what a cell took."""
        self._taken[key] = seconds
        for kind in _widening(self._kinds[key]):
            self._work[kind] += self._costs[key]
            self._seconds[kind] += max(0.0, seconds - BASE)

    def knows(self, key: str) -> bool:
        """Whether a cell was timed."""
        return key in self._taken

    def seconds(self, key: str) -> float:
        """Return what a cell took, or may take."""
        if key in self._taken:
            return self._taken[key]
        cost, rate = self._costs[key], RATE
        for kind in reversed(list(_widening(self._kinds[key]))):
            rate = (self._seconds[kind] + _WEIGHT * cost * rate) / (self._work[kind] + _WEIGHT * cost)
        return BASE + cost * rate


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """Return cells as they are best computed: first one of each kind, which tells what the others take, then the rest.

    Both parts have long ones first, so that workers end together.
    """
    seen: set[Kind] = set()
    first: list[Cell] = []
    rest: list[Cell] = []
    for cell in sorted(cells, key=cost, reverse=True):
        kind = kind_of(cell)
        (rest if kind in seen else first).append(cell)
        seen.add(kind)
    return first + rest


def _widening(kind: Kind) -> Iterable[Kind]:
    """Yield a kind and all that are wider, the narrowest first; the last is everything."""
    return (kind[:end] for end in range(len(kind), -1, -1))


def in_words(seconds: float) -> str:
    """Return a span of time as people say it.

    >>> in_words(42), in_words(150), in_words(8000)
    ('42 s', '2.5 min', '2.2 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"
