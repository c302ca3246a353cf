"""A layer with parameters as seen by a flat batch of victims, and what all kinds of layers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...update import Network, Update
from .entries import Entries

Pulled = tuple[Tensor, Tensor]
"""A tensor of the graph, and the gradient of the loss that flows into it."""

Pull = list[Pulled]
"""All that the gradient of the matching loss flows into."""


class NotUnderstoodError(Exception):
    """Why this backend cannot compute a problem."""


@dataclass(frozen=True)
class ObservedUpdates:
    """Observed updates [W, ...]; those of low rank as left @ right^T, [W, out, rank] and [W, in, rank]."""

    dense: Update
    left: Update
    right: Update


class Layer(ABC):
    """A layer that has parameters, seen by a flat batch [W * B, ...]; keeps notes of one pass."""

    def __init__(self, module: nn.Module, prefix: str, network: Network):
        self.module = module
        self.full = {name: prefix + name for name, _ in module.named_parameters()}
        self.parameters = {name: network.parameters[full] for name, full in self.full.items()}
        own = {prefix + name: name for name, _ in module.named_buffers()}
        self.buffers = {own[full]: tensor for full, tensor in network.buffers.items() if full in own}
        self.victims = 0
        self.copies = False
        """Whether the output is handed on as a copy, since what comes next works in place."""
        self.forget()

    def forget(self) -> None:
        """Drop the notes of the last pass and with them its graph."""
        self.wanted: list[Tensor] = []
        """Tensors of the graph by which the loss is differentiated."""
        self.cotangents: list[Tensor] = []
        """These gradients, with a graph."""
        self._gradients: Update | None = None
        self.activations: list[Tensor] = []
        """Input of each call."""
        self._marks: list[tuple[Tensor, int]] = []
        self._weights: Tensor | None = None

    def see(self, victims: int, weights: Tensor | None = None) -> None:
        """Take the batch for that of so many victims, with cotangents multiplied by a weight of each image."""
        self.victims, self._weights, self._gradients = victims, weights, None

    def run(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Stand in for the module: run the layer on its only input, and note what must not change after."""
        if named or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise NotUnderstoodError(f"{type(self.module).__name__} is called with more than one tensor")
        self.activations.append(inputs[0])
        output = self.forward(inputs[0])
        self._marks = [(tensor, tensor._version) for tensor in (output, inputs[0])]
        return output.clone() if self.copies else output

    @property
    def overwritten(self) -> bool:
        """Whether input or output were changed in place after the call."""
        return any(tensor._version != version for tensor, version in self._marks)

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Run the layer and take notes."""

    @abstractmethod
    def compute(self) -> Update:
        """Gradient of each parameter, [W, ...], by its name in the layer."""

    @abstractmethod
    def vjp(self, towards: Update) -> Pull:
        """What flows into the graph for given gradients of the loss by the layer's gradients."""

    def gradients(self) -> Update:
        """Gradient of each parameter, [W, ...], by its full name."""
        if self._gradients is None:
            own = self.compute()
            self._gradients = {self.full[name]: tensor for name, tensor in own.items()}
        return self._gradients

    def pull(self, towards: Update) -> Pull:
        """What flows into the graph for given gradients of the loss by every update, by full name."""
        return self.vjp({name: towards[full] for name, full in self.full.items()})

    def products(self, observed: ObservedUpdates) -> tuple[Tensor, Tensor]:
        """Inner product with the observed gradients and squared norm, [W] each."""
        own = self.gradients()
        parts = [dot(tensor, observed.dense[name]) for name, tensor in own.items()]
        squares = [dot(tensor, tensor) for tensor in own.values()]
        return torch.stack(parts).sum(0), torch.stack(squares).sum(0)

    def square(self) -> Tensor:
        """Squared norm of the gradients, [W]."""
        return torch.stack([dot(tensor, tensor) for tensor in self.gradients().values()]).sum(0)

    def pull_own(self, of_own: Tensor) -> Pull:
        """What flows into the graph where V = of_own * G, coefficients [W]."""
        return self.pull({name: rows(of_own, tensor) * tensor for name, tensor in self.gradients().items()})

    def gap(self, observed: ObservedUpdates, factor: Tensor | None = None) -> Tensor:
        """Squared distance of the gradients, times a factor [W], from the observed ones, [W]."""
        own = self.gradients()
        if factor is not None:
            own = {name: rows(factor, tensor) * tensor for name, tensor in own.items()}
        parts = [(tensor - observed.dense[name]).square().flatten(1).sum(1) for name, tensor in own.items()]
        return torch.stack(parts).sum(0)

    def pull_directly(self, observed: ObservedUpdates, of_observed: Tensor, of_own: Tensor) -> Pull:
        """What flows into the graph where V = of_observed * g + of_own * G, coefficients [W]."""
        towards = {
            name: (rows(of_own, tensor) * tensor).addcmul_(rows(of_observed, tensor), observed.dense[name])
            for name, tensor in self.gradients().items()
        }
        return self.pull(towards)

    def fill_columns(self, columns: Update) -> None:
        """Write the gradients with the victims last, [size, W], by full name."""
        for name, tensor in self.gradients().items():
            columns[name].copy_(tensor.flatten(1).T)

    def picked(self, entries: Mapping[str, Entries]) -> Update:
        """Some entries of the gradients, [W, K], by full name."""
        return {
            name: tensor.flatten(1).index_select(1, entries[name].index) for name, tensor in self.gradients().items()
        }

    def pull_picked(self, entries: Mapping[str, Entries], values: Update) -> Pull:
        """What flows into the graph where V has values [W, K], by full name, at some entries and zeros elsewhere."""
        towards = {}
        for name, full in self.full.items():
            zeros = values[full].new_zeros(self.victims, entries[full].size)
            filled = zeros.index_copy_(1, entries[full].index, values[full])
            towards[name] = filled.view(self.victims, *self.parameters[name].shape)
        return self.vjp(towards)

    def note(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Keep the input and ask for the cotangent of the output."""
        if self.wanted:
            raise NotUnderstoodError(f"{type(self.module).__name__} is called more than once")
        if len(inputs) % self.victims or len(output) != len(inputs):
            raise NotUnderstoodError(f"{type(self.module).__name__} does not see the batch as its first axis")
        self.inputs = inputs
        self.wanted = [output]
        return output

    @property
    def cotangent(self) -> Tensor:
        """Gradient of the loss by the layer's output."""
        return self.cotangents[0]

    @property
    def flowing(self) -> Tensor:
        """The cotangent without a graph, times the weight of each image."""
        values = self.cotangent.detach()
        return values if self._weights is None else rows(self._weights, values) * values


def on_batch(module: nn.Module) -> bool:
    """Whether a module is a batch normalisation that uses statistics of the batch."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def split_tensor(tensor: Tensor, axis: int, victims: int) -> Tensor:
    """Cut the axis of a flat batch into victims and what is left."""
    return cast(Tensor, tensor.unflatten(axis, (victims, -1)))


def rows(values: Tensor, like: Tensor) -> Tensor:
    """Values [n] to the axes of a tensor [n, ...]."""
    return values.view(-1, *(1,) * (like.ndim - 1))


_CACHE = 2**14
"""Numbers of a victim from which victims are taken one by one, so that what is between two passes stays in a cache."""


def dot(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of each victim's rows, [W]. Not as a matrix product, which is slow for one row and column."""
    one, other = one.flatten(1), other.flatten(1)
    if one.device.type != "cpu" or one.shape[1] < _CACHE:
        return (one * other).sum(1)
    return torch.stack([(row * others).sum() for row, others in zip(one, other, strict=True)])


def beyond(values: Tensor, limit: Tensor) -> Tensor:
    """By how much values [W, n] lie outside of -limit to limit [W], with their sign; 0 inside."""
    if values.device.type != "cpu" or values.shape[1] < _CACHE:
        return values - values.clamp(-limit[:, None], limit[:, None])
    outside = torch.empty_like(values)
    for row, most, into in zip(values, limit.tolist(), outside, strict=True):
        torch.ops.aten.softshrink(row, most, out=into)
    return outside
