"""What the template needs for second-order optimisers: float64, residuals, and how small these are at the truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from ..defense import View
from ..engine.problem import Facts
from ..engine.residuals import relative_difference
from ..threat import Observation
from ..update import Update

READ = 1e-8
"""Squared relative residual below which a message without noise is taken for read: far above rounding, far below any
local minimum."""


def in_double(observation: Observation) -> Observation:
    """The observation in float64: near a solution the residual's squares leave float32's digits."""
    view = observation.view
    if view is not None and view.public is not None:
        view = View(view.defense, _double(view.public))
    return dataclasses.replace(
        observation,
        network=observation.network.to(observation.device, torch.float64),
        message=_double(observation.message),
        update=_double(observation.update),
        view=view,
        running_statistics=_if_granted(observation.running_statistics),
        batch_statistics=_if_granted(observation.batch_statistics),
        private=_if_granted(observation.private),
    )


def residual_of(observation: Observation, turned: bool) -> Callable[[Update, Facts], Tensor]:
    """Residuals of one victim: the defense's in message space if it can be simulated, else of the decoded update.

    `turned` negates simulated updates.
    """
    view = known_view(observation)

    def residual(update: Update, facts: Facts) -> Tensor:
        if view is None:
            return relative_difference(update, facts.update)
        if turned:
            update = {name: -tensor for name, tensor in update.items()}
        return view.residual(facts.message, view.simulate(update))

    return residual


def goal(observation: Observation) -> Tensor:
    """Squared norm of the residual [N] that the truth is expected not to exceed: four deviations above the mean."""
    view = known_view(observation)
    if view is None:
        return torch.full((observation.victims,), READ, dtype=observation.dtype, device=observation.device)
    floor = vmap(view.noise_floor)(observation.message)
    return floor + 4 * (2 * floor).sqrt() + READ


def is_noisy(observation: Observation) -> bool:
    """Whether the defense has a known law of noise."""
    view = known_view(observation)
    return view is not None and bool((vmap(view.noise_floor)(observation.message) > 0).any())


_QUADRATIC = ("cosine", "masked-cosine", "relative-squared")
_LINEAR = ("absolute", "angular", "layer-distances")
"""Objectives that grow with the square of a small relative difference, or with itself."""


def first_order_goal(observation: Observation, objective: str) -> Tensor | None:
    """The loss [N] of a difference that is READ, or of rounding if that is more; None for objectives with a scale."""
    if objective not in _QUADRATIC + _LINEAR:
        return None
    least = READ if objective in _QUADRATIC else READ**0.5
    value = max(least, 4 * torch.finfo(observation.dtype).eps)
    return torch.full((observation.victims,), value, dtype=observation.dtype, device=observation.device)


def known_view(observation: Observation) -> View | None:
    """The view of a defense that can be simulated, or None."""
    return observation.view if observation.view is not None and observation.view.complete else None


def _double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _if_granted(tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if tensors is None else _double(tensors)
