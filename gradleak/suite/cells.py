"""A cell: one point of a grid, typed, with its key and the plugins that it names."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import registry
from ..errors import unknown
from ..secret import Secret
from .parts import DatasetPart, GivenPrior, LearnedPrior, Part, members, prior_of, taken
from .schema import UTILITY, Engine, Utility
from .settings import build_setting, stored_setting

if TYPE_CHECKING:  # What needs torch; suites are read without it.
    from ..attack import Attack
    from ..defense import Defense
    from ..server import Server
    from ..threat import Level, Setting


@dataclass(frozen=True)
class Draws:
    """What random numbers of an attacked cell may depend on: equal choices, equal draws.

    Names, labels, what is granted and the wording of code are no part of it.
    """

    messages: tuple[object, ...]
    """Of the round; without the attack, so that every attack faces the same messages."""
    clients: tuple[object, ...]
    """Of each client's private randomness: those and the secret, where there is one."""
    attack: tuple[object, ...]
    """Of the attack's streams; without the defense."""
    server: tuple[object, ...]
    """Of the model that the server sends; without attack and defense, which all face the same model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell(ABC):
    """One point of a grid. What it builds is built once; what is stored of it is plain data."""

    defense: Part
    model: Part
    dataset: DatasetPart
    setting: Setting
    seed: int
    suite: tuple[str, int | str] = ("", 1)
    """Name and version of the suite that asked for it; no part of the key."""
    optional: bool = False
    """Whether it is left out where its attack cannot run on its model, instead of refused; not stored."""

    @staticmethod
    def of(
        stored: Mapping[str, Any], optional: bool = False, secret: Secret | None = None
    ) -> AttackCell | TrainingCell:
        """Return the cell of a stored form.

        Args:
            stored: of a store.
            optional: see the field.
            secret: of that store; without it a cell that was drawn from one can be looked at, but not computed.

        Raises:
            GradleakError: a key is missing, or its value is of another kind.
        """
        attack = Part.of(taken(stored, "attack", dict))
        suite = taken(stored, "suite", dict, {})
        common: dict[str, Any] = {
            "defense": Part.of(taken(stored, "defense", dict)),
            "model": Part.of(taken(stored, "model", dict)),
            "dataset": DatasetPart.of(taken(stored, "dataset", dict)),
            "setting": build_setting(taken(stored, "setting", dict), "cell"),
            "seed": taken(stored, "seed", int),
            "suite": (suite.get("name", ""), suite.get("version", 1)),
            "optional": optional,
        }
        if attack.name == UTILITY:
            return TrainingCell(recipe=Utility.of(attack.options), version=attack.version, **common)
        return AttackCell.of_parts(attack, stored, common, secret)

    @abstractmethod
    def stored(self) -> dict[str, Any]:
        """Return all that the key stands for, and the names, as plain data."""

    @cached_property
    def key(self) -> str:
        """Hash of what is stored, without what only names it (labels, setting name, suite)."""
        return key_of(self.stored())

    @property
    @abstractmethod
    def title(self) -> str:
        """One line for progress and errors."""

    @property
    def context(self) -> str:
        """Model, dataset and setting in one line; a training under a defense has none of its own."""
        return " · ".join([self.model.label, self.dataset.label, self.setting.name])

    @cached_property
    def built_defense(self) -> Defense:
        """The defense."""
        return build_defense(self.defense.name, self.defense.options)

    @cached_property
    def built_server(self) -> Server:
        """The server."""
        server: Server = registry.build("servers", self.setting.server.name, self.setting.server.options)
        return server

    def check_code(self, root: Path | None = None) -> None:
        """Refuse to compute it with other code than it was made with; `root` is the data root.

        Raises:
            GradleakError: code or a file was changed, or differs on this machine.
        """
        sender = self.setting.server
        Part(sender.name, options=sender.options, code=sender.code).check_code("servers", root)
        for group, part in (("defenses", self.defense), ("models", self.model), ("datasets", self.dataset)):
            part.check_code(group, root)
        conduct = self.setting.client
        if conduct.name:
            Part(conduct.name, options=conduct.options, code=conduct.code).check_code("clients", root)

    def _stored_suite(self) -> dict[str, Any]:
        return {"name": self.suite[0], "version": self.suite[1]}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the cell alone: a worker builds its plugins itself."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True)
class Before:
    """The federated training, under a cell's own defense, that its model went through before the attacked round."""

    recipe: Utility
    """Its `rounds` are those of the setting's `after_rounds`."""
    epoch: int
    """Epoch of the attacked round, from 0, for what follows a schedule."""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Before:
        """Return what is stored.

        Raises:
            GradleakError: a key is missing, or its value is of another kind.
        """
        return cls(Utility.of(taken(stored, "recipe", dict)), taken(stored, "epoch", int))

    def stored(self) -> dict[str, Any]:
        """Return it as plain data, with the version of training."""
        return {"recipe": self.recipe.model_dump(exclude={"seeds"}), "epoch": self.epoch, "version": Utility.VERSION}


@dataclass(frozen=True, kw_only=True, eq=False)
class AttackCell(Cell):
    """A cell that attacks a list of victims."""

    attack: Part
    knowledge: Level
    """Of the defense."""
    victims: int
    tuning: bool = False
    """Whether these are tuning victims."""
    candidates: int = 100
    """Images among which re-identification must find the true one."""
    engine: Engine = field(default_factory=Engine)
    prior: LearnedPrior | GivenPrior | None = None
    """The generator that the attack is given."""
    before: Before | None = None
    """Training under the defense before the attacked round."""
    definitions: Mapping[str, Any] = field(default_factory=dict)
    """Versions of what every result depends on beside its plugins."""
    secret: Secret | None = None
    """What private randomness is drawn from; None in older stores, where the suite's seed alone decided it."""

    @classmethod
    def of_parts(
        cls, attack: Part, stored: Mapping[str, Any], common: Mapping[str, Any], secret: Secret | None = None
    ) -> AttackCell:
        """Return the cell of a stored form whose attack, and what all cells have, are read already.

        Raises:
            GradleakError: a key is missing, or its value is of another kind.
        """
        from ..threat import Level

        level = taken(stored, "knowledge", str)
        if level not in (known := [each.value for each in Level]):
            raise unknown("level", level, known, "cell: knowledge")
        digest = taken(stored, "secret", str, "")
        known_secret = secret if secret is not None and secret.digest == digest else Secret(digest)
        return cls(
            attack=attack,
            knowledge=Level(level),
            victims=taken(stored, "victims", int),
            tuning=taken(stored, "tuning", bool),
            candidates=taken(stored, "candidates", int),
            engine=Engine.of(taken(stored, "engine", dict)),
            prior=prior_of(taken(stored, "prior", dict)) if "prior" in stored else None,
            before=Before.of(taken(stored, "before", dict)) if "before" in stored else None,
            definitions=taken(stored, "definitions", dict),
            secret=known_secret if digest else None,
            **common,
        )

    def stored(self) -> dict[str, Any]:
        """Return all that the key stands for, and the names, as plain data."""
        return {
            "attack": self.attack.stored(),
            "defense": self.defense.stored(),
            "model": self.model.stored(),
            "dataset": self.dataset.stored(),
            "setting": stored_setting(self.setting),
            "knowledge": self.knowledge.value,
            "victims": self.victims,
            "tuning": self.tuning,
            "candidates": self.candidates,
            "seed": self.seed,
            "engine": self.engine.model_dump(),
            "definitions": self.definitions,
            "suite": self._stored_suite(),
            **({} if self.prior is None else {"prior": self.prior.stored()}),
            **({} if self.before is None else {"before": self.before.stored()}),
            **({} if self.secret is None else {"secret": self.secret.digest}),
        }

    @property
    def title(self) -> str:
        """One line for progress and errors."""
        labels = [part.label for part in (self.attack, self.defense, self.model, self.dataset)]
        return " · ".join([*labels, self.setting.name, self.knowledge.value, f"seed {self.seed}"])

    @cached_property
    def draws(self) -> Draws:
        """What random numbers may depend on."""
        bare = unnamed(self.stored())
        bare["setting"].pop("grants")
        for name in ("dataset", "model", "defense"):
            bare[name].pop("code", None)
        for name in ("server", "client"):
            bare["setting"].get(name, {}).pop("code", None)
        # The text is what seeds have been derived from ever since; it must not change.
        dataset, model, setting, defense = (
            json.dumps(bare[name], sort_keys=True) for name in ("dataset", "model", "setting", "defense")
        )
        messages = (self.seed, dataset, model, setting, defense)
        return Draws(
            messages=messages,
            clients=messages if self.secret is None else (self.secret.value, *messages),
            attack=(self.seed, "attack", self.attack.name, dataset, model, setting),
            server=(self.seed, "server", dataset, model, setting),
        )

    @property
    def place(self) -> tuple[str, str, str, str, str]:
        """Labels of attack, defense, model, dataset and setting, as tables have them."""
        data = dataset_label(self.dataset.label, self.tuning)
        return self.attack.label, self.defense.label, self.model.label, data, self.setting.name

    def left_out(self, reason: str) -> LeftOut:
        """Return the note that its attack does not apply."""
        return LeftOut(*self.place, self.knowledge.value, reason)

    @cached_property
    def built_defense(self) -> Defense:
        """The defense as it is in the attacked round, for all messages that the attacker has of a client."""
        from ..repeated import repeated

        defense = build_defense(self.defense.name, self.defense.options)
        if self.before is not None:
            defense = defense.at_round(self.before.recipe.rounds, self.before.epoch)
        return repeated(defense, self.setting.rounds)

    @cached_property
    def built_attack(self) -> Attack:
        """The attack."""
        attack: Attack = registry.build("attacks", self.attack.name, self.attack.options)
        return attack

    def check_code(self, root: Path | None = None) -> None:
        """Refuse to compute it with other code than it was made with; `root` is the data root.

        Raises:
            GradleakError: code or a file was changed, or differs on this machine.
        """
        self.attack.check_code("attacks", root)
        super().check_code(root)
        if isinstance(self.prior, LearnedPrior):
            self.prior.dataset.check_code("datasets", root)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingCell(Cell):
    """A cell that trains a model under a defense, to measure what accuracy that leaves; it attacks nobody."""

    recipe: Utility
    version: str = Utility.VERSION

    def stored(self) -> dict[str, Any]:
        """Return all that the key stands for, and the names, as plain data."""
        recipe = self.recipe.model_dump(exclude={"seeds"})
        return {
            "attack": Part(UTILITY, UTILITY, recipe, self.version).stored(),
            "defense": self.defense.stored(),
            "model": self.model.stored(),
            "dataset": self.dataset.stored(),
            "setting": stored_setting(self.setting),
            "victims": 0,
            "seed": self.seed,
            "suite": self._stored_suite(),
        }

    @property
    def title(self) -> str:
        """One line for progress and errors."""
        labels = [part.label for part in (self.defense, self.model, self.dataset)]
        return " · ".join([UTILITY, *labels, f"seed {self.seed}"])


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


def attacking(cells: Iterable[Cell]) -> list[AttackCell]:
    """Return the cells that attack."""
    return [cell for cell in cells if isinstance(cell, AttackCell)]


def build_defense(name: str, options: Mapping[str, Any], where: str = "") -> Defense:
    """Return a defense; `a + b` chains several, whose options are keyed by their names."""
    parts = members(name)
    if len(parts) == 1:
        defense: Defense = registry.build("defenses", name, options, where)
        return defense
    from ..chain import Chain

    for key in options:
        if key not in parts:
            raise unknown(f"part of {name!r}", key, parts, where)
    chained: Defense = Chain(tuple(registry.build("defenses", part, options.get(part, {}), where) for part in parts))
    return chained


def key_of(stored: Mapping[str, Any]) -> str:
    """Hash of a stored form, without what only names it (labels, setting name, suite)."""
    return hashlib.sha256(json.dumps(unnamed(stored), sort_keys=True).encode()).hexdigest()[:32]


def unnamed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored form without labels, setting name and suite: all that a result may depend on."""
    kept = {key: value for key, value in stored.items() if key != "suite"}
    for part, title in (*((axis, "label") for axis in ("attack", "defense", "model", "dataset")), ("setting", "name")):
        kept[part] = {key: value for key, value in kept[part].items() if key != title}
    return kept


def question_of(stored: Mapping[str, Any]) -> str:
    """Hash of what a stored form asks, whatever code answers: also without codes, versions, definitions and secret."""
    asked = {key: value for key, value in unnamed(stored).items() if key not in ("definitions", "secret")}
    for part in ("attack", "defense", "model", "dataset"):
        asked[part] = {key: value for key, value in asked[part].items() if key not in ("code", "version")}
    for part in {"server", "client"} & asked["setting"].keys():
        bare = {key: value for key, value in asked["setting"][part].items() if key not in ("code", "file", "version")}
        asked["setting"] = {**asked["setting"], part: bare}
    if "prior" in asked:
        asked["prior"] = {key: value for key, value in asked["prior"].items() if key not in ("code", "dataset")}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
