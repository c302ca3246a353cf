"""GradInversion: batch normalisation statistics, and seeds that are pulled to what they agree on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Le
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from gradleak.attack import GradientMatching, Reconstruction
from gradleak.defense import Defense
from gradleak.engine import loop
from gradleak.engine.loop import Outcome, Status
from gradleak.engine.optimisers import Variables
from gradleak.engine.problem import Facts, Guess, Problem, take
from gradleak.engine.restarts import Restarts, least
from gradleak.mechanisms import batch_statistics
from gradleak.seeds import Generators
from gradleak.threat import BatchNorm, Knowledge, Labels, Observation, Setting, Width


@dataclass(frozen=True, kw_only=True)
class GradInversion(GradientMatching):
    """Minimises gradient and batch normalisation distances over several seeds that are pulled to their mean.

    References: Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov, CVPR 2021, arXiv:2104.07586. Seeds are the restarts of
    a victim. The search runs in rounds; after each, the seeds' images are put into one order, registered to their
    mean, and averaged to the image that the next round pulls every seed to. Noise is added to the pixels before every
    iteration (Langevin), in proportion to the rate.

    Deviations: gradients are matched by the cosine (the paper's distance is the objective `layer-distances`, which was
    worse here); distances are relative to what they are for a guess of zeros, and weights are made for that; images
    are registered by whole pixels (the peak of the cross-correlation), not by an optical flow; a round starts from
    the best iterate of the one before with fresh moments of Adam; repeated labels are allowed (`label_rule` `yin`
    is the paper's rule, which needs distinct ones).
    """

    reference = "arXiv:2104.07586"
    tuning = "objective, tv, statistics_weight: 19 trials on 4 tuning victims of digits and photos (convnet, resnet20)"
    ensembles = ("auto-v1", "auto-v2")

    statistics: Literal["none", "running", "batch"] = "running"
    """Which batch normalisation statistics are matched: the server's, or the victim batch's own (leaked)."""
    statistics_weight: Annotated[float, Ge(0)] = 0.1
    l2: Annotated[float, Ge(0)] = 1e-6
    """Weight of the norm of the batch."""
    group: Annotated[float, Ge(0)] = 0.01
    """Weight of the distance between a seed and the seeds' mean (root mean square over pixels)."""
    group_from: Annotated[float, Ge(0), Le(1)] = 0.25
    """Share of the iterations before seeds see each other."""
    group_every: Annotated[int, Ge(1)] = 100
    """Iterations in a round after that."""
    shift: Annotated[int, Ge(0)] = 1
    """Most pixels by which an image is moved onto the mean; 0 averages as it is."""
    noise: Annotated[float, Ge(0)] = 0.01
    """Standard deviation of the noise on the pixels, per rate."""
    objective: str = "cosine"
    lr: float = 0.1
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    warm_up: Annotated[int, Ge(0)] = 50
    iterations: int = 2000
    restarts: Annotated[int, Ge(1)] = 4
    tv: float = 0.1

    @property
    def needs(self) -> Knowledge:  # type: ignore[override]
        """The statistics that are matched."""
        return Knowledge(labels=Labels.INFERRED, batch_norm=BatchNorm(self.statistics))

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs batch normalisation to match its statistics."""
        if self.statistics != "none" and not batch_statistics.layers(module):
            return "needs a model with batch normalisation (statistics: none does not)"
        return super().unsuited(module, setting, defense)

    def facts(self, observation: Observation) -> Facts:
        """What is known of each victim: also the statistics."""
        facts = super().facts(observation)
        if self.statistics == "running" and observation.running_statistics is not None:
            running = observation.running_statistics
            facts = facts.plus(
                named={"statistics": {n: row.expand(observation.victims, -1) for n, row in running.items()}}
            )
        if self.statistics == "batch" and observation.batch_statistics is not None:
            facts = facts.plus(named={"statistics": observation.batch_statistics})
        return facts

    def terms(self, guess: Guess, variables: Variables, facts: Facts) -> Iterator[Tensor]:
        """The batch's norm, and its distance to the seeds' mean once there is one."""
        images = guess.images
        yield self.l2 * (images.square().sum() + 1e-12).sqrt()
        if "agreed" in facts.own:
            yield self.group * ((images - facts.own["agreed"]).square().mean() + 1e-12).sqrt()

    def problem(self, observation: Observation) -> Problem:
        """One trial's loss: also the distance of statistics."""
        plain, network = super().problem(observation), observation.network
        batch_statistics.layers(network.module)  # found once, before the search

        def penalty(guess: Guess, variables: Variables, facts: Facts) -> Tensor:
            total = plain.penalty(guess, variables, facts)
            known = facts.named.get("statistics")
            if known is not None:
                found = batch_statistics.of_batch(network, guess.images, guess.buffers)
                total = total + self.statistics_weight * batch_statistics.distance(found, known)
            return total

        return dataclasses.replace(plain, penalty=penalty)

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Search in rounds and return each victim's seed of lowest matching loss."""
        compute, seeds = observation.compute, Restarts(generator, self.restarts)
        current = seeds.start(lambda stream: self.begin(observation, stream))
        facts = take(self.facts(observation), seeds.owner)
        each = torch.arange(len(seeds.owner), device=observation.device)
        problem = self.problem(observation)
        outcomes: list[Outcome] = []
        done = 0
        for length in self._rounds():
            plan = dataclasses.replace(
                self.plan(observation),
                iterations=length,
                schedule=lambda share, done=done, length=length: self._factor_at(done + share * length),  # type: ignore[misc]
                perturb=self._jitter(seeds.trials(), done) if self.noise else None,
            )
            outcome = loop.minimise(problem, current, facts, each, plan, compute)
            outcomes.append(outcome)
            current, done = outcome.variables, done + length
            if done < self.iterations:
                facts = facts.plus(own={"agreed": self._agreed(problem, current, facts, seeds, compute.width)})
            if compute.expired:
                break
        final = loop.finish(problem, current, facts, compute.width)
        return self._pick(_joined(outcomes), final, seeds)

    def _rounds(self) -> list[int]:
        if self.restarts == 1 or not self.group:
            return [self.iterations]
        first = max(1, round(self.group_from * self.iterations))
        rest = self.iterations - first
        rounds = [first, *[self.group_every] * (rest // self.group_every), rest % self.group_every]
        return [length for length in rounds if length]

    def _factor_at(self, iteration: Tensor) -> Tensor:
        return self.factor(iteration / self.iterations)

    def _jitter(self, streams: Generators, before: int) -> Callable[[Variables, Tensor, Tensor], None]:
        def jitter(variables: Variables, trials: Tensor, steps: Tensor) -> None:
            rows = zip(trials.tolist(), steps.tolist(), strict=True)
            names = [(streams.names[trial], "noise", before + step) for trial, step in rows]
            draws = Generators(names, streams.device, streams.dtype)
            rate = self.lr * self._factor_at(before + steps.double())
            for tensor in variables.values():
                column = rate.to(tensor.dtype).view(-1, *(1,) * (tensor.ndim - 1))
                tensor += self.noise * column * draws.normal(*tensor.shape[1:])

        return jitter

    def _agreed(self, problem: Problem, variables: Variables, facts: Facts, seeds: Restarts, width: Width) -> Tensor:
        """Mean of every victim's registered seeds, a row a trial, [T, B, C, H, W]."""
        final = loop.finish(problem, variables, facts, width)
        images = seeds.grid(final.images)
        order = _orders(images, seeds.grid(final.targets), least(seeds.grid(final.matching)))
        images = images.gather(2, order.view(*order.shape, 1, 1, 1).expand_as(images))
        if self.shift:
            images = _registered(images, images.mean(0, keepdim=True).expand_as(images), self.shift)
        # Back from the common order to each seed's own.
        mean = images.mean(0, keepdim=True).expand_as(images)
        own = order.argsort(-1)
        agreed: Tensor = mean.gather(2, own.view(*own.shape, 1, 1, 1).expand_as(mean)).flatten(0, 1)
        return agreed


def _orders(images: Tensor, targets: Tensor, best: Tensor) -> Tensor:
    """Order [G, N, B] of each seed's images [G, N, B, C, H, W] in which they are nearest those of the best seed.

    Only images of one label [G, N, B, K] change places. Assignments are solved on the CPU, one after the other.
    """
    victims = torch.arange(images.shape[1], device=images.device)
    reference, kinds = images[best, victims], targets[best, victims]
    cost = (reference[None, :, :, None] - images[:, :, None]).square().flatten(4).sum(-1)
    other = (kinds[None, :, :, None] - targets[:, :, None]).abs().sum(-1)
    table = (cost + 1e6 * other).double().cpu().numpy()
    rows = [linear_sum_assignment(square)[1] for square in table.reshape(-1, *table.shape[2:])]
    return torch.as_tensor(np.stack(rows), device=images.device).view(images.shape[:3])


def _registered(images: Tensor, reference: Tensor, most: int) -> Tensor:
    """Images [..., C, H, W] moved cyclically by the whole pixels, `most` at most, that correlate best."""
    height, width = images.shape[-2:]
    centred = [batch - batch.mean((-2, -1), keepdim=True) for batch in (images, reference)]
    here, there = (torch.fft.rfft2(batch) for batch in centred)
    correlation = torch.fft.irfft2((there * here.conj()).sum(-3), s=(height, width))
    moves = [torch.arange(-min(most, side // 2), min(most, side // 2) + 1) for side in (height, width)]
    window = correlation[..., (moves[0] % height)[:, None], moves[1] % width].flatten(-2)
    peak = window.argmax(-1)
    down = moves[0].to(peak.device)[peak // len(moves[1])]
    right = moves[1].to(peak.device)[peak % len(moves[1])]
    rows = (torch.arange(height, device=images.device) - down[..., None]) % height
    columns = (torch.arange(width, device=images.device) - right[..., None]) % width
    moved = images.gather(-2, rows[..., None, :, None].expand_as(images))
    return moved.gather(-1, columns[..., None, None, :].expand_as(moved))


def _joined(outcomes: list[Outcome]) -> Outcome:
    """One outcome of all rounds: the last, with the iterations and traces of all."""
    status = []
    for ends in zip(*(outcome.status for outcome in outcomes), strict=True):
        status.append(Status.TIMEOUT if Status.TIMEOUT in ends else ends[-1])
    return dataclasses.replace(
        outcomes[-1],
        iterations=torch.stack([outcome.iterations for outcome in outcomes]).sum(0),
        status=status,
        trace=torch.cat([outcome.trace for outcome in outcomes], dim=1),
    )
