"""Ways to compute losses and gradients of stacked trials; all give the same numbers up to rounding."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from .. import __version__
from ..errors import unknown
from ..process import default_cache
from ..update import by_autograd, by_transform
from .layerwise import Layerwise
from .memory import is_out_of_memory
from .optimisers import Variables
from .problem import Backend, Direct, Facts, Problem, Values, take

log = logging.getLogger(__name__)


class Sequential(Backend):
    """One trial after the other with plain double backward: the reference for all others."""

    def applies(self, problem: Problem, variables: Variables, facts: Facts) -> bool:
        """Anything."""
        return True

    def __call__(self, problem: Problem, variables: Variables, facts: Facts) -> Values:
        """Losses and gradients of W stacked trials."""
        totals, matchings, rows = [], [], []
        for index in range(_width(variables)):
            leaves = {name: tensor[index].detach().requires_grad_() for name, tensor in variables.items()}
            total, matching = problem.loss(leaves, take(facts, index), by_autograd)
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
            totals.append(total.detach())
            matchings.append(matching.detach())
            rows.append(gradients)
        stacked = {name: torch.stack(column) for name, column in zip(variables, zip(*rows, strict=True), strict=True)}
        return Values(torch.stack(totals), torch.stack(matchings), stacked)


class Vmap(Backend):
    """All trials at once through torch.func.vmap."""

    def __init__(self) -> None:
        self._problem: Problem | None = None
        self._compiles = False

    def compile(self) -> bool:
        """Compile from now on; the first call of every width takes a minute."""
        self._compiles = True
        self._problem = None
        return True

    def applies(self, problem: Problem, variables: Variables, facts: Facts) -> bool:
        """Anything torch.func can stack."""
        return True

    def __call__(self, problem: Problem, variables: Variables, facts: Facts) -> Values:
        """Losses and gradients of W stacked trials."""
        if self._problem is not problem:
            self._problem, self._plain = problem, _stacked(problem)
            self._compiled = torch.compile(self._plain, dynamic=False) if self._compiles else None
            self._tested: set[int] = set()
        if self._compiled is not None and (answer := self._try(variables, facts)) is not None:
            return answer
        return _values(self._plain(variables, facts))

    def _try(self, variables: Variables, facts: Facts) -> Values | None:
        """Run compiled; the first answer of every width is compared, and what fails is not tried again."""
        assert self._compiled is not None
        width = _width(variables)
        try:
            answer = _values(self._compiled(variables, facts))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            if width in self._tested or _agrees(answer, _values(self._plain(variables, facts)), width):
                self._tested.add(width)
                return answer
            reason = "it answers something else than without"
        log.warning("torch.compile cannot be used here, going on without (%s)", reason)
        self._compiled = None
        return None


def _stacked(problem: Problem) -> Callable[[Variables, Facts], Any]:
    def one(row: Variables, known: Facts) -> tuple[Tensor, Tensor]:
        return problem.loss(row, known, by_transform)

    # Randomness is refused by vmap's default: a loss draws nothing, so that it can be repeated.
    return cast(Callable[[Variables, Facts], Any], vmap(grad_and_value(one, has_aux=True)))


def _values(answer: tuple[Variables, tuple[Tensor, Tensor]]) -> Values:
    gradients, (total, matching) = answer
    return Values(total.detach(), matching.detach(), {n: g.detach() for n, g in gradients.items()})


BACKENDS: dict[str, type[Backend]] = {"sequential": Sequential, "vmap": Vmap, "layerwise": Layerwise}

_WORTH_TIMING = 64
"""Fewer victim-iterations than this are computed sooner than the other backends are tried."""
_TIE = 1.1
"""`sequential` is kept unless another backend is faster by this factor."""


def choose(name: str, problem: Problem, variables: Variables, facts: Facts, iterations: int) -> tuple[str, Backend]:
    """Return the named backend, or for `auto` the fastest one for this chunk of trials.

    A named backend that does not apply is replaced by `vmap`.

    Raises:
        GradleakError: no backend has that name.
    """
    if name == "auto":
        return _remembered(problem, variables, facts, iterations)
    if name not in BACKENDS:
        raise unknown("backend", name, [*BACKENDS, "auto"])
    backend = BACKENDS[name]()
    return (name, backend) if backend.applies(problem, variables, facts) else ("vmap", Vmap())


def _remembered(problem: Problem, variables: Variables, facts: Facts, iterations: int) -> tuple[str, Backend]:
    """Time the backends once for each kind of problem on a machine: later runs must give the same digits."""
    if _width(variables) * iterations < _WORTH_TIMING:
        return "sequential", Sequential()
    path = default_cache() / "backends" / kind_of(problem, variables, facts, _width(variables))
    if not path.exists():
        chosen, backend = _fastest(problem, variables, facts)
        log.debug("backend %r was chosen for %d trials", chosen, _width(variables))
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(chosen)
        # A link fails where another process has decided meanwhile: the first decision holds.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    name = path.read_text()
    backend = BACKENDS[name]()
    return (name, backend) if backend.applies(problem, variables, facts) else ("vmap", Vmap())


def kind_of(problem: Problem, variables: Variables, facts: Facts, width: int = 0) -> str:
    """Hash of what decides speed and memory: architecture, shapes, objective, protocol, device, versions, width."""

    def shapes(value: object) -> object:
        if isinstance(value, dict):
            return {key: shapes(item) for key, item in value.items()}
        return (tuple(value.shape[1:]), str(value.dtype), value.device.type) if isinstance(value, Tensor) else None

    match = problem.match
    parts = (
        repr(problem.network.module),
        problem.network.module.training,
        {name: tuple(tensor.shape) for name, tensor in problem.network.parameters.items()},
        width,
        shapes(variables),
        shapes(facts),
        repr(match) if isinstance(match, Direct) else getattr(match, "__qualname__", type(match).__qualname__),
        problem.per_example is not None,
        repr(problem.training),
        torch.get_num_threads(),
        torch.__version__,
        __version__,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _fastest(problem: Problem, variables: Variables, facts: Facts) -> tuple[str, Backend]:
    """Time every backend that applies, after a warm-up, and keep the fastest."""
    width = _width(variables)
    reference = Sequential()
    # One trial is enough to know what `sequential` takes for all, and what the others must answer for it.
    first = {name: tensor[:1] for name, tensor in variables.items()}
    known = take(facts, slice(0, 1))
    truth = reference(problem, first, known)
    least = width * min(_seconds(reference, problem, first, known) for _ in range(2))
    picked: tuple[str, Backend] = ("sequential", reference)
    limit = least / _TIE
    for name, kind in BACKENDS.items():
        backend = kind()
        if name == "sequential" or (name == "vmap" and width == 1) or not backend.applies(problem, variables, facts):
            continue
        try:
            ready = backend.prepare(problem, facts)
            answer = backend(problem, variables, ready)
            seconds = min(_seconds(backend, problem, variables, ready) for _ in range(2))
        except RuntimeError as error:  # memory, or an operation that cannot be stacked
            log.debug("backend %r cannot compute this problem: %s", name, error)
            continue
        if not _agrees(answer, truth):
            log.warning("backend %r disagrees with 'sequential' on this model and is not used", name)
        elif seconds < limit:
            picked, limit = (name, backend), seconds
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


def _agrees(answer: Values, truth: Values, rows: int = 1) -> bool:
    """Whether the first trials' gradients are the same up to rounding; what is not finite says nothing."""
    for name, expected in truth.gradients.items():
        wanted = expected[:rows].flatten(1)
        error, size = (answer.gradients[name][:rows].flatten(1) - wanted).norm(dim=1), wanted.norm(dim=1)
        if bool((error.isfinite() & (error > 1e-2 * size)).any()):
            return False
    return True


def _width(variables: Variables) -> int:
    return len(next(iter(variables.values())))
