"""The contracts of plugins as checks on a small case: what `gradleak check` and the tests of built-ins run.

A check is a function that returns if a promise is kept and raises `Broken` if not; its docstring's first line says
the promise. The victims are tuning victims of the digits, or of the dataset that a case names.
`gradleak check` runs the steps in a process of their own (see `process`); the tests of built-ins call the checks.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .. import registry
from ..plugins import near_misses, place_of_hook
from .attacks import (
    AttackCase,
    attack_answers_every_victim,
    attack_declares_itself,
    attack_leaves_things_alone,
    attack_repeats_itself,
    attack_treats_victims_apart,
)
from .behaviour import Watch
from .clients import client_can_be_imitated, client_declares_itself, client_gives_an_update
from .datasets import (
    dataset_declares_itself,
    dataset_holds_images,
    dataset_keeps_victims_private,
    dataset_repeats_itself,
)
from .defenses import (
    DefenseCase,
    defense_can_be_attacked_adaptively,
    defense_changes_something,
    defense_decides_by_more_than_rounding,
    defense_declares_itself,
    defense_is_what_it_declares,
    defense_leaves_its_input_alone,
    defense_packs_its_messages,
    defense_sends_what_decodes,
    defense_simulates_what_it_sends,
)
from .findings import Finding, found_by
from .imports import keeps_away_from_the_truth
from .models import (
    ModelCase,
    model_can_be_differentiated_twice,
    model_declares_itself,
    model_follows_its_seed,
    model_gives_logits,
)
from .scan import looks_only_at_what_it_is_given
from .servers import (
    ServerCase,
    server_changes_what_it_says,
    server_declares_itself,
    server_leaves_the_model_alone,
    server_repeats_itself,
    server_says_what_it_cannot,
    server_sends_a_model,
)
from .victims import Ask

Step = tuple[str, Callable[[], Finding]]
"""A promise, and what checks it."""


def check_file(path: Path, ask: Ask | None = None) -> list[Finding]:
    """Add the plugin of a file and check its contract, in this process.

    Args:
        path: the plugin file.
        ask: what it is checked with.

    Raises:
        GradleakError: the file is no plugin.
    """
    ((group, name),) = registry.add_file(path)
    return check(group, name, ask)


def check(group: str, name: str, ask: Ask | None = None) -> list[Finding]:
    """Check a plugin of the registry, in this process."""
    return [run() for _, run in steps(group, name, ask or Ask())]


def steps(group: str, name: str, ask: Ask) -> Iterator[Step]:
    """Yield what is checked of a plugin, one promise after the other; each is to be run before the next is asked for.

    Raises:
        GradleakError: there is no such plugin, or it cannot be loaded.
    """
    cls = registry.load(group, name)
    source = inspect.getsourcefile(cls)
    path = None if source is None else Path(source)
    watch, met = Watch(path), set[str]()

    def step(check: Callable[[], None], promise: str, *hooks: str) -> Step:
        def run() -> Finding:
            with watch():
                return found_by(check, promise, place_of_hook(cls, *hooks), met)

        return promise, run

    if path is not None and group in ("attacks", "defenses", "servers"):
        package = (group,) if cls.__module__.startswith(f"gradleak.{group}.") else ()
        yield step(partial(keeps_away_from_the_truth, path, package), "does not reach the truth")
        yield step(partial(looks_only_at_what_it_is_given, path), _promise(looks_only_at_what_it_is_given))
    yield _names_its_hooks(cls)
    needed = _required(cls, ask.options)
    if needed:
        built = Finding("can be built with its defaults", None, f"no default for {', '.join(needed)}")
        yield built.check, lambda: built
        return
    promise = "can be built with these options" if ask.options else "can be built with its defaults"
    name_of, build = step(lambda: registry.build(group, name, ask.options), promise)
    found = build()
    if not found.ok:
        yield name_of, lambda: found
        return
    case = _case(group, name, ask)
    for each in CHECKS[group]:
        yield step(partial(each, case), _promise(each), *ABOUT.get(each, ()))
    for look in (watch.keeps_quiet, watch.leaves_the_process_alone, watch.takes_little_memory):
        yield _promise(look), partial(found_by, look, _promise(look), place_of_hook(cls, *MAIN[group]))


def _case(group: str, name: str, ask: Ask) -> Any:
    prepare: dict[str, Callable[[], Any]] = {
        "attacks": lambda: AttackCase(name, ask=ask),
        "clients": lambda: registry.build("clients", name, ask.options),
        "defenses": lambda: DefenseCase(registry.build("defenses", name, ask.options), ask),
        "models": lambda: ModelCase(registry.build("models", name, ask.options), ask.shape),
        "datasets": lambda: (registry.build("datasets", name, ask.options), name, ask.root),
        "servers": lambda: ServerCase(registry.build("servers", name, ask.options), ask),
    }
    return prepare[group]()


def _required(cls: type[Any], given: Mapping[str, Any]) -> list[str]:
    fields = dataclasses.fields(cls)
    required = [each.name for each in fields if each.default is each.default_factory is dataclasses.MISSING]
    return [name for name in required if name not in given]


def _names_its_hooks(cls: type[Any]) -> Step:
    promise = "names its methods as the contract does"

    def run() -> Finding:
        near = near_misses(cls)
        return Finding(promise, None if near else True, "; ".join(near), warning=bool(near))

    return promise, run


def _promise(check: Callable[..., None]) -> str:
    first = (check.__doc__ or "").partition("\n")[0].rstrip(".")
    return first[:1].lower() + first[1:]


MAIN = {
    "attacks": ("reconstruct",),
    "clients": ("step",),
    "defenses": ("protect",),
    "models": ("build",),
    "datasets": ("read",),
    "servers": ("tamper",),
}
"""The method that a group's plugins are made of."""

CHECKS: dict[str, tuple[Callable[[Any], None], ...]] = {
    "attacks": (
        attack_declares_itself,
        attack_answers_every_victim,
        attack_leaves_things_alone,
        attack_repeats_itself,
        attack_treats_victims_apart,
    ),
    "clients": (client_declares_itself, client_gives_an_update, client_can_be_imitated),
    "defenses": (
        defense_declares_itself,
        defense_sends_what_decodes,
        defense_packs_its_messages,
        defense_leaves_its_input_alone,
        defense_changes_something,
        defense_simulates_what_it_sends,
        defense_is_what_it_declares,
        defense_decides_by_more_than_rounding,
        defense_can_be_attacked_adaptively,
    ),
    "models": (model_declares_itself, model_gives_logits, model_follows_its_seed, model_can_be_differentiated_twice),
    "datasets": (dataset_declares_itself, dataset_holds_images, dataset_repeats_itself, dataset_keeps_victims_private),
    "servers": (
        server_declares_itself,
        server_sends_a_model,
        server_changes_what_it_says,
        server_leaves_the_model_alone,
        server_repeats_itself,
        server_says_what_it_cannot,
    ),
}
"""By group, the checks of one plugin."""

ABOUT: dict[Callable[[Any], None], tuple[str, ...]] = {
    check: hooks
    for hooks, checks in {
        ("reconstruct",): CHECKS["attacks"][1:],
        ("protect", "release", "encode", "prepare_model"): CHECKS["defenses"][1:5],
        ("simulate", "protect"): CHECKS["defenses"][5:7],
        ("nll", "simulate", "per_example"): CHECKS["defenses"][7:],
        ("build",): CHECKS["models"][1:],
        ("read",): CHECKS["datasets"][1:],
        ("tamper",): CHECKS["servers"][1:5],
        ("unsuited",): CHECKS["servers"][5:],
        ("step", "objective"): CHECKS["clients"][1:],
    }.items()
    for check in checks
}
"""Which methods a promise is about, in the order in which they are blamed."""
