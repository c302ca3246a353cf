"""The tuning victims that plugins are checked on."""

from __future__ import annotations

from torch import Tensor

from ..dataset import Data
from ..threat import Observation

VICTIMS = 3


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
