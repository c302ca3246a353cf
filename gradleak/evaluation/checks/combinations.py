"""One combination of dataset, model, setting and defense, tried on its victims before anything runs."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor

from ...dataset import Data
from ...errors import GradleakError
from ...federation import client
from ...repeated import Repeated, refusal
from ...suite import AttackCell
from ...threat import Knowledge
from ...update import Network, one_hot
from ..workshop import Workshop
from . import clients

log = logging.getLogger(__name__)

_TRIED = 16
"""Victims that are tried at most."""


def mark_of(cell: AttackCell) -> Hashable:
    """Return what makes a combination its own: all that a client depends on except the values of its weights."""
    setting = replace(cell.setting, name="", epochs=0, after_rounds=0, grants=Knowledge())
    return cell.dataset, cell.model, cell.defense, setting, cell.victims, cell.tuning


def private(data: Data, cell: AttackCell) -> None:
    """Refuse victims that do not exist, or that are among the attacker's public images.

    Raises:
        GradleakError: more victims are asked for than the dataset holds, or one of them is in its train split.
    """
    asked = cell.victims * cell.built_defense.cohort
    indices = data.victim_indices(asked, cell.setting.batch_size, cell.tuning).flatten()
    copies = data.split.copies(indices)
    if len(copies):
        raise GradleakError(
            f"dataset {data.name!r}: {len(copies)} of {len(indices)} private images are public too, byte for byte (the "
            f"first is number {int(copies[0])} of the test split); remove the copies from one of the splits"
        )


def check(cell: AttackCell, workshop: Workshop) -> None:
    """Try a combination with untrained weights on the CPU.

    Raises:
        GradleakError: its model or its client is no function, or leaves nothing to attack.
    """
    defense, setting, data = cell.built_defense, cell.setting, workshop.data(cell.dataset)
    model, title = cell.model.label, cell.defense.label
    where = f"model {model!r} on dataset {data.name!r} in setting {setting.name!r} under defense {title!r}"
    module = workshop.untrained(cell.model, data.shape, data.classes)
    images, labels = data.cohorts(min(cell.victims, _TRIED), setting.batch_size, 1, cell.tuning)
    others = _public(data, setting.batch_size)
    try:
        network = client.client_network(module, defense, setting)
        reason = clients.refusal(
            network, images.to(setting.dtype), labels, others.to(setting.dtype), data.classes, defense, setting
        )
    except GradleakError as error:
        raise GradleakError(f"{where}: {error}") from error
    except Exception as error:
        raise GradleakError(f"{where}: {workshop.described(error)}") from error
    if reason is not None:
        raise GradleakError(f"{where}: {reason}")


def rounds(network: Network, data: Data, cell: AttackCell) -> str | None:
    """Say why several messages of a client are not modelled under a cell's defense, or None."""
    assert isinstance(cell.built_defense, Repeated)
    size, dtype = cell.setting.batch_size, cell.setting.dtype
    targets = one_hot(torch.arange(size) % data.classes, data.classes, dtype)
    images = _public(data, size).to(dtype)
    return refusal(cell.built_defense.defense, network.module, dict(network.parameters), images, targets)


def _public(data: Data, size: int) -> Tensor:
    """Return as many public images as a victim has, over and over where there are fewer."""
    public = data.split.train.images
    return public.repeat(-(-size // len(public)), 1, 1, 1)[:size]
