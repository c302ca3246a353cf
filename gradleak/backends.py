"""Ways to compute losses and gradients of stacked trials; all give the same numbers up to rounding."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from .errors import unknown
from .optimisers import Variables
from .problem import Facts, Problem, Values, take
from .update import by_autograd, by_transform


class Backend(ABC):
    """A way to compute the losses and gradients of stacked trials."""

    @abstractmethod
    def applies(self, problem: Problem, width: int) -> bool:
        """Whether this backend can compute the problem."""

    @abstractmethod
    def __call__(self, problem: Problem, variables: Variables, facts: Facts) -> Values:
        """Losses and gradients of W stacked trials."""


class Sequential(Backend):
    """One trial after the other with plain double backward: the reference for all others."""

    def applies(self, problem: Problem, width: int) -> bool:
        """Anything."""
        return True

    def __call__(self, problem: Problem, variables: Variables, facts: Facts) -> Values:
        """Losses and gradients of W stacked trials."""
        width = len(next(iter(variables.values())))
        totals, matchings, rows = [], [], []
        for index in range(width):
            leaves = {name: tensor[index].detach().requires_grad_() for name, tensor in variables.items()}
            total, matching = problem.loss(leaves, take(facts, index), by_autograd)
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
            totals.append(total.detach())
            matchings.append(matching.detach())
            rows.append(gradients)
        stacked = {name: torch.stack(column) for name, column in zip(variables, zip(*rows, strict=True), strict=True)}
        return Values(torch.stack(totals), torch.stack(matchings), stacked)


class Vmap(Backend):
    """All trials at once through torch.func.vmap."""

    def applies(self, problem: Problem, width: int) -> bool:
        """Anything torch.func can stack; one trial alone only pays its overhead."""
        return width > 1

    def __call__(self, problem: Problem, variables: Variables, facts: Facts) -> Values:
        """Losses and gradients of W stacked trials."""

        def one(row: Variables, known: Facts) -> tuple[Tensor, Tensor]:
            return problem.loss(row, known, by_transform)

        # Randomness is refused by vmap's default: a loss draws nothing, so that it can be repeated.
        gradients, (total, matching) = vmap(grad_and_value(one, has_aux=True))(variables, facts)
        return Values(total.detach(), matching.detach(), {n: g.detach() for n, g in gradients.items()})


BACKENDS: dict[str, Backend] = {"sequential": Sequential(), "vmap": Vmap()}


def choose(problem: Problem, width: int, name: str) -> tuple[str, Backend]:
    """Return the named backend, or for `auto` the one to use for chunks of this width.

    Raises:
        GradleakError: no backend has that name.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise unknown("backend", name, [*BACKENDS, "auto"])
        return name, BACKENDS[name]
    picked = "vmap" if BACKENDS["vmap"].applies(problem, width) else "sequential"
    return picked, BACKENDS[picked]
