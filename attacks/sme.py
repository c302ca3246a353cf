"""Surrogate model extension: many local steps as one gradient, taken somewhere between both ends."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from gradleak.attack import GradientMatching, single_step
from gradleak.defense import Defense
from gradleak.engine import loop
from gradleak.engine.optimisers import Adam, Optimiser, Variables
from gradleak.engine.problem import Facts, Guess, Problem
from gradleak.seeds import Generators
from gradleak.threat import Observation, Setting
from gradleak.update import Update


@dataclass(frozen=True, kw_only=True)
class SME(GradientMatching):
    """Matches the direction of a weight difference by the gradient at a w0 + (1 - a) wT, with a searched in [0, 1].

    References: Zhu, Yao, Blaschko, ICML 2023, arXiv:2306.00127. It costs a gradient an iteration however many local
    steps there were, and knows neither their number nor their rate. wT is what an honest server decodes. A FedSGD
    gradient has no segment: there it is plain cosine matching. The adaptive loss of a defense whose scale matters is
    given the length of the decoded weight difference.
    """

    reference = "arXiv:2306.00127"
    ensembles = ("auto-v1", "auto-v2")
    tuning = "surrogate_lr: 2 values on 4 tuning victims of digits (lenet, batches of 2), 10 and 20 local steps"

    surrogate: Annotated[float, Ge(0), Le(1)] = 0.5
    """Where a starts; 1 is the weights before the local steps."""
    surrogate_lr: Annotated[float, Ge(0)] = 1e-2
    """Rate of a; 0 keeps it."""
    objective: str = "cosine"
    signed: bool | Literal["soft"] = True
    lr: Annotated[float, Gt(0)] = 0.1
    iterations: Annotated[int, Ge(1)] = 1000
    tv: Annotated[float, Ge(0)] = 1e-4

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs a weight difference."""
        if setting.local_lr is None:
            return "needs a client that sends a weight difference (local_lr)"
        return super().unsuited(module, setting, defense)

    def initial(self, observation: Observation, generator: Generators) -> Variables:
        """Initial images, and the place on the segment, [N, 1]."""
        like = generator.uniform(1)
        return {**super().initial(observation, generator), "surrogate": torch.full_like(like, self.surrogate)}

    def new_optimiser(self) -> Optimiser:
        """Optimiser with the surrogate's own rate."""
        signs = frozenset({"pixels"}) if self.signed else frozenset[str]()
        return Adam(signs=signs, soft=self.signed == "soft", rates={"surrogate": self.surrogate_lr / self.lr})

    def project(self, variables: Variables, mean: Tensor, std: Tensor) -> None:
        """Clamp pixels to the box and the surrogate to the segment."""
        super().project(variables, mean, std)
        variables["surrogate"].clamp_(0, 1)

    def problem(self, observation: Observation) -> Problem:
        """One trial's loss: of a gradient at the surrogate."""
        gradient = dataclasses.replace(observation, training=single_step(observation.training))
        problem = super().problem(gradient)
        inner, scaled = problem.match, observation.view is not None and observation.weight_difference

        def decode(variables: Variables, facts: Facts) -> Guess:
            difference = facts.named["difference"]
            surrogate = _between(observation.network.parameters, difference, variables["surrogate"].squeeze())
            return dataclasses.replace(self.decode(variables, facts), parameters=surrogate)

        def match(update: Update, facts: Facts) -> Tensor:
            if not scaled:
                return inner(update, facts)
            difference = facts.named["difference"]
            length = (_squares(difference) / (_squares(update) + 1e-30)).sqrt()
            return inner({name: length * tensor for name, tensor in update.items()}, facts)

        return dataclasses.replace(problem, decode=decode, match=match)

    def facts(self, observation: Observation) -> Facts:
        """What is known of each victim: also the weight difference."""
        facts = super().facts(dataclasses.replace(observation, training=single_step(observation.training)))
        differs = observation.weight_difference
        difference = {
            name: tensor if differs else torch.zeros_like(tensor) for name, tensor in observation.update.items()
        }
        return facts.plus(named={"difference": difference})

    def loss(self, observation: Observation, images: Tensor, targets: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        """Matching loss [N] of given batches, with the surrogate where its search starts."""
        facts = self.facts(observation)
        difference = facts.named["difference"]
        surrogates = _between(observation.network.parameters, difference, torch.tensor(self.surrogate).to(images))
        rows: dict[str, Any] = {"images": images, "targets": targets, "buffers": buffers, "parameters": surrogates}
        return loop.evaluate(self.problem(observation), rows, facts, observation.compute.width)


def _between(start: Update, difference: Update, share: Tensor) -> Update:
    """Weights a w0 + (1 - a) wT, with wT = w0 + difference."""
    return {name: start[name] + (1 - share) * tensor for name, tensor in difference.items()}


def _squares(update: Update) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in update.values()]).sum()
