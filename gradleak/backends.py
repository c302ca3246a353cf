"""Ways to compute losses and gradients of stacked trials; all give the same numbers up to rounding."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from . import __version__
from .errors import unknown
from .layerwise import Layerwise
from .optimisers import Variables
from .problem import Backend, Direct, Facts, Problem, Values, take
from .process import default_cache
from .update import by_autograd, by_transform

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

    def applies(self, problem: Problem, variables: Variables, facts: Facts) -> bool:
        """Anything torch.func can stack."""
        return True

    def __call__(self, problem: Problem, variables: Variables, facts: Facts) -> Values:
        """Losses and gradients of W stacked trials."""

        def one(row: Variables, known: Facts) -> tuple[Tensor, Tensor]:
            return problem.loss(row, known, by_transform)

        # Randomness is refused by vmap's default: a loss draws nothing, so that it can be repeated.
        gradients, (total, matching) = vmap(grad_and_value(one, has_aux=True))(variables, facts)
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
    path = default_cache() / "backends" / _kind(problem, variables, facts)
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


def _kind(problem: Problem, variables: Variables, facts: Facts) -> str:
    """Hash of what decides a problem's speed: architecture, shapes, objective, protocol, device and versions."""

    def shapes(value: object) -> object:
        if isinstance(value, dict):
            return {key: shapes(item) for key, item in value.items()}
        return (tuple(value.shape[1:]), str(value.dtype), value.device.type) if isinstance(value, Tensor) else None

    match = problem.match
    parts = (
        repr(problem.network.module),
        problem.network.module.training,
        {name: tuple(tensor.shape) for name, tensor in problem.network.parameters.items()},
        _width(variables),
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


def _agrees(answer: Values, truth: Values) -> bool:
    """Whether the first trial's gradients are the same up to rounding; what is not finite says nothing."""
    for name, expected in truth.gradients.items():
        error, size = (answer.gradients[name][:1] - expected).norm(), expected.norm()
        if bool(error.isfinite() & (error > 1e-2 * size)):
            return False
    return True


def _width(variables: Variables) -> int:
    return len(next(iter(variables.values())))
