"""Where clients who look at the model draw the line: at what honest models reach, untrained and during training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import seeds
from ..dataset import Data
from ..defense import Defense
from ..suite import Cell
from ..update import copied, one_hot
from .workshop import Workshop

CHECKPOINTS = (0, 1, 4, 16)
"""Epochs of training after which honest models are looked at, beside those of the setting; closest together at first,
where training changes a model most."""
BATCHES = 50
"""Batches of images on which each checkpoint is looked at, to set thresholds; as many others count false alarms."""


@dataclass(frozen=True)
class Threshold:
    """The suspicion above which a client refuses."""

    defense: Defense
    value: float
    """The suspicion that all but the allowed share of honest models stay within."""


@dataclass(frozen=True)
class Inspection:
    """How the clients of a cell look at models."""

    template: nn.Module
    thresholds: tuple[Threshold, ...]
    false_alarms: float
    """Share of further honest rounds that are refused."""
    rounds: int
    """How many these were."""

    def suspicious(self, module: nn.Module, images: Tensor, targets: Tensor) -> bool:
        """Whether any of the defenses refuses a model, for a client with these images and targets."""
        return any(
            not each.defense.inspect(module, self.template, images, targets) <= each.value for each in self.thresholds
        )


def inspection(cell: Cell, workshop: Workshop) -> Inspection | None:
    """Return how the clients of a cell look at models; None where they do not.

    Honest models are those of the cell's own seed; the images are tuning victims', which no model has seen and no
    board shows: half of them set thresholds, the others count false alarms.
    """
    defense = cell.built_defense
    if not defense.inspectors:
        return None
    return workshop.inspection(cell, lambda: _calibrated(cell, workshop))


def _calibrated(cell: Cell, workshop: Workshop) -> Inspection:
    setting, data, inspectors = cell.setting, workshop.data(cell.dataset), cell.built_defense.inspectors
    template = copied(workshop.network(cell, 0)[0]).to(setting.dtype)
    epochs = sorted({*CHECKPOINTS, setting.epochs})
    models = [copied(workshop.network(cell, epoch)[0]).to(setting.dtype) for epoch in epochs]
    first, second = _halves(data)
    seen = [
        [each.inspect(model, template, images, targets) for each in inspectors]
        for model, images, targets in _batches(cell, data, models, first, "thresholds")
    ]
    thresholds = tuple(
        Threshold(each, _line([row[number] for row in seen], each.false_alarms))
        for number, each in enumerate(inspectors)
    )
    found = Inspection(template, thresholds, math.nan, 0)
    refused = [
        found.suspicious(model, images, targets)
        for model, images, targets in _batches(cell, data, models, second, "false alarms")
    ]
    return Inspection(template, thresholds, sum(refused) / len(refused), len(refused))


def _line(suspicions: list[float], allowed: float) -> float:
    """Return the least suspicion that no more than the allowed share is above."""
    ordered = sorted(suspicions, reverse=True)
    return ordered[math.floor(allowed * len(ordered))]


def _halves(data: Data) -> tuple[Tensor, Tensor]:
    tuning = data.victim_indices(len(data.split.test) // 2, 1, tuning=True).flatten()
    return tuning[::2], tuning[1::2]


def _batches(
    cell: Cell, data: Data, models: list[nn.Module], pool: Tensor, purpose: str
) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """Yield every model with batches of the setting's size, drawn from a pool of test images, over and over."""
    size, dtype = cell.setting.batch_size, cell.setting.dtype
    stream = seeds.generator("inspection", purpose, data.name, cell.seed, size)
    for model in models:
        for _ in range(BATCHES):
            order = torch.randperm(len(pool), generator=stream).repeat(-(-size // len(pool)))[:size]
            chosen = data.split.test[pool[order]]
            yield model, chosen.images.to(dtype), one_hot(chosen.labels, data.classes, dtype)
