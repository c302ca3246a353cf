"""What an audit runs: attackers by what they know, attacks that can run, and as many iterations as time allows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .. import registry
from ..attack import Attack, GradientMatching
from ..board.store import CellResult
from ..dataset import Data
from ..defense import Defense
from ..errors import GradleakError
from ..evaluation import check
from ..evaluation.evaluate import evaluate
from ..evaluation.workshop import Resources, Workshop
from ..plugins import said
from ..suite import AttackCell, Cell, DatasetPart, Engine, Part, TrainingCell, build_defense
from ..suite.parts import plain
from ..suite.settings import tampering
from ..threat import BatchNorm, Knowledge, Labels, Level, Setting
from ..update import copied

ENSEMBLE = "auto-v2"
SHORTEST = 20
"""Iterations below which a search says nothing: it would be stopped before its loss has settled, and pass for a
defense."""
_ANALYTIC = "analytic"
_WIDEST = 32
"""Trials that are searched together at most."""
_MEASURED = 19
"""Iterations, after the first, over which the time of one is measured."""
LONGER = " (longer)"
"""What is added to the label of a search that is run again with the time that was left."""


@dataclass(frozen=True)
class Attacker:
    """Somebody who sees the update, by what else is known."""

    name: str
    says: str
    grants: Knowledge
    server: str = "honest"


ATTACKERS = (
    Attacker(
        "informed server",
        "knows model, protocol and defense, the labels, and public images of the same kind",
        Knowledge(labels=Labels.KNOWN, batch_norm=BatchNorm.RUNNING, auxiliary=True, local_training=True),
    ),
    Attacker(
        "curious server",
        "knows model, protocol and defense, as every server does, and nothing of the images",
        Knowledge(batch_norm=BatchNorm.RUNNING, local_training=True),
    ),
)
"""Strongest first: what it recovers bounds what the others can."""
MALICIOUS = Attacker(
    "malicious server",
    "may also change the model that it sends",
    Knowledge(labels=Labels.KNOWN, batch_norm=BatchNorm.RUNNING, auxiliary=True, local_training=True),
    "imprint",
)
"""No part of a verdict, which is about servers that follow the protocol; it shows what rests on their honesty."""


class Own(Workshop):
    """A workshop whose only model and data are the user's."""

    def __init__(self, module: nn.Module, data: Data, resources: Resources) -> None:
        """Take a model, in eval mode, and data."""
        super().__init__(resources)
        self.module, self.images = module, data
        # What is found of a network's structure is kept with the object.
        self._prepared: dict[str, nn.Module] = {}

    def data(self, part: Part) -> Data:
        """Return the user's data."""
        return self.images

    def untrained(self, part: Part, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the user's model, as it is."""
        return self.module

    def network(self, cell: Cell, epochs: int | None = None) -> tuple[nn.Module, float]:
        """Return the user's model as the defense prepares it; its accuracy is not asked for here."""
        key = f"{cell.defense.name} {cell.defense.options}"
        if key not in self._prepared:
            self._prepared = {key: prepared(self.module, cell.built_defense)}
        return self._prepared[key], math.nan


def prepared(module: nn.Module, defense: Defense) -> nn.Module:
    """Return a copy of a model as a defense changes it."""
    from .. import structure

    shape, changed = structure.shape_of(module), defense.prepare_model(copied(module))
    if shape is not None:
        structure.mark(changed, shape)
    return changed


@dataclass
class Clock:
    """The time that an audit may take."""

    budget: float
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.budget - self.spent

    @property
    def spent(self) -> float:
        """Seconds that are gone."""
        return time.monotonic() - self.started


@dataclass(frozen=True)
class Ran:
    """One attack that was run on the victims."""

    attack: str
    attacker: str
    defense: str
    result: CellResult
    cell: AttackCell
    iterations: int | None = None
    """Iterations that it was given; None for what does not iterate."""
    usual: int | None = None
    """Iterations that it would have had without a budget."""
    needed: float = math.nan
    """Seconds that these would have taken; NaN where that was not measured."""

    @property
    def reached(self) -> float:
        """Share of the usual iterations that it was given; 1 of what does not iterate."""
        return 1.0 if self.iterations is None or self.usual is None else self.iterations / self.usual

    @property
    def iteration(self) -> float:
        """Seconds of an iteration, or where that was not measured a bound; NaN of what does not iterate."""
        if self.iterations is None or self.usual is None:
            return math.nan
        return self.needed / self.usual if math.isfinite(self.needed) else self.result.seconds / self.iterations


@dataclass(frozen=True)
class Bench:
    """What attacks are run on: the user's model, data and client, in one setting and under one defense."""

    workshop: Own
    setting: Setting
    victims: int
    seed: int
    model: Part
    dataset: DatasetPart

    def cell(
        self,
        attacker: Attacker,
        attack: tuple[str, str, dict[str, Any]],
        defense: tuple[str, dict[str, Any]],
        level: Level = Level.PUBLIC,
    ) -> AttackCell:
        """Return the cell of one attack by one attacker."""
        name, label, options = attack
        plugin: Attack = registry.build("attacks", name, options)
        guard = build_defense(*defense)
        return AttackCell(
            attack=Part(name, label, plain(registry.options_of(plugin)), plugin.version),
            defense=Part(defense[0], defense[0], plain(_options(guard, defense)), guard.version),
            model=self.model,
            dataset=self.dataset,
            setting=replace(
                self.setting, name=attacker.name, grants=attacker.grants, server=tampering(attacker.server)
            ),
            seed=self.seed,
            suite=("audit", 1),
            optional=True,
            knowledge=level,
            victims=self.victims,
            candidates=min(100, len(self.workshop.images.split.train) + len(self.workshop.images.split.test) // 2),
        )

    def reasons(self, cells: Sequence[AttackCell]) -> dict[str, str]:
        """Say of the cells whose attack cannot run why, by their keys.

        Raises:
            GradleakError: no attack can run: it is the model, the data or the defense that does not fit.
        """
        found: dict[str, str] = {}
        able = []
        for cell in cells:
            missing = cell.built_attack.needs.missing(
                replace(cell.setting.grants, defense=cell.knowledge, server=cell.setting.server.surface)
            )
            if missing and cell.built_attack.family != "control":
                found[cell.key] = f"needs {', '.join(missing)}"
            else:
                able.append(cell)
        notes: dict[tuple[str, str], str] = {}
        kept = check.check(able, self.workshop, lambda left: notes.update({(left.setting, left.attack): left.reason}))
        running = {cell.key for cell in kept}
        for cell in able:
            if cell.key not in running:
                found[cell.key] = notes.get((cell.setting.name, cell.attack.label), "cannot run")
        return found

    def run(self, cell: AttackCell, seconds: float, before: Ran | None = None) -> Ran:
        """Run one attack for about so many seconds; searches get as many iterations as fit.

        Of a search that ran before, the time of an iteration is known.
        """
        plugin, given, usual, needed = cell.built_attack, None, None, math.nan
        # A wider chunk would be filled up with copies, and computed whole.
        width = min(_WIDEST, self.victims)
        cell = replace(cell, engine=Engine(width=width, timeout=max(1.0, 1.5 * seconds)))
        if isinstance(plugin, GradientMatching):
            given, needed = self._fitting(cell, seconds) if before is None else _fitting_again(before, seconds)
            cell, usual = _with_iterations(cell, given), plugin.iterations
        result = evaluate(cell, self.workshop)
        return Ran(cell.attack.label, cell.setting.name, cell.defense.label, result, cell, given, usual, needed)

    def _fitting(self, cell: AttackCell, seconds: float) -> tuple[int, float]:
        """Measure an iteration with the attack itself; return how many fit, and the seconds that all would take."""
        plugin = cell.built_attack
        assert isinstance(plugin, GradientMatching)
        begun = time.monotonic()
        alone = replace(cell, victims=1, engine=cell.engine.model_copy(update={"width": 1}))

        def spent(iterations: int) -> float:
            started = time.monotonic()
            evaluate(_with_iterations(alone, iterations), self.workshop)
            return time.monotonic() - started

        spent(1)  # What is found out about a network is found out once.
        once = spent(1)
        if once * (self.victims + 1) > seconds - (time.monotonic() - begun):
            return SHORTEST, math.nan
        each = max((spent(1 + _MEASURED) - once) / _MEASURED, once / 1000, 1e-4) * self.victims
        left = 0.9 * (seconds - (time.monotonic() - begun)) - once * self.victims
        return max(SHORTEST, min(plugin.iterations, int(left / each))), each * plugin.iterations


def _fitting_again(before: Ran, seconds: float) -> tuple[int, float]:
    """Return as `Bench._fitting`, of a search whose time was measured."""
    assert before.usual is not None
    return max(SHORTEST, min(before.usual, int(0.9 * seconds / before.iteration))), before.needed


def _with_iterations(cell: AttackCell, iterations: int) -> AttackCell:
    part = replace(cell.attack, options={**cell.attack.options, "iterations": iterations, "patience": None})
    return replace(cell, attack=part)


def _options(guard: Defense, defense: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    from ..chain import Chain
    from ..suite.parts import members

    if isinstance(guard, Chain):
        names = members(defense[0])
        return {name: registry.options_of(part) for name, part in zip(names, guard.defenses, strict=True)}
    return registry.options_of(guard)


def controls() -> list[tuple[str, str, dict[str, Any]]]:
    """Return the attacks that read nothing of an update: the best of them is what a guess is worth."""
    return [(name, name, {}) for name in ("mean-image", "class-mean")]


def attacks() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the members of the ensemble, closed forms first, then the search that most networks fall to."""
    order = {_ANALYTIC: 0, "optimisation": 1, "learned": 2}
    found = []
    for name, label, options in registry.members(ENSEMBLE):
        plugin: Attack = registry.build("attacks", name, options)
        if plugin.family in order:
            place = (order[plugin.family], label != "inverting-gradients", label)
            found.append((place, (name, label, dict(options))))
    for _, each in sorted(found, key=lambda pair: pair[0]):
        yield each


def training(bench: Bench, defense: tuple[str, dict[str, Any]], recipe: Any) -> TrainingCell:
    """Return the cell that measures what accuracy a defense leaves."""
    guard = build_defense(*defense)
    return TrainingCell(
        recipe=recipe,
        defense=Part(defense[0], defense[0], plain(_options(guard, defense)), guard.version),
        model=bench.model,
        dataset=bench.dataset,
        setting=bench.setting,
        seed=bench.seed,
        suite=("audit", 1),
    )


def refused(error: BaseException) -> str:
    """Say what was refused, in one line."""
    return str(error) if isinstance(error, GradleakError) else said(error)
