"""Which backend computes a problem: the one that is named or fastest, if it is right, or else the next."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import time
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import __version__
from ..client import PLAIN
from ..errors import unknown
from ..process import default_cache
from . import memory
from .backends import BACKENDS, Sequential, width_of
from .comparison import disagreement
from .optimisers import Variables
from .problem import Backend, Direct, Facts, Problem, take

log = logging.getLogger(__name__)

_LADDER = ("layerwise", "vmap", "sequential")
"""What follows a backend that cannot compute a problem, or not rightly."""
_WORTH_TIMING = 64
"""Fewer victim-iterations than this are computed sooner than the other backends are tried: which takes a
comparison with the reference and two timed calls each."""
_TIE = 1.1
"""`sequential` is kept unless another backend is faster by this factor, so that noise does not decide."""


class Choice(NamedTuple):
    """A backend for a problem, and why it is not the one that was asked for."""

    name: str
    backend: Backend
    reason: str
    width: int
    """Trials of the chunk that fitted into memory together."""
    facts: Facts
    """What is known of all victims, as the backend likes it."""


_compared: WeakKeyDictionary[nn.Module, dict[str, tuple[str, str]]] = WeakKeyDictionary()
"""Names and reasons by kind of problem, as long as a network lives, which is a cell: what an earlier cell of the
same worker found must not change the digits of a later one."""


def choose(
    name: str, problem: Problem, variables: Variables, facts: Facts, iterations: int, owner: Tensor | None = None
) -> Choice:
    """Return the named backend, or for `auto` the fastest one for this chunk of trials.

    It is compared with `sequential` on trials of the chunk. One that does not apply, fails or answers otherwise is
    replaced by the next of layerwise, vmap, sequential.

    Args:
        name: in `BACKENDS`, or auto.
        problem: one trial's loss.
        variables: those of the chunk's trials, [W, ...].
        facts: what is known of all victims, [N, ...].
        iterations: how many there will be.
        owner: victim of each trial of the chunk, [W]; by default they are the first.

    Raises:
        GradleakError: no backend has that name.
        torch.OutOfMemoryError: one trial is too large for the memory.
    """
    if name not in (*BACKENDS, "auto"):
        raise unknown("backend", name, [*BACKENDS, "auto"])
    width = width_of(variables)
    rows = torch.arange(width, device=next(iter(variables.values())).device) if owner is None else owner
    known = take(facts, rows)
    kind = kind_of(problem, variables, facts, width)
    if name == "auto":
        name = _fastest_known(problem, variables, known, iterations, kind)
    found = _compared.setdefault(problem.network.module, {})
    if f"{name} {kind}" in found:
        name, reason = found[f"{name} {kind}"]
        backend = BACKENDS[name]()
        if backend.refusal(problem, variables, known) is None:
            return Choice(name, backend, reason, width, backend.prepare(problem, facts))
    choice = _right(name, problem, variables, facts, rows)
    found[f"{name} {kind}"] = choice.name, choice.reason
    return choice


def _right(name: str, problem: Problem, variables: Variables, facts: Facts, rows: Tensor) -> Choice:
    """Return the first backend from the named one on that computes the chunk rightly, or as much of it as fits."""
    width = width_of(variables)
    while True:
        part = {key: tensor[:width] for key, tensor in variables.items()}
        try:
            return _first_right(name, problem, part, facts, rows[:width])
        except (RuntimeError, MemoryError) as error:
            width = memory.half(width, error)
        # Only here is what the error held free again.
        memory.release(next(iter(variables.values())).device)


def _first_right(name: str, problem: Problem, variables: Variables, facts: Facts, rows: Tensor) -> Choice:
    reasons: list[str] = []
    known = take(facts, rows)
    for candidate in _LADDER[_LADDER.index(name) :]:
        backend, ready = BACKENDS[candidate](), facts
        reason = backend.refusal(problem, variables, known)
        if reason is None and candidate != "sequential":
            # All victims' facts, once: making them ready can take as long as many iterations.
            ready = backend.prepare(problem, facts)
            reason = disagreement(backend, problem, variables, known, take(ready, rows))
            if reason is not None:
                _say(f"backend {candidate!r} fails or answers otherwise than 'sequential': {reason}")
        if reason is None:
            return Choice(candidate, backend, "; ".join(reasons), width_of(variables), ready)
        log.debug("backend %r does not apply: %s", candidate, reason)
        reasons.append(f"{candidate}: {reason}")
    raise AssertionError("'sequential' computes everything")


def _fastest_known(problem: Problem, variables: Variables, facts: Facts, iterations: int, kind: str) -> str:
    """Time the backends once for each kind of problem on a machine: later runs must give the same digits."""
    if width_of(variables) * iterations < _WORTH_TIMING:
        return "sequential"
    path = default_cache() / "backends" / kind
    if not path.exists():
        chosen = _fastest(problem, variables, facts)
        log.debug("backend %r was chosen for %d trials", chosen, width_of(variables))
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(chosen)
        # A link fails where another process has decided meanwhile: the first decision holds.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    return path.read_text()


def _fastest(problem: Problem, variables: Variables, facts: Facts) -> str:
    """Time every backend that applies and is right, after a warm-up, and return the fastest's name."""
    width = width_of(variables)
    # One trial is enough to know what `sequential` takes for all.
    first, known = {name: tensor[:1] for name, tensor in variables.items()}, take(facts, slice(0, 1))
    reference = Sequential()
    reference(problem, first, known)
    picked, limit = "sequential", width * min(_seconds(reference, problem, first, known) for _ in range(2)) / _TIE
    for name, kind in BACKENDS.items():
        backend = kind()
        if name == "sequential" or (name == "vmap" and width == 1):
            continue
        try:
            if backend.refusal(problem, variables, facts) is not None:
                continue
            ready = backend.prepare(problem, facts)
            if disagreement(backend, problem, variables, facts, ready) is not None:
                continue
            seconds = min(_seconds(backend, problem, variables, ready) for _ in range(2))
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            log.debug("backend %r finds too little memory: %s", name, error)
            continue
        if seconds < limit:
            picked, limit = name, seconds
    return picked


def _seconds(backend: Backend, problem: Problem, variables: Variables, facts: Facts) -> float:
    device = next(iter(variables.values())).device
    # One thread's own time does not depend on what else the machine does.
    own = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if own else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = clock()
    backend(problem, variables, facts)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def kind_of(problem: Problem, variables: Variables, facts: Facts, width: int = 0) -> str:
    """Hash of what decides speed and memory: architecture, shapes, objective, protocol, device, versions, width."""

    def shapes(value: object) -> object:
        if isinstance(value, Facts):
            return shapes(vars(value))
        if isinstance(value, dict):
            return {key: shapes(item) for key, item in value.items()}
        return (tuple(value.shape[1:]), str(value.dtype), value.device.type) if isinstance(value, Tensor) else None

    match = problem.match
    parts = (
        [(str(type(part)), _plain(vars(part))) for part in problem.network.module.modules()],
        repr(problem.network.module),
        problem.network.module.training,
        {name: tuple(tensor.shape) for name, tensor in problem.network.parameters.items()},
        width,
        shapes(variables),
        shapes(facts),
        repr(match) if isinstance(match, Direct) else _described(match),
        [_described(part) for part in (problem.decode, problem.penalty, problem.per_example)],
        repr(problem.training),
        *([] if problem.network.client == PLAIN else [repr(problem.network.client)]),
        torch.get_num_threads(),
        torch.__version__,
        __version__,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _plain(values: Mapping[str, object]) -> list[tuple[str, object]]:
    """Settings of a module that its `repr` need not show."""
    return [(name, value) for name, value in values.items() if isinstance(value, bool | int | float | str)]


def _described(value: object, depth: int = 6) -> object:
    """What a callable does, as far as it can be told: its code, and the objects and options it holds."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth == 0 or isinstance(value, nn.Module):
        return str(type(value))
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape)
    deeper = functools.partial(_described, depth=depth - 1)
    if isinstance(value, types.MethodType):
        return deeper(value.__self__), value.__func__.__qualname__
    if isinstance(value, types.FunctionType):
        cells = [deeper(cell.cell_contents) for cell in value.__closure__ or ()]
        return value.__module__, value.__qualname__, hashlib.sha256(value.__code__.co_code).hexdigest(), cells
    if isinstance(value, dict):
        return [(str(key), deeper(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [deeper(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        version = getattr(value, "version", "")
        return str(type(value)), version, [(item.name, deeper(getattr(value, item.name))) for item in fields(value)]
    return str(type(value))


@functools.cache
def _say(text: str) -> None:
    log.warning("%s", text)
