"""Ways to compute losses and gradients of stacked trials; all give the same numbers up to rounding."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from ..update import by_autograd, by_transform, twice_differentiable_kernels
from .layerwise import Layerwise
from .memory import is_out_of_memory
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
        self._compiles = False

    def compile(self) -> bool:
        """Compile from now on; the first call of every width takes a minute."""
        self._compiles = True
        self._problem = None
        return True

    def __call__(self, problem: Problem, variables: Variables, facts: Facts) -> Values:
        """Losses and gradients of W stacked trials."""
        if self._problem is not problem:
            self._problem, self._plain = problem, _stacked(problem)
            self._compiled = torch.compile(self._plain, dynamic=False) if self._compiles else None
            self._tested: set[int] = set()
        if self._compiled is not None and (answer := self._try(variables, facts)) is not None:
            return answer
        return _values(self._plain(variables, facts))

    def _try(self, variables: Variables, facts: Facts) -> Values | None:
        """Run compiled; the first answer of every width is compared, and what fails is not tried again."""
        assert self._compiled is not None and self._problem is not None
        width = width_of(variables)
        try:
            with twice_differentiable_kernels(self._problem.network.module):
                answer = _values(self._compiled(variables, facts))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            if width in self._tested or _agrees(answer, _values(self._plain(variables, facts)), width):
                self._tested.add(width)
                return answer
            reason = "it answers something else than without"
        log.warning("torch.compile cannot be used here, going on without (%s)", reason)
        self._compiled = None
        return None


def _stacked(problem: Problem) -> Callable[[Variables, Facts], Any]:
    def one(row: Variables, known: Facts) -> tuple[Tensor, Tensor]:
        return problem.loss(row, known, by_transform)

    # Randomness is refused by vmap's default: a loss draws nothing, so that it can be repeated.
    return cast(Callable[[Variables, Facts], Any], vmap(grad_and_value(one, has_aux=True)))


def _values(answer: tuple[Variables, tuple[Tensor, Tensor]]) -> Values:
    gradients, (total, matching) = answer
    return Values(total.detach(), matching.detach(), {n: g.detach() for n, g in gradients.items()})


BACKENDS: dict[str, type[Backend]] = {"sequential": Sequential, "vmap": Vmap, "layerwise": Layerwise}


def _agrees(answer: Values, truth: Values, rows: int) -> bool:
    """Whether the first trials' gradients are the same up to rounding; what is not finite in both says nothing."""
    for name, expected in truth.gradients.items():
        wanted, found = (tensor[:rows].flatten(1) for tensor in (expected, answer.gradients[name]))
        error, size = (found - wanted).norm(dim=1), wanted.norm(dim=1)
        # Fused kernels round otherwise; a wrong one is off by its own size.
        wrong = ~(error <= 1e-2 * size) & (size.isfinite() | found.norm(dim=1).isfinite())
        if bool(wrong.any()):
            return False
    return True


def width_of(variables: Variables) -> int:
    """Return W of stacked variables."""
    return len(next(iter(variables.values())))
