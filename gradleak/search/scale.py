"""How far apart an attacker's loss has an image that knows nothing and the truth: the unit of a prior's weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..defense import View
from ..engine.optimisers import Variables
from ..engine.problem import Facts, Problem, take
from ..errors import GradleakError
from ..threat import Observation
from ..update import Update, by_autograd
from . import penalties, public_images

IMAGES = 4
"""Batches whose updates stand for the victim's."""

_PATCH = 4
"""Side of the noise that is enlarged to an image where no public images are granted: most of a photograph's contrast
lies in coarse structures too."""


def ranges(observation: Observation, problem: Problem, facts: Facts, row: Variables, view: View | None) -> Tensor:
    """Return each victim's range of the matching loss [N], in its units.

    It is what the mean image's update loses against that of an image, less what this image's own update loses: the mean
    over public images of the victim's labels or, where none are granted, over smooth noise around grey. The victim's
    message is not read.

    Args:
        observation: whose model, labels and public images are used.
        problem: one trial's loss.
        facts: of each victim, stacked.
        row: variables of one restart, [N, ...]; what is guessed beside images stays as it is here.
        view: of the defense, if it can be simulated.

    Raises:
        GradleakError: what the model sees is no image of the dataset's shape.
    """
    # Of unknown local steps the guess is one gradient, which a weight difference points away from.
    sign = -1 if observation.weight_difference and observation.training.lr is None else 1

    def sent(update: Update, known: Facts) -> Facts:
        """Facts of a client that has this update, without the noise of its defense."""
        message = known.message
        if view is not None:
            message = view.simulate({name: sign * tensor for name, tensor in update.items()})
        return dataclasses.replace(known, update=update, message=message)

    mean, images = _references(observation, facts)
    found = []
    for victim in range(observation.victims):
        own = {name: tensor[victim] for name, tensor in row.items()}
        found.append(_range(problem, take(facts, victim), own, mean, images[:, victim], sent))
    return torch.stack(found)


def _range(
    problem: Problem,
    facts: Facts,
    row: Variables,
    mean: Tensor,
    images: Tensor,
    sent: Callable[[Update, Facts], Facts],
) -> Tensor:
    guess = problem.decode(row, facts)
    if guess.images.shape != images[0].shape:
        raise GradleakError(
            f"tv_unit: range: images are {list(images[0].shape)}, the model sees {list(guess.images.shape)}; use loss"
        )

    def update_of(batch: Tensor) -> Update:
        update = problem.simulate(dataclasses.replace(guess, images=batch), by_autograd)
        return {name: tensor.detach() for name, tensor in update.items()}

    blank, found = update_of(mean.expand_as(images[0])), []
    for batch in images:
        update = update_of(batch)
        known = sent(update, facts)
        found.append(problem.match(blank, known) - problem.match(update, known))
    size = torch.stack(found).detach().mean()
    # Of an update that does not depend on the image there is nothing to weigh a prior against.
    return size.clamp(min=torch.finfo(size.dtype).tiny) if bool(size.isfinite()) else torch.ones_like(size)


def _references(observation: Observation, facts: Facts) -> tuple[Tensor, Tensor]:
    """A mean image [C, H, W], and batches of images [K, N, B, C, H, W]."""
    victims, size = observation.victims, observation.batch_size
    like = facts.own["mean"]
    public = observation.auxiliary
    if public is None:
        channels, height, width = observation.shape
        stream = torch.Generator().manual_seed(0)
        coarse = torch.rand(IMAGES * size, channels, _PATCH, _PATCH, generator=stream)
        smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)
        images = smooth.view(IMAGES, 1, size, *observation.shape).expand(-1, victims, -1, -1, -1, -1)
        return like.new_full(observation.shape, 0.5), images.to(like)
    labels = facts.targets.argmax(-1).cpu() if facts.knows_labels else torch.zeros(victims, size, dtype=torch.int64)
    return public.images.mean(0).to(like), public_images.first(public, observation.classes, labels, IMAGES).to(like)


def variation(images: Tensor, facts: Facts, weight: float, unit: str) -> tuple[Tensor, Tensor]:
    """Total variation [W] of stacked images and its slope, in the unit of the matching loss."""
    total, slope = penalties.total_variation_rows(images, weight)
    if unit == "range":
        size = facts.own["range"]
        return total * size, slope * size[:, None, None, None, None]
    return total, slope
