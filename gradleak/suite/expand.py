"""Suites: a YAML file that spans a grid, validated, and expanded into cells with stable keys."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from .. import registry
from ..errors import GradleakError
from ..scales import METRICS
from .cells import AttackCell, Cell, TrainingCell, build_defense
from .parts import DatasetPart, GivenPrior, LearnedPrior, Part, code_of, members, plain
from .read import levels_of
from .schema import Entry, Prior, Suite, build_setting, unused_of

if TYPE_CHECKING:  # What needs torch; suites are read without it.
    from ..attack import Attack
    from ..defense import Defense
    from ..threat import Setting

_P = TypeVar("_P")

CORE = "1"
"""Raised whenever the engine, the client or the label rules change results."""


Digest = Callable[[str, Mapping[str, Any]], tuple[str, str]]
"""A dataset's name and options to its version and the hash of its images."""


_Point: TypeAlias = (
    "tuple[tuple[Entry, DatasetPart], tuple[Entry, Part], Setting, int, _Plugged[Defense], _Plugged[Attack]]"
)
"""One point of a grid: dataset, model, setting, seed, defense, attack."""


def expand(suite: Suite, digest: Digest, root: Path | None = None) -> list[Cell]:
    """Return every cell of the grid once, in a stable order, then the cells that measure utility.

    Levels of knowledge that make no difference (the attack or the defense ignores them) are one cell.

    Args:
        suite: what to expand.
        digest: reads the datasets.
        root: the data root, where a prior's weights are.

    Raises:
        GradleakError: no level of the suite's `knowledge` is enough for an attack, or a prior's weights are missing.
    """
    from ..threat import Level

    axes, definitions = _Axes.of(suite, digest), _definitions()
    cells: dict[str, Cell] = {}
    for (data_entry, dataset), (model_entry, model), setting, seed, guard, attack in axes.grid(suite.seeds):
        here = {
            "datasets": data_entry.title,
            "models": model_entry.title,
            "settings": setting.name,
            "defenses": guard.entry.title,
        }
        if not (_wanted(attack.entry, here) and _wanted(guard.entry, here)):
            continue
        needs, optional = attack.plugin.needs, attack.entry.optional
        for level in map(Level, levels_of(suite, attack.plugin, guard.plugin, optional)):
            if optional and needs.missing(dataclasses.replace(setting.grants, defense=level)):
                continue
            granted = needs.generator and setting.grants.generator
            cell = AttackCell(
                attack=attack.part,
                defense=guard.part,
                model=model,
                dataset=dataset,
                setting=setting,
                knowledge=level,
                victims=suite.victims,
                tuning=suite.tuning,
                candidates=suite.candidates,
                seed=seed,
                engine=suite.engine,
                prior=_prior(suite.prior, dataset, digest, root) if granted else None,
                definitions=definitions,
                suite=(suite.name, suite.version),
                optional=optional,
            )
            cells.setdefault(cell.key, cell)
    for training in _utilities(suite, axes):
        cells.setdefault(training.key, training)
    return list(cells.values())


@dataclass(frozen=True)
class _Plugged(Generic[_P]):
    """An attack or a defense of a grid."""

    entry: Entry
    plugin: _P
    part: Part


@dataclass(frozen=True)
class _Axes:
    """What a grid is spanned by, each built once."""

    datasets: list[tuple[Entry, DatasetPart]]
    models: list[tuple[Entry, Part]]
    settings: list[Setting]
    defenses: list[_Plugged[Defense]]
    attacks: list[_Plugged[Attack]]

    @classmethod
    def of(cls, suite: Suite, digest: Digest) -> _Axes:
        return cls(
            datasets=[(entry, _dataset(entry, digest)) for entry in suite.datasets],
            models=[
                (entry, _part("models", entry, registry.build("models", entry.name, entry.options)))
                for entry in suite.models
            ],
            settings=[build_setting(values) for values in suite.settings],
            defenses=[
                _Plugged(entry, defense, _guard(entry, defense))
                for entry in suite.defenses
                for defense in [build_defense(entry.name, entry.options)]
            ],
            attacks=[
                _Plugged(entry, attack, _part("attacks", entry, attack))
                for entry in suite.attacks
                for attack in [registry.build("attacks", entry.name, entry.options)]
            ],
        )

    def grid(self, seeds: Sequence[int]) -> Iterator[_Point]:
        return itertools.product(self.datasets, self.models, self.settings, seeds, self.defenses, self.attacks)


def _utilities(suite: Suite, axes: _Axes) -> Iterator[TrainingCell]:
    """Yield every training under a defense that is wanted in any setting."""
    if suite.utility is None:
        return
    recipe = suite.utility
    grid = itertools.product(axes.datasets, axes.models, recipe.seeds or suite.seeds, axes.defenses)
    for (data_entry, dataset), (model_entry, model), seed, guard in grid:
        here = {"datasets": data_entry.title, "models": model_entry.title, "defenses": guard.entry.title}
        wanted = all(title in guard.entry.only.get(axis, [title]) for axis, title in here.items())
        if guard.plugin.single_round or not wanted:
            continue
        yield TrainingCell(
            recipe=recipe,
            defense=guard.part,
            model=model,
            dataset=dataset,
            setting=recipe.setting(),
            seed=seed,
            suite=(suite.name, suite.version),
        )


def _guard(entry: Entry, defense: Defense) -> Part:
    names, chained = members(entry.name), getattr(defense, "defenses", None)
    options = (
        plain(registry.options_of(defense))
        if chained is None
        else {name: plain(registry.options_of(part)) for name, part in zip(names, chained, strict=True)}
    )
    return Part(entry.name, entry.title, options, defense.version, code_of("defenses", entry.name))


def _wanted(entry: Entry, here: Mapping[str, str]) -> bool:
    return all(here[axis] in titles for axis, titles in entry.only.items())


def _part(group: str, entry: Entry, plugin: Any) -> Part:
    """Return a plugin with every hyper-parameter but the `later` ones that are not used."""
    unused = unused_of(plugin)
    options = {name: value for name, value in registry.options_of(plugin).items() if name not in unused}
    return Part(entry.name, entry.title, plain(options), plugin.version, code_of(group, entry.name))


def _definitions() -> dict[str, Any]:
    """Versions of what every result depends on beside its plugins."""
    from ..training.networks import RECIPE

    return {"core": CORE, "training": RECIPE, "metrics": sorted(metric.id for metric in METRICS.values())}


def _dataset(entry: Entry, digest: Digest) -> DatasetPart:
    part = _part("datasets", entry, registry.build("datasets", entry.name, entry.options))
    version, value = digest(entry.name, part.options)
    return DatasetPart(part.name, part.label, part.options, version, part.code, value)


def _prior(prior: Prior, dataset: DatasetPart, digest: Digest, root: Path | None) -> LearnedPrior | GivenPrior:
    """Everything that decides a generator; of a user's, the hash of its weights."""
    if prior.source is not None:
        content, weights = b"", None
        if prior.weights is not None:
            path = (root or Path()) / prior.weights
            try:
                content, weights = path.read_bytes(), str(prior.weights)
            except OSError as error:
                raise GradleakError(f"prior: weights: no file {path} ({error.strerror}); see --data-root") from error
        return GivenPrior(prior.source, weights, hashlib.sha256(content).hexdigest())
    from ..training.priors import Recipe

    recipe = plain(dataclasses.asdict(Recipe(**prior.options)))
    return LearnedPrior(dataset if prior.dataset is None else _dataset(prior.dataset, digest), recipe)
