"""GIFD: search the generator's features stage by stage, each inside an l1 ball round where it started."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, MinLen
from torch import Tensor

from gradleak.engine.loop import Final, Outcome, Plan
from gradleak.engine.optimisers import Variables
from gradleak.threat import Observation

from ._latent import LatentMatching, Trials, granted, located, ramp

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class GIFD(LatentMatching):
    """Minimises the cosine over the code, then over the features before each later stage of the generator.

    References: Fang, Chen, Wang, Wang, Xia, ICCV 2023, arXiv:2308.04699. Phase 0 is the code, phase k the
    features before stage k. Every phase has a fresh Adam and rate, starts from the features of the last, and
    projects each image's step onto an l1 ball. Deviations: a phase starts from the best iterate, not the last;
    steps and radii are in units of the features' mean size at the start (`relative`), so that they suit any
    generator; the image norm of weight 1e-6 / 64^2, which is below rounding, is left out.
    """

    reference = "arXiv:2308.04699"
    ensembles = ("auto-v1", "auto-v2")
    tuning = "radius: 3 values on 8 tuning victims of digits (lenet, batch 2) with and without noise and top-k"

    objective: str = "cosine"
    lr: Annotated[float, Gt(0)] = 0.1
    iterations: Annotated[int, Ge(1)] = 1000
    """Steps of every phase."""
    restarts: Annotated[int, Ge(1)] = 4
    tv: Annotated[float, Ge(0)] = 1e-4
    depth: Annotated[int, Ge(0)] | None = None
    """Phases after the code; None searches the features before every later stage."""
    radii: Annotated[tuple[Annotated[float, Ge(0)], ...], MinLen(1)] = (0.1,)
    """Radius of each phase after the code, the last repeated: a share of the start's l1 norm, or absolute."""
    relative: bool = True

    def phases(self, observation: Observation, trials: Trials) -> Iterator[tuple[Outcome, Final]]:
        """Code, then the features before each later stage."""
        generator = granted(observation)
        outcome, final = self.latent_phase(observation, trials)
        yield outcome, final
        last = len(generator.stages) - 1
        facts = trials.facts
        condition = generator.condition(facts.targets).flatten(0, 1)
        for stage in range(1, 1 + min(last, last if self.depth is None else self.depth)):
            before = {name: tensor.flatten(0, 1) for name, tensor in located(outcome.variables, facts).items()}
            with torch.no_grad():
                after = generator.advance(before, condition, stage - 1)
            start = {name: tensor.unflatten(0, (-1, observation.batch_size)) for name, tensor in after.items()}
            size = {name: _mean_size(tensor) for name, tensor in start.items()}
            scale = size if self.relative else {name: torch.ones_like(tensor) for name, tensor in size.items()}
            facts = trials.facts.plus(named={"start": start, "scale": scale})
            steps = {name: torch.zeros_like(start[name]) for name in start if name not in generator.held}
            plan = self._within(self.plan(observation), self.radii[min(stage, len(self.radii)) - 1])
            outcome, final = self.minimise(self.searched(observation, stage), steps, facts, observation, plan)
            yield outcome, final

    def plan(self, observation: Observation) -> Plan:
        """How every phase is minimised."""
        return dataclasses.replace(super().plan(observation), schedule=ramp(self.iterations))

    def _within(self, plan: Plan, radius: float) -> Plan:
        def project(variables: Variables) -> None:
            for tensor in variables.values():
                flat = tensor.flatten(2)
                limit = radius * flat.shape[-1] if self.relative else radius
                tensor.copy_(_onto_ball(flat, limit).view_as(tensor))

        return dataclasses.replace(plan, project=project)


def _mean_size(features: Tensor) -> Tensor:
    """Mean absolute value of each image's features, [T, B, 1, ...]."""
    mean = features.abs().flatten(2).mean(2).clamp(min=_TINY)
    return mean.view(*mean.shape, *[1] * (features.ndim - 2))


def _onto_ball(points: Tensor, radius: float) -> Tensor:
    """Nearest points of the l1 ball to points [..., d], exactly, by sorting (Duchi et al., ICML 2008)."""
    size = points.abs()
    ordered = size.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - radius
    rank = torch.arange(1, points.shape[-1] + 1, device=points.device, dtype=points.dtype)
    support = (ordered * rank > excess).sum(-1, keepdim=True).clamp(min=1)
    threshold = excess.gather(-1, support - 1) / support
    inside = size.sum(-1, keepdim=True) <= radius
    return torch.where(inside, points, points.sign() * (size - threshold).clamp(min=0))
