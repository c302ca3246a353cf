"""An attack's answer: asked for, timed, and held to what an answer must be, never repaired."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..attack import Attack, Reconstruction
from ..engine import memory
from ..engine.loop import Status
from ..plugins import at, place_of_hook, said
from ..reconstruction import left_alone
from ..seeds import Generators
from ..state import restored
from ..threat import Observation

log = logging.getLogger(__name__)

ROUNDING = 1e-6
"""How far beyond [0, 1] a pixel may lie: what clamping before the last product in float32 leaves."""

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


def ask(name: str, attack: Attack, observation: Observation, generator: Generators) -> Answer:
    """Run an attack and check its answer; global state that it changed is put back, which is logged once.

    An answer that is no `Reconstruction` of this observation's shapes and types is invalid for every victim. A victim
    whose images are not finite or leave [0, 1] by more than `ROUNDING`, or whose labels are no classes, is invalid
    unless the attack itself says that it failed. What is invalid counts as failed.

    Args:
        name: of the attack, for the log.
        attack: what is run.
        observation: of N victims.
        generator: its streams, one a victim.
    """
    victims = observation.victims
    clock = time.perf_counter()
    try:
        with guarded(f"attack {name!r}"), left_alone(attack, observation):
            answer = attack.reconstruct(observation, generator)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        log.warning("attack %r: out of memory: %s", name, said(error))
        return Answer(None, [Status.OUT_OF_MEMORY.value] * victims, (time.perf_counter() - clock) / victims)
    seconds = (time.perf_counter() - clock) / victims
    place = at(place_of_hook(attack, "reconstruct"))
    wrong = next(_wrong(answer, observation), None)
    if wrong is not None:
        wrong += place
        log.warning("attack %r: its answer is invalid: %s", name, wrong)
        return Answer(None, [Status.INVALID.value] * victims, seconds, f"invalid answer: {wrong}")
    answer = _detached(answer)
    status = [Status(state).value for state in answer.status] or [Status.OK.value] * victims
    notes = {
        victim: reason
        for victim, reason in _wrong_victims(answer, observation.classes).items()
        if status[victim] == Status.OK
    }
    for victim, reason in notes.items():
        status[victim] = Status.INVALID.value
        log.warning("attack %r: its answer for victim %d is invalid: %s%s", name, victim, reason, place)
    return Answer(answer, status, seconds, notes=notes)


def guarded(plugin: str) -> AbstractContextManager[None]:
    """Put global state back after a call of a plugin, and log once a process what that changed."""

    def tell(changed: list[str]) -> None:
        if (plugin, *changed) not in _told:
            _told.add((plugin, *changed))
            log.warning("%s changed global state, which is put back: %s", plugin, ", ".join(changed))

    return restored(tell)


def _wrong(answer: object, observation: Observation) -> Iterator[str]:
    """Say what is wrong with an answer as a whole, in types and shapes."""
    if not isinstance(answer, Reconstruction):
        yield f"{type(answer).__name__} (allowed: Reconstruction)"
        return
    batch = (observation.victims, observation.batch_size)
    yield from _misfit("images", answer.images, (*batch, *observation.shape), floating=True)
    if answer.labels is not None:
        yield from _misfit("labels", answer.labels, batch, floating=False)
    for name in ("loss", "iterations", "gradient_evaluations"):
        if getattr(answer, name) is not None:
            yield from _misfit(name, getattr(answer, name), batch[:1])
    for name, column in answer.details.items():
        yield from _misfit(f"details[{name!r}]", column, batch[:1])
    if answer.candidates is not None:
        yield from _misfit(
            "candidates", answer.candidates, (batch[0], None, batch[1], *observation.shape), floating=True
        )
    if answer.trace is not None:
        yield from _misfit("trace", answer.trace, (batch[0], None))
    for name, guess in answer.guessed.items():
        if not isinstance(guess, Tensor) or guess.shape[:1] != batch[:1]:
            yield f"guessed[{name!r}] has no row for each of {batch[0]} victims"
    known = [state.value for state in Status]
    if len(answer.status) not in (0, batch[0]) or any(state not in known for state in answer.status):
        yield f"status {answer.status} (allowed: none, or one a victim of {', '.join(known)})"


def _misfit(name: str, tensor: object, shape: tuple[int | None, ...], floating: bool | None = None) -> Iterator[str]:
    """Say so if a tensor has another shape (None: any size), or another kind of numbers."""
    if not isinstance(tensor, Tensor):
        yield f"{name} are {type(tensor).__name__} (allowed: a tensor)"
        return
    if tensor.ndim != len(shape) or any(size not in (None, own) for own, size in zip(tensor.shape, shape, strict=True)):
        allowed = ", ".join("any" if size is None else str(size) for size in shape)
        yield f"{name} of shape {list(tensor.shape)} (allowed: [{allowed}])"
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
    if floating is not None and (not tensor.is_floating_point() if floating else not whole):
        allowed = "float32 or float64" if floating else "int64"
        yield f"{name} of {str(tensor.dtype).removeprefix('torch.')} (allowed: {allowed})"


def _wrong_victims(answer: Reconstruction, classes: int) -> dict[int, str]:
    """Say what is wrong with single victims' images and labels, by victim."""
    found: dict[int, str] = {}
    for victim, images in enumerate(answer.images):
        if not images.isfinite().all():
            found[victim] = "images are not finite"
        elif images.min() < -ROUNDING or images.max() > 1 + ROUNDING:
            found[victim] = f"images lie in [{float(images.min()):.4g}, {float(images.max()):.4g}] (allowed: [0, 1])"
        elif answer.labels is not None:
            labels = answer.labels[victim]
            if labels.min() < 0 or labels.max() >= classes:
                found[victim] = f"labels {labels.tolist()} (allowed: 0 to {classes - 1})"
    return found


def _detached(answer: Reconstruction) -> Reconstruction:
    """Return an answer that holds no graph."""
    changed = copy.copy(answer)
    for item in fields(answer):
        value = getattr(answer, item.name)
        setattr(changed, item.name, tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value))
    return changed
