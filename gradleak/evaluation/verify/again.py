"""What only running shows: cells are run again, and their rows compared in units of rounding."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from ... import suite
from ...board.codec import late_progress
from ...board.schema import REFUSED
from ...board.store import STATUSES, CellResult, ImageRow
from ...suite import HELD_OUT, AttackCell, Cell, TrainingCell
from .. import evaluate
from ..apart import Apart
from ..workshop import Workshop
from .findings import Finding, Say, judged
from .messages import IMAGES, OF_THE_ANSWER
from .rounding import BYTES, LOSS, Floats, Shaken, decibels, unexplained

CHEAP = 1.0
"""Seconds that a control or a closed form may take to be run again in every cell."""
CLOSED = ("control", "analytic")
"""Families of attacks that are run again in every cell if they are cheap."""
DECIBELS, LATE, STEPS = 0.01, 0.02, 0.01
"""Units of PSNR, of late progress, and of iterations and losses (relatively) within which rows are the same."""
SHARE = 1e-4
"""Unit of the details that an attack gives, beside that of losses: many are shares."""
ROUNDINGS = 16
"""Roundings of a pixel that a stable attack may pass on to its answer."""


@dataclass(frozen=True)
class Bundle:
    """What the bundle says of the cells that the verifier's suite has."""

    cells: Mapping[str, Cell]
    """By key, from the verifier's own suite."""
    told: Mapping[str, Mapping[Any, Any]]
    """Lines of the store's table of cells, by key."""
    rows: Mapping[str, pd.DataFrame]
    """Lines an image, by key."""

    @classmethod
    def of(cls, cells: Mapping[str, Cell], table: pd.DataFrame, rows: pd.DataFrame) -> Bundle:
        """Take what a store returned apart."""
        groups = {str(key): part.sort_values(["victim", "image"]) for key, part in rows.groupby("key")}
        lines = {str(line["key"]): line for line in table.to_dict("records") if line["key"] in cells}
        return cls({key: cell for key, cell in cells.items() if key in lines}, lines, groups)

    def is_failed(self, key: str) -> bool:
        """Whether a cell, or any of its victims, is said to have failed."""
        rows = self.rows.get(key)
        return bool(
            self.told[key]["status"] != "ok" or (rows is not None and (~rows["status"].isin(("ok", REFUSED))).any())
        )


@dataclass
class Reruns:
    """Cells that were run again, and what came of it."""

    bundle: Bundle
    workshop: Workshop
    scale: Mapping[str, Floats]
    """Each victim's loss at a grey image, by key."""
    say: Say
    apart: Apart | None
    """Runs their attacks, which may be anybody's."""
    done: dict[str, str | None] = field(default_factory=dict)
    """What was wrong, by key; None where nothing was."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What their attacks took here, by key."""

    def run(self, title: str, keys: Sequence[str]) -> list[str]:
        """Run cells that were not run yet; return what is wrong with these and the others of them."""
        for number, key in enumerate(keys, start=1):
            if key not in self.done:
                self.say(f"{title}: cell {number} of {len(keys)}, {self.bundle.cells[key].title}")
                self._take(key, self._evaluated(key, self.workshop))
        return [f"{self.bundle.cells[key].title}: {wrong}" for key in keys if (wrong := self.done[key])]

    def closed_forms(self) -> Finding:
        """Run every control and closed form again that takes under `CHEAP` seconds here."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for key, cell in self.bundle.cells.items():
            if isinstance(cell, AttackCell) and cell.built_attack.family in CLOSED:
                groups.setdefault((cell.attack.label, cell.model.label, cell.setting.name), []).append(key)
        wrong, ran = [], 0
        for _, keys in sorted(groups.items()):
            for key in sorted(keys):
                if key not in self.done:
                    self.say(f"closed forms: {self.bundle.cells[key].title}")
                    result = self._evaluated(key, self.workshop)
                    self._take(key, result)
                    if result.seconds > CHEAP:
                        break  # Its others are left to the sample.
            part = [key for key in keys if key in self.done]
            ran += len(part)
            wrong += [f"{self.bundle.cells[key].title}: {each}" for key in part if (each := self.done[key])]
        return judged("closed forms and controls", wrong, f"{ran} cells run again, all as they were")

    def _evaluated(self, key: str, workshop: Workshop) -> CellResult:
        """Run a cell; its rows are those that a store would hold."""
        result = self.run_anew(self.bundle.cells[key], workshop)
        rows = [
            replace(row, late_progress=late_progress(result.traces[row.victim]))
            if row.late_progress is None and row.victim in result.traces
            else row
            for row in result.rows
        ]
        return replace(result, rows=rows)

    def run_anew(self, cell: Cell, workshop: Workshop | None = None) -> CellResult:
        """Run a cell, its attack where no victim is if the system can do that."""
        return evaluate.evaluate(cell, workshop or self.workshop, apart=self.apart)

    def _take(self, key: str, result: CellResult) -> None:
        """Compare a cell that was run again, and say at once what is wrong."""
        self.done[key] = wrong = self._again(key, result)
        if result.status == "ok":
            self.seconds[key] = sum(row.seconds or 0.0 for row in result.rows)
        if wrong:
            self.say(f"not as submitted: {self.bundle.cells[key].title}: {wrong}")

    def _again(self, key: str, result: CellResult) -> str | None:
        cell, told = self.bundle.cells[key], self.bundle.told[key]
        if told["status"] != "ok" or result.status != "ok":
            if told["status"] == result.status:
                return None
            if result.status != "ok":
                return f"cannot be run here: {result.error}"
            return f"marked failed ({told['error']}), but runs here"
        if isinstance(cell, TrainingCell):
            return self._trained(cell, told["provenance"], result)
        return next(self._differences(key, result), None)

    def _differences(self, key: str, result: CellResult) -> Iterator[str]:
        rows = self.bundle.rows.get(key)
        if rows is None or len(rows) != len(result.rows):
            yield f"{0 if rows is None else len(rows)} images, {len(result.rows)} here"
            return
        known: dict[int, Sequence[ImageRow]] = {0: result.rows}

        def own(column: Callable[[ImageRow], float | None]) -> Callable[[int], Floats]:
            def computed(number: int) -> Floats:
                if number not in known:
                    known[number] = self._evaluated(key, Shaken(self.workshop.resources, number)).rows
                if len(known[number]) != len(result.rows):  # It failed, as the plain one did not.
                    return np.full(len(result.rows), np.nan)
                return np.array([column(row) for row in known[number]], dtype=float)

            return computed

        size = len(result.rows) // max(1, len(set(rows["victim"])))
        scale = np.repeat(self.scale[key], size) if key in self.scale else np.ones(len(rows))
        for name, unit in _units(result.rows, scale).items():
            stored = rows[name].map(STATUSES.index) if name == "status" else rows[name]
            wrong = unexplained(stored.to_numpy(dtype=float), own(_reader(name)), unit)
            if wrong is not None and name == "status":
                ended = ({*rows["status"]}, {row.status for row in result.rows})
                wrong = ", here ".join("/".join(sorted(each)) for each in ended)
            if wrong is not None:
                yield f"{name.replace('_', ' ')}: {wrong}"
        extras = [json.loads(text) for text in rows["extras"]]
        for name in sorted({name for each in (*extras, *(row.extras for row in result.rows)) for name in each}):
            read = partial(_number, name)
            here = np.array([read(row.extras) for row in result.rows])
            told = np.array([read(each) for each in extras])
            unit = SHARE + STEPS * np.nan_to_num(np.abs(here))
            if (wrong := unexplained(told, own(lambda row, read=read: read(row.extras)), unit)) is not None:  # type: ignore[misc]
                yield f"{name.replace('_', ' ')}: {wrong}"
        for name in OF_THE_ANSWER[:1]:
            stored = self.bundle.told[key]["provenance"].get(name)
            if stored != result.provenance.get(name) and self.bundle.cells[key].engine.backend != "auto":  # type: ignore[attr-defined]
                yield f"{name} {stored!r}, {result.provenance.get(name)!r} here"

    def _trained(self, cell: TrainingCell, told: Mapping[str, Any], result: CellResult) -> str | None:
        here = suite.plain(result.provenance)
        for name in ("dense_bytes", "lr"):
            if told.get(name) != here[name]:
                return f"{name} {told.get(name)}, {here[name]} here"
        if not abs(float(told.get("bytes") or 0) - here["bytes"]) <= BYTES * here["bytes"]:
            return f"bytes {told.get('bytes')}, {here['bytes']} here"
        held = told.get("validation_accuracy")
        if not isinstance(held, Mapping) or held.keys() != here["validation_accuracy"].keys():
            return f"validation accuracy {held}, {here['validation_accuracy']} here"
        split = self.workshop.data(cell.dataset).split
        units = np.array([IMAGES / len(split.test)] + [IMAGES * HELD_OUT / len(split.train)] * len(held))
        known: dict[int, Floats] = {0: _accuracies(here)}

        def own(number: int) -> Floats:
            if number not in known:
                known[number] = _accuracies(self.run_anew(cell, Shaken(self.workshop.resources, number)).provenance)
            return known[number] if len(known[number]) == len(units) else np.full(len(units), np.nan)

        for place, name in enumerate(
            ["test accuracy", *(f"validation accuracy at rate {rate}" for rate in sorted(held))]
        ):
            at = slice(place, place + 1)
            wrong = unexplained(_accuracies(told)[at], lambda number, at=at: own(number)[at], units[at])  # type: ignore[misc]
            if wrong is not None:
                return f"{name}: {wrong}"
        return None


def _accuracies(told: Mapping[str, Any]) -> Floats:
    """Return the accuracies of a training: on the test split, and at each rate on images held out."""
    held = told.get("validation_accuracy") or {}
    return np.array([told.get("test_accuracy"), *(held[rate] for rate in sorted(held))], dtype=float)


def _units(rows: Iterable[ImageRow], scale: Floats) -> dict[str, Floats | float]:
    """Return the columns that are compared, each with the differences that are of no account."""
    names = ("mse", "loss", "iterations", "gradient_evaluations")
    here = {name: np.array([getattr(row, name) for row in rows], dtype=float) for name in names}
    images = DECIBELS + ROUNDINGS * np.array([decibels(value) for value in np.nan_to_num(here["mse"], nan=1.0)])
    return {
        "status": 0.5,
        "psnr": images,
        "label_correct": 0.5,
        "label_found": 0.5,
        "loss": STEPS * np.nan_to_num(np.abs(here["loss"])) + LOSS * np.abs(scale),
        "oracle_psnr": images,
        "late_progress": LATE,
        "iterations": 0.5 + STEPS * np.nan_to_num(here["iterations"]),
        "gradient_evaluations": 0.5 + STEPS * np.nan_to_num(here["gradient_evaluations"]),
    }


def _number(name: str, extras: Mapping[str, Any]) -> float:
    """Return a detail of a row; NaN where it has none, or one that is no number."""
    value = extras.get(name)
    return float(value) if isinstance(value, int | float) else np.nan


def _reader(name: str) -> Callable[[ImageRow], float | None]:
    if name == "status":
        return lambda row: float(STATUSES.index(row.status))
    return lambda row: None if getattr(row, name) is None else float(getattr(row, name))


def sample(cells: Mapping[str, Cell], count: int, seed: int, without: Iterable[str] = ()) -> list[str]:
    """Draw cells until there are `count` of every attack, of every defense that is attacked, and of every training.

    Args:
        cells: by key.
        count: of each.
        seed: of the draw.
        without: keys of cells that are checked anyway.
    """
    left = sorted(cells.keys() - set(without))
    random.Random(seed).shuffle(left)
    have: dict[tuple[str, str], int] = {}
    drawn = []
    for key in left:
        cell = cells[key]
        if isinstance(cell, AttackCell):
            groups = [("attack", cell.attack.label), ("defense", cell.defense.label)]
        else:
            groups = [("training", cell.defense.label)]
        if any(have.get(group, 0) < count for group in groups):
            drawn.append(key)
            for group in groups:
                have[group] = have.get(group, 0) + 1
    return drawn
