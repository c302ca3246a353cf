"""What follows from the messages, which clients send again here: norms, bytes, guarantees, labels, losses.

Messages need no attack, so this is done for every cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ... import suite
from ...board.store import Store
from ...errors import GradleakError
from ...federation import utility
from ...suite import UTILITY, AttackCell, Cell, TrainingCell
from ...update import one_hot
from .. import landscape
from ..evaluate import Stage, stage
from ..identity import identity, provenance
from ..score import norms_of
from ..workshop import Workshop
from .findings import Finding, Say, judged
from .rounding import BYTES, LOSS, NORM, Floats, Shaken, unexplained

MEASURED = ("client_seconds",)
"""Facts that no other machine repeats; they stay as submitted."""
CONTRAST = 1e-5
"""Rounding of a cosine distance between two updates."""
OF_THE_ANSWER = ("backend", "backend_reason")
"""Facts of the attack's run, known where a cell is run again."""
TRAINED = ("test_accuracy", "validation_accuracy", "lr", "bytes", "dense_bytes")
"""Facts that only training again shows."""
ROUNDED = {"bytes": BYTES, "model_accuracy": 0.02}
"""How far facts may be off: relatively, and for an accuracy by so much."""


@dataclass
class Losses:
    """What the losses of cells say."""

    scale: dict[str, Floats]
    """By key, each victim's loss at a grey image, against which others are rounded."""
    suspicious: list[str]
    """Keys whose loss does not follow from the reconstruction; running again decides."""


def check(
    store: Store,
    attacked: Mapping[str, AttackCell],
    cells: pd.DataFrame,
    rows: pd.DataFrame,
    workshop: Workshop,
    say: Say,
) -> tuple[list[Finding], Losses]:
    """Let the clients of every cell send again and compare what was said of it.

    Args:
        store: the bundle's.
        attacked: finished cells that attack.
        cells: of the store.
        rows: of the store.
        workshop: of this machine.
        say: told how far it is.
    """
    found: dict[str, list[str]] = {name: [] for name in ("messages", "facts", "losses")}
    losses = Losses({}, [])
    told = dict(zip(cells["key"], cells["provenance"], strict=True))
    groups = {str(key): part.sort_values(["victim", "image"]) for key, part in rows.groupby("key")}
    for number, (key, cell) in enumerate(sorted(attacked.items(), key=lambda item: item[1].title), start=1):
        say(f"messages and losses: cell {number} of {len(attacked)}")
        here = stage(cell, workshop)
        found["facts"] += [f"{cell.title}: {wrong}" for wrong in facts(cell, here, told[key])]
        lines = groups.get(key)
        if lines is None or len(lines) != cell.victims * cell.setting.batch_size:
            continue
        found["messages"] += [f"{cell.title}: {wrong}" for wrong in _norms(cell, here, lines, workshop)]
        wrong, scale, follows = _losses(store, cell, here, lines, workshop)
        found["losses"] += [f"{cell.title}: {each}" for each in wrong]
        if scale is not None:
            losses.scale[key] = scale
        if not follows:
            losses.suspicious.append(key)
    count = len(attacked)
    right = {
        "messages": f"norms of {count} cells' messages, to rounding",
        "facts": f"bytes, guarantees, families and levels of {count} cells",
        "losses": f"at the truth, and where one gradient tells it at the answer, of {len(losses.scale)} cells",
    }
    return [judged(name, found[name], right[name]) for name in found], losses


def facts(cell: AttackCell, here: Stage, told: Mapping[str, Any]) -> Iterator[str]:
    """Say which stored facts of a finished cell are not those of its messages."""
    known = suite.plain(provenance(cell, here.sent, here.accuracy, None))
    yield from _compared(told, known, (*MEASURED, *OF_THE_ANSWER))


def facts_of_failed(cell: Cell, told: Mapping[str, Any]) -> Iterator[str]:
    """Say which stored facts of a failed cell are not its own."""
    yield from _compared(told, identity(cell) if isinstance(cell, AttackCell) else {}, ())


def promises(cell: TrainingCell, told: Mapping[str, Any], workshop: Workshop) -> Iterator[str]:
    """Say which stored facts of a training do not follow from its recipe; its accuracy and bytes need the training."""
    validation, lr = told.get("validation_accuracy"), told.get("lr")
    if isinstance(validation, Mapping) and validation:
        best = max(validation, key=lambda rate: validation[rate])
        if lr is None or validation.get(f"{lr:g}") != validation[best]:
            yield f"rate {lr}, but {best} was the best on images held out"
    taken = utility.participations(workshop.data(cell.dataset), cell.recipe)
    guarantee = cell.built_defense.run_guarantee(cell.recipe.setting(), 1.0, taken)
    known = {
        "attack_family": UTILITY,
        "defense_family": cell.built_defense.family,
        "participations": taken,
        "training_epsilon": None if guarantee is None else suite.plain(asdict(guarantee)),
    }
    yield from _compared(told, known, TRAINED)


def _compared(told: Mapping[str, Any], known: Mapping[str, Any], unchecked: tuple[str, ...]) -> Iterator[str]:
    for name in sorted(told.keys() | known.keys()):
        if name in unchecked:
            continue
        stored, here = told.get(name, "absent"), known.get(name, "absent")
        if name in ROUNDED and isinstance(stored, int | float) and isinstance(here, int | float):
            if abs(stored - here) <= ROUNDED[name] * (abs(here) if name == "bytes" else 1):
                continue
        elif stored == here:
            continue
        yield f"{name} {stored}, {here} here"


def _norms(cell: AttackCell, here: Stage, lines: pd.DataFrame, workshop: Workshop) -> Iterator[str]:
    stored = lines["message_norm"].to_numpy(dtype=float).reshape(cell.victims, -1)

    def own(number: int) -> Floats:
        again = here if number == 0 else stage(cell, Shaken(workshop.resources, number))
        return np.array(norms_of(again.sent.message))

    if (stored != stored[:, :1]).any():
        yield "images of one victim have several messages"
    elif (wrong := unexplained(stored[:, 0], own, NORM * own(0) + 1e-12)) is not None:
        yield f"norm of the message: {wrong}"


def _losses(
    store: Store, cell: AttackCell, here: Stage, lines: pd.DataFrame, workshop: Workshop
) -> tuple[list[str], Floats | None, bool]:
    """Return what is wrong with a cell's losses, their scale, and whether the answer's follow from its images."""
    names = ("loss", "loss_at_truth", "loss_at_mean", "contrast", "finite")
    told = {name: lines[name].to_numpy(dtype=float).reshape(cell.victims, -1)[:, 0] for name in names}
    wrong = [_contrast(cell, here, told, workshop)]
    scale = _loss(cell, here, torch.full_like(here.sent.images, 0.5), here.sent.targets)
    if scale is None:
        unknown = ("loss_at_truth", "loss_at_mean")
        wrong += [f"{name.replace('_', ' ')}, none here" for name in unknown if not np.isnan(told[name]).all()]
        return [each for each in wrong if each], None, True
    if not cell.built_attack.observes_other_victim:
        wrong += [_at(name, cell, here, told, scale, workshop) for name in ("loss_at_truth", "loss_at_mean")]
    found = [each for each in wrong if each]
    answer = _loss_at_answer(store, cell, here, lines)
    if answer is None:
        return found, scale, True
    gap = np.abs(answer - told["loss"]) > LOSS * np.maximum(np.abs(scale), np.abs(answer))
    return found, scale, not bool(gap.any() or np.isnan(told["loss"]).any())


def _at(
    name: str, cell: AttackCell, here: Stage, told: Mapping[str, Floats], scale: Floats, workshop: Workshop
) -> str | None:
    """Say what is wrong with the losses at the truth, or at the mean public image, of the victims with an answer.

    Private randomness counts in them where the attack guesses it, which only its answer tells: either is right.
    """
    answered = ~np.isnan(told["finite"])
    wrong = None
    for buffers in (True, False) if here.sent.buffers else (False,):

        def own(number: int, buffers: bool = buffers) -> Floats:
            again = here if number == 0 else stage(cell, Shaken(workshop.resources, number))
            images = (
                again.sent.images
                if name == "loss_at_truth"
                else landscape.mean_of(again.data.split.train.images.mean(0), again.sent)
            )
            found = None if images is None else _loss(cell, again, images, again.sent.targets, buffers)
            return np.full(cell.victims, math.nan) if found is None else np.where(answered, found, math.nan)

        first = np.nan_to_num(np.abs(own(0)))
        wrong = unexplained(told[name], own, LOSS * np.maximum(np.abs(scale), first))
        if wrong is None:
            return None
    return f"{name.replace('_', ' ')}: {wrong}"


def _contrast(cell: AttackCell, here: Stage, told: Mapping[str, Floats], workshop: Workshop) -> str | None:
    def own(number: int) -> Floats:
        again = here if number == 0 else stage(cell, Shaken(workshop.resources, number))
        found = landscape.contrast(cell, again.observation, again.sent, again.data.split.train.images.mean(0))
        values = np.full(cell.victims, math.nan) if found is None else found.cpu().numpy()
        return np.where(np.isnan(told["finite"]), math.nan, values)

    wrong = unexplained(told["contrast"], own, CONTRAST)
    return None if wrong is None else f"contrast: {wrong}"


def _loss_at_answer(store: Store, cell: AttackCell, here: Stage, lines: pd.DataFrame) -> Floats | None:
    """Return the attack's loss [N] at the kept images; None where its labels, or more than they, are not known.

    Attacks keep no labels. They are known where they are said to be all right, and clients train on the images as they
    are, each with its label.
    """
    sent, size = here.sent, cell.setting.batch_size
    plain = torch.stack([one_hot(labels, here.data.classes, here.images.dtype) for labels in here.labels])
    as_they_are = sent.images.shape == here.images.shape and torch.equal(sent.images, here.images)
    if sent.buffers or here.observation.batch_size != size or not as_they_are or not torch.equal(sent.targets, plain):
        return None
    if not (lines["label_correct"] == 1).all() or (lines["status"] == "invalid").any():
        return None
    try:
        kept = np.stack([store.reconstruction(cell.key, victim) for victim in range(cell.victims)])
    except (GradleakError, ValueError):
        return None
    matched = torch.as_tensor(lines["matched"].to_numpy(dtype=int).reshape(cell.victims, size))
    if kept.shape != tuple(here.images.shape) or not all(set(row) == set(range(size)) for row in matched.tolist()):
        return None
    targets = torch.zeros_like(plain).scatter_(1, matched[:, :, None].expand_as(plain).to(plain.device), plain)
    return _loss(cell, here, torch.as_tensor(kept).to(here.images), targets)


def _loss(cell: AttackCell, here: Stage, images: Tensor, targets: Tensor, buffers: bool | None = None) -> Floats | None:
    """Return the attack's own loss [N] at some images, with or without the clients' private randomness.

    Unset, an attacker has it who is told of it. None where the attack has no loss.
    """
    told = here.observation.private is not None if buffers is None else buffers
    try:
        found = cell.built_attack.loss(here.observation, images, targets, here.sent.buffers if told else {})
    except Exception:  # The evaluator keeps no loss either where a plugin raises.
        return None
    return None if found is None else np.asarray(found.detach().cpu().double().numpy())
