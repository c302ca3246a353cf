"""Which cells cannot run, said before any of them does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

from ..attack import GradientMatching
from ..engine.derivatives import not_computable
from ..errors import GradleakError
from ..federation import utility
from ..reconstruction import granted_of
from ..search.generators import Generator
from ..state import restored
from ..suite import Cell, Note, Utility, attack_and_defense, build_defense_of, build_setting, unnoted
from ..threat import Level
from .checks import combinations, generators
from .observe import batch_size_of
from .workshop import Resources, client_of, data_of, fitting_prior


def check(cells: Iterable[Cell], resources: Resources, note: Note = unnoted) -> list[Cell]:
    """Refuse cells that cannot run, before any of them does; return all but the optional ones that cannot.

    Every combination of dataset, model, setting and defense is tried on real victims: models and clients must be
    functions (see `checks`). What is tried is never shown to an attack. `note` is told what is left out, and why.

    Raises:
        GradleakError: an attack needs knowledge that its setting does not grant, cannot run on a model or
            under a defense at all, more victims are asked for than the dataset holds, one of them is public, a prior's
            generator cannot be had or makes other images than the victims', or a client is no function.
    """
    with restored():
        kept = _fitting(cells, resources, note)
        tried: set[str] = set()
        for cell in kept:
            mark = None if cell.is_utility else combinations.mark_of(cell)
            if mark is not None and mark not in tried:
                tried.add(mark)
                combinations.check(cell, resources)
    return kept


def _fitting(cells: Iterable[Cell], resources: Resources, note: Note) -> list[Cell]:
    """Compare what cells ask for with what there is; nothing is computed but networks' structure."""
    seen: dict[str, bool] = {}
    kept: list[Cell] = []
    for cell in cells:
        config = cell.config
        if cell.is_utility:
            recipe = Utility.model_validate(config["attack"]["options"])
            utility.check(data_of(config["dataset"], resources), build_defense_of(config["defense"]), recipe)
            kept.append(cell)
            continue
        relevant = {key: config[key] for key in ("attack", "defense", "model", "dataset", "setting", "knowledge")}
        mark = json.dumps([relevant, config["victims"], config["candidates"], config.get("prior")], sort_keys=True)
        if mark in seen:
            if seen[mark]:
                kept.append(cell)
            continue
        seen[mark] = True
        attack, defense = attack_and_defense(config)
        setting = build_setting(config["setting"])
        data = data_of(config["dataset"], resources)
        combinations.private(data, config, setting, defense)
        data.candidates(config["candidates"], config["tuning"])
        missing = attack.needs.missing(granted_of(attack, setting, config["knowledge"]))
        if missing:
            raise GradleakError(
                f"attack {config['attack']['label']!r} needs {', '.join(missing)}, which setting "
                f"{setting.name!r} does not grant; add it to the setting's `grants`"
            )
        if "prior" in config:
            prior = fitting_prior(config["prior"], data, resources)
            if isinstance(prior, Generator):
                generators.check(prior, config["prior"]["source"], data)
        if attack.observes_other_victim and config["victims"] < 2:
            raise GradleakError(f"attack {config['attack']['label']!r} needs at least 2 victims")
        network = client_of(config, data)
        refused = not_computable(network, data.shape, data.classes, setting, isinstance(attack, GradientMatching))
        if refused is not None:
            raise GradleakError(f"model {config['model']['label']!r} under setting {setting.name!r}: {refused}")
        level = Level(config["knowledge"])
        faced = replace(setting, batch_size=batch_size_of(attack, defense, setting, level))
        reason = attack.unsuited(network.module, faced, defense)
        if defense.cohort > 1 and setting.local_batch_size is not None:
            reason = "a sum of clients with local batches is no update of one batch; leave local_batch_size out"
        if reason is not None and cell.optional:
            seen[mark] = False
            note(cell.left_out(reason))
            continue
        if reason is not None:
            raise GradleakError(
                f"attack {config['attack']['label']!r} cannot run on model {config['model']['label']!r} under "
                f"defense {config['defense']['label']!r}: {reason}; restrict it with `only`"
            )
        kept.append(cell)
    return kept
