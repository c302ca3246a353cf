"""What a model promises."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from ..engine.derivatives import twice_differentiable
from ..model import Model, initialise
from ..update import LocalTraining, Network, local_update, one_hot, squared_norm
from .findings import require, same
from .victims import VICTIMS

# Models


@dataclass(frozen=True)
class ModelCase:
    """A model, and the one shape of images it is for."""

    model: Model
    shape: tuple[int, int, int] | None = None

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes (C, H, W) that it must take."""
        return ((1, 8, 8), (3, 32, 32)) if self.shape is None else (self.shape,)


def model_declares_itself(case: ModelCase) -> None:
    """Declares its reference."""
    require(getattr(case.model, "reference", ""), "reference is missing")


def model_gives_logits(case: ModelCase) -> None:
    """Gives finite logits of grey and of colour images, one or several, in both modes."""
    for shape, classes in itertools.product(case.shapes, (7, 10)):
        network = initialise(case.model, shape, classes, 0)
        for count, training in ((1, False), (2, True)):
            logits = network.train(training)(torch.rand(count, *shape, generator=torch.Generator().manual_seed(1)))
            fits = logits.shape == (count, classes)
            require(fits, f"logits {tuple(logits.shape)}, not {(count, classes)}, of images {shape}")
            require(logits.isfinite().all(), f"logits are not finite for images {shape}")


def model_follows_its_seed(case: ModelCase) -> None:
    """Draws its weights from the seed alone."""
    noise = torch.get_rng_state()
    first, again, other = (initialise(case.model, case.shapes[0], 10, seed).state_dict() for seed in (1, 1, 2))
    require(torch.equal(torch.get_rng_state(), noise), "the global generator was moved")
    require(same(first, again), "two networks of one seed differ")
    require(not same(first, other), "networks of two seeds are equal")


def model_can_be_differentiated_twice(case: ModelCase) -> None:
    """Can be differentiated twice, and depends on images through its gradients."""
    network = Network.of(initialise(case.model, case.shapes[0], 10, 0).double())
    batches = torch.rand(VICTIMS, 2, *case.shapes[0], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    targets = one_hot(torch.tensor([4, 7]), 10, torch.float64)
    reason = twice_differentiable(network, batches[0], targets)
    require(reason is None, reason or "")
    for batch in batches:
        point = batch.clone().requires_grad_()
        update = local_update(network, point, targets, LocalTraining())
        (slope,) = torch.autograd.grad(squared_norm(update), point)
        require(slope.isfinite().all(), "the second derivative is not finite")
        require(slope.abs().max() > 0, "the second derivative is zero")
