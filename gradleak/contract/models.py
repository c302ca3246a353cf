"""What a model promises."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from ..model import Model, initialise
from .findings import close, require, same
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
    """Can be differentiated twice, in a stack of victims as alone, and depends on images through its gradients."""
    network = initialise(case.model, case.shapes[0], 10, 0).double().eval()
    require(not any(getattr(each, "inplace", False) for each in network.modules()), "a layer works in place")
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    images = torch.rand(VICTIMS, 2, *case.shapes[0], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([4, 7])

    def energy(batch: Tensor) -> Tensor:
        def loss(at: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(functional_call(network, at, (batch,)), labels)

        return torch.stack([each.square().sum() for each in grad(loss)(parameters).values()]).sum()

    stacked = vmap(grad(energy))(images)
    require(stacked.isfinite().all(), "the second derivative is not finite")
    require(stacked.abs().max() > 0, "the second derivative is zero")
    for index, batch in enumerate(images):
        point = batch.clone().requires_grad_()
        slopes = torch.autograd.grad(
            F.cross_entropy(network(point), labels), list(network.parameters()), create_graph=True
        )
        (alone,) = torch.autograd.grad(torch.stack([slope.square().sum() for slope in slopes]).sum(), point)
        close(stacked[index], alone, "second derivatives in a stack and alone", rtol=1e-8, atol=1e-10)
