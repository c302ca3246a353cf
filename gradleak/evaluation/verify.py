"""Verification of a bundle: everything in it that can be computed again is computed again."""

from __future__ import annotations

import itertools
import math
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..board.bundle import open_bundle
from ..board.store import Store, victim_list
from ..dataset import Data
from ..errors import GradleakError
from ..suite import UTILITY, AttackCell, Cell, GivenPrior, Part, TrainingCell, key_of
from . import evaluate, identity, metrics
from .workshop import Resources, Workshop, versions

TOLERANCE = {
    "mse": 1e-6,
    "psnr": 0.05,
    "ssim": 1e-3,
    "ms_ssim": 1e-3,
    "lpips": 5e-3,
    "lpips_64": 5e-3,
    "reidentified": 0.0,
}
"""How far a recomputed metric may be off: reconstructions are kept as float32, and machines round differently."""
RERUN = 1.0
"""dB by which the mean PSNR of a cell that is run again may be off: optimisation amplifies rounding."""
ACCURACY = 0.03
"""How far the test accuracy of a training that is run again may be off."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    ok: bool | None
    """None where it could not be checked here."""
    detail: str


def verify(bundle: Path, resources: Resources, sample: int = 3, seed: int = 0) -> list[Finding]:
    """Check a bundle and return what was found; it is verified if no finding is False.

    The store's hash and schema; that each key is the hash of its configuration; that the configured attacks and
    defenses are what the cells say they are; the victims, against the datasets themselves; that every victim has its
    rows; every image metric, from the reconstructions; and a random sample of cells, run again. What a label attack
    claims (`label_correct`) and the losses are only checked by running again.

    Args:
        bundle: what `publish` wrote.
        resources: where datasets are; cells run again on its device.
        sample: how many cells to run again.
        seed: picks them.

    Raises:
        GradleakError: the file is no bundle, or was changed after it was made.
    """
    with tempfile.TemporaryDirectory() as folder, open_bundle(bundle, Path(folder)) as store:
        cells = store.cells()
        rows = store.rows(cells)
        finished = cells[cells["status"] == "ok"]
        attacks = finished[finished["attack_name"] != UTILITY]
        found = [
            Finding("bundle", True, f"{len(cells)} cells, {len(cells) - len(finished)} failed, {len(rows)} images"),
            _versions(cells),
            _keys(cells),
            _plugins(attacks),
        ]
        workshop = Workshop(resources)
        data, victims = _victims(store, attacks, workshop)
        found += [*victims, _complete(attacks, rows), _metrics(store, attacks, rows, data)]
        known = finished[[_runnable(config, data) for config in finished["config"]]]
        picked = sorted(random.Random(seed).sample(range(len(known)), min(sample, len(known))))
        return [*found, *(_again(cell, rows, workshop) for cell in known.iloc[picked].to_dict("records"))]


def _versions(cells: pd.DataFrame) -> Finding:
    here = versions()
    other = {
        f"{name} {value}" for found in cells["versions"] for name, value in found.items() if here.get(name) != value
    }
    detail = f"made with {', '.join(sorted(other))}; here {_listed(here)}" if other else _listed(here)
    return Finding("versions", None if other else True, detail)


def _keys(cells: pd.DataFrame) -> Finding:
    wrong = [key[:12] for key, config in zip(cells["key"], cells["config"], strict=True) if key_of(config) != key]
    detail = f"not the hash of their configurations: {_first(wrong)}" if wrong else "are the hash of each configuration"
    return Finding("keys", not wrong, detail)


def _plugins(cells: pd.DataFrame) -> Finding:
    """Check what a cell says of its attack and defense, which decides how it is counted."""
    wrong, unknown = [], []
    for key, config, facts in zip(cells["key"], cells["config"], cells["provenance"], strict=True):
        try:
            cell = _cell(config)
            attack, defense = cell.built_attack, cell.built_defense
            true = identity.identity(cell)
            cell.check_code()
        except GradleakError as error:
            unknown.append(str(error))
            continue
        same = (cell.attack.version, cell.defense.version) == (attack.version, defense.version)
        if not same or any(facts.get(name) != value for name, value in true.items()):
            wrong.append(key[:12])
    if wrong:
        return Finding("attacks and defenses", False, f"other family, knowledge or version than here: {_first(wrong)}")
    if unknown:
        return Finding(
            "attacks and defenses", None, f"{len(unknown)} cells use a plugin that is not here: {unknown[0]}"
        )
    return Finding("attacks and defenses", True, "families, adaptivity and versions are those of the plugins here")


def _victims(store: Store, cells: pd.DataFrame, workshop: Workshop) -> tuple[dict[Part, Data], list[Finding]]:
    """Return the datasets that are here and what they are marked with, and a finding for each list of victims."""
    data: dict[Part, Data] = {}
    found = []
    lists: dict[str, AttackCell] = {}
    for config in cells["config"]:
        name, cell = victim_list(config), _cell(config)
        if name not in lists or cell.victims > lists[name].victims:
            lists[name] = cell
    for name, cell in sorted(lists.items()):
        try:
            here = workshop.data(cell.dataset)
        except GradleakError as error:
            found.append(Finding("victims", None, f"{name}: the dataset is not here: {error}"))
            continue
        if (here.version, here.digest) != (cell.dataset.version, cell.dataset.digest):
            found.append(
                Finding("victims", False, f"{name}: the dataset here is version {here.version}, {here.digest}")
            )
            continue
        images, labels = workshop.victims_of(cell)
        try:
            kept = [store.truth(name, victim) for victim in range(cell.victims)]
        except GradleakError:
            found.append(Finding("victims", False, f"{name}: the bundle lacks some of {cell.victims}"))
            continue
        same = all(
            np.array_equal(image, images[victim]) and np.array_equal(label, labels[victim])
            for victim, (image, label) in enumerate(kept)
        )
        if same:
            data[cell.dataset] = here
        detail = f"{cell.victims} of {name}" + ("" if same else ": not the images of the dataset")
        found.append(Finding("victims", same, detail))
    return data, found


def _complete(cells: pd.DataFrame, rows: pd.DataFrame) -> Finding:
    """Check that every finished cell has a row for each image of each victim, no more and no fewer."""
    places = {key: set(zip(part["victim"], part["image"], strict=True)) for key, part in rows.groupby("key")}
    wrong = [
        key[:12]
        for key, victims, size in zip(cells["key"], cells["victims"], cells["batch_size"], strict=True)
        if places.get(key) != set(itertools.product(range(victims), range(size)))
    ]
    detail = f"victims are missing or too many: {_first(wrong)}" if wrong else "every victim of every cell"
    return Finding("rows", not wrong, detail)


def _metrics(store: Store, cells: pd.DataFrame, rows: pd.DataFrame, data: dict[Part, Data]) -> Finding:
    """Compute every image metric again from the reconstructions."""
    worst = dict.fromkeys(TOLERANCE, 0.0)
    wrong: list[str] = []
    checked, groups = 0, {key: part for key, part in rows.groupby("key")}
    for key, config in zip(cells["key"], cells["config"], strict=True):
        cell = _cell(config)
        if cell.dataset not in data:
            continue
        candidates = data[cell.dataset].candidates(cell.candidates, cell.tuning)
        for victim, part in groups.get(key, rows[:0]).groupby("victim"):
            try:
                images = store.reconstruction(key, int(str(victim)))
            except GradleakError:
                if (part["status"] == "ok").any() or part["psnr"].notna().any():
                    wrong.append(f"{key[:12]} victim {victim} has scores but no reconstruction")
                continue
            truth, labels = (torch.as_tensor(each)[None] for each in store.truth(victim_list(config), int(str(victim))))
            scored = metrics.score(torch.as_tensor(images)[None], None, truth, labels, candidates)
            for row, again in zip(part.to_dict("records"), scored, strict=True):
                checked += 1
                for name, difference in _differences({str(k): v for k, v in row.items()}, again):
                    worst[name] = max(worst[name], difference)
                    if not difference <= TOLERANCE[name]:
                        wrong.append(
                            f"{key[:12]} victim {victim} image {row['image']}: {name} {row[name]}, {again[name]} here"
                        )
    if wrong:
        return Finding("metrics", False, f"{len(wrong)} differ: {wrong[0]}")
    if not checked:
        return Finding("metrics", None, "no reconstruction of a dataset that is here")
    return Finding("metrics", True, f"{checked} images; largest difference {worst['psnr']:.2g} dB")


def _differences(row: dict[str, Any], again: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield how far each metric is off, infinitely where it is there only once."""
    for name in TOLERANCE:
        stored, here = float(row[name]), float(again[name])
        if math.isnan(here) and (name.startswith("lpips") or math.isnan(stored)):
            continue  # LPIPS needs weights that may not be here
        if name.startswith("lpips") and math.isnan(stored):
            continue
        yield name, abs(stored - here) if math.isfinite(stored) else math.inf


def _again(cell: dict[Any, Any], rows: pd.DataFrame, workshop: Workshop) -> Finding:
    """Run a cell again and compare the scores of its images."""
    ran = Cell.of(cell["config"])
    name = f"run again {cell['key'][:12]}"
    result = evaluate.evaluate(ran, workshop)
    if result.status != "ok":
        return Finding(name, None, f"{ran.title}: cannot be run here: {result.error}")
    if isinstance(ran, TrainingCell):
        stored, here = (np.array([facts["test_accuracy"]]) for facts in (cell["provenance"], result.provenance))
        what, allowed = "test accuracy", ACCURACY
    else:
        stored = rows[rows["key"] == cell["key"]]["psnr"].fillna(0.0).to_numpy()
        here = np.array([row.psnr if row.psnr is not None else 0.0 for row in result.rows])
        what, allowed = "mean PSNR", RERUN
    if len(here) != len(stored):
        return Finding(name, False, f"{ran.title}: {len(stored)} images, {len(here)} here")
    same = "identical" if np.array_equal(here, stored) else f"{what} {stored.mean():.3f}, {here.mean():.3f} here"
    return Finding(name, bool(abs(here.mean() - stored.mean()) <= allowed), f"{ran.title}: {same}")


def _cell(config: dict[str, Any]) -> AttackCell:
    """Return the typed form of a cell that attacks.

    Raises:
        GradleakError: it is none.
    """
    cell = Cell.of(config)
    if not isinstance(cell, AttackCell):
        raise GradleakError("cell: attacks nobody")
    return cell


def _runnable(config: dict[str, Any], data: dict[Part, Data]) -> bool:
    """Whether the dataset is here, and the cell names no code of its own: a stranger's bundle may not pick any."""
    cell = Cell.of(config)
    return cell.dataset in data and not (isinstance(cell, AttackCell) and isinstance(cell.prior, GivenPrior))


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items())


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
