"""GIAS: search the generator's code, then its weights, a copy of them for every image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt
from torch import Tensor
from torch.func import functional_call, vmap

from gradleak.engine.loop import Final, Outcome
from gradleak.engine.optimisers import SCHEDULES, Variables
from gradleak.engine.problem import Facts, Guess, Problem
from gradleak.threat import Observation

from ._latent import LatentMatching, Trials, granted


@dataclass(frozen=True, kw_only=True)
class GIAS(LatentMatching):
    """Minimises the cosine over the code, then over the generator's own weights at that code.

    References: Jeon, Lee, Oh, Ok, NeurIPS 2021, arXiv:2110.14962. Phase 0 is the code, phase 1 the weights.
    Deviation: a trial keeps the phase of lowest matching loss, which is phase 1 unless it diverged.
    """

    reference = "arXiv:2110.14962"
    ensembles = ("auto-v2",)

    objective: str = "cosine"
    lr: Annotated[float, Gt(0)] = 3e-2
    iterations: Annotated[int, Ge(1)] = 1000
    restarts: Annotated[int, Ge(1)] = 4
    tv: Annotated[float, Ge(0)] = 1e-6
    code_norm: Annotated[float, Ge(0)] = 0.0
    """Weight of the mean square of the code (1e-3 in some of the authors' runs)."""
    weights_lr: Annotated[float, Gt(0)] = 1e-3
    weights_iterations: Annotated[int, Ge(0)] = 8000
    """Steps on the generator's weights; 0 searches the code only."""

    def terms(self, guess: Guess, variables: Variables, facts: Facts) -> Iterator[Tensor]:
        """The norm of the code while it is searched."""
        if self.code_norm and "latent" in variables:
            yield self.code_norm * variables["latent"].square().mean()

    def phases(self, observation: Observation, trials: Trials) -> Iterator[tuple[Outcome, Final]]:
        """Code, then weights."""
        outcome, final = self.latent_phase(observation, trials)
        yield outcome, final
        if self.weights_iterations:
            facts = trials.facts.plus(named={"code": outcome.variables})
            own = {name: tensor.detach() for name, tensor in granted(observation).named_parameters()}
            copies = (len(trials.each), observation.batch_size)
            start = {name: tensor.expand(*copies, *tensor.shape).clone() for name, tensor in own.items()}
            plan = dataclasses.replace(
                self.plan(observation),
                rate=self.weights_lr,
                schedule=SCHEDULES["constant"],
                iterations=self.weights_iterations,
            )
            yield self.minimise(self._weights(observation), start, facts, observation, plan)

    def _weights(self, observation: Observation) -> Problem:
        generator = granted(observation)

        def image(weights: Variables, code: Variables, targets: Tensor) -> Tensor:
            rows = {name: tensor[None] for name, tensor in code.items()}
            made: Tensor = functional_call(generator, weights, (rows, targets[None]))
            return made[0]

        def decode(variables: Variables, facts: Facts) -> Guess:
            condition = generator.condition(facts.targets)
            images: Tensor = vmap(image)(variables, facts.named["code"], condition)
            return Guess(images, facts.targets)

        return dataclasses.replace(self.problem(observation), decode=decode)
