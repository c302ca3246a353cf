"""The engine: minimises every trial's own loss, many stacked trials at a time.

A trial is one victim and one restart. A `Problem` describes one trial; a backend answers value and gradient
for a chunk of W trials; `minimise` owns the only optimisation loop. The chunk keeps its width: finished
trials leave, the next in the queue takes the slot, spare slots repeat a trial and are thrown away. So a
trial's arithmetic depends on the width alone, never on its neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from .backends import choose
from .optimisers import Optimiser, Schedule, Variables
from .problem import Facts, Guess, Problem, Values, take
from .threat import Compute
from .update import by_transform

log = logging.getLogger(__name__)


class Status(StrEnum):
    """How a victim's attack ended; all but `ok` are scored at the floor."""

    OK = "ok"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "oom"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to minimise: optimiser, rate, length and stopping rules, the same for every trial."""

    optimiser: Callable[[], Optimiser]
    rate: float
    schedule: Schedule
    iterations: int
    tolerance: float = 0.0
    """A trial whose total loss falls below this is finished."""
    patience: int | None = None
    """A trial that has not improved for so many iterations is finished."""
    project: Callable[[Variables], None] | None = None
    """Brings stacked variables back into their set, in place, after every step."""
    perturb: Callable[[Variables, Tensor, Tensor], None] | None = None
    """Changes stacked variables in place before an iteration, given trial index and step [W] (noise, fresh masks)."""
    trace_points: int = 50


@dataclass(frozen=True)
class Outcome:
    """The best iterate of T trials by their own total loss, and how they got there."""

    variables: Variables
    """[T, ...]."""
    total: Tensor
    """Total loss at `variables`, [T]; infinite if it never was finite."""
    matching: Tensor
    """Matching loss at `variables`, [T]."""
    iterations: Tensor
    """Gradients taken, [T], int64."""
    status: list[Status]
    trace: Tensor
    """Matching loss at `trace_points` + 1 evenly spaced iterations, [T, points]; NaN where a trial had ended."""
    backend: str


def minimise(problem: Problem, start: Variables, facts: Facts, owner: Tensor, plan: Plan, compute: Compute) -> Outcome:
    """Minimise the loss of T trials and return each one's best iterate.

    Args:
        problem: one trial's loss.
        start: initial variables, [T, ...].
        facts: what is known of the N victims, [N, ...].
        owner: victim of each trial, [T], int64.
        plan: how to minimise.
        compute: backend, chunk width, deadline and progress.
    """
    return _Run(problem, start, facts, owner, plan, compute).finish()


@dataclass(frozen=True)
class Final:
    """T trials as they are returned: images clamped to [0, 1] and the matching loss of exactly these."""

    images: Tensor
    targets: Tensor
    buffers: dict[str, Tensor]
    matching: Tensor


def finish(problem: Problem, variables: Variables, facts: Facts, width: int) -> Final:
    """Decode T trials, clamp their images, and evaluate the matching loss once more, `width` at a time."""

    def one(row: Variables, known: Facts) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        guess = problem.decode(row, known)
        guess = replace(guess, images=guess.images.clamp(0, 1))
        matching = problem.match(problem.simulate(guess, by_transform), known)
        return guess.images, guess.targets, guess.buffers, matching

    parts = [vmap(one)(*rows) for rows in _chunks((variables, facts), width)]
    return Final(*_join(parts, len(next(iter(variables.values())))))


def evaluate(problem: Problem, guesses: dict[str, Any], facts: Facts, width: int) -> Tensor:
    """Matching loss [N] of given guesses (fields of `Guess`, stacked), `width` at a time."""

    def one(row: dict[str, Any], known: Facts) -> Tensor:
        return problem.match(problem.simulate(Guess(**row), by_transform), known)

    parts = [vmap(one)(*rows).detach() for rows in _chunks((guesses, facts), width)]
    return torch.cat(parts)[: len(guesses["images"])]


def _chunks(rows: tuple[Any, ...], width: int) -> Iterator[tuple[Any, ...]]:
    """Cut stacked trees into chunks of one width; the last is filled up with repeats of the last row."""
    total = len(tree_leaves(rows)[0])
    for begin in range(0, total, width):
        index = torch.arange(begin, begin + width).clamp(max=total - 1)
        yield tree_map(lambda tensor, index=index: tensor[index.to(tensor.device)], rows)


def _join(parts: list[Any], total: int) -> Any:
    return tree_map(lambda *tensors: torch.cat(tensors)[:total].detach(), *parts)


class _Run:
    """The loop of `minimise`, its slots and its bookkeeping."""

    def __init__(
        self, problem: Problem, start: Variables, facts: Facts, owner: Tensor, plan: Plan, compute: Compute
    ) -> None:
        self.problem, self.owner, self.plan, self.compute = problem, owner, plan, compute
        self.start = start
        self.trials = len(owner)
        self.width = min(compute.width, self.trials)
        first = {name: tensor[: self.width] for name, tensor in start.items()}
        self.name, self.backend = choose(
            compute.backend, problem, first, take(facts, owner[: self.width]), plan.iterations
        )
        self.facts = self.backend.prepare(problem, facts)
        device = owner.device
        # `slot[w]` is the trial in slot w; a slot whose trial has ended and is not replaced is idle.
        self.slot = torch.arange(self.width, device=device)
        self.waiting = self.width
        self.idle = torch.zeros(self.width, dtype=torch.bool, device=device)
        self.step = torch.zeros(self.width, dtype=torch.int64, device=device)
        self.stale = torch.zeros_like(self.step)
        self.current = {name: tensor[self.slot].clone() for name, tensor in start.items()}
        self.known = take(self.facts, owner[self.slot])
        self.best = {name: tensor.clone() for name, tensor in start.items()}
        dtype = next(iter(start.values())).dtype
        self.total = torch.full((self.trials,), torch.inf, dtype=dtype, device=device)
        self.matching = torch.full_like(self.total, torch.inf)
        self.iterations = torch.zeros(self.trials, dtype=torch.int64, device=device)
        self.status = [Status.OK] * self.trials
        self.stride = max(1, -(-plan.iterations // plan.trace_points))
        points = plan.iterations // self.stride + 1
        self.trace = torch.full((self.trials, points), torch.nan, dtype=dtype, device=device)
        self.optimiser = plan.optimiser()
        self.optimiser.start(self.current)

    def finish(self) -> Outcome:
        rounds = 0
        while not bool(self.idle.all()):
            if self.compute.expired:
                self._time_out()
                break
            self._iterate()
            rounds += 1
            if self.compute.progress is not None and rounds % 10 == 0:
                self._report()
        return Outcome(self.best, self.total, self.matching, self.iterations, self.status, self.trace, self.name)

    def _iterate(self) -> None:
        if self.plan.perturb is not None:
            self.plan.perturb(self.current, self.slot, self.step)
        values = self._evaluate()
        finite = torch.isfinite(values.total)
        for gradient in values.gradients.values():
            finite &= torch.isfinite(gradient.flatten(1)).all(1)
        self._keep_best(values, finite)
        # A row that is not finite must not poison its optimiser state: it leaves below.
        gradients = {
            name: torch.where(_column(finite, g), g, torch.zeros_like(g)) for name, g in values.gradients.items()
        }
        done = self.step.double() / self.plan.iterations
        moving = self.optimiser.step(self.current, gradients, self.plan.rate * self.plan.schedule(done), done)
        if self.plan.project is not None:
            self.plan.project(self.current)
        self.step += 1
        ended = ~moving | (self.step > self.plan.iterations) | (values.total < self.plan.tolerance) | ~finite
        if self.plan.patience is not None:
            ended |= self.stale >= self.plan.patience
        self._retire(ended & ~self.idle, finite)

    def _evaluate(self) -> Values:
        try:
            return self.backend(self.problem, self.current, self.known)
        except torch.OutOfMemoryError:
            if self.width == 1:
                raise
        log.warning("out of memory with %d trials at once; going on with halves", self.width)
        halves = torch.arange(self.width, device=self.slot.device).chunk(2)
        parts = [
            self.backend(self.problem, {n: t[half] for n, t in self.current.items()}, take(self.known, half))
            for half in halves
        ]
        return Values(
            torch.cat([part.total for part in parts]),
            torch.cat([part.matching for part in parts]),
            {name: torch.cat([part.gradients[name] for part in parts]) for name in self.current},
        )

    def _keep_best(self, values: Values, finite: Tensor) -> None:
        live = ~self.idle
        rows = self.slot[live]
        self.iterations[rows] = self.step[live] + 1
        at = (self.step % self.stride == 0) & live
        self.trace[self.slot[at], self.step[at] // self.stride] = values.matching[at]
        better = live & finite & (values.total < self.total[self.slot])
        rows = self.slot[better]
        self.total[rows] = values.total[better]
        self.matching[rows] = values.matching[better]
        for name, tensor in self.current.items():
            self.best[name][rows] = tensor[better]
        self.stale = torch.where(better, torch.zeros_like(self.stale), self.stale + 1)

    def _retire(self, ended: Tensor, finite: Tensor) -> None:
        if not bool(ended.any()):
            return
        for index in ended.nonzero().flatten().tolist():
            trial = int(self.slot[index])
            if not bool(finite[index]) and not bool(torch.isfinite(self.total[trial])):
                self.status[trial] = Status.DIVERGED
            if self.waiting < self.trials:
                self._admit(index)
            else:
                self.idle[index] = True

    def _admit(self, index: int) -> None:
        trial = self.waiting
        self.waiting += 1
        self.slot[index] = trial
        self.step[index] = 0
        self.stale[index] = 0
        for name, tensor in self.current.items():
            tensor[index] = self.start[name][trial]
        for known, fresh in _leaves(self.known, take(self.facts, int(self.owner[trial]))):
            known[index] = fresh
        self.optimiser.restart(torch.tensor([index], device=self.slot.device))

    def _time_out(self) -> None:
        running = set(self.slot[~self.idle].tolist()) | set(range(self.waiting, self.trials))
        for trial in running:
            self.status[trial] = Status.TIMEOUT

    def _report(self) -> None:
        assert self.compute.progress is not None
        ended = self.waiting - int((~self.idle).sum())
        under_way = float(self.step[~self.idle].sum()) / self.plan.iterations
        live = self.total[self.slot[~self.idle]]
        live = live[torch.isfinite(live)]
        loss = float(live.mean()) if len(live) else float("nan")
        self.compute.progress(min(1.0, (ended + under_way) / self.trials), loss)


def _column(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view((-1,) + (1,) * (like.ndim - 1))


def _leaves(stacked: Facts, single: Facts) -> list[tuple[Tensor, Tensor]]:
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, value in stacked.items():
        fresh = single[name]
        if isinstance(value, dict) and isinstance(fresh, dict):
            pairs += [(value[key], fresh[key]) for key in value]
        elif isinstance(value, Tensor) and isinstance(fresh, Tensor):
            pairs.append((value, fresh))
    return pairs
