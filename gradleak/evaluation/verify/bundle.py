"""Verification of a bundle: everything in it that can be computed again is computed again."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ...board.bundle import open_bundle
from ...board.record import RECOMPUTED, RERUN
from ...board.store import Store
from ...errors import GradleakError
from ...suite import AttackCell, TrainingCell
from ..apart import Apart, possible
from ..workshop import Resources, Workshop, versions
from . import grid, luck, messages, seconds, stored
from .again import Bundle, Reruns, sample
from .findings import Finding, Findings, Say, Tell, judged


@dataclass(frozen=True)
class Verified:
    """What verification found."""

    findings: list[Finding]
    seed: int
    """Of the sample; the same again draws the same."""
    cells: dict[str, str]
    """How far each cell of the suite was checked: `RECOMPUTED`, `RERUN`."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return all(found.ok is not False for found in self.findings)


@dataclass(frozen=True)
class Extent:
    """How much is run again."""

    sample: int = 1
    """Cells of every attack, of every defense, and of every training."""
    seed: int | None = None
    """Of the draw; None draws one."""


def verify(
    bundle: Path,
    resources: Resources,
    extent: Extent | None = None,
    suites: Sequence[Path] = (),
    say: Say = lambda line: None,
    tell: Tell = lambda found: None,
) -> Verified:
    """Check a bundle and return what was found.

    The suite is the verifier's own copy, by the name and version that cells state. Its every cell has to be there as
    it is, and no other; what is left out has to be left out here. Then for every cell: victims, against the datasets;
    rows; image metrics, from the reconstructions; messages, with norms, bytes and guarantees; losses at the truth, and
    where one gradient tells them at the answer; controls and cheap closed forms, run again. Cells that are said to have
    failed run again first, then those whose losses do not follow from their images, then a sample, trainings included;
    of the sample, what hangs on the store's secret also with another.

    Of seconds the order of magnitude is compared. What needs the attack itself is not checked where a cell is not run
    again.

    Args:
        bundle: what `publish` wrote.
        resources: where datasets are; cells run again on its device.
        extent: how much is run again.
        suites: files of suites that do not come along.
        say: told what is looked at now.
        tell: told each finding as soon as it is there.

    Raises:
        GradleakError: the file is no bundle, or was changed after it was made.
    """
    extent = extent or Extent()
    seed = secrets.randbelow(2**32) if extent.seed is None else extent.seed
    with tempfile.TemporaryDirectory() as folder, open_bundle(bundle, Path(folder)) as store:
        cells = store.cells()
        rows = store.rows(cells)
        failed = int((cells["status"] != "ok").sum())
        found = Findings(tell)
        found.add(Finding("bundle", True, f"{len(cells)} cells, {failed} failed, {len(rows)} images"), _versions(cells))
        workshop = Workshop(resources)
        say("the suite")
        paths, more = grid.chosen(cells, grid.named(suites))
        found.add(*more)
        try:
            wanted = grid.expanded(paths, workshop, store.secret)
        except GradleakError as error:
            found.add(Finding("cells", False, f"the suite cannot be expanded here: {error}"))
            return Verified(found.all, seed, {})
        found.add(*grid.compared(store, cells, wanted))
        told = Bundle.of(wanted.cells, cells, rows)
        done = _computed(store, cells, rows, told, workshop, extent.sample, seed, say, found)
        return Verified(found.all, seed, done)


def _computed(
    store: Store,
    cells: pd.DataFrame,
    rows: pd.DataFrame,
    told: Bundle,
    workshop: Workshop,
    count: int,
    seed: int,
    say: Say,
    found: Findings,
) -> dict[str, str]:
    """Compute everything again that can be, and return how far each cell was checked."""
    finished = {key: cell for key, cell in told.cells.items() if told.told[key]["status"] == "ok"}
    attacked = {key: cell for key, cell in finished.items() if isinstance(cell, AttackCell)}
    say("victims, rows and metrics")
    apart = Apart(device=workshop.resources.device) if possible() else None
    data, more = stored.truths(store, attacked, workshop)
    found.add(*more, stored.complete(cells, rows))
    found.add(stored.scores(store, attacked, rows, data, workshop))
    found.add(stored.traces(store, attacked, rows))
    more, here = messages.check(store, attacked, cells, rows, workshop, apart, say)
    found.add(*more, _promises(told, workshop))
    reruns = Reruns(told, workshop, here.scale, say, apart)
    lost = sorted(key for key in told.cells if told.is_failed(key))
    wrong = reruns.run("failed cells", lost)
    found.add(judged("failed cells", wrong, f"{len(lost)}, which fail here too" if lost else "none"))
    found.add(reruns.closed_forms())
    odd = {key: attacked[key] for key in here.suspicious}
    several = sample(odd, max(1, count), seed)
    wrong = reruns.run("losses in doubt", several)
    found.add(judged("losses in doubt", wrong, _said_of(len(odd), len(several))))
    drawn = sample(told.cells, count, seed, reruns.done)
    wrong = reruns.run("sample", drawn)
    trained = sum(isinstance(told.cells[key], TrainingCell) for key in drawn)
    right = f"{len(drawn)} cells run again, {trained} of them trainings, all as they were"
    found.add(judged("sample", wrong, right) if drawn or not count else Finding("sample", True, "nothing is left"))
    if drawn:
        found.add(luck.check(reruns, drawn))
    found.add(seconds.check(_times(told, here, reruns)))
    return {key: RERUN if key in reruns.done else RECOMPUTED for key in told.cells}


def _promises(told: Bundle, workshop: Workshop) -> Finding:
    wrong = []
    for key, cell in told.cells.items():
        facts, status = told.told[key]["provenance"], told.told[key]["status"]
        if status != "ok":
            wrong += [f"{cell.title}: {each}" for each in messages.facts_of_failed(cell, facts)]
        elif isinstance(cell, TrainingCell):
            wrong += [f"{cell.title}: {each}" for each in messages.promises(cell, facts, workshop)]
    right = "guarantees, participations and rates of trainings follow from their recipes"
    return judged("recipes", wrong, right)


def _times(told: Bundle, here: messages.Measured, reruns: Reruns) -> seconds.Times:
    times: dict[str, list[tuple[float, float]]] = {}
    for key, own in here.seconds.items():
        cell, stored = told.cells[key], told.told[key]["provenance"].get("client_seconds")
        times.setdefault(f"defense {cell.defense.label!r}", []).append((stored or 0.0, own))
    for key, own in reruns.seconds.items():
        cell, rows = told.cells[key], told.rows.get(key)
        if isinstance(cell, AttackCell) and rows is not None and own > seconds.SHORT:
            times.setdefault(f"attack {cell.attack.label!r}", []).append((float(rows["seconds"].sum()), own))
    return times


def _said_of(odd: int, ran: int) -> str:
    if not odd:
        return "none: they follow from the images wherever one gradient tells them"
    return f"{odd} cells' losses do not follow from the images alone; {ran} of them run again, all as they were"


def _versions(cells: pd.DataFrame) -> Finding:
    here = versions()
    other = {
        f"{name} {value}" for found in cells["versions"] for name, value in found.items() if here.get(name) != value
    }
    own = ", ".join(f"{name} {value}" for name, value in here.items())
    return Finding(
        "versions", None if other else True, f"made with {', '.join(sorted(other))}; here {own}" if other else own
    )
