"""The engine: minimises every trial's own loss, many stacked trials at a time.

A trial is one victim and one restart. A `Problem` describes one trial; a backend answers value and gradient
for a chunk of W trials; `minimise` owns the only optimisation loop. The chunk keeps its width: finished
trials leave, the next in the queue takes the slot, spare slots repeat a trial and are thrown away. So a
trial's arithmetic depends on the width alone, never on its neighbours. Where memory runs out the chunk is
computed in halves, which is the arithmetic of half the width.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..process import full_precision
from ..status import Status
from ..threat import Compute
from . import memory
from .choice import choose, kind_of
from .final import Final, chunks, evaluate, finish, join
from .graphs import WORTH_RECORDING, Recorded
from .optimisers import Optimiser, Scene, Schedule, Variables
from .problem import Facts, Problem, Values, take
from .restarts import Heats, OnDemand

log = logging.getLogger(__name__)

_USUAL = 32
"""Trials together before it is measured how many fit: enough to choose a backend by."""
_LOOK = {"cuda": 16}
"""Iterations between two looks at which trials have ended, where looking waits for the device; elsewhere 1."""

__all__ = ["Final", "Outcome", "Plan", "Status", "evaluate", "finish", "minimise"]


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
    """Changes stacked variables in place before an iteration, by its trial and step [W] alone (noise, fresh masks)."""
    goal: Tensor | None = None
    """Matching loss [N] of each victim at which later trials of it are given up, once a trial has ended there."""
    ends_at_goal: bool = False
    """Whether a trial ends as soon as it reaches the goal."""
    halving: tuple[float, ...] = ()
    """Shares of the iterations after which the worse half of a victim's trials, by matching loss so far, leaves."""
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
    reason: str = ""
    """Why `backend` is not the one that was asked for."""


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


class _Run:
    """The loop of `minimise`, its slots and its bookkeeping."""

    def __init__(
        self, problem: Problem, start: Variables, facts: Facts, owner: Tensor, plan: Plan, compute: Compute
    ) -> None:
        self.problem, self.owner, self.plan, self.compute = problem, owner, plan, compute
        self.start, self.widths = start, compute.widths
        self.trials = len(owner)
        self.device = device = owner.device
        if device.type == "cuda":
            full_precision()
        self.kind = (kind_of(problem, start, facts), compute.backend)
        width = min(_USUAL if compute.width == "auto" else compute.width, self.trials)
        width = min(width, self.widths.halved.get(self.kind, width))
        first = {name: tensor[:width] for name, tensor in start.items()}
        choice = choose(compute.backend, problem, first, facts, plan.iterations, owner[:width])
        self.name, self.backend, self.reason, fits, self.ready = choice
        self.facts = facts
        if compute.width == "auto":
            width = min(self._fitting(), self.trials)
        elif fits < width:
            self.widths.halved[self.kind] = fits
        if plan.goal is not None:
            width = min(width, len(plan.goal))
        self.width = self.part = min(width, self.widths.halved.get(self.kind, width))
        if device.type == "cuda" and plan.iterations >= WORTH_RECORDING:
            self.backend = Recorded(self.backend)
        # The trial that each slot holds, and how many iterations are left until it must be looked at.
        self.held: list[int | None] = [None] * self.width
        self.left = [0] * self.width
        self.demand = OnDemand(owner.tolist(), plan.goal)
        self.queue = deque(self.demand.first())
        self.paused: dict[int, _Paused] = {}
        self.heats = Heats(owner.tolist(), plan.halving, plan.iterations)
        self.slot = torch.arange(self.width, device=device)
        self.nobody = torch.full_like(self.slot, self.trials)
        # Slots whose trial has ended, for whatever reason, and was not replaced yet.
        self.idle = torch.ones(self.width, dtype=torch.bool, device=device)
        self.step = torch.zeros(self.width, dtype=torch.int64, device=device)
        self.stale = torch.zeros_like(self.step)
        self.current = {name: tensor[self.slot].clone() for name, tensor in start.items()}
        self.slot_ready = take(self.ready, owner[self.slot])
        # The same as the problem reads them; what the backend left alone is not held twice.
        self.slot_facts = self.slot_ready if self.facts is self.ready else take(self.facts, owner[self.slot])
        # One row more than trials: idle slots write there.
        self.best = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in start.items()}
        dtype = next(iter(start.values())).dtype
        self.total = torch.full((self.trials + 1,), torch.inf, dtype=dtype, device=device)
        self.matching = torch.full_like(self.total, torch.inf)
        self.iterations = torch.zeros(self.trials + 1, dtype=torch.int64, device=device)
        self.status = [Status.OK] * self.trials
        self.stride = max(1, -(-plan.iterations // plan.trace_points))
        points = plan.iterations // self.stride + 1
        self.trace = torch.full((self.trials + 1, points), torch.nan, dtype=dtype, device=device)
        self.optimiser = plan.optimiser()
        self.optimiser.start(self.current)
        self._fill()

    def finish(self) -> Outcome:
        done = 0
        while any(trial is not None for trial in self.held):
            if self.compute.expired:
                self._time_out()
                break
            left = [left for left, trial in zip(self.left, self.held, strict=True) if trial is not None]
            rounds = min(_LOOK.get(self.device.type, 1), *left)
            for _ in range(rounds):
                self._iterate()
            self._look(rounds)
            done += rounds
            if self.compute.progress is not None and done % 10 < rounds:
                self._report()
        rows = slice(self.trials)
        best = {name: tensor[rows] for name, tensor in self.best.items()}
        return Outcome(
            best,
            self.total[rows],
            self.matching[rows],
            self.iterations[rows],
            self.status,
            self.trace[rows],
            self.name,
            self.reason,
        )

    def _fitting(self) -> int:
        """Measure how many trials fit into memory, by whole steps of few."""

        def step(width: int) -> None:
            rows = torch.arange(width, device=self.device).clamp(max=self.trials - 1)
            current = {name: tensor[rows] for name, tensor in self.start.items()}
            values = self.backend(self.problem, current, take(self.ready, self.owner[rows]))
            optimiser = self.plan.optimiser()
            optimiser.start(current)
            known = take(self.facts, self.owner[rows])
            optimiser.see(Scene(self.problem, known, values.total, self.plan.project))
            rate = torch.full((width,), self.plan.rate, dtype=torch.float64, device=self.device)
            optimiser.step(current, values.gradients, rate)

        if self.kind not in self.widths.measured:
            self.widths.measured[self.kind] = memory.fitting(step, self.device)
            log.debug("memory holds %d trials at once", self.widths.measured[self.kind])
        return self.widths.measured[self.kind]

    def _iterate(self) -> None:
        """One iteration of every slot; nothing here waits for the device."""
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
        self.optimiser.see(Scene(self.problem, self.slot_facts, values.total, self.plan.project))
        moving = self.optimiser.step(self.current, gradients, self.plan.rate * self.plan.schedule(done), done)
        if self.plan.project is not None:
            self.plan.project(self.current)
        self.step += 1
        ended = ~moving | (self.step > self.plan.iterations) | (values.total < self.plan.tolerance) | ~finite
        if self.plan.patience is not None:
            ended |= self.stale >= self.plan.patience
        if self.plan.goal is not None and self.plan.ends_at_goal:
            ended |= values.matching <= self.plan.goal[self.owner[self.slot]]
        self.idle |= ended

    def _evaluate(self) -> Values:
        while True:
            try:
                return self._in_parts()
            except (RuntimeError, MemoryError) as error:
                self.part = memory.half(self.part, error)
            # Only here is what the error held free again.
            self.widths.halved[self.kind] = self.part
            memory.release(self.device)

    def _in_parts(self) -> Values:
        if self.part == self.width:
            return self.backend(self.problem, self.current, self.slot_ready)
        parts = [self.backend(self.problem, *rows) for rows in chunks((self.current, self.slot_ready), self.part)]
        return Values(*join([(part.total, part.matching, part.gradients) for part in parts], self.width))

    def _keep_best(self, values: Values, finite: Tensor) -> None:
        live = ~self.idle
        rows = torch.where(live, self.slot, self.nobody)
        self.iterations[rows] = self.step + 1
        at = (self.step % self.stride == 0) & live
        point = torch.where(at, self.step // self.stride, 0)
        self.trace[torch.where(at, self.slot, self.nobody), point] = values.matching
        better = live & finite & (values.total < self.total[rows])
        rows = torch.where(better, self.slot, self.nobody)
        self.total[rows] = values.total
        self.matching[rows] = values.matching
        for name, tensor in self.current.items():
            self.best[name][rows] = tensor
        self.stale = torch.where(better, torch.zeros_like(self.stale), self.stale + 1)

    def _look(self, rounds: int) -> None:
        """Let the trials that have ended leave, and those rest that must be compared; hand out their slots."""
        resting = []
        for index, over in enumerate(self.idle.tolist()):
            trial = self.held[index]
            if trial is None:
                continue
            self.left[index] -= rounds
            if over:
                if not bool(torch.isfinite(self.total[trial])):
                    self.status[trial] = Status.DIVERGED
            elif self.left[index] == 0:
                self._pause(index, trial)
            else:
                continue
            self.held[index] = None
            resting.append(trial)
        if not resting:
            return
        self.queue, left = self.demand.settle(resting, self.matching, self.queue)
        for index, held in enumerate(self.held):
            if held in left:
                self.held[index] = None
                self.idle[index] = True
        for trial, stays in self.heats.compare(resting, self.matching):
            if stays and trial in self.paused:
                self.heats.go_on(trial)
                self.queue.append(trial)
            elif not stays:
                self.paused.pop(trial, None)
        self._fill()

    def _pause(self, index: int, trial: int) -> None:
        current = {name: tensor[index].clone() for name, tensor in self.current.items()}
        step, stale = int(self.step[index]), int(self.stale[index])
        self.paused[trial] = _Paused(current, self.optimiser.state(index), step, stale)
        self.idle[index] = True

    def _fill(self) -> None:
        for index, trial in enumerate(self.held):
            if trial is None and self.queue:
                self._admit(index, self.queue.popleft())

    def _admit(self, index: int, trial: int) -> None:
        paused = self.paused.pop(trial, None)
        self.held[index] = trial
        self.slot[index] = trial
        self.idle[index] = False
        owner = int(self.owner[trial])
        kinds = [(self.slot_ready, self.ready)]
        if self.slot_facts is not self.slot_ready:
            kinds.append((self.slot_facts, self.facts))
        for held, facts in kinds:
            for known, fresh in zip(tree_leaves(held), tree_leaves(take(facts, owner)), strict=True):
                known[index] = fresh
        if paused is None:
            self.step[index] = self.stale[index] = 0
            for name, tensor in self.current.items():
                tensor[index] = self.start[name][trial]
            self.optimiser.restart(torch.tensor([index], device=self.device))
        else:
            self.step[index], self.stale[index] = paused.step, paused.stale
            for name, tensor in self.current.items():
                tensor[index] = paused.current[name]
            self.optimiser.resume(index, paused.state)
        self.left[index] = self.heats.next_stop(trial) - (0 if paused is None else paused.step)

    def _time_out(self) -> None:
        for trial in {*self.queue, *self.paused, *(trial for trial in self.held if trial is not None)}:
            self.status[trial] = Status.TIMEOUT

    def _report(self) -> None:
        assert self.compute.progress is not None
        held = [trial for trial in self.held if trial is not None]
        ended = self.trials - len(held) - len({*self.queue, *self.paused})
        under_way = float(self.step[~self.idle].sum()) + sum(paused.step for paused in self.paused.values())
        live = self.total[held]
        live = live[torch.isfinite(live)]
        loss = float(live.mean()) if len(live) else float("nan")
        self.compute.progress(min(1.0, (ended + under_way / self.plan.iterations) / self.trials), loss)


@dataclass(frozen=True)
class _Paused:
    """A trial that waits for its victim's others: everything that its slot held."""

    current: Variables
    state: list[Tensor]
    step: int
    stale: int


def _column(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view((-1,) + (1,) * (like.ndim - 1))
