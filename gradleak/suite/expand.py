"""Suites: a YAML file that spans a grid, validated, and expanded into cells with stable keys."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from .. import code, registry
from ..errors import GradleakError
from ..privacy import Exposure
from ..scales import METRICS
from ..secret import Secret
from .cells import AttackCell, Before, Cell, LeftOut, Note, TrainingCell, build_defense, dataset_label, unnoted
from .contexts import grids
from .fields import Counter, Entry
from .parts import DatasetPart, GivenPrior, LearnedPrior, Part, code_of, members, plain
from .read import levels_enough, levels_of
from .schema import Prior, Suite, Utility
from .settings import build_setting, unused_of

if TYPE_CHECKING:  # What needs torch; suites are read without it.
    from ..attack import Attack
    from ..defense import Defense
    from ..threat import Level, Setting

_P = TypeVar("_P")

CORE = "2"
"""Version of the numbers of all that plugins share; raised by hand whenever engine, search, mechanisms, clients or
label rules change a result. Their code is no part of a cell's identity: it can be rewritten without losing boards."""


Digest = Callable[[str, Mapping[str, Any]], tuple[str, str] | tuple[str, str, int]]
"""Takes a dataset's name and options; returns its version, the hash of its images, and how many there are to train
on."""


_Point: TypeAlias = (
    "tuple[tuple[Entry, DatasetPart], tuple[Entry, Part], Setting, int, _Plugged[Defense], _Plugged[Attack]]"
)
"""One point of a grid: dataset, model, setting, seed, defense, attack."""


def expand(
    suite: Suite, digest: Digest, root: Path | None = None, note: Note = unnoted, secret: Secret | None = None
) -> list[Cell]:
    """Return every cell of the grid once, in a stable order, then the cells that measure utility.

    Levels of knowledge that make no difference (the attack or the defense ignores them) are one cell.

    Args:
        suite: what to expand.
        digest: reads the datasets.
        root: the data root, where a prior's weights are.
        note: told what of the grid is left out, and why.
        secret: of the store that the cells are for (`gradleak.secret`); part of their keys by its digest.

    Raises:
        GradleakError: no level of the suite's `knowledge` is enough for an attack, or a prior's weights are missing.
    """
    cells: dict[str, Cell] = {}
    for place, grid in grids(suite):
        try:
            for cell in _cells(grid, digest, root, note, secret):
                cells.setdefault(cell.key, cell)
        except GradleakError as error:
            raise GradleakError(f"{place}: {error}" if place else str(error)) from error
    return list(cells.values())


def _cells(suite: Suite, digest: Digest, root: Path | None, note: Note, secret: Secret | None) -> Iterator[Cell]:
    """Yield the cells of one grid."""
    axes, definitions = _Axes.of(suite, digest, root), _definitions()
    for point in _points(suite, axes, note):
        (data_entry, dataset), (_, model), setting, seed, guard, attack = point
        takes_prior = attack.plugin.needs.generator and setting.grants.generator
        for level in _levels(suite, attack, guard.plugin, setting, _titles(point), note):
            yield AttackCell(
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
                prior=_prior(suite.prior, dataset, digest, root) if takes_prior else None,
                before=axes.before(data_entry, setting),
                definitions=definitions,
                suite=(suite.name, suite.version),
                optional=attack.entry.optional,
                secret=secret,
            )
    yield from _utilities(suite, axes)


def _points(suite: Suite, axes: _Axes, note: Note) -> Iterator[_Point]:
    """Yield the points of the grid at which attacks may run, each defense with the noise that it takes there."""
    guessed: set[tuple[object, ...]] = set()
    for point in axes.grid(suite.seeds):
        (data_entry, _), _, setting, seed, guard, attack = point
        here = _titles(point)
        if not _wanted(guard.entry, here):
            continue
        guard = axes.calibrated(guard, data_entry, setting)
        if setting.after_rounds and guard.plugin.single_round:
            data = dataset_label(here["datasets"], suite.tuning)
            place = (attack.entry.title, here["defenses"], here["models"], data, setting.name, "")
            note(LeftOut(*place, "after_rounds: no model is trained under a defense of one round"))
            continue
        if suite.controls == "all" and attack.plugin.family == "control" and attack.plugin.blind(setting):
            # Nothing of it depends on the defense but how many clients' images it answers.
            guess = (*list(here.values())[:3], seed, attack.entry.title, guard.plugin.cohort)
            if guess in guessed:
                continue
            guessed.add(guess)
        yield (*point[:4], guard, attack)


def _titles(point: _Point) -> dict[str, str]:
    """Return what names a point but for its attack, by axis."""
    (data, _), (model, _), setting, _, guard, _ = point
    return {"datasets": data.title, "models": model.title, "settings": setting.name, "defenses": guard.entry.title}


def _levels(
    suite: Suite, attack: _Plugged[Attack], defense: Defense, setting: Setting, here: Mapping[str, str], note: Note
) -> list[Level]:
    """Return the levels of knowledge at which an attack is run here; note the others that make a difference."""
    from ..reconstruction import granted_of
    from ..threat import Level

    entry, plugin = attack.entry, attack.plugin
    data = dataset_label(here["datasets"], suite.tuning)
    place = (entry.title, here["defenses"], here["models"], data, here["settings"])
    if (reason := _reason(entry, here)) is not None:
        note(LeftOut(*place, "", *reason))
        return []
    levels = [Level(level) for level in levels_of(suite, plugin, defense, entry.optional)]
    if not levels:
        lacking = f"needs {plugin.needs.defense.value} knowledge of the defense, which the suite does not give"
        note(LeftOut(*place, "", lacking))
    if plugin.adaptive and plugin.family != "control" and not defense.is_adaptive_target:
        for name in levels_enough(suite, plugin)[1:]:
            note(LeftOut(*place, name, "the attack would do the same as at a lower level"))
    kept = []
    for level in levels:
        missing = plugin.needs.missing(granted_of(plugin, setting, level))
        if entry.optional and missing:
            reason_here = f"needs {', '.join(missing)}, which the setting does not grant"
            note(LeftOut(*place, level.value, reason_here))
        else:
            kept.append(level)
    return kept


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
    utility: Utility | None
    images: dict[str, int]
    """By title of a dataset, how many images there are to train on."""
    root: Path | None
    """The data root, where the files are that options name."""
    known: dict[tuple[str, str, str], _Plugged[Defense]] = dataclasses.field(default_factory=dict)
    """Defenses with the noise that reaches a wanted epsilon, by what that noise depends on."""

    @classmethod
    def of(cls, suite: Suite, digest: Digest, root: Path | None) -> _Axes:
        datasets = [(entry, *_dataset(entry, digest, root)) for entry in suite.datasets]
        return cls(
            datasets=[(entry, part) for entry, part, _ in datasets],
            models=[
                (entry, _part("models", entry, registry.build("models", entry.name, entry.options), root))
                for entry in suite.models
            ],
            settings=[build_setting(values) for values in suite.settings],
            defenses=[
                _Plugged(entry, defense, _guard(entry, defense, root))
                for entry in suite.defenses
                for defense in [build_defense(entry.name, entry.options)]
            ],
            attacks=[
                _Plugged(entry, attack, _part("attacks", entry, attack, root))
                for entry in suite.attacks
                for attack in [registry.build("attacks", entry.name, entry.options)]
            ],
            utility=suite.utility,
            images={entry.title: count for entry, _, count in datasets},
            root=root,
        )

    def grid(self, seeds: Sequence[int]) -> Iterator[_Point]:
        return itertools.product(self.datasets, self.models, self.settings, seeds, self.defenses, self.attacks)

    def before(self, data: Entry, setting: Setting) -> Before | None:
        """Return the training under the defense that a setting asks for before the attacked round."""
        if not setting.after_rounds:
            return None
        recipe = (self.utility or Utility()).at(setting).model_copy(update={"rounds": setting.after_rounds})
        return Before(recipe, setting.after_rounds // max(1, recipe.batches_an_epoch(self.images[data.title])))

    def calibrated(self, guard: _Plugged[Defense], data: Entry, setting: Setting) -> _Plugged[Defense]:
        """Return a defense with the noise that reaches the epsilon it is asked for over the suite's training run.

        Raises:
            GradleakError: no noise reaches it.
        """
        place = (guard.entry.title, data.title, setting.name)
        if place not in self.known:
            exposure = None
            if self.utility is not None and not guard.plugin.single_round:
                exposure = Exposure(self.utility.at(setting).participations(self.images[data.title]))
            defense = guard.plugin.calibrated(setting, exposure)
            part = guard.part if defense == guard.plugin else _guard(guard.entry, defense, self.root)
            self.known[place] = _Plugged(guard.entry, defense, part)
        return self.known[place]


def _utilities(suite: Suite, axes: _Axes) -> Iterator[TrainingCell]:
    """Yield every training under a defense that is wanted in any setting."""
    if suite.utility is None:
        return
    seeds = suite.utility.seeds or suite.seeds
    grid = itertools.product(axes.datasets, axes.models, axes.settings, seeds, axes.defenses)
    for (data_entry, dataset), (model_entry, model), faced, seed, guard in grid:
        here = {"datasets": data_entry.title, "models": model_entry.title, "defenses": guard.entry.title}
        if suite.utility.batch_size == "setting":
            here["settings"] = faced.name
        wanted = all(title in guard.entry.only.get(axis, [title]) for axis, title in here.items())
        if guard.plugin.single_round or not wanted:
            continue
        recipe, guard = suite.utility.at(faced), axes.calibrated(guard, data_entry, faced)
        yield TrainingCell(
            recipe=recipe,
            defense=guard.part,
            model=model,
            dataset=dataset,
            setting=recipe.setting(),
            seed=seed,
            suite=(suite.name, suite.version),
        )


def _guard(entry: Entry, defense: Defense, root: Path | None) -> Part:
    names, chained = members(entry.name), getattr(defense, "defenses", None)
    options = (
        _options(defense)
        if chained is None
        else {name: _options(part) for name, part in zip(names, chained, strict=True)}
    )
    return Part(entry.name, entry.title, options, defense.version, code_of("defenses", entry.name, options, root))


def _wanted(entry: Entry, here: Mapping[str, str]) -> bool:
    return all(here[axis] in titles for axis, titles in entry.only.items())


def _reason(entry: Entry, here: Mapping[str, str]) -> tuple[str, bool] | None:
    """Say why an attack is not run here, and whether that is the suite's own choice; None if it is run."""
    if not _wanted(entry, here):
        return "left out by the suite", True
    if isinstance(entry, Counter) and here["defenses"] not in entry.against:
        return "is a counter-attack to other defenses only", False
    return None


def _part(group: str, entry: Entry, plugin: Any, root: Path | None) -> Part:
    options = _options(plugin)
    return Part(entry.name, entry.title, options, plugin.version, code_of(group, entry.name, options, root))


def _options(plugin: Any) -> dict[str, Any]:
    """Return every hyper-parameter of a plugin but the `later` ones that are not used."""
    unused = unused_of(plugin)
    options: dict[str, Any] = plain(
        {name: value for name, value in registry.options_of(plugin).items() if name not in unused}
    )
    return options


def _definitions() -> dict[str, Any]:
    """Versions of what every result depends on beside its plugins."""
    from ..training.networks import RECIPE

    return {"core": CORE, "training": RECIPE, "metrics": sorted(metric.id for metric in METRICS.values())}


def _dataset(entry: Entry, digest: Digest, root: Path | None) -> tuple[DatasetPart, int]:
    """Return a dataset, and how many images there are to train on, as far as `digest` says so."""
    part = _part("datasets", entry, registry.build("datasets", entry.name, entry.options), root)
    version, value, *counted = digest(entry.name, part.options)
    return DatasetPart(part.name, part.label, part.options, version, part.code, value), int(next(iter(counted), 0))


def _prior(prior: Prior, dataset: DatasetPart, digest: Digest, root: Path | None) -> LearnedPrior | GivenPrior:
    """Everything that decides a generator; of a user's, the hashes of its weights and of its code."""
    if prior.source is not None:
        content, weights = b"", None
        if prior.weights is not None:
            path = (root or Path()) / prior.weights
            try:
                content, weights = path.read_bytes(), str(prior.weights)
            except OSError as error:
                raise GradleakError(f"prior: weights: no file {path} ({error.strerror}); see --data-root") from error
        module = code.of_module(prior.source.partition(":")[0])
        return GivenPrior(prior.source, weights, hashlib.sha256(content).hexdigest(), module)
    from ..training.priors import Recipe

    recipe = plain(dataclasses.asdict(Recipe(**prior.options)))
    return LearnedPrior(dataset if prior.dataset is None else _dataset(prior.dataset, digest, root)[0], recipe)
