"""Ways to compute losses and gradients of stacked trials; all give the same numbers up to rounding."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from ..update import by_autograd, by_transform
from .layerwise import Layerwise
from .optimisers import Variables
from .problem import Backend, Facts, Problem, Values, take

log = logging.getLogger(__name__)


class Sequential(Backend):
    """One trial after the other with plain double backward: the reference for all others."""

    def __call__(self, problem: Problem, variables: Variables, facts: Facts) -> Values:
        """Losses and gradients of W stacked trials."""
        totals, matchings, rows = [], [], []
        for index in range(width_of(variables)):
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

    def __init__(self) -> None:
        self._problem: Problem | None = None

    def __call__(self, problem: Problem, variables: Variables, facts: Facts) -> Values:
        """Losses and gradients of W stacked trials."""
        if self._problem is not problem:
            self._problem, self._stacked = problem, _stacked(problem)
        return _values(self._stacked(variables, facts))


def _stacked(problem: Problem) -> Callable[[Variables, Facts], Any]:
    def one(row: Variables, known: Facts) -> tuple[Tensor, Tensor]:
        return problem.loss(row, known, by_transform)

    # Randomness is refused by vmap's default: a loss draws nothing, so that it can be repeated.
    return cast(Callable[[Variables, Facts], Any], vmap(grad_and_value(one, has_aux=True)))


def _values(answer: tuple[Variables, tuple[Tensor, Tensor]]) -> Values:
    gradients, (total, matching) = answer
    return Values(total.detach(), matching.detach(), {n: g.detach() for n, g in gradients.items()})


BACKENDS: dict[str, type[Backend]] = {"sequential": Sequential, "vmap": Vmap, "layerwise": Layerwise}


def width_of(variables: Variables) -> int:
    """Return W of stacked variables."""
    return len(next(iter(variables.values())))
