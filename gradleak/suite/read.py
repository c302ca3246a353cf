"""Turns a YAML file into a suite with every name, option and label checked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from .. import declared, registry
from ..errors import GradleakError, unknown
from ..options import check

if TYPE_CHECKING:
    from ..attack import Attack
    from ..defense import Defense
from .cells import build_defense
from .contexts import budgeted, grid_of, grids, refuse_confusions, with_entries
from .document import load
from .fields import Counter, Entry, first_mistake
from .parts import members
from .schema import AXES, ENTRIES, KNOWLEDGE, Context, Prior, Suite
from .settings import build_setting


def read(path: Path) -> Suite:
    """Return the suite of a YAML file with every name, option and label checked.

    Raises:
        GradleakError: one line with the file, the path in it, what was found and what is allowed.
    """
    suite = _with_attacks(outline(path))
    if suite.contexts:
        found = [
            _whole(suite, context, f"suite {path}: contexts[{index}]") for index, context in enumerate(suite.contexts)
        ]
        suite = suite.model_copy(update={"contexts": found})
    _check(suite, f"suite {path}")
    return suite


def _with_attacks(suite: Suite) -> Suite:
    """Return a suite with the members of its ensembles and its controls."""
    suite = suite.model_copy(update={"attacks": _members(suite)})
    return suite.model_copy(update={"attacks": _controlled(suite.attacks)}) if suite.controls == "all" else suite


def _whole(suite: Suite, context: Context, where: str) -> Context:
    """Return a context with all of its attacks and defenses."""
    grid = _with_attacks(grid_of(suite, context))
    attacks = budgeted(grid.attacks, context.budgets, where)
    return context.model_copy(update={"attacks": attacks, "defenses": grid.defenses, "budgets": {}})


def outline(path: Path, added: Collection[str] = ()) -> Suite:
    """Return the suite of a YAML file with what can be checked before any plugin, and torch with it, is imported.

    That is its syntax, keys and types, and the names of plugins and of built-ins' options; `added` are names of plugin
    files to come.

    Raises:
        GradleakError: as `read`.
    """
    content = load(path, f"suite {path}")
    if not isinstance(content, dict):
        raise GradleakError(f"suite {path}: expected keys and values, found {type(content).__name__}")
    for key in content:
        if key not in Suite.model_fields:
            raise unknown("key", str(key), Suite.model_fields, f"suite {path}")
    try:
        suite = Suite.model_validate(content)
    except ValidationError as error:
        raise GradleakError(f"suite {path}: {first_mistake(error)}") from error
    suite = with_entries(suite)
    for axis in ENTRIES:
        _check_names(axis, getattr(suite, axis), added, f"suite {path}: ")
    for place, grid in grids(suite):
        for axis in ENTRIES:
            _check_names(axis, getattr(grid, axis), added, f"suite {path}: {place + ': ' if place else ''}")
    return suite


def _check_names(axis: str, entries: Sequence[Entry], added: Collection[str], where: str) -> None:
    known = {*registry.names(axis), *added}
    for index, entry in enumerate(entries):
        for name in members(entry.name) if axis == "defenses" else [entry.name]:
            if name not in known and not name.startswith("auto-"):
                raise unknown(registry.GROUPS[axis], name, known, f"{where}{_place(axis, index, where)}")
        _check_options(axis, entry, f"{where}{_place(axis, index, where)}")


def _place(axis: str, index: int, where: str) -> str:
    """Return how a file calls an item of an axis; a context has one dataset, one model and one setting."""
    alone = "contexts[" in where and axis in ("datasets", "models", "settings")
    return axis.removesuffix("s") if alone else f"{axis}[{index}]"


def _check_options(axis: str, entry: Entry, where: str) -> None:
    """Refuse options that a built-in plugin does not have, by its source; `build` says the same of all others later."""
    parts = members(entry.name) if axis == "defenses" else [entry.name]
    for name in parts:
        given = entry.options if len(parts) == 1 else entry.options.get(name) or {}
        allowed = declared.options(axis, name) if given and isinstance(given, Mapping) else None
        for option in given:
            if allowed is not None and option not in allowed:
                raise unknown(f"option of {registry.GROUPS[axis]} {name!r}", str(option), allowed - {"preset"}, where)


def title_of(path: Path) -> tuple[str, str]:
    """Return the name and the version that a suite's file states; nothing else of it is looked at.

    Raises:
        GradleakError: it is no YAML file of keys and values, or states no name.
    """
    content = load(path, f"suite {path}")
    name = content.get("name") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise GradleakError(f"suite {path}: states no name")
    return name, str(content.get("version", Suite.model_fields["version"].default))


def _check(suite: Suite, where: str) -> None:
    """Refuse wrong names, options, levels and `only` filters; builds every plugin once."""
    _check_prior(suite.prior, f"{where}: prior")
    _check_backend(suite.engine.backend, f"{where}: engine")
    known = {axis: {entry.title for entry in getattr(suite, axis)} for axis in ENTRIES}
    known["settings"] = set[str]()
    for _, grid in grids(suite):
        for axis in ENTRIES:
            known[axis] |= {entry.title for entry in getattr(grid, axis)}
        known["settings"] |= {str(values.get("name", "default")) for values in grid.settings}
    for axis in ENTRIES:
        _check_entries(axis, getattr(suite, axis), known, where)
    for place, grid in grids(suite):
        inside = f"{where}: {place}" if place else where
        if place:
            for axis in ENTRIES:
                _check_entries(axis, getattr(grid, axis), known, inside)
        _check_settings(grid, inside)
        _check_levels(grid, inside)
    refuse_confusions(suite, where)


def _check_entries(axis: str, entries: Sequence[Entry], known: Mapping[str, Collection[str]], where: str) -> None:
    """Refuse wrong options of plugins, labels that are given twice, and `only` of labels that are nowhere."""
    titles: set[str] = set()
    for index, entry in enumerate(entries):
        place = f"{where}: {_place(axis, index, where)}"
        if axis == "defenses":
            build_defense(entry.name, entry.options, place)
            _check_noise(entry, place)
        else:
            registry.build(axis, entry.name, entry.options, place)
        if entry.title in titles:
            raise GradleakError(f"{place}: {entry.title!r} is listed twice; give one a label")
        titles.add(entry.title)
        for key, wanted in entry.only.items() if axis in ("attacks", "defenses") else ():
            if key not in AXES:
                raise unknown("axis", key, AXES, f"{place}.only")
            for title in wanted:
                if title not in known[key]:
                    raise unknown(f"label of {key}", title, known[key], f"{place}.only.{key}")


def _check_noise(entry: Entry, place: str) -> None:
    for options in (entry.options, *(each for each in entry.options.values() if isinstance(each, Mapping))):
        if {"sigma", "epsilon"} <= set(options):
            raise GradleakError(f"{place}: epsilon: sigma is what it takes to reach it; give one of the two")


def _check_settings(suite: Suite, where: str) -> None:
    names: set[str] = set()
    for index, values in enumerate(suite.settings):
        place = f"{where}: {_place('settings', index, where)}"
        setting = build_setting(values, place)
        if setting.name in names:
            raise GradleakError(f"{place}: name {setting.name!r} is taken; settings need names")
        names.add(setting.name)
        if suite.utility is not None:
            suite.utility.at(setting, f"{where}: utility").setting(f"{where}: utility")


def _check_levels(suite: Suite, where: str) -> None:
    for index, level in enumerate(suite.knowledge):
        if level not in KNOWLEDGE:
            raise unknown("level", level, KNOWLEDGE, f"{where}: knowledge[{index}]")
    attacks = [registry.build("attacks", entry.name, entry.options) for entry in suite.attacks]
    defenses = [build_defense(entry.name, entry.options) for entry in suite.defenses]
    for (index, attack), defense in itertools.product(enumerate(attacks), defenses):
        try:
            levels_of(suite, attack, defense, suite.attacks[index].optional)
        except GradleakError as error:
            raise GradleakError(f"{where}: attacks[{index}]: {error}") from error


def _members(suite: Suite) -> list[Entry]:
    """Attacks of a suite, with the name of an ensemble (`auto-v2`) replaced by its members.

    Members are all attacks that declare it, and against each defense those it calls its counter-attacks. One that the
    suite lists by itself stays as it is listed.
    """
    listed = {entry.title for entry in suite.attacks}
    found: list[Entry] = []
    for entry in suite.attacks:
        variants = registry.members(entry.name)
        if not variants or entry.name in registry.names("attacks"):
            found.append(entry)
            continue
        names = {name for name, _, _ in variants}
        joined = [
            Entry(name=name, label=label, options=dict(options), only=entry.only, optional=True)
            for name, label, options in variants
        ]
        counters: dict[str, list[str]] = {}
        for guard in suite.defenses:
            for name in build_defense(guard.name, guard.options).counter_attacks:
                counters.setdefault(name, []).append(guard.title)
        for name, titles in counters.items():
            if name not in names and name in registry.names("attacks"):
                joined.append(Counter(name=name, only=entry.only, optional=True, against=tuple(titles)))
        found += [member for member in joined if member.title not in listed]
        listed |= {member.title for member in joined}
    return found


def _controlled(attacks: list[Entry]) -> list[Entry]:
    """Add the controls that are not listed, and take `only` from those that are."""
    controls = [name for name in registry.names("attacks") if registry.load("attacks", name).family == "control"]
    listed = {entry.name for entry in attacks}
    missing = [name for name in controls if not registry.load("attacks", name).observes_other_victim]
    found = [entry.model_copy(update={"only": {}}) if entry.name in controls else entry for entry in attacks]
    return [*found, *(Entry(name=name, optional=True) for name in missing if name not in listed)]


def levels_enough(suite: Suite, attack: Attack) -> list[str]:
    """Return the levels of knowledge of a suite that an attack can work with."""
    least = KNOWLEDGE.index(attack.needs.defense.value)
    return [level for level in KNOWLEDGE if level in suite.knowledge and KNOWLEDGE.index(level) >= least]


def levels_of(suite: Suite, attack: Attack, defense: Defense, optional: bool = False) -> list[str]:
    """Return the levels of knowledge of a suite that make a difference between an attack and a defense."""
    need, enough = attack.needs.defense.value, levels_enough(suite, attack)
    if not enough and optional:
        return []
    if not enough:
        found = ", ".join(suite.knowledge)
        raise GradleakError(
            f"attack {type(attack).__name__} needs defense knowledge {need!r}; the suite's knowledge is [{found}]"
        )
    differs = attack.adaptive and attack.family != "control" and defense.is_adaptive_target
    return enough if differs else enough[:1]


def _check_backend(name: str, where: str) -> None:
    from ..engine.backends import BACKENDS

    if name not in (allowed := [*BACKENDS, "auto"]):
        raise unknown("backend", name, allowed, where)


def _check_prior(prior: Prior, where: str) -> None:
    if prior.source is not None and (prior.dataset is not None or prior.options):
        raise GradleakError(f"{where}: source: a user's generator takes no dataset and no options")
    if prior.source is None and prior.weights is not None:
        raise GradleakError(f"{where}: weights: needs source, the module:function that builds the generator")
    if prior.dataset is not None:
        registry.build("datasets", prior.dataset.name, prior.dataset.options, f"{where}: dataset")
    if not prior.options:
        return
    from ..training.priors import Recipe

    allowed = [field.name for field in dataclasses.fields(Recipe)]
    for key in prior.options:
        if key not in allowed:
            raise unknown("key", key, allowed, f"{where}: options")
    check(Recipe, prior.options, f"{where}: options")
