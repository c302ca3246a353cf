"""What follows from the messages, which clients send again here: norms, bytes, guarantees, labels, losses.

Messages need no attack, so this is done for every cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ... import suite
from ...board.provenance import Provenance
from ...board.schema import REFUSED
from ...board.store import Store
from ...errors import GradleakError
from ...federation.client import Sent
from ...federation.serving import Round
from ...suite import UTILITY, AttackCell, Cell, TrainingCell
from ...threat import Observation
from ...update import one_hot
from .. import landscape
from ..apart import Apart
from ..evaluate import Stage, stage
from ..identity import identity
from ..losses import losses_of
from ..observe import isolated
from ..score import norms_of
from ..workshop import Workshop
from .findings import Finding, Say, judged
from .rounding import BYTES, LOSS, NORM, Floats, Shaken, unexplained
from .stored import UNSCORED

MEASURED = ("client_seconds",)
"""Facts that no other machine repeats (`seconds`)."""
CONTRAST = 1e-5
"""Rounding of a cosine distance between two updates."""
OF_THE_MODEL = "model_accuracy"
"""A fact that training may move by rounding."""
OF_THE_ANSWER = ("backend", "backend_reason", "width")
"""Facts of the attack's run, known where a cell is run again."""
TRAINED = ("test_accuracy", "validation_accuracy", "lr", "bytes", "dense_bytes")
"""Facts that only training again shows."""
ROUNDED = {"bytes": BYTES}
"""How far facts may be off, relatively."""
IMAGES = 2
"""Test images by which an accuracy may differ; measured: none."""


@dataclass
class Measured:
    """What sending the messages again tells other checks."""

    scale: dict[str, Floats]
    """By key, each victim's loss at a grey image, against which others are rounded."""
    suspicious: list[str]
    """Keys whose loss does not follow from the reconstruction; running again decides."""
    seconds: dict[str, float]
    """By key, the time of a client for one message."""


@dataclass(frozen=True)
class Heard:
    """A round as its attacker faces it, with the truth."""

    victims: list[int]
    observation: Observation
    sent: Sent
    images: Tensor
    labels: Tensor
    refused: tuple[bool, ...]


class Scene:
    """What the victims of a cell send, and twins of it whose weights are shaken."""

    def __init__(self, cell: AttackCell, workshop: Workshop, apart: Apart | None = None) -> None:
        """Let the clients send; a plugin's losses are asked with `apart`."""
        self._losses_of = losses_of(cell, apart)
        self.cell = cell
        self._workshop = workshop
        self._stages: dict[int, tuple[Stage, list[Heard]]] = {}

    @property
    def stage(self) -> Stage:
        """What the clients send from the weights as they are."""
        return self._of(0)[0]

    @property
    def mean(self) -> Tensor:
        """The mean public image, [C, H, W]."""
        return self.stage.data.mean

    def accuracy(self, number: int = 0) -> float:
        """Return the accuracy of the agreed model of a twin."""
        return self._of(number)[0].accuracy

    def heard(self, number: int = 0) -> list[Heard]:
        """Return the rounds of a twin; the first is the plain one."""
        return self._of(number)[1]

    def each(self, of: Callable[[Heard], Floats | None], number: int = 0) -> Floats:
        """Return what is found for each victim, [N]; NaN where nothing is."""
        values = np.full(self.cell.victims, math.nan)
        for part in self.heard(number):
            found = of(part)
            if found is not None:
                values[part.victims] = found
        return values

    def loss(self, part: Heard, images: Tensor, targets: Tensor, buffers: bool | None = None) -> Floats | None:
        """Return the attack's own loss at some images, with or without the clients' private randomness.

        Unset, an attacker has it who is told of it. None where the attack has no loss.
        """
        told = part.observation.private is not None if buffers is None else buffers
        try:
            found = self._losses_of(part.observation, {"": images}, targets, part.sent.buffers if told else {})[""]
        except Exception:  # The evaluator keeps no loss either where a plugin raises.
            return None
        return None if found is None else np.asarray(found.detach().cpu().double().numpy())

    def _of(self, number: int) -> tuple[Stage, list[Heard]]:
        if number not in self._stages:
            workshop = self._workshop if number == 0 else Shaken(self._workshop.resources, number)
            found = stage(self.cell, workshop)
            self._stages[number] = found, [self._heard(found, each) for each in found.rounds]
        return self._stages[number]

    def _heard(self, found: Stage, each: Round) -> Heard:
        rows, observation = list(each.victims), found.observation(each)
        size = observation.batch_size
        images, labels = found.images[rows][:, :size], found.labels[rows][:, :size]
        silent = self.cell.built_attack.family != "control"
        refused = tuple(silent and refused for refused in each.refused) or (False,) * len(rows)
        return Heard(rows, observation, each.sent.of_first(size), images, labels, refused)


def check(
    store: Store,
    attacked: Mapping[str, AttackCell],
    cells: pd.DataFrame,
    rows: pd.DataFrame,
    workshop: Workshop,
    apart: Apart | None,
    say: Say,
) -> tuple[list[Finding], Measured]:
    """Let the clients of every cell send again and compare what was said of it.

    Args:
        store: the bundle's.
        attacked: finished cells that attack.
        cells: of the store.
        rows: of the store.
        workshop: of this machine.
        apart: runs what others' attacks say of their losses.
        say: told how far it is.
    """
    found: dict[str, list[str]] = {name: [] for name in ("messages", "facts", "losses")}
    here = Measured({}, [], {})
    told = dict(zip(cells["key"], cells["provenance"], strict=True))
    groups = {str(key): part.sort_values(["victim", "image"]) for key, part in rows.groupby("key")}
    for number, (key, cell) in enumerate(sorted(attacked.items(), key=lambda item: item[1].title), start=1):
        say(f"messages and losses: cell {number} of {len(attacked)}")
        scene = Scene(cell, workshop, apart)
        known = scene.stage.facts(None)
        here.seconds[key] = known.client_seconds or 0.0
        found["facts"] += [
            f"{cell.title}: {wrong}" for wrong in (*facts(known, told[key]), *_accuracy(scene, told[key]))
        ]
        lines = groups.get(key)
        if lines is None or len(lines) != cell.victims * cell.setting.batch_size:
            continue
        found["messages"] += [f"{cell.title}: {wrong}" for wrong in _norms(scene, lines)]
        wrong, scale, follows = _losses(store, scene, lines)
        found["losses"] += [f"{cell.title}: {each}" for each in wrong]
        if scale is not None:
            here.scale[key] = scale
        if not follows:
            here.suspicious.append(key)
    count = len(attacked)
    right = {
        "messages": f"norms of {count} cells' messages, to rounding",
        "facts": f"bytes, guarantees, families and levels of {count} cells",
        "losses": f"at the truth, and where one gradient tells it at the answer, of {len(here.scale)} cells",
    }
    return [judged(name, found[name], right[name]) for name in found], here


def facts(here: Provenance, told: Mapping[str, Any]) -> Iterator[str]:
    """Say which stored facts of a finished cell are not those of its messages."""
    yield from _compared(told, suite.plain(here.stored()), (*MEASURED, OF_THE_MODEL, *OF_THE_ANSWER))


def _accuracy(scene: Scene, told: Mapping[str, Any]) -> Iterator[str]:
    stored = np.array([told.get(OF_THE_MODEL, math.nan)], dtype=float)
    unit = IMAGES / len(scene.stage.data.split.test)
    wrong = unexplained(stored, lambda number: np.array([scene.accuracy(number)]), unit)
    if wrong is not None:
        yield f"{OF_THE_MODEL}: {wrong}"


def facts_of_failed(cell: Cell, told: Mapping[str, Any]) -> Iterator[str]:
    """Say which stored facts of a failed cell are not its own."""
    yield from _compared(told, identity(cell).stored() if isinstance(cell, AttackCell) else {}, ())


def promises(cell: TrainingCell, told: Mapping[str, Any], workshop: Workshop) -> Iterator[str]:
    """Say which stored facts of a training do not follow from its recipe; its accuracy and bytes need the training."""
    validation, lr = told.get("validation_accuracy"), told.get("lr")
    if isinstance(validation, Mapping) and validation:
        best = max(validation, key=lambda rate: validation[rate])
        if lr is None or validation.get(f"{lr:g}") != validation[best]:
            yield f"rate {lr}, but {best} was the best on images held out"
    taken = cell.recipe.participations(len(workshop.data(cell.dataset).split.train))
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
            if abs(stored - here) <= ROUNDED[name] * abs(here):
                continue
        elif stored == here:
            continue
        yield f"{name} {stored}, {here} here"


def _norms(scene: Scene, lines: pd.DataFrame) -> Iterator[str]:
    size = scene.cell.setting.batch_size
    stored = lines["message_norm"].to_numpy(dtype=float).reshape(-1, size)
    silent = (lines["status"] == REFUSED).to_numpy().reshape(-1, size)

    def own(number: int) -> Floats:
        def norms(part: Heard) -> Floats:
            return np.where(part.refused, math.nan, norms_of(part.sent.message))

        return scene.each(norms, number)

    if (silent != scene.each(lambda part: np.array(part.refused, dtype=float))[:, None]).any():
        yield "other victims refused to send"
    elif not ((stored == stored[:, :1]) | np.isnan(stored)).all():
        yield "images of one victim have several messages"
    elif (wrong := unexplained(stored[:, 0], own, NORM * np.nan_to_num(own(0)) + 1e-12)) is not None:
        yield f"norm of the message: {wrong}"


def _losses(store: Store, scene: Scene, lines: pd.DataFrame) -> tuple[list[str], Floats | None, bool]:
    """Return what is wrong with a cell's losses, their scale, and whether the answer's follow from its images."""
    cell = scene.cell
    names = ("loss", "loss_at_truth", "loss_at_mean", "contrast", "finite")
    told = {name: lines[name].to_numpy(dtype=float).reshape(cell.victims, -1)[:, 0] for name in names}
    wrong = [_contrast(scene, told)]
    scale = scene.each(lambda part: scene.loss(part, torch.full_like(part.sent.images, 0.5), part.sent.targets))
    if np.isnan(scale).all() or isolated(cell):
        unknown = ("loss_at_truth", "loss_at_mean")
        wrong += [f"{name.replace('_', ' ')}, none here" for name in unknown if not np.isnan(told[name]).all()]
        return [each for each in wrong if each], None, True
    if not cell.built_attack.observes_other_victim:
        wrong += [_at(name, scene, told, scale) for name in ("loss_at_truth", "loss_at_mean")]
    found = [each for each in wrong if each]
    answer = _loss_at_answer(store, scene, lines)
    if answer is None:
        return found, scale, True
    gap = np.abs(answer - told["loss"]) > LOSS * np.maximum(np.abs(scale), np.abs(answer))
    return found, scale, not bool(gap.any() or np.isnan(told["loss"]).any())


def _at(name: str, scene: Scene, told: Mapping[str, Floats], scale: Floats) -> str | None:
    """Say what is wrong with the losses at the truth, or at the mean public image, of the victims with an answer.

    Private randomness counts in them where the attack guesses it, which only its answer tells: either is right.
    """
    answered, wrong = ~np.isnan(told["finite"]), None
    for buffers in (True, False) if any(part.sent.buffers for part in scene.heard()) else (False,):

        def at(part: Heard, buffers: bool = buffers) -> Floats | None:
            images = part.sent.images if name == "loss_at_truth" else landscape.mean_of(scene.mean, part.sent)
            return None if images is None else scene.loss(part, images, part.sent.targets, buffers)

        def own(number: int, at: Callable[[Heard], Floats | None] = at) -> Floats:
            return np.where(answered, scene.each(at, number), math.nan)

        first = np.nan_to_num(np.abs(own(0)))
        wrong = unexplained(told[name], own, LOSS * np.maximum(np.abs(np.nan_to_num(scale)), first))
        if wrong is None:
            return None
    return f"{name.replace('_', ' ')}: {wrong}"


def _contrast(scene: Scene, told: Mapping[str, Floats]) -> str | None:
    def of(part: Heard) -> Floats | None:
        found = landscape.contrast(scene.cell, part.observation, part.sent, scene.mean)
        return None if found is None else np.asarray(found.cpu().numpy())

    def own(number: int) -> Floats:
        return np.where(np.isnan(told["finite"]), math.nan, scene.each(of, number))

    wrong = unexplained(told["contrast"], own, CONTRAST)
    return None if wrong is None else f"contrast: {wrong}"


def _loss_at_answer(store: Store, scene: Scene, lines: pd.DataFrame) -> Floats | None:
    """Return the attack's loss [N] at the kept images; None where its labels, or more than they, are not known.

    Attacks keep no labels. They are known where they are said to be all right, and clients train on the images as they
    are, each with its label.
    """
    cell, size, classes = scene.cell, scene.cell.setting.batch_size, scene.stage.data.classes
    if not (lines["label_correct"] == 1).all() or lines["status"].isin((UNSCORED, REFUSED)).any():
        return None
    try:
        kept = torch.as_tensor(np.stack([store.reconstruction(cell.key, victim) for victim in range(cell.victims)]))
    except (GradleakError, ValueError):
        return None
    matched = torch.as_tensor(lines["matched"].to_numpy(dtype=int).reshape(cell.victims, size))
    if not all(sorted(row) == list(range(size)) for row in matched.tolist()):
        return None
    values = np.full(cell.victims, math.nan)
    for part in scene.heard():
        plain = torch.stack([one_hot(labels, classes, part.images.dtype) for labels in part.labels])
        sent, images = part.sent, kept[part.victims].to(part.images)
        as_they_are = sent.images.shape == part.images.shape and torch.equal(sent.images, part.images)
        if sent.buffers or part.observation.batch_size != size or not as_they_are or images.shape != part.images.shape:
            return None
        if not torch.equal(sent.targets, plain):
            return None
        order = matched[part.victims][:, :, None].expand_as(plain).to(plain.device)
        found = scene.loss(part, images, torch.zeros_like(plain).scatter_(1, order, plain))
        if found is not None:
            values[part.victims] = found
    return values
