"""Which cells cannot run, said before any of them does."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace

from .. import structure
from ..attack import GradientMatching
from ..dataset import Data
from ..engine.derivatives import not_computable
from ..errors import GradleakError
from ..federation import utility
from ..federation.trainable import choose
from ..reconstruction import granted_of
from ..search.generators import Generator
from ..state import restored
from ..suite import AttackCell, Cell, GivenPrior, Note, TrainingCell, unnoted
from ..threat import Power
from ..update import copied
from .checks import combinations, generators
from .observe import faced_of
from .workshop import Workshop


def check(cells: Iterable[Cell], workshop: Workshop, note: Note = unnoted) -> list[Cell]:
    """Refuse cells that cannot run, before any of them does; return all but the optional ones that cannot.

    Every combination of dataset, model, setting and defense is tried on real victims: models and clients must be
    functions (see `checks`). What is tried is never shown to an attack. `note` is told what is left out, and why.

    Raises:
        GradleakError: an attack needs knowledge that its setting does not grant, cannot run on a model or
            under a defense at all, more victims are asked for than the dataset holds, one of them is public, a prior's
            generator cannot be had or makes other images than the victims', or a client is no function.
    """
    with restored():
        kept = fitting(cells, workshop, note)
        tried: set[Hashable] = set()
        for cell in kept:
            if isinstance(cell, AttackCell) and (mark := combinations.mark_of(cell)) not in tried:
                tried.add(mark)
                combinations.check(cell, workshop)
    return kept


def fitting(cells: Iterable[Cell], workshop: Workshop, note: Note = unnoted) -> list[Cell]:
    """Compare what cells ask for with what there is; nothing is computed but networks' structure.

    Raises:
        GradleakError: as `check`, but for what only trying shows.
    """
    seen: dict[Hashable, bool] = {}
    known: dict[Hashable, str | None] = {}
    kept: list[Cell] = []
    for cell in cells:
        if isinstance(cell, TrainingCell):
            utility.check(workshop.data(cell.dataset), cell.built_defense, cell.recipe)
            kept.append(cell)
            continue
        assert isinstance(cell, AttackCell)
        mark = _mark(cell)
        if mark not in seen:
            seen[mark] = _fits(cell, workshop, note, known)
        if seen[mark]:
            kept.append(cell)
    return kept


def _mark(cell: AttackCell) -> Hashable:
    """Return what a cell asks for, whatever its seed."""
    parts = (cell.attack, cell.defense, cell.model, cell.dataset, cell.prior)
    return *parts, cell.setting, cell.knowledge, cell.victims, cell.candidates


def _once(known: dict[Hashable, str | None], question: Hashable, answer: Callable[[], str | None]) -> str | None:
    """Return what is known of a question, answered now if it is asked for the first time."""
    if question not in known:
        known[question] = answer()
    return known[question]


def _fits(cell: AttackCell, workshop: Workshop, note: Note, known: dict[Hashable, str | None]) -> bool:
    """Return whether a cell can run; only an optional one need not. `known` is what does not depend on its attack.

    Raises:
        GradleakError: it has to, and cannot.
    """
    attack, defense, setting = cell.built_attack, cell.built_defense, cell.setting
    data = workshop.data(cell.dataset)
    combinations.private(data, cell)
    data.candidates(cell.candidates, cell.tuning)
    missing = attack.needs.missing(granted_of(attack, setting, cell.knowledge))
    if missing:
        raise GradleakError(
            f"attack {cell.attack.label!r} needs {', '.join(missing)}, which setting "
            f"{setting.name!r} does not grant; add it to the setting's `grants`"
        )
    if cell.prior is not None:
        fitting = workshop.fitting(cell.prior, data)
        if isinstance(fitting, Generator) and isinstance(cell.prior, GivenPrior):
            generators.check(fitting, cell.prior.source, data)
    if attack.observes_other_victim and cell.victims < 2:
        raise GradleakError(f"attack {cell.attack.label!r} needs at least 2 victims")
    if cell.before is not None:
        utility.check(data, defense, cell.before.recipe)
    server = cell.built_server
    missing = server.needs.missing(setting.grants)
    if missing:
        raise GradleakError(
            f"server {setting.server.name!r} needs {', '.join(missing)}, which setting {setting.name!r} does not "
            "grant; add it to the setting's `grants`"
        )
    place = (cell.model, cell.dataset, cell.defense, cell.setting)
    reason = _once(known, place, lambda: _unserved(cell, workshop, data))
    if reason is not None:
        return _left_out(cell, reason, note)
    network = workshop.client(cell, data)
    matching = isinstance(attack, GradientMatching)
    refused = _once(
        known, (*place, matching), lambda: not_computable(network, data.shape, data.classes, setting, matching)
    )
    if refused is not None:
        raise GradleakError(f"model {cell.model.label!r} under setting {setting.name!r}: {refused}")
    faced = replace(setting, batch_size=faced_of(cell))
    reason = attack.unsuited(network.module, faced, defense)
    if defense.cohort > 1 and setting.local_batch_size is not None:
        reason = "a sum of clients with local batches is no update of one batch; leave local_batch_size out"
    if setting.rounds > 1:
        reason = reason or combinations.rounds(network, data, cell)
    if attack.observes_other_victim and server.adapts:
        reason = "attacks another victim, but this server sends every victim a model of its own"
    return reason is None or _left_out(cell, reason, note)


def _unserved(cell: AttackCell, workshop: Workshop, data: Data) -> str | None:
    """Say why a cell's server cannot work on its clients, or None."""
    if cell.setting.rounds > 1 and cell.built_server.surface is not Power.HONEST:
        return "rounds: a server that changes its model asks as often as it needs; leave rounds out"
    module = workshop.untrained(cell.model, data.shape, data.classes)
    prepared = cell.built_defense.prepare_model(module)
    structure.mark(prepared, data.shape)
    reason = cell.built_server.unsuited(
        choose(copied(prepared), cell.setting.trainable), cell.setting, cell.built_defense
    )
    return None if reason is None else f"server {cell.setting.server.name!r}: {reason}"


def _left_out(cell: AttackCell, reason: str, note: Note) -> bool:
    """Note that an optional cell is left out.

    Raises:
        GradleakError: it is not optional.
    """
    if not cell.optional:
        raise GradleakError(
            f"attack {cell.attack.label!r} cannot run on model {cell.model.label!r} under "
            f"defense {cell.defense.label!r}: {reason}; restrict it with `only`"
        )
    note(cell.left_out(reason))
    return False
