"""Stochastic gradient descent with momentum and weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Lt

from ..client import Client, Parameters, State
from ..errors import GradleakError


@dataclass(frozen=True, kw_only=True)
class SGD(Client):
    """Local steps with heavy-ball or Nesterov momentum and weight decay, as `torch.optim.SGD` takes them.

    With d the gradient plus `weight_decay` times the weights, the velocity is v = `momentum` v + (1 - `dampening`) d,
    in the first step d itself; the weights move by -lr v, or with `nesterov` by -lr (d + `momentum` v).
    """

    reference = "Sutskever et al., ICML 2013"

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    dampening: Annotated[float, Ge(0), Lt(1)] = 0.0
    weight_decay: Annotated[float, Ge(0)] = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        """Refuse Nesterov's step without a momentum or with dampening, as torch does."""
        Client.__post_init__(self)
        if self.nesterov and (not self.momentum or self.dampening):
            raise GradleakError("nesterov: needs a momentum above 0 and no dampening")

    @property
    def optimises(self) -> bool:
        """Whether there is anything besides plain steps."""
        return bool(self.momentum or self.weight_decay)

    def step(self, parameters: Parameters, gradient: Parameters, state: State, lr: float) -> tuple[Parameters, State]:
        """Take one step; the state is the velocity by parameter."""
        if not self.optimises:
            return super().step(parameters, gradient, state, lr)
        moves = {name: gradient[name] + self.weight_decay * tensor for name, tensor in parameters.items()}
        if self.momentum:
            kept: Parameters | None = state
            state = (
                moves
                if kept is None
                else {name: self.momentum * kept[name] + (1 - self.dampening) * move for name, move in moves.items()}
            )
            ahead = {name: move + self.momentum * state[name] for name, move in moves.items()}
            moves = ahead if self.nesterov else state
        return {name: tensor - lr * moves[name] for name, tensor in parameters.items()}, state
