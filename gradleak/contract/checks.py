"""The contracts of plugins as checks on a small case: what `gradleak check` and the tests of built-ins run.

A check is a function that returns if a promise is kept and raises `Broken` if not; its docstring's first line says
the promise. The victims are tuning victims of the digits, or of the dataset that a case names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .. import registry
from ..errors import GradleakError
from .attacks import (
    AttackCase,
    attack_answers_every_victim,
    attack_declares_itself,
    attack_leaves_things_alone,
    attack_repeats_itself,
    attack_treats_victims_apart,
)
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
    defense_leaves_its_input_alone,
    defense_packs_its_messages,
    defense_sends_what_decodes,
    defense_simulates_what_it_sends,
)
from .findings import Finding, found_by
from .imports import keeps_away_from_the_truth
from .models import model_can_be_differentiated_twice, model_declares_itself, model_follows_its_seed, model_gives_logits


def check_file(path: Path, root: Path | None = None) -> list[Finding]:
    """Add the plugin of a file and check its contract.

    Args:
        path: the plugin file.
        root: the data root, for a dataset.

    Raises:
        GradleakError: the file is no plugin.
    """
    ((group, name),) = registry.add_file(path)
    found = [found_by(partial(keeps_away_from_the_truth, path), "does not reach the truth")]
    return [*(found if group in ("attacks", "defenses") else []), *check(group, name, root)]


def check(group: str, name: str, root: Path | None = None) -> list[Finding]:
    """Check a plugin of the registry with its default options."""
    prepare: dict[str, Callable[[], Any]] = {
        "attacks": lambda: AttackCase(name),
        "defenses": lambda: DefenseCase(registry.build("defenses", name)),
        "models": lambda: registry.build("models", name),
        "datasets": lambda: (registry.build("datasets", name), name, root),
    }
    try:
        registry.build(group, name)
    except GradleakError as error:
        cls = registry.load(group, name)
        fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
        required = [each.name for each in fields if each.default is each.default_factory is dataclasses.MISSING]
        detail = f"no default for {', '.join(required)}" if required else str(error)
        return [Finding("can be built with its defaults", None if required else False, detail)]
    case = prepare[group]()
    return [
        found_by(partial(each, case), (each.__doc__ or "").partition("\n")[0].rstrip(".")) for each in CHECKS[group]
    ]


CHECKS: dict[str, tuple[Callable[[Any], None], ...]] = {
    "attacks": (
        attack_declares_itself,
        attack_answers_every_victim,
        attack_leaves_things_alone,
        attack_repeats_itself,
        attack_treats_victims_apart,
    ),
    "defenses": (
        defense_declares_itself,
        defense_sends_what_decodes,
        defense_packs_its_messages,
        defense_leaves_its_input_alone,
        defense_changes_something,
        defense_simulates_what_it_sends,
        defense_decides_by_more_than_rounding,
        defense_can_be_attacked_adaptively,
    ),
    "models": (model_declares_itself, model_gives_logits, model_follows_its_seed, model_can_be_differentiated_twice),
    "datasets": (dataset_declares_itself, dataset_holds_images, dataset_repeats_itself, dataset_keeps_victims_private),
}
"""By group, the checks of one plugin."""
