"""A cell: one point of a grid, its key, and the plugins that its configuration names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import registry
from ..errors import GradleakError, unknown

if TYPE_CHECKING:
    from ..attack import Attack
    from ..defense import Defense


UTILITY = "utility"
"""What stands for the attack in a cell that trains a model under a defense, and attacks nobody."""


@dataclass(frozen=True)
class Cell:
    """One point of a grid over its list of victims: a key, and everything that the key stands for."""

    key: str
    config: dict[str, Any]
    optional: bool = False
    """Whether it is left out where its attack cannot run on its model, instead of refused."""

    @property
    def place(self) -> tuple[str, str, str, str, str]:
        """Labels of attack, defense, model, dataset and setting, as tables have them."""
        attack, defense, model, dataset = (
            self.config[axis]["label"] for axis in ("attack", "defense", "model", "dataset")
        )
        tuning = bool(self.config.get("tuning"))
        return attack, defense, model, dataset_label(dataset, tuning), self.config["setting"]["name"]

    def left_out(self, reason: str) -> LeftOut:
        """Return the note that its attack does not apply."""
        return LeftOut(*self.place, self.config["knowledge"], reason)

    @property
    def title(self) -> str:
        """One line for progress and errors."""
        config = self.config
        parts = [config[axis]["label"] for axis in ("attack", "defense", "model", "dataset")]
        if not self.is_utility:
            parts += [config["setting"]["name"], config["knowledge"]]
        return " · ".join([*parts, f"seed {config['seed']}"])

    @property
    def is_utility(self) -> bool:
        """Whether it trains a model under the defense instead of attacking it."""
        return bool(self.config["attack"]["name"] == UTILITY)


@dataclass(frozen=True)
class LeftOut:
    """A combination of a grid that is not run, by its labels, and why."""

    attack: str
    defense: str
    model: str
    dataset: str
    setting: str
    knowledge: str
    """Empty for all levels."""
    reason: str
    chosen: bool = False
    """Whether the suite leaves it out by its own choice; else the attack does not apply."""


Note = Callable[[LeftOut], None]
"""Told of every combination that is left out."""


def unnoted(found: LeftOut) -> None:
    """Note nothing."""


def dataset_label(label: str, tuning: bool) -> str:
    """Return what tables call a dataset: its tuning victims are a list of their own."""
    return f"{label} (tuning victims)" if tuning else label


def build_defense(name: str, options: Mapping[str, Any], where: str = "") -> Defense:
    """Return a defense; `a + b` chains several, whose options are keyed by their names."""
    parts = [part.strip() for part in name.split("+")]
    if len(parts) == 1:
        defense: Defense = registry.build("defenses", name, options, where)
        return defense
    from ..chain import Chain

    for key in options:
        if key not in parts:
            raise unknown(f"part of {name!r}", key, parts, where)
    chained: Defense = Chain(tuple(registry.build("defenses", part, options.get(part, {}), where) for part in parts))
    return chained


def code_of_file(group: str, name: str) -> dict[str, str]:
    """Return the hash of the code that a plugin file brought, of all parts of a chain; nothing for other plugins."""
    codes = [registry.fingerprint(group, part.strip()) for part in name.split("+")]
    code = codes[0] if len(codes) == 1 else hashlib.sha256("+".join(codes).encode()).hexdigest()
    return {"file": code} if any(codes) else {}


def check_files(config: Mapping[str, Any]) -> None:
    """Refuse to compute a cell with other plugin files than those that it was made of.

    Raises:
        GradleakError: a file was changed, or another of the same name was given.
    """
    used = [(group, noun, config[noun]) for group, noun in registry.GROUPS.items()]
    if config.get("prior", {}).get("dataset"):
        used.append(("datasets", "dataset", config["prior"]["dataset"]))
    for group, noun, part in used:
        if part.get("file", "") != code_of_file(group, part["name"]).get("file", ""):
            raise GradleakError(f"{noun} {part['name']!r}: its plugin file is not the one of this cell")


def key_of(config: Mapping[str, Any]) -> str:
    """Hash of a resolved configuration, without what only names it (labels, setting name, suite)."""
    return hashlib.sha256(json.dumps(unnamed(config), sort_keys=True).encode()).hexdigest()[:32]


def unnamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration without labels, setting name and suite: all that a result may depend on."""
    kept = {key: value for key, value in config.items() if key != "suite"}
    for part, title in (*((axis, "label") for axis in ("attack", "defense", "model", "dataset")), ("setting", "name")):
        kept[part] = {key: value for key, value in kept[part].items() if key != title}
    return kept


def attack_and_defense(config: Mapping[str, Any]) -> tuple[Attack, Defense]:
    """Rebuild a cell's attack and defense from its configuration."""
    attack: Attack = registry.build("attacks", config["attack"]["name"], config["attack"]["options"])
    return attack, build_defense_of(config["defense"])


def build_defense_of(config: Mapping[str, Any]) -> Defense:
    """Rebuild a defense from a cell's `defense`."""
    name, options = config["name"], config["options"]
    if isinstance(options, list):
        parts = [part.strip() for part in name.split("+")]
        return build_defense(name, dict(zip(parts, options, strict=True)))
    return build_defense(name, options)
