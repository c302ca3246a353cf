"""The restarts of a victim: how they start, which of them run and for how long, and which one is the answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..seeds import Generators
from .problem import Variables


@dataclass(frozen=True)
class Restarts:
    """R restarts of each of N victims, as trials [R * N]: those of the first restart come first."""

    generator: Generators
    """Randomness of the victims, a stream each."""
    count: int
    """R."""

    @cached_property
    def streams(self) -> list[Generators]:
        """Randomness of every restart, a stream a victim."""
        return [self.generator.child("restart", restart) for restart in range(self.count)]

    @property
    def victims(self) -> int:
        """N."""
        return len(self.generator)

    @property
    def owner(self) -> Tensor:
        """Victim of every trial, [R * N]."""
        return torch.arange(self.victims, device=self.generator.device).repeat(self.count)

    def start(self, initial: Callable[[Generators], Variables]) -> Variables:
        """Initial variables of all trials, by what gives those of one restart, [N, ...]."""
        rows = [initial(stream) for stream in self.streams]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def trials(self, *components: object) -> Generators:
        """Fresh streams, one a trial."""
        each = [self.generator.child("restart", restart, *components) for restart in range(self.count)]
        names = [name for streams in each for name in streams.names]
        return Generators(names, self.generator.device, self.generator.dtype)

    def grid(self, rows: Tensor) -> Tensor:
        """What belongs to trials, [R * N, ...], as [R, N, ...]."""
        return rows.view(self.count, self.victims, *rows.shape[1:])

    def picked(self, restart: Tensor) -> Tensor:
        """Trials [N] of each victim's restart [N]."""
        return restart * self.victims + torch.arange(self.victims, device=restart.device)


def least(loss: Tensor) -> Tensor:
    """Restart [N] of the least loss [R, N], the first of equal ones; what is not finite counts as largest."""
    return torch.where(torch.isfinite(loss), loss, torch.full_like(loss, torch.inf)).argmin(0)


def first_to_reach(loss: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Restart [N] to answer with, by losses [R, N], and which restarts [R, N] it took to know.

    It is the first to reach its victim's goal [N], or the one of least loss where none does.
    """
    reached = loss <= goal
    first = torch.where(reached.any(0), reached.int().argmax(0), len(loss))
    made = torch.arange(len(loss), device=loss.device)[:, None] <= first
    return torch.where(reached.any(0), first, least(loss)), made


class Heats:
    """Successive halving: at each of some steps a victim's trials wait for one another, and the worse half leaves.

    Jamieson and Talwalkar, arXiv:1502.07943. Trials that have ended by themselves are compared like the others.
    """

    def __init__(self, owner: list[int], halving: tuple[float, ...], iterations: int) -> None:
        """Take the victim of every trial, the shares of the iterations to compare them after, and these."""
        self.owner, self.last = owner, iterations + 1
        stops = {round(share * iterations) for share in halving}
        self.stops = sorted(stop for stop in stops if 0 < stop < self.last)
        self.racing: dict[int, list[int]] = {}
        for trial, victim in enumerate(owner):
            self.racing.setdefault(victim, []).append(trial)
        self.heat = dict.fromkeys(self.racing, 0)
        self.resting: dict[int, set[int]] = {victim: set() for victim in self.racing}

    def next_stop(self, trial: int) -> int:
        """Step at which a trial must be looked at: at the next comparison, if it has company, or at its end."""
        victim = self.owner[trial]
        if len(self.racing[victim]) == 1 or self.heat[victim] == len(self.stops):
            return self.last
        return self.stops[self.heat[victim]]

    def compare(self, trials: list[int], loss: Tensor) -> list[tuple[int, bool]]:
        """Note trials that have ended or reached their stop; return whether each that this compares stays."""
        found: list[tuple[int, bool]] = []
        for trial in trials:
            victim = self.owner[trial]
            racing, resting = self.racing[victim], self.resting[victim]
            resting.add(trial)
            if self.heat[victim] == len(self.stops) or not resting.issuperset(racing):
                continue
            ranked = sorted(racing, key=lambda trial: float(loss[trial]))
            self.racing[victim] = ranked[: -(-len(ranked) // 2)]
            self.heat[victim] += 1
            found += [(trial, trial in self.racing[victim]) for trial in sorted(ranked)]
        return found

    def go_on(self, trial: int) -> None:
        """Note that a trial runs again."""
        self.resting[self.owner[trial]].discard(trial)


class OnDemand:
    """Restarts only where they are needed: a victim's later trials wait until its first has ended above its goal.

    The answer is a victim's first trial, in their own order, to reach the goal: those after it are given up, those
    before it go on. So which later ones ran while slots were free does not matter, and neighbours do not either.
    """

    def __init__(self, owner: list[int], goal: Tensor | None) -> None:
        """Take the victim of every trial and the matching loss [N] to reach; without one all trials run."""
        self.goal = goal
        self.owner = owner
        self.trials: dict[int, list[int]] = {}
        for trial, victim in enumerate(owner):
            self.trials.setdefault(victim, []).append(trial)
        self.released: set[int] = set()

    def first(self) -> list[int]:
        """Trials to begin with."""
        if self.goal is None:
            return list(range(len(self.owner)))
        return sorted(trials[0] for trials in self.trials.values())

    def settle(self, ended: list[int], loss: Tensor, queue: deque[int]) -> tuple[deque[int], set[int]]:
        """Return the queue after some trials have ended, by the losses of all, and which trials are given up."""
        left: set[int] = set()
        if self.goal is None:
            return queue, left
        for trial in ended:
            victim = self.owner[trial]
            later = [other for other in self.trials[victim] if other > trial]
            if loss[trial] <= self.goal[victim]:
                left.update(later)
            elif victim not in self.released:
                queue.extend(later)
            self.released.add(victim)
        return deque(trial for trial in queue if trial not in left), left
