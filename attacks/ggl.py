"""GGL: search the generator's code under an estimate of what the defense did to the gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from gradleak.engine.loop import Final, Outcome, Plan, Status, finish
from gradleak.engine.optimisers import Variables
from gradleak.engine.problem import Facts, Guess, take
from gradleak.threat import Observation
from gradleak.update import Update, squared_norm

from ._latent import LatentMatching, Trials, granted, ramp

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class GGL(LatentMatching):
    """Minimises the squared error of the code's update, changed as the defense seems to have changed the observed.

    References: Li, Zhang, Liu, Liu, CVPR 2022, arXiv:2203.15696; Hansen, arXiv:1604.00772 (CMA-ES). The
    estimate reads three things off the message: its norm bounds the guess's (clipping), each tensor's share of
    zeros is its sparsity, and features without a gradient in the last layer are masked (Soteria). At the truth
    of a clean gradient all three change nothing. Deviations: the squared error is relative to the
    observation's norm; codes are drawn and searched without tanh, from N(0, 1), not U(0, 1).
    """

    reference = "arXiv:2203.15696"
    ensembles = ("auto-v2",)

    objective: str = "relative-squared"
    search: Literal["cma-es", "adam"] = "cma-es"
    """Derivative-free with `rounds` of `population` codes, or Adam with `iterations` steps."""
    rounds: Annotated[int, Ge(1)] = 800
    population: Annotated[int, Ge(4)] = 50
    spread: Annotated[float, Gt(0)] = 0.5
    """Initial standard deviation of the population."""
    lr: Annotated[float, Gt(0)] = 0.1
    iterations: Annotated[int, Ge(1)] = 2500
    restarts: Annotated[int, Ge(1)] = 4
    divergence: Annotated[float, Ge(0)] = 0.1
    """Weight of the KL divergence of the code's mean and variance from N(0, 1)."""
    estimate: bool = True
    """Whether to estimate the defense from the message."""

    def distance(self, guess: Update, observed: Update) -> Tensor:
        """Objective between the guess, changed as the defense is estimated to, and the observation."""
        return super().distance(_transformed(guess, observed) if self.estimate else guess, observed)

    def terms(self, guess: Guess, variables: Variables, facts: Facts) -> Iterator[Tensor]:
        """KL divergence of the code."""
        yield self.divergence * _divergence(variables["latent"])

    def phases(self, observation: Observation, trials: Trials) -> Iterator[tuple[Outcome, Final]]:
        """The code only."""
        yield self.latent_phase(observation, trials) if self.search == "adam" else self._evolve(observation, trials)

    def plan(self, observation: Observation) -> Plan:
        """How Adam minimises."""
        return dataclasses.replace(super().plan(observation), schedule=ramp(self.iterations))

    def _evolve(self, observation: Observation, trials: Trials) -> tuple[Outcome, Final]:
        # Without derivatives there is no step for the engine's loop to take; it evaluates, and this asks and tells.
        problem, compute = self.problem(observation), observation.compute
        count, size = len(trials.each), observation.batch_size * granted(observation).latent
        crowd = take(trials.facts, trials.each.repeat_interleave(self.population))
        best = torch.zeros(count, size, device=observation.device, dtype=observation.dtype)
        total = best.new_full((count,), torch.inf)
        strategy = _Evolution(best, self.population, self.spread)
        trace, status = [], [Status.OK] * count
        for done in range(self.rounds):
            if compute.expired:
                status = [Status.TIMEOUT] * count
                break
            normal = torch.cat([stream.normal(self.population, size) for stream in trials.restarts.streams])
            points = strategy.ask(normal)
            codes = points.view(count * self.population, observation.batch_size, -1)
            found = finish(problem, {"latent": codes}, crowd, compute.width)
            losses = found.matching + self.divergence * torch.stack([_divergence(code) for code in codes])
            losses = torch.where(losses.isfinite(), losses, torch.inf).view(count, self.population)
            strategy.tell(points, losses)
            lowest, index = losses.min(1)
            better = lowest < total
            best = torch.where(better[:, None], points[trials.each, index], best)
            total = torch.where(better, lowest, total)
            trace.append(found.matching.view(count, -1)[trials.each, index])
            if compute.progress is not None:
                compute.progress((done + 1) / self.rounds, float(total.mean()))
        code = {"latent": best.view(count, observation.batch_size, -1)}
        final = finish(problem, code, trials.facts, compute.width)
        points_kept = trace[:: max(1, len(trace) // 50)]
        outcome = Outcome(
            variables=code,
            total=total,
            matching=final.matching,
            iterations=torch.full_like(trials.each, len(trace) * self.population),
            status=status,
            trace=torch.stack(points_kept, dim=1) if points_kept else total[:, None],
            backend="vmap",
        )
        return outcome, final


class _Evolution:
    """CMA-ES (Hansen, arXiv:1604.00772) with its default constants, for T populations at once."""

    def __init__(self, mean: Tensor, population: int, spread: float):
        # The tutorial's defaults, in its names: the better half of the points count, by the logarithm of their rank, as
        # if they were mu_eff (`mass`) equal ones; then the rates of the paths (c_c, c_sigma) and of the covariance
        # (c_1, c_mu), the damping d_sigma, and the expected length of a standard normal vector.
        (count, size), parents = mean.shape, population // 2
        weights = math.log((population + 1) / 2) - torch.arange(1, parents + 1).to(mean).log()
        self.parents, self.weights = parents, weights / weights.sum()
        mass = float(1 / self.weights.square().sum())
        self.path_rate = (4 + mass / size) / (size + 4 + 2 * mass / size)
        self.spread_rate = (mass + 2) / (size + mass + 5)
        self.rank_one = 2 / ((size + 1.3) ** 2 + mass)
        self.rank_many = min(1 - self.rank_one, 2 * (mass - 2 + 1 / mass) / ((size + 2) ** 2 + mass))
        self.damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (size + 1)) - 1) + self.spread_rate
        self.expected = math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))
        self.mass, self.size, self.round = mass, size, 0
        self.mean = mean
        self.spread = mean.new_full((count, 1), spread)
        self.path, self.spread_path = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        self.covariance = torch.eye(size).to(mean).repeat(count, 1, 1)
        self.axes, self.lengths = self.covariance.clone(), torch.ones_like(self.mean)
        # The eigenvectors are renewed only after the covariance has changed by about a tenth.
        self.every = max(1, int(1 / (10 * size * (self.rank_one + self.rank_many))))

    def ask(self, normal: Tensor) -> Tensor:
        """Turn standard normal numbers [T, population, size] into points."""
        steps: Tensor = (normal * self.lengths[:, None]) @ self.axes.mT
        return self.mean[:, None] + self.spread[:, None] * steps

    def tell(self, points: Tensor, losses: Tensor) -> None:
        """Learn from the losses [T, population] of points."""
        self.round += 1
        order = losses.argsort(1)[:, : self.parents, None].expand(-1, -1, self.size)
        steps = (points.gather(1, order) - self.mean[:, None]) / self.spread[:, None]
        move = (self.weights[:, None] * steps).sum(1)
        self.mean = self.mean + self.spread * move
        whitened = (((move[:, None] @ self.axes) / self.lengths[:, None]) @ self.axes.mT)[:, 0]
        rate = self.spread_rate
        self.spread_path = (1 - rate) * self.spread_path + math.sqrt(rate * (2 - rate) * self.mass) * whitened
        norm = self.spread_path.norm(dim=1, keepdim=True)
        # h_sigma: while the step size still grows fast, the covariance's path waits.
        settled = norm / math.sqrt(1 - (1 - rate) ** (2 * self.round)) < (1.4 + 2 / (self.size + 1)) * self.expected
        rate = self.path_rate
        push = math.sqrt(rate * (2 - rate) * self.mass) * move
        self.path = (1 - rate) * self.path + torch.where(settled, push, torch.zeros_like(push))
        # What the path's variance then lacks.
        stalled = torch.where(settled, 0.0, rate * (2 - rate)).unsqueeze(-1)
        one = self.path[:, :, None] * self.path[:, None] + stalled * self.covariance
        many = (self.weights[:, None] * steps).mT @ steps
        kept = 1 - self.rank_one - self.rank_many
        self.covariance = kept * self.covariance + self.rank_one * one + self.rank_many * many
        # No more than e at once, against overflow.
        growth = self.spread_rate / self.damping * (norm / self.expected - 1)
        self.spread = self.spread * growth.clamp(max=1).exp()
        if self.round % self.every == 0:
            squares, self.axes = torch.linalg.eigh((self.covariance + self.covariance.mT) / 2)
            self.lengths = squares.clamp(min=_TINY).sqrt()


def _divergence(code: Tensor) -> Tensor:
    """KL divergence of N(mean, variance) of each image's code [B, k] from N(0, 1), averaged, a scalar."""
    mean, variance = code.mean(-1), code.var(-1) + _TINY
    return -0.5 * (1 + variance.log() - mean.square() - variance).mean()


def _transformed(guess: Update, observed: Update) -> Update:
    """Change a guess as the observed update seems to have been: masked, made sparse, clipped."""
    last = [name for name, tensor in observed.items() if tensor.ndim == 2][-1:]
    changed = {}
    for name, tensor in guess.items():
        if name in last:
            tensor = tensor * (observed[name] != 0).any(0)
        changed[name] = _sparsified(tensor, (observed[name] == 0).sum())
    ratio = (squared_norm(observed) + _TINY).sqrt() / (squared_norm(changed) + _TINY).sqrt()
    return {name: tensor * ratio.clamp(max=1) for name, tensor in changed.items()}


def _sparsified(tensor: Tensor, zeros: Tensor) -> Tensor:
    """Set the `zeros` smallest entries to zero; ties stay."""
    size = tensor.detach().abs().flatten()
    threshold = size.sort().values.gather(0, zeros.clamp(max=size.numel() - 1).unsqueeze(0))
    keep = (tensor.detach().abs() >= threshold) & (zeros < size.numel())
    return tensor * keep
