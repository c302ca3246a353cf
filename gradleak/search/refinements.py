"""What public images add to any matching attack: starts, a Gaussian prior, an alphabet, and an answer without reading.

All of it is chosen by the attack's own loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from ..engine import loop
from ..engine.loop import Plan
from ..engine.optimisers import Variables
from ..engine.problem import Facts, Guess, Problem
from ..engine.restarts import Restarts, first_to_reach, least
from ..errors import GradleakError
from ..reconstruction import Reconstruction
from ..seeds import Generators
from ..threat import Compute, Observation
from . import public_images, second_order

CANDIDATES = 128
"""Public batches a victim whose loss is looked at before the first restart: each costs one gradient, all of
them less than a restart."""


class Matching(Protocol):
    """What is read here of a matching attack: options of `GradientMatching`, how it begins, and its own loss."""

    @property
    def class_prior(self) -> tuple[float, ...]:
        """Weights of the Gaussian of the label's public images."""

    @property
    def alphabet(self) -> bool:
        """Whether to answer with grey levels of public images."""

    @property
    def fallback(self) -> bool:
        """Whether to answer with class means where nothing was read."""

    @property
    def budget(self) -> str:
        """fixed, or ceiling."""

    @property
    def optimiser(self) -> str:
        """Name of the optimiser."""

    @property
    def initialisation(self) -> str:
        """Where a search starts."""

    @property
    def tv_unit(self) -> str:
        """loss, or range."""

    @property
    def parametrisation(self) -> str:
        """What is searched."""

    @property
    def halving(self) -> tuple[float, ...]:
        """Shares of the iterations after which restarts are given up."""

    @property
    def restarts(self) -> int:
        """Searches a victim."""

    def begin(self, observation: Observation, generator: Generators) -> Variables:
        """Initial variables of a restart, [N, ...]."""

    def loss(self, observation: Observation, images: Tensor, targets: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        """Matching loss [N] of batches."""


def refuse(attack: Matching, own_way: bool) -> None:
    """Refuse options that an attack cannot follow.

    Raises:
        GradleakError: refinements where restarts are searched in another way than the template's, or contradict.
    """
    name = type(attack).__name__
    used = {
        "class_prior": bool(attack.class_prior),
        "alphabet": attack.alphabet,
        "fallback": attack.fallback,
        "budget": attack.budget != "fixed",
        "optimiser": attack.optimiser == "levenberg-marquardt",
        "initialisation": attack.initialisation in ("class-mean", "public"),
        "tv_unit": attack.tv_unit != "loss",
    }
    if own_way and any(used.values()):
        option = next(option for option in used if used[option])
        raise GradleakError(
            f"{option}: {name} searches in its own way; leave the option at {_default(attack, option)!r}"
        )
    if used["initialisation"] and attack.parametrisation != "pixels":
        raise GradleakError(
            f"initialisation: {attack.initialisation} is an image, but parametrisation {attack.parametrisation!r} "
            "searches something else; use pixels"
        )
    if used["tv_unit"] and used["optimiser"]:
        raise GradleakError("tv_unit: range is of first-order searches; leave it at 'loss'")
    if used["budget"] and attack.halving:
        raise GradleakError(
            "budget: 'ceiling' makes restarts on demand, which halving cannot compare; use one of the two"
        )


def starts(
    attack: Matching,
    observation: Observation,
    problem: Problem,
    facts: Facts,
    restarts: Restarts,
    generator: Generators,
) -> Variables:
    """Initial variables of all trials, [R * N, ...]."""
    drawn = restarts.start(lambda stream: attack.begin(observation, stream))
    start = {name: tensor.to(observation.dtype) for name, tensor in drawn.items()}
    if attack.initialisation not in ("class-mean", "public") or observation.auxiliary is None:
        return start
    labels = _labels(facts, observation)
    mean = public_images.class_means(observation.auxiliary, observation.classes).to(observation.device)[labels]
    images = [mean] * attack.restarts
    if attack.initialisation == "public" and attack.restarts > 1:
        first = {name: tensor[: restarts.victims] for name, tensor in start.items()}
        images = [mean, *_nearest(attack, observation, problem, facts, first, generator)]
    return {**start, "pixels": torch.cat([_pixels(image, observation, facts) for image in images])}


def with_prior(observation: Observation, facts: Facts) -> Facts:
    """Add the Gaussian of each victim's labels, where public images are granted."""
    if observation.auxiliary is None:
        return facts
    fitted = public_images.gaussian(observation.auxiliary, observation.classes)
    own = fitted.facts(_labels(facts, observation).cpu())
    moved = {name: tensor.to(observation.device, observation.dtype) for name, tensor in own.items()}
    return facts.plus(own={"weight": torch.ones_like(moved["deviation"])}, named={"class": moved})


def prior_rows(guess: Guess, facts: Facts) -> Tensor:
    """Residuals of one victim's images against the Gaussian of their labels; their squares sum to -2 times its log."""
    return facts.own["weight"].sqrt() * public_images.whiten(guess.images, facts.named["class"])


def search(
    problem: Problem,
    start: Variables,
    facts: Facts,
    owner: Tensor,
    plan: Plan,
    compute: Compute,
    weights: Sequence[float],
) -> tuple[loop.Outcome, Facts, Tensor | None]:
    """Minimise at each weight of the class prior in turn; return the last outcome, its facts and its goal [N].

    Each run goes on where the last ended, the restart that would be answered first.
    """
    if not weights:
        return loop.minimise(problem, start, facts, owner, plan, compute), facts, plan.goal
    own = facts.named["class"]["mean"]
    # Twice minus the prior's log at the truth: its mean and four of its deviations above.
    usual = own[0].numel() + 4 * (2 * own[0].numel()) ** 0.5
    iterations = torch.zeros_like(owner)
    for weight in weights:
        facts = facts.plus(own={"weight": torch.full_like(facts.own["weight"], weight)})
        goal = None if plan.goal is None else plan.goal + weight * usual
        outcome = loop.minimise(problem, start, facts, owner, dataclasses.replace(plan, goal=goal), compute)
        order = _answered_first(outcome.matching, len(own), goal)
        start = {name: tensor[order] for name, tensor in outcome.variables.items()}
        iterations = (iterations + outcome.iterations)[order]
    return _reordered(outcome, order, start, iterations), facts, goal


def _answered_first(matching: Tensor, victims: int, goal: Tensor | None) -> Tensor:
    """Trials [R * N], each victim's answer so far swapped with its first restart."""
    by_restart = torch.arange(len(matching), device=matching.device).view(-1, victims)
    loss = matching.view(-1, victims)
    best = least(loss) if goal is None else first_to_reach(loss, goal)[0]
    each = torch.arange(victims, device=matching.device)
    order = by_restart.clone()
    order[best, each], order[0] = by_restart[0], by_restart[best, each]
    return order.flatten()


def _reordered(outcome: loop.Outcome, order: Tensor, variables: Variables, iterations: Tensor) -> loop.Outcome:
    return dataclasses.replace(
        outcome,
        variables=variables,
        total=outcome.total[order],
        matching=outcome.matching[order],
        iterations=iterations,
        status=[outcome.status[index] for index in order.tolist()],
        trace=outcome.trace[order],
    )


def refine(attack: Matching, observation: Observation, answer: Reconstruction, goal: Tensor | None) -> Reconstruction:
    """Answer in grey levels, or with class means where nothing was read, if the attack's own loss allows it."""
    if observation.auxiliary is None:
        return answer
    if attack.alphabet:
        values = public_images.levels(observation.auxiliary)
        if values is not None:
            answer = _snapped(attack, observation, answer, goal, values)
    return _unless_read(attack, observation, answer, goal) if attack.fallback else answer


def _unless_read(
    attack: Matching, observation: Observation, answer: Reconstruction, goal: Tensor | None
) -> Reconstruction:
    """Answer with the class means for victims whose message was not read, by the attack's own loss."""
    assert observation.auxiliary is not None
    labels = cast(Tensor, answer.labels)
    means = public_images.class_means(observation.auxiliary, observation.classes).to(answer.images)
    guess = means[labels.to(means.device)]
    loss, of_means = cast(Tensor, answer.loss), own_loss(attack, observation, answer, guess)
    if attack.optimiser == "levenberg-marquardt" and second_order.is_noisy(observation):
        # So many free pixels lower the squares by as much where there is nothing but noise (Akaike's criterion).
        read = of_means - loss > 2 * guess[0].numel()
    else:
        read = loss < of_means / 2
        read = read if goal is None else read | (loss <= goal)
    images = torch.where(_column(read, guess), answer.images, guess)
    return dataclasses.replace(
        answer,
        images=images,
        loss=torch.where(read, loss, of_means),
        details={**answer.details, "read": read.to(loss)},
    )


def _snapped(
    attack: Matching, observation: Observation, answer: Reconstruction, goal: Tensor | None, values: Tensor
) -> Reconstruction:
    snapped = public_images.snap(answer.images, values.to(answer.images))
    loss, before = own_loss(attack, observation, answer, snapped), cast(Tensor, answer.loss)
    # At most as large as the truth's is expected to be, or as before.
    fits = loss <= (before if goal is None else torch.maximum(before, goal.to(loss)))
    images = torch.where(_column(fits, snapped), snapped, answer.images)
    return dataclasses.replace(answer, images=images, loss=torch.where(fits, loss, before))


def own_loss(attack: Matching, observation: Observation, answer: Reconstruction, images: Tensor) -> Tensor:
    """Matching loss [N] of other images in an answer's place."""
    labels = cast(Tensor, answer.labels)
    targets = torch.nn.functional.one_hot(labels, observation.classes).to(images)
    return attack.loss(observation, images, targets, answer.guessed)


def _nearest(
    attack: Matching,
    observation: Observation,
    problem: Problem,
    facts: Facts,
    row: Variables,
    generator: Generators,
) -> list[Tensor]:
    """The public batches [N, B, C, H, W] of least matching loss, of some drawn, best first."""
    assert observation.auxiliary is not None
    count = max(CANDIDATES, attack.restarts - 1)
    labels = _labels(facts, observation)
    drawn = public_images.draw(observation.auxiliary, observation.classes, labels, count, generator)
    drawn = drawn.to(observation.device, observation.dtype)
    losses = [
        loop.finish(problem, {**row, "pixels": _pixels(images, observation, facts)}, facts, observation.compute.width)
        for images in drawn
    ]
    order = torch.stack([final.matching for final in losses]).argsort(dim=0, stable=True)
    victims = torch.arange(observation.victims, device=observation.device)
    return [drawn[order[place], victims] for place in range(attack.restarts - 1)]


def _pixels(images: Tensor, observation: Observation, facts: Facts) -> Tensor:
    """Images [N, B, C, H, W] in the space searched."""
    mean, std = (facts.own[name][:, None] for name in ("mean", "std"))
    return ((images - mean) / std).to(observation.dtype)


def _labels(facts: Facts, observation: Observation) -> Tensor:
    """Labels [N, B] that an attack goes by; zeros where it searches for them."""
    if not facts.knows_labels:
        return torch.zeros(observation.victims, observation.batch_size, dtype=torch.int64, device=observation.device)
    return facts.targets.argmax(-1)


def _column(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view((-1,) + (1,) * (like.ndim - 1))


def _default(attack: Matching, option: str) -> object:
    default: object = getattr(type(attack), option)
    return default
