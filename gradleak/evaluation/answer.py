"""An attack's answer: asked for, timed, and held to what an answer must be, never repaired."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields

from torch import Tensor
from torch.utils._pytree import tree_map

from ..attack import Attack, Reconstruction
from ..engine import memory
from ..plugins import at, place_of_hook, said
from ..reconstruction import left_alone, mistakes, mistakes_of_victims
from ..seeds import Generators
from ..state import restored
from ..status import Status
from ..threat import Observation

log = logging.getLogger(__name__)

_told: set[tuple[str, ...]] = set()
"""What was logged of plugins that change global state, once a process."""


@dataclass(frozen=True)
class Answer:
    """What an attack answered for N victims, and what it is worth."""

    reconstruction: Reconstruction | None
    """None where nothing came back that could be compared with a truth: out of memory, or invalid as a whole."""
    status: list[str]
    """One a victim."""
    seconds: float
    """Time of a victim."""
    error: str = ""
    """Why the answer is invalid as a whole."""
    notes: dict[int, str] = field(default_factory=dict)
    """Why a victim's part of it is invalid, by victim."""
    width: int | None = None
    """Trials that memory held at once, if they are fewer than were asked for."""


class Mistake(str):
    """What is wrong with an answer as a whole, found where it was given."""


Asker = Callable[[str, Attack, Observation, Generators], Answer]
"""Asks an attack, as `ask` does."""
Respond = Callable[[], tuple[object, int | None]]
"""Runs an attack; returns its answer, or a `Mistake`, and the width if it was halved."""


def ask(
    name: str, attack: Attack, observation: Observation, generator: Generators, respond: Respond | None = None
) -> Answer:
    """Run an attack and check its answer; global state that it changed is put back, which is logged once.

    An answer that is no `Reconstruction` of this observation's shapes and types is invalid for every victim. A victim
    whose images are not finite or leave [0, 1] by more than rounding, or whose labels are no classes, is invalid
    unless the attack itself says that it failed. What is invalid counts as failed.

    Args:
        name: of the attack, for the log.
        attack: what is run.
        observation: of N victims.
        generator: its streams, one a victim.
        respond: runs it; by default here and now.
    """
    victims = observation.victims
    clock = time.perf_counter()
    try:
        if respond is not None:
            answer, width = respond()
        else:
            with guarded(f"attack {name!r}"), left_alone(attack, observation):
                answer = attack.reconstruct(observation, generator)
            width = halved(observation)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        log.warning("attack %r: out of memory: %s", name, said(error))
        return Answer(None, [Status.OUT_OF_MEMORY.value] * victims, (time.perf_counter() - clock) / victims)
    seconds = (time.perf_counter() - clock) / victims
    place = at(place_of_hook(attack, "reconstruct"))
    wrong = answer if isinstance(answer, Mistake) else next(mistakes(answer, observation), None)
    if wrong is not None:
        wrong = f"{wrong}{place}"
        log.warning("attack %r: its answer is invalid: %s", name, wrong)
        return Answer(None, [Status.INVALID.value] * victims, seconds, f"invalid answer: {wrong}")
    assert isinstance(answer, Reconstruction)
    answer = detached(answer)
    status = [Status(state).value for state in answer.status] or [Status.OK.value] * victims
    notes = {
        victim: reason
        for victim, reason in mistakes_of_victims(answer, observation.classes).items()
        if status[victim] == Status.OK
    }
    for victim, reason in notes.items():
        status[victim] = Status.INVALID.value
        log.warning("attack %r: its answer for victim %d is invalid: %s%s", name, victim, reason, place)
    return Answer(answer, status, seconds, notes=notes, width=width)


def halved(observation: Observation) -> int | None:
    """Return the least width that memory held of an attack that has run, if it is not the one that was asked for."""
    return min(observation.compute.widths.halved.values(), default=None)


def guarded(plugin: str) -> AbstractContextManager[None]:
    """Put global state back after a call of a plugin, and log once a process what that changed."""

    def tell(changed: list[str]) -> None:
        if (plugin, *changed) not in _told:
            _told.add((plugin, *changed))
            log.warning("%s changed global state, which is put back: %s", plugin, ", ".join(changed))

    return restored(tell)


def detached(answer: Reconstruction) -> Reconstruction:
    """Return an answer that holds no graph."""
    changed = copy.copy(answer)
    for item in fields(answer):
        value = getattr(answer, item.name)
        setattr(changed, item.name, tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value))
    return changed
