"""The tuning victims that plugins are checked on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import registry, seeds
from ..dataset import Data, Dataset, Images, Split
from ..threat import Observation

VICTIMS = 3


@dataclass(frozen=True)
class Ask:
    """What a plugin is checked with, where that is not the usual."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """The plugin's own."""
    dataset: str = ""
    model: str = ""
    shape: tuple[int, int, int] | None = None
    """(C, H, W) of random images that take the place of a dataset's."""
    root: Path | None = None
    """The data root."""

    def data(self, usual: str) -> Data:
        """Return the images to attack; `usual` names the dataset unless one was asked for."""
        if self.shape is not None:
            return Data(_Random(shape=self.shape), "random images")
        name = self.dataset or usual
        return Data(registry.build("datasets", name), name, self.root)


@dataclass(frozen=True, kw_only=True)
class _Random(Dataset):
    """Uniform noise in ten classes."""

    reference = "gradleak"
    shape: tuple[int, int, int]

    def read(self, root: Path | None, download: bool) -> Split:
        stream = seeds.generator("random images", *self.shape)
        images, labels = torch.rand(160, *self.shape, generator=stream), torch.arange(160) % 10
        public, private = (Images(images[part], labels[part]) for part in (slice(0, 80), slice(80, 160)))
        return Split(public, private, tuple(map(str, range(10))))


def tuning_victims(data: Data, batch_size: int) -> tuple[Tensor, Tensor]:
    """Images [N, B, C, H, W] in float64 and labels [N, B] of tuning victims."""
    chosen = data.split.test[data.victim_indices(VICTIMS, batch_size, tuning=True)]
    return chosen.images.double(), chosen.labels


def tensors_of(observation: Observation) -> dict[str, Tensor]:
    """Copies of every tensor that an attack is handed."""
    network = observation.network
    groups = {
        "message": observation.message,
        "update": observation.update,
        "parameters": network.parameters,
        "buffers": network.buffers,
        "private": observation.private or {},
        "state": dict(network.module.state_dict()),
    }
    return {f"{group}.{name}": t.detach().clone() for group, items in groups.items() for name, t in items.items()}
