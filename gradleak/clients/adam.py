"""Adam and AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from ..client import Client, Parameters, State


@dataclass(frozen=True, kw_only=True)
class Adam(Client):
    """Local steps of Adam, or with `decoupled` weight decay of AdamW, as torch takes them.

    References: Kingma and Ba, ICLR 2015, arXiv:1412.6980; Loshchilov and Hutter, ICLR 2019, arXiv:1711.05101. Every
    client begins with empty moments. Where a second moment is exactly zero its root counts as constant: the step there
    is zero, and has no derivative.
    """

    reference = "arXiv:1412.6980"

    first: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay of the first moment, torch's `betas[0]`."""
    second: Annotated[float, Ge(0), Lt(1)] = 0.999
    """Decay of the second moment, torch's `betas[1]`."""
    eps: Annotated[float, Gt(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.0
    decoupled: bool = False
    """Weight decay shrinks the weights themselves (AdamW) instead of adding to the gradient."""

    def begin(self, parameters: Parameters) -> State:
        """Both moments, and the number of steps taken."""
        zeros = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        return zeros, zeros, 0

    def step(self, parameters: Parameters, gradient: Parameters, state: State, lr: float) -> tuple[Parameters, State]:
        """Take one step."""
        means, squares, taken = state
        taken += 1
        if self.weight_decay and self.decoupled:
            parameters = {name: (1 - lr * self.weight_decay) * tensor for name, tensor in parameters.items()}
        elif self.weight_decay:
            gradient = {name: gradient[name] + self.weight_decay * tensor for name, tensor in parameters.items()}
        means = {name: self.first * means[name] + (1 - self.first) * slope for name, slope in gradient.items()}
        squares = {
            name: self.second * squares[name] + (1 - self.second) * slope.square() for name, slope in gradient.items()
        }
        rate, scale = lr / (1 - self.first**taken), (1 - self.second**taken) ** 0.5
        moved = {
            name: tensor - rate * means[name] / (_root(squares[name]) / scale + self.eps)
            for name, tensor in parameters.items()
        }
        return moved, (means, squares, taken)


def _root(square: Tensor) -> Tensor:
    """Square root with a derivative of zero at zero."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
