"""The suite of a bundle, expanded by the verifier, and which of its cells the bundle has, lacks or labels otherwise."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd

from ... import suite
from ...board import left_out
from ...board.store import Store
from ...errors import GradleakError
from ...secret import Secret
from ...suite import AttackCell, Cell, LeftOut, TrainingCell, key_of
from ..check import fitting
from ..workshop import Workshop
from .findings import Finding, judged, listed

Suites = Mapping[tuple[str, str], Path]
"""Files by the names and versions of the suites in them."""


@dataclass(frozen=True)
class Grid:
    """What has to be in a bundle."""

    cells: dict[str, Cell]
    """By key."""
    named: dict[str, list[Cell]]
    """By key, with the labels that each of several suites gives."""
    left_out: set[tuple[Any, ...]] = field(default_factory=set)
    """Lines of the store's table."""


def suites_here() -> Suites:
    """Return the suites that come along: of the checkout that gradleak runs from, or installed with it."""
    checkout = Path(__file__).parents[3] / "benchmarks"
    installed = Path(sysconfig.get_path("data")) / "share" / "gradleak" / "benchmarks"
    folder = checkout if checkout.is_dir() else installed
    return named(sorted(folder.rglob("*.yaml")))


def named(paths: Sequence[Path]) -> Suites:
    """Return suite files by name and version.

    Raises:
        GradleakError: one is no suite.
    """
    return {suite.title_of(path): path for path in paths}


def expanded(paths: Sequence[Path], workshop: Workshop, secret: Secret | None = None) -> Grid:
    """Return the grid of suites: the same that `run` computes with a secret.

    Raises:
        GradleakError: a suite cannot be expanded here.
    """
    named: dict[str, list[Cell]] = {}
    notes: list[LeftOut] = []
    for path in paths:
        try:
            root = workshop.resources.data_root
            planned = suite.expand(suite.read(path), workshop.digest, root, notes.append, secret)
            for cell in fitting(planned, workshop, notes.append):
                named.setdefault(cell.key, []).append(cell)
        except GradleakError as error:
            raise GradleakError(str(error) if str(path) in str(error) else f"suite {path}: {error}") from error
    cells = {key: several[0] for key, several in named.items()}
    return Grid(cells, named, {tuple(getattr(each, item.name) for item in fields(LeftOut)) for each in notes})


def chosen(cells: pd.DataFrame, given: Suites) -> tuple[list[Path], list[Finding]]:
    """Return the files of the suites that cells say they are of, looked for among the given ones or those here."""
    told = {(str(name), str(version)) for name, version in zip(cells["suite"], cells["suite_version"], strict=True)}
    known = given or suites_here()
    missing = [_unknown(each, known) for each in sorted(told - known.keys())]
    paths = list(given.values()) or [known[each] for each in sorted(told & known.keys())]
    right = ", ".join(f"{suite.title_of(path)[0]} {suite.title_of(path)[1]}" for path in paths)
    return paths, [judged("suite", missing, f"{right}, expanded here")]


def compared(store: Store, cells: pd.DataFrame, grid: Grid) -> list[Finding]:
    """Compare the cells of a store, and what it says was left out, with what has to be there."""
    stored: dict[str, dict[str, Any]] = dict(zip(cells["key"], cells["config"], strict=True))
    false = [key[:12] for key, config in stored.items() if key_of(config) != key]
    missing = [cell.title for key, cell in grid.cells.items() if key not in stored]
    extra = [_other(config, grid) for key, config in stored.items() if key not in grid.cells]
    renamed = [
        f"{grid.cells[key].title}: {', '.join(difference)}"
        for key, config in stored.items()
        if key in grid.cells
        if (difference := min((list(_differences(config, each.stored())) for each in grid.named.get(key, [])), key=len))
    ]
    total = len(grid.cells)
    return [
        judged("keys", false, "are the hash of each configuration"),
        judged("cells", _counted("missing", missing) + _counted("not of the suite", extra), f"all {total} of the grid"),
        judged("labels", renamed, "of cells and suite are those of the grid"),
        _left_out(store, grid),
    ]


def _left_out(store: Store, grid: Grid) -> Finding:
    there, wrong = set(left_out.all_lines(store.query)), []
    reasons = {line[:6]: line[6] for line in grid.left_out}
    for line in sorted(there - grid.left_out):
        place = " · ".join(filter(None, line[:6]))
        asked = f"here {reasons[line[:6]]!r}" if line[:6] in reasons else "it is not left out here"
        wrong.append(f"{place} is said to be left out ({line[6]!r}); {asked}")
    wrong += [
        f"no reason why {' · '.join(filter(None, line[:6]))} is left out"
        for line in sorted(grid.left_out - there)
        if line[:6] not in {other[:6] for other in there}
    ]
    return judged("left out", wrong, f"{len(there)} combinations, each for the reason that is found here")


def _unknown(told: tuple[str, str], known: Suites) -> str:
    others = [version for name, version in known if name == told[0]]
    here = f"here is version {', '.join(others)}" if others else "give its file with --suite"
    return f"cells say they are of suite {told[0]!r} version {told[1]}, which is not here; {here}"


def _counted(what: str, found: Sequence[str]) -> list[str]:
    return [f"{len(found)} {what}: {listed(found)}"] if found else []


def _other(config: Mapping[str, Any], grid: Grid) -> str:
    """Name a cell that is not of the grid, and how it differs from the one that is most like it."""
    try:
        cell = Cell.of(config)
    except GradleakError as error:
        return str(error)
    kind = AttackCell if isinstance(cell, AttackCell) else TrainingCell
    rivals = [list(_differences(config, each.stored())) for each in grid.cells.values() if type(each) is kind]
    nearest = min(rivals, key=len, default=[])
    return f"{cell.title} ({', '.join(nearest[:3])})" if nearest else cell.title


def _differences(stored: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    told, known = dict(_leaves(stored)), dict(_leaves(suite.plain(here)))
    for place in sorted(told.keys() | known.keys()):
        if told.get(place, ...) != known.get(place, ...):
            yield f"{place} {_short(told.get(place, 'absent'))}, {_short(known.get(place, 'absent'))} here"


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{place}.{name}" if place else str(name))
    else:
        yield place, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
