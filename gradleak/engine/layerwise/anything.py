"""Any other layer with parameters, through torch.func."""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor, nn
from torch.func import functional_call, vmap

from ...update import Network, Update
from .layer import Layer, NotUnderstoodError, Pull, split_tensor


class Anything(Layer):
    """Any other module with parameters: every victim gets its own, and autograd does the rest."""

    def __init__(self, module: nn.Module, prefix: str, network: Network):
        super().__init__(module, prefix, network)
        self.original = copy.copy(module)

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the module once a victim, stacked."""
        if self.wanted:
            raise NotUnderstoodError(f"{type(self.module).__name__} is called more than once")
        names = list(self.parameters)
        own = [self.parameters[name].expand(self.victims, *self.parameters[name].shape) for name in names]
        self.wanted = [tensor.detach().requires_grad_() for tensor in own]

        def run(parameters: list[Tensor], rows: Tensor) -> Tensor:
            state = {**self.buffers, **dict(zip(names, parameters, strict=True))}
            return cast(Tensor, functional_call(self.original, state, (rows,), strict=False))

        return vmap(run)(self.wanted, split_tensor(inputs, 0, self.victims)).flatten(0, 1)

    def compute(self) -> Update:
        """Gradient of each parameter."""
        return {name: tensor.detach() for name, tensor in zip(self.parameters, self.cotangents, strict=True)}

    def vjp(self, towards: Update) -> Pull:
        """V itself."""
        return [(tensor, towards[name]) for name, tensor in zip(self.parameters, self.cotangents, strict=True)]
