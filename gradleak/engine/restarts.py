"""Which trials of a victim run, and for how long: successive halving, and restarts on demand."""

from __future__ import annotations

from collections import deque

from torch import Tensor


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
