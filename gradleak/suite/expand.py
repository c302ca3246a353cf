"""Suites: a YAML file that spans a grid, validated, and expanded into cells with stable keys."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import registry
from ..errors import GradleakError
from ..scales import METRICS

if TYPE_CHECKING:
    from ..attack import Attack
    from ..defense import Defense
    from ..threat import Setting
from .cells import UTILITY, Cell, LeftOut, Note, build_defense, code_of_file, dataset_label, key_of, unnoted
from .read import levels_of
from .schema import Counter, Entry, Prior, Suite, Utility, build_setting

CORE = "1"
"""Raised whenever the engine, the client or the label rules change results."""


Digest = Callable[[str, Mapping[str, Any]], tuple[str, str]]
"""A dataset's name and options to its version and the hash of its images."""


def expand(suite: Suite, digest: Digest, root: Path | None = None, note: Note = unnoted) -> list[Cell]:
    """Return every cell of the grid once, in a stable order, then the cells that measure utility.

    Levels of knowledge that make no difference (the attack or the defense ignores them) are one cell.

    Args:
        suite: what to expand.
        digest: reads the datasets.
        root: the data root, where a prior's weights are.
        note: told what of the grid is left out, and why.

    Raises:
        GradleakError: no level of the suite's `knowledge` is enough for an attack, or a prior's weights are missing.
    """
    attacks = [(entry, registry.build("attacks", entry.name, entry.options)) for entry in suite.attacks]
    defenses = [(entry, build_defense(entry.name, entry.options)) for entry in suite.defenses]
    settings = [build_setting(values) for values in suite.settings]
    datasets = [(entry, _dataset(entry, digest)) for entry in suite.datasets]
    models = [(entry, _plugin("models", entry)) for entry in suite.models]
    cells: dict[str, Cell] = {}
    guessed: set[tuple[Any, ...]] = set()
    grid = itertools.product(datasets, models, settings, suite.seeds, defenses, attacks)
    for (data_entry, dataset), (model_entry, model), setting, seed, (guard, defense), (entry, attack) in grid:
        here = {
            "datasets": data_entry.title,
            "models": model_entry.title,
            "settings": setting.name,
            "defenses": guard.title,
        }
        if not _wanted(guard, here):
            continue
        if suite.controls == "all" and attack.family == "control" and attack.blind(setting):
            # Nothing of it depends on the defense but how many clients' images it answers.
            guess = (*list(here.values())[:3], seed, entry.title, defense.cohort)
            if guess in guessed:
                continue
            guessed.add(guess)
        for level in _levels(suite, entry, attack, defense, setting, here, note):
            config = {
                "attack": _plugin("attacks", entry),
                "defense": _guard(guard, defense),
                "model": model,
                "dataset": dataset,
                "setting": _setting(setting),
                "knowledge": level,
                **_of_suite(suite, seed),
            }
            if attack.needs.generator and setting.grants.generator:
                config["prior"] = _prior(suite.prior, dataset, digest, root)
            cell = Cell(key_of(config), config, entry.optional)
            cells.setdefault(cell.key, cell)
    for config in _utilities(suite, datasets, models, settings, defenses):
        cell = Cell(key_of(config), config)
        cells.setdefault(cell.key, cell)
    return list(cells.values())


def _of_suite(suite: Suite, seed: int) -> dict[str, Any]:
    """Return the parts of a configuration that all cells of a suite and a seed share."""
    return {
        "victims": suite.victims,
        "tuning": suite.tuning,
        "candidates": suite.candidates,
        "seed": seed,
        "engine": suite.engine.model_dump(),
        "definitions": _definitions(),
        "suite": {"name": suite.name, "version": suite.version},
    }


def _levels(
    suite: Suite,
    entry: Entry,
    attack: Attack,
    defense: Defense,
    setting: Setting,
    here: Mapping[str, str],
    note: Note,
) -> list[str]:
    """Return the levels of knowledge at which an attack is run here; note the others that make a difference."""
    from ..reconstruction import granted_of

    data = dataset_label(here["datasets"], suite.tuning)
    place = (entry.title, here["defenses"], here["models"], data, here["settings"])
    if (reason := _reason(entry, here)) is not None:
        note(LeftOut(*place, "", *reason))
        return []
    levels = levels_of(suite, attack, defense, entry.optional)
    if not levels:
        lacking = f"needs {attack.needs.defense.value} knowledge of the defense, which the suite does not give"
        note(LeftOut(*place, "", lacking))
    kept = []
    for level in levels:
        missing = attack.needs.missing(granted_of(attack, setting, level))
        if entry.optional and missing:
            note(LeftOut(*place, level, f"needs {', '.join(missing)}, which the setting does not grant"))
        else:
            kept.append(level)
    return kept


def _utilities(
    suite: Suite,
    datasets: list[tuple[Entry, dict[str, Any]]],
    models: list[tuple[Entry, dict[str, Any]]],
    settings: list[Setting],
    defenses: list[tuple[Entry, Defense]],
) -> Iterator[dict[str, Any]]:
    """Yield the configuration of every training under a defense that is wanted in any setting."""
    if suite.utility is None:
        return
    grid = itertools.product(datasets, models, settings, suite.utility.seeds or suite.seeds, defenses)
    for (data_entry, dataset), (model_entry, model), faced, seed, (guard, defense) in grid:
        here = {"datasets": data_entry.title, "models": model_entry.title, "defenses": guard.title}
        if suite.utility.batch_size == "setting":
            here["settings"] = faced.name
        asked = suite.utility.at(faced)
        recipe, setting = asked.model_dump(exclude={"seeds"}), _setting(asked.setting())
        wanted = all(title in guard.only.get(axis, [title]) for axis, title in here.items())
        if defense.single_round or not wanted:
            continue
        yield {
            "attack": {"name": UTILITY, "label": UTILITY, "options": recipe, "version": Utility.VERSION},
            "defense": _guard(guard, defense),
            "model": model,
            "dataset": dataset,
            "setting": setting,
            "victims": 0,
            "seed": seed,
            "suite": {"name": suite.name, "version": suite.version},
        }


def _guard(entry: Entry, defense: Defense) -> dict[str, Any]:
    config = {"name": entry.name, "label": entry.title, "options": _defense_options(defense)}
    return {**config, "version": defense.version, **code_of_file("defenses", entry.name)}


def _wanted(entry: Entry, here: Mapping[str, str]) -> bool:
    return all(here[axis] in titles for axis, titles in entry.only.items())


def _reason(entry: Entry, here: Mapping[str, str]) -> tuple[str, bool] | None:
    """Say why an attack is not run here, and whether that is the suite's own choice; None if it is run."""
    if not _wanted(entry, here):
        return "left out by the suite", True
    if isinstance(entry, Counter) and here["defenses"] not in entry.against:
        return "is a counter-attack to other defenses only", False
    return None


def _plugin(group: str, entry: Entry) -> dict[str, Any]:
    plugin = registry.build(group, entry.name, entry.options)
    config = {"name": entry.name, "label": entry.title, "options": _plain(_chosen(plugin))}
    return {**config, "version": plugin.version, **code_of_file(group, entry.name)}


def _chosen(plugin: Any) -> dict[str, Any]:
    """Every hyper-parameter but the `later` ones that are not used: cells keep the keys that they had before these."""
    unused = _unused(plugin)
    return {name: value for name, value in registry.options_of(plugin).items() if name not in unused}


def _setting(setting: Setting) -> dict[str, Any]:
    unused = _unused(setting)
    return {name: value for name, value in _plain(dataclasses.asdict(setting)).items() if name not in unused}


def _unused(options: Any) -> set[str]:
    """Names of the `later` fields that have their defaults."""
    return {
        field.name
        for field in dataclasses.fields(options)
        if field.metadata.get("later") and getattr(options, field.name) == field.default
    }


def _definitions() -> dict[str, Any]:
    """Versions of what every result depends on beside its plugins."""
    from ..training.networks import RECIPE

    return {"core": CORE, "training": RECIPE, "metrics": sorted(metric.id for metric in METRICS.values())}


def _dataset(entry: Entry, digest: Digest) -> dict[str, Any]:
    config = _plugin("datasets", entry)
    version, value = digest(entry.name, config["options"])
    return {**config, "version": version, "digest": value}


def _prior(prior: Prior, dataset: dict[str, Any], digest: Digest, root: Path | None) -> dict[str, Any]:
    """Everything that decides a generator; of a user's, the hash of its weights."""
    if prior.source is not None:
        content, weights = b"", None
        if prior.weights is not None:
            path = (root or Path()) / prior.weights
            try:
                content, weights = path.read_bytes(), str(prior.weights)
            except OSError as error:
                raise GradleakError(f"prior: weights: no file {path} ({error.strerror}); see --data-root") from error
        return {"source": prior.source, "weights": weights, "digest": hashlib.sha256(content).hexdigest()}
    from ..training.priors import Recipe

    recipe = _plain(dataclasses.asdict(Recipe(**prior.options)))
    return {"dataset": dataset if prior.dataset is None else _dataset(prior.dataset, digest), "options": recipe}


def _defense_options(defense: Defense) -> Any:
    parts = getattr(defense, "defenses", None)
    if parts is None:
        return _plain(registry.options_of(defense))
    return [_plain(registry.options_of(part)) for part in parts]


def _plain(value: Any) -> Any:
    """Round-trip through JSON, so that a key does not depend on tuples, enums or paths."""
    return json.loads(json.dumps(value, default=str))
