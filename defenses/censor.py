"""Censor: a random update orthogonal to the gradient that still lowers the loss."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from gradleak.defense import Defense, Loss, Message, Public
from gradleak.engine.objectives import relative_squared
from gradleak.update import Update

_RESOLUTION = 1e-14
"""Relative change of a loss in float64 below which rounding would decide."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Censor(Defense):
    """Sends the best of `trials` random updates, each tensor orthogonal to its gradient and of its norm.

    References: Zhang et al., NDSS 2025, arXiv:2501.15718. Best is the one of lowest loss after a virtual step;
    where none beats the loss before the step, the gradient itself is sent, which is logged and is frequent with
    exact orthogonality (a step along it lowers nothing to first order). `exact=False` is the released code,
    whose projection is exact for gradients of norm one only.

    Whether the gradient itself was sent shows: a gradient of the cross-entropy sums to zero over the classes, a random
    update does not. Who knows the defense matches those, and of a replaced message asks what is left of the truth, one
    orthogonality a tensor. (Norms are equations as well, but images that obeyed them were worse on 16 tuning digits.)
    That is far fewer equations than pixels: replaced messages stay below the floor, fallbacks leak all. The released
    code leaves a share of the gradient in every message, which is matched as it is. FedSGD; in a chain, where no loss
    is at hand, the first trial is sent.
    """

    family = "noise"
    version = "3"
    reference = "arXiv:2501.15718"
    linear = False
    has_likelihood = True

    trials: Annotated[int, Ge(1)] = 20
    lr: Annotated[float, Gt(0)] = 1e-4
    """Rate of the virtual step."""
    exact: bool = True
    """Whether updates are orthogonal to the gradient."""

    def release(self, update: Update, public: Public, generator: torch.Generator, loss: Loss) -> Message:
        """Return the trial of lowest loss after a step, or the gradient if none is below the loss now."""
        best: Message | None = None
        least = loss({name: torch.zeros_like(tensor) for name, tensor in update.items()})
        least = least - _RESOLUTION * least.abs()
        for _ in range(self.trials):
            candidate = self._trial(update, generator)
            value = loss({name: -self.lr * tensor for name, tensor in candidate.items()})
            if bool(value < least):
                best, least = candidate, value
        if best is None:
            log.info("censor: no trial lowers the loss; the gradient itself is sent")
            return update
        return _as(best, update)

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Return one trial."""
        return _as(self._trial(update, generator), update)

    def _trial(self, update: Update, generator: torch.Generator) -> Message:
        """Return one trial in float64."""
        return {name: self._orthogonal(tensor.double(), generator) for name, tensor in update.items()}

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Return the relative squared distance of a gradient that was sent, else the mean squared cosine of tensors."""
        distance = relative_squared(simulated, message)
        if not self.exact:
            return distance
        cosines = [
            (tensor * simulated[name]).sum().square()
            / (tensor.square().sum() * simulated[name].square().sum()).clamp(min=1e-30)
            for name, tensor in message.items()
        ]
        return torch.where(_is_gradient(message), distance, torch.stack(cosines).mean())

    def _orthogonal(self, gradient: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        direction = (drawn / drawn.norm()).to(gradient)
        norm = gradient.norm()
        along = (direction * gradient).sum() / (norm.square() if self.exact else norm).clamp(min=1e-30)
        rest: Tensor = direction - along * gradient
        trial: Tensor = rest * norm / rest.norm().clamp(min=1e-30)
        return trial


def _as(message: Message, like: Update) -> Message:
    return {name: tensor.to(like[name]) for name, tensor in message.items()}


def _is_gradient(message: Message) -> Tensor:
    """Whether the last matrix [classes, features] of a message sums to zero over the classes, a bool scalar."""
    last = next((tensor for tensor in reversed([*message.values()]) if tensor.ndim == 2), None)
    if last is None:
        return torch.ones((), dtype=torch.bool, device=next(iter(message.values())).device)
    return last.sum(0).square().sum() < 1e-6 * last.square().sum()
