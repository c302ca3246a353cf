"""What the generative attacks share: a search of the generator's code, then phases that start where it ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.attack import GradientMatching, Reconstruction
from gradleak.engine import loop
from gradleak.engine.loop import Final, Outcome, Plan, Status
from gradleak.engine.optimisers import Schedule, Variables, cosine_decay
from gradleak.engine.problem import Facts, Guess, Problem, take
from gradleak.engine.restarts import Restarts
from gradleak.errors import GradleakError
from gradleak.search.generators import Features, Generator
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Labels, Observation


def granted(observation: Observation) -> Generator:
    """Return the granted generator."""
    if not isinstance(observation.generator, Generator):
        raise GradleakError("the attack needs a generator; the observation grants none (setting: grants.generator)")
    return observation.generator


def ramp(iterations: int) -> Schedule:
    """Rise over the first 5 % of the steps, hold, and fall by half a cosine over the last 75 %.

    The first step already moves; the schedule of the reference starts at a rate of zero.
    """

    def factor(done: Tensor) -> Tensor:
        rise = ((done + 1 / iterations) / 0.05).clamp(max=1)
        return rise * cosine_decay(((done - 0.25) / 0.75).clamp(min=0))

    return factor


@dataclass(frozen=True)
class Trials:
    """The trials of all restarts, each with its own row of facts."""

    facts: Facts
    restarts: Restarts

    @property
    def each(self) -> Tensor:
        """Rows of `facts` by trial, [T]."""
        owner = self.restarts.owner
        return torch.arange(len(owner), device=owner.device)


@dataclass(frozen=True, kw_only=True)
class LatentMatching(GradientMatching):
    """Searches the generator's code; a plugin adds phases, each started where the one before it ended.

    A trial answers the phase of the lowest matching loss, evaluated once more on its images, and a victim the
    restart that answers best. So another phase never raises the loss of what is returned.
    """

    family = "generative"
    needs = Knowledge(labels=Labels.INFERRED, generator=True)

    boxed: bool = False

    def phases(self, observation: Observation, trials: Trials) -> Iterator[tuple[Outcome, Final]]:
        """Search; yield where every phase ended."""
        yield self.latent_phase(observation, trials)

    def latent_phase(self, observation: Observation, trials: Trials) -> tuple[Outcome, Final]:
        """Search the code."""
        start = trials.restarts.start(lambda stream: self.begin(observation, stream))
        return self.minimise(self.problem(observation), start, trials.facts, observation, self.plan(observation))

    def minimise(
        self, problem: Problem, start: Variables, facts: Facts, observation: Observation, plan: Plan
    ) -> tuple[Outcome, Final]:
        """Minimise one phase of all trials; `facts` has a row a trial."""
        compute = observation.compute
        rows = torch.arange(len(next(iter(start.values()))), device=observation.device)
        outcome = loop.minimise(problem, start, facts, rows, plan, compute)
        return outcome, loop.finish(problem, outcome.variables, facts, compute.width)

    def initial(self, observation: Observation, generator: Generators) -> Variables:
        """Random codes, [N, B, ...]."""
        return granted(observation).code(lambda size: generator.normal(observation.batch_size, size))

    def problem(self, observation: Observation) -> Problem:
        """One trial's loss of its code."""
        return self.searched(observation, 0)

    def searched(self, observation: Observation, stage: int) -> Problem:
        """One trial's loss of the features before a stage.

        Facts may have a `start` and a `scale` by feature: the features are then start + scale * variables.
        """
        generator = granted(observation)

        def decode(variables: Variables, facts: Facts) -> Guess:
            features = located(variables, facts)
            return Guess(generator(features, generator.condition(facts.targets), stage), facts.targets)

        return dataclasses.replace(super().problem(observation), decode=decode)

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Run every phase and return each victim's best by matching loss, with the phase it came from."""
        restarts = Restarts(generator, self.restarts)
        trials = Trials(take(self.facts(observation), restarts.owner), restarts)
        outcomes, finals = zip(*self.phases(observation, trials), strict=True)
        outcome, final = _best(list(outcomes), list(finals))
        answer = self._pick(outcome, final, restarts)
        return dataclasses.replace(answer, details={"phase": answer.guessed.pop("phase")})


def located(variables: Variables, facts: Facts) -> Features:
    """Features that variables stand for: themselves, or scaled steps from `start` in `facts`."""
    if "start" not in facts.named:
        return variables
    start, scale = facts.named["start"], facts.named["scale"]
    moved = {name: start[name] + scale[name] * variables[name] for name in variables}
    return {**start, **moved}


def _best(outcomes: list[Outcome], finals: list[Final]) -> tuple[Outcome, Final]:
    """Take every trial from its phase of lowest matching loss, the earliest of equal ones."""
    losses = torch.stack([final.matching for final in finals])
    phase = torch.where(losses.isfinite(), losses, torch.full_like(losses, torch.inf)).argmin(0)
    trial = torch.arange(len(phase), device=phase.device)

    def chosen(rows: list[Tensor]) -> Tensor:
        return torch.stack(rows)[phase, trial]

    status = []
    for index, picked in enumerate(phase.tolist()):
        ends = [outcome.status[index] for outcome in outcomes]
        status.append(Status.TIMEOUT if Status.TIMEOUT in ends else ends[picked])
    final = Final(
        images=chosen([final.images for final in finals]),
        targets=chosen([final.targets for final in finals]),
        buffers={"phase": phase},
        matching=losses[phase, trial],
    )
    outcome = Outcome(
        variables={},
        total=chosen([outcome.total for outcome in outcomes]),
        matching=chosen([outcome.matching for outcome in outcomes]),
        iterations=torch.stack([outcome.iterations for outcome in outcomes]).sum(0),
        status=status,
        trace=torch.cat([outcome.trace for outcome in outcomes], dim=1),
        backend=outcomes[0].backend,
        reason=outcomes[0].reason,
    )
    return outcome, final
