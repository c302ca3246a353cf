"""What follows from a store alone and the datasets: victims, rows, image metrics, and the ends of traces."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from ...board.codec import late_progress
from ...board.store import Store, victim_list
from ...dataset import Data
from ...errors import GradleakError
from ...suite import AttackCell, Part
from .. import metrics
from ..workshop import Workshop
from .findings import Finding, judged
from .rounding import decibels, pixels_apart

TOLERANCE = {"ssim": 1e-5, "ms_ssim": 1e-5, "lpips": 1e-3, "lpips_64": 1e-3, "reidentified": 0.0, "finite": 0.0}
"""How far a metric may be off that is computed again from the kept float32 reconstruction."""
UNSCORED = "invalid"
"""The status of victims whose answer has no scores though it is kept."""

Attacked = Mapping[str, AttackCell]
"""Finished cells that attack, by key, as the verifier's own suite has them."""


def truths(store: Store, attacked: Attacked, workshop: Workshop) -> tuple[dict[Part, Data], list[Finding]]:
    """Return the datasets whose victims are kept as they are, and a finding for each list of victims."""
    data: dict[Part, Data] = {}
    found = []
    lists: dict[str, AttackCell] = {}
    for cell in attacked.values():
        name = victim_list(cell.stored())
        if name not in lists or cell.victims > lists[name].victims:
            lists[name] = cell
    for name, cell in sorted(lists.items()):
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
        data[cell.dataset] = workshop.data(cell.dataset)
        detail = f"{cell.victims} of {name}" + ("" if same else ": not the images of the dataset")
        found.append(Finding("victims", same, detail))
    return data, found


def complete(cells: pd.DataFrame, rows: pd.DataFrame) -> Finding:
    """Check that a finished cell has one row for each image of each victim, and a failed one none."""
    places = {key: set(zip(part["victim"], part["image"], strict=True)) for key, part in rows.groupby("key")}
    wrong = []
    names = ("key", "status", "victims", "batch_size")
    for key, status, count, size in zip(*(cells[name] for name in names), strict=True):
        expected = set(itertools.product(range(count), range(size))) if status == "ok" else set()
        if places.get(key, set()) != expected:
            wrong.append(f"cell {key[:12]}: victims are missing or too many")
    return judged("rows", wrong, "every victim of every cell")


def scores(
    store: Store, attacked: Attacked, rows: pd.DataFrame, data: Mapping[Part, Data], workshop: Workshop
) -> Finding:
    """Compute every image metric again from the reconstructions, against the dataset's own images."""
    wrong: list[str] = []
    checked, groups = 0, {str(key): part for key, part in rows.groupby("key")}
    for key, cell in attacked.items():
        if cell.dataset not in data or key not in groups:
            continue
        candidates = data[cell.dataset].candidates(cell.candidates, cell.tuning)
        images, labels = (torch.from_numpy(each) for each in workshop.victims_of(cell))
        for number, part in groups[key].groupby("victim"):
            victim, where = int(str(number)), f"{cell.title}: victim {number}"
            try:
                answer = torch.as_tensor(store.reconstruction(key, victim))[None]
            except GradleakError:
                if (part["status"] == "ok").any() or part["psnr"].notna().any():
                    wrong.append(f"{where} has scores but no reconstruction")
                continue
            lines = part.sort_values("image").to_dict("records")
            if {line["status"] for line in lines} == {UNSCORED}:
                wrong += [f"{where} is invalid and has scores"] if part["psnr"].notna().any() else []
                continue
            if answer.shape[1:] != images[victim].shape:
                wrong.append(f"{where} has a reconstruction {list(answer.shape[1:])}, not {list(images[victim].shape)}")
                continue
            scored = metrics.score(answer, None, images[victim][None], labels[victim][None], candidates)
            checked += len(lines)
            for line, again in zip(lines, scored, strict=True):
                difference = next(_differences({str(name): value for name, value in line.items()}, again), None)
                wrong += [f"{where} image {line['image']}: {difference}"] if difference else []
    if not checked and not wrong:
        return Finding("metrics", None, "no reconstruction of a dataset that is here")
    return judged("metrics", wrong, f"{checked} images, to rounding")


def _differences(line: Mapping[str, Any], again: Mapping[str, Any]) -> Iterator[str]:
    """Say which metrics are off, or there only once."""
    stored, here = float(line["mse"]), float(again["mse"])
    limits = {"psnr": decibels(here), **TOLERANCE}
    if pixels_apart(stored, here):
        yield f"mse {stored:.6g}, {here:.6g} here"
    for name, limit in limits.items():
        stored, here = float(line[name]), float(again[name])
        if (math.isnan(here) or math.isnan(stored)) and (
            name.startswith("lpips") or (math.isnan(here) and math.isnan(stored))
        ):
            continue  # LPIPS needs weights that may not be on every machine.
        if not abs(stored - here) <= limit:
            yield f"{name} {stored:.6g}, {here:.6g} here"


def traces(store: Store, attacked: Attacked, rows: pd.DataFrame) -> Finding:
    """Compute again how much of a loss's fall came late, from the kept traces."""
    wrong = []
    checked = 0
    first = rows[(rows["image"] == 0) & rows["key"].isin(attacked)]
    for key, victim, told in zip(first["key"], first["victim"], first["late_progress"], strict=True):
        try:
            here = late_progress(store.trace(key, victim))
        except GradleakError:
            if not math.isnan(told):
                wrong.append(f"{attacked[key].title}: victim {victim} has late progress but no trace")
            continue
        checked += 1
        known = math.nan if here is None else here
        if not (math.isnan(told) and math.isnan(known)) and not abs(told - known) <= 1e-9:
            wrong.append(f"{attacked[key].title}: victim {victim}: late progress {told:.4g}, {known:.4g} by its trace")
    return judged("traces", wrong, f"{checked} victims' losses fell as late as it is said")
