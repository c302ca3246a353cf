"""One combination of dataset, model, setting and defense, tried on its victims before anything runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from ...dataset import Data
from ...defense import Defense
from ...errors import GradleakError
from ...federation import client
from ...suite import Cell, build_defense_of, build_setting
from ...threat import Setting
from ..workshop import Resources, data_of, described, untrained
from . import clients

log = logging.getLogger(__name__)

_TRIED = 16
"""Victims that are tried at most."""


def mark_of(cell: Cell) -> str:
    """Return what a combination is told from others by: all that a client depends on, but for its weights' values."""
    config = cell.config
    setting = {name: value for name, value in config["setting"].items() if name not in ("name", "epochs", "grants")}
    parts = [{key: value for key, value in config[axis].items() if key != "label"} for axis in _AXES]
    return json.dumps([*parts, setting, config["victims"], config["tuning"]], sort_keys=True)


_AXES = ("dataset", "model", "defense")


def private(data: Data, config: Mapping[str, Any], setting: Setting, defense: Defense) -> None:
    """Refuse victims that there are not, or that the attacker's public images hold too.

    Raises:
        GradleakError: more victims are asked for than the dataset holds, or one of them is in its train split.
    """
    asked = config["victims"] * defense.cohort
    indices = data.victim_indices(asked, setting.batch_size, config["tuning"]).flatten()
    copies = data.split.copies(indices)
    if len(copies):
        raise GradleakError(
            f"dataset {data.name!r}: {len(copies)} of {len(indices)} private images are public too, byte for byte (the "
            f"first is number {int(copies[0])} of the test split); remove the copies from one of the splits"
        )


def check(cell: Cell, resources: Resources) -> None:
    """Try a combination with untrained weights on the CPU.

    Raises:
        GradleakError: its model or its client is no function, or leaves nothing to attack.
    """
    config = cell.config
    defense, setting = build_defense_of(config["defense"]), build_setting(config["setting"])
    data = data_of(config["dataset"], resources)
    model, title = config["model"]["label"], config["defense"]["label"]
    where = f"model {model!r} on dataset {data.name!r} in setting {setting.name!r} under defense {title!r}"
    module = untrained(json.dumps(config["model"], sort_keys=True), data.shape, data.classes)
    count = min(config["victims"], _TRIED)
    images, labels = data.cohorts(count, setting.batch_size, 1, config["tuning"])
    # As many public images as a victim has, over and over where there are fewer.
    public = data.split.train.images
    others = public.repeat(-(-setting.batch_size // len(public)), 1, 1, 1)[: setting.batch_size]
    try:
        network = client.client_network(module, defense, setting)
        reason = clients.refusal(
            network, images.to(setting.dtype), labels, others.to(setting.dtype), data.classes, defense, setting
        )
    except GradleakError as error:
        raise GradleakError(f"{where}: {error}") from error
    except Exception as error:
        raise GradleakError(f"{where}: {described(error, resources)}") from error
    if reason is not None:
        raise GradleakError(f"{where}: {reason}")
