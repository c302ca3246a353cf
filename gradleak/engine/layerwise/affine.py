"""Normalisation layers: a scale and a shift of each channel."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ...update import Network, Update
from .layer import Layer, ObservedUpdates, Pull, on_batch, split_tensor


class Affine(Layer):
    """The scale and shift of a normalisation layer, after the normalisation itself."""

    def __init__(self, module: nn.Module, prefix: str, network: Network):
        super().__init__(module, prefix, network)
        self.axis = -1 if isinstance(module, nn.LayerNorm) else 1

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the layer and take notes."""
        self.per_input: tuple[Tensor, Tensor] | None = None
        module = self.module
        if isinstance(module, _BatchNorm):
            if not on_batch(module):
                return self._fixed(inputs)
            # Statistics of each victim's own batch: victims become channels.
            grouped = split_tensor(inputs, 0, self.victims).transpose(0, 1).flatten(1, 2)
            normal = F.batch_norm(grouped, None, None, training=True, eps=module.eps)
            normal = split_tensor(normal, 1, self.victims).transpose(0, 1).flatten(0, 1)
        elif isinstance(module, nn.GroupNorm):
            normal = F.group_norm(inputs, module.num_groups, eps=module.eps)
        else:
            assert isinstance(module, nn.LayerNorm)
            normal = F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
        if not self.parameters:
            return normal
        output = normal * self._along(self.parameters["weight"], inputs)
        if "bias" in self.parameters:
            output = output + self._along(self.parameters["bias"], inputs)
        return self.note(normal, output)

    def _fixed(self, inputs: Tensor) -> Tensor:
        """Known statistics: one scale and shift, so that the graph has one product."""
        assert isinstance(self.module, _BatchNorm)
        scale = (self.buffers["running_var"] + self.module.eps).rsqrt()
        shift = -self.buffers["running_mean"] * scale
        if not self.parameters:
            return inputs * self._along(scale, inputs) + self._along(shift, inputs)
        weight, bias = self.parameters["weight"], self.parameters["bias"]
        self.per_input = scale, shift
        product = inputs * self._along(scale * weight, inputs) + self._along(shift * weight + bias, inputs)
        return self.note(inputs, product)

    def compute(self) -> Update:
        """Sums of D times the normalised input, and of D."""
        if not self.parameters:
            return {}
        cotangent = self.flowing
        own = {"weight": self._sum(cotangent * self._normal())}
        if "bias" in self.parameters:
            own["bias"] = self._sum(cotangent)
        return own

    def vjp(self, towards: Update) -> Pull:
        """V times the other factor."""
        if not self.parameters:
            return []
        weight = self._each(towards["weight"])
        into_cotangent = weight * self._victims(self._normal())
        if "bias" in towards:
            into_cotangent = into_cotangent + self._each(towards["bias"])
        into_inputs = weight * self._victims(self.flowing)
        if self.per_input is not None:
            into_inputs = into_inputs * self._along(self.per_input[0], self.inputs)
        return [
            (self.cotangent, into_cotangent.flatten(0, 1)),
            (self.inputs, into_inputs.flatten(0, 1)),
        ]

    def products(self, observed: ObservedUpdates) -> tuple[Tensor, Tensor]:
        """Inner product with the observed gradients and squared norm, [W] each."""
        if not self.parameters:
            nothing = self._nothing(observed)
            return nothing, nothing
        return super().products(observed)

    def gap(self, observed: ObservedUpdates, factor: Tensor | None = None) -> Tensor:
        """Squared distance of the gradients, times a factor [W], from the observed ones, [W]."""
        return super().gap(observed, factor) if self.parameters else self._nothing(observed)

    def _nothing(self, observed: ObservedUpdates) -> Tensor:
        return next(iter(observed.dense.values())).new_zeros(self.victims)

    def _normal(self) -> Tensor:
        inputs = self.inputs.detach()
        if self.per_input is None:
            return inputs
        scale, shift = self.per_input
        return inputs * self._along(scale, inputs) + self._along(shift, inputs)

    def _along(self, values: Tensor, like: Tensor) -> Tensor:
        """Parameter to the axes it scales."""
        return values if self.axis == -1 else values.view(-1, *(1,) * (like.ndim - 2))

    def _victims(self, maps: Tensor) -> Tensor:
        return split_tensor(maps, 0, self.victims)

    def _each(self, rows: Tensor) -> Tensor:
        """Gradients [W, *shape] of a parameter to the axes of [W, B, ...]."""
        inputs = self.inputs
        if self.axis == -1:
            return rows.view(self.victims, *(1,) * (inputs.ndim - rows.ndim + 1), *rows.shape[1:])
        return rows.view(self.victims, 1, -1, *(1,) * (inputs.ndim - 2))

    def _sum(self, maps: Tensor) -> Tensor:
        """Sum over the axes that the parameter does not have, [W, *shape]."""
        rows = self._victims(maps)
        if self.axis == -1:
            kept = self.parameters["weight"].ndim
            return rows.flatten(1, rows.ndim - kept - 1).sum(1)
        return rows.flatten(3).sum((1, 3)) if rows.ndim > 3 else rows.sum(1)
