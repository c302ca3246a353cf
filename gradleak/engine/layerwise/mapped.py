"""Matching losses of a linear map of the update: sketches, and entries that are picked."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from ...update import Update
from ..closed_forms import Compared, LinearMap
from ..closed_forms import Picked as PickedEntries
from ..problem import Described, Facts
from . import coefficients
from .entries import Entries, bags, grouped
from .layer import Layer, Pull
from .matching import Matcher


class Mapped(Matcher):
    """A linear map of victims' gradients to messages of one tensor, which are compared."""

    def __init__(self, layers: Sequence[Layer], parameters: Update, key: str, match: Described, form: Compared):
        super().__init__(layers)
        self._shapes = {name: tensor.shape for name, tensor in parameters.items()}
        self._key, self._match, self._clip = key, match, form.clip
        self._objective = form.objective or match.objective

    def __call__(self, facts: Facts) -> tuple[Tensor, Pull]:
        """Loss [W], and what flows into the graph."""
        loss, towards = self._compare(self.forward(), facts.message[self._key])
        return loss, self.backward(towards)

    @abstractmethod
    def forward(self) -> Tensor:
        """Messages [W, s] of the gradients."""

    @abstractmethod
    def backward(self, towards: Tensor) -> Pull:
        """What flows into the graph for gradients [W, s] of the loss by messages."""

    def _compare(self, mapped: Tensor, sent: Tensor) -> tuple[Tensor, Tensor]:
        if self._objective not in coefficients.KNOWN:
            return self._compare_anyhow(mapped, sent)
        dot, own, size = (mapped * sent).sum(1), mapped.square().sum(1), sent.square().sum(1)
        factor = torch.ones_like(own) if self._clip is None else coefficients.factor(own, self._clip)
        if self._objective == "cosine":
            found = coefficients.cosine(factor * dot, factor.square() * own, size)
        else:
            gap = (factor[:, None] * mapped - sent).square().sum(1)
            found = coefficients.squared(gap, size, self._objective == "relative-squared")
        if self._clip is not None:
            found = coefficients.through_clip(found, dot, own, self._clip)
        return found.loss, found.of_observed[:, None] * sent + found.of_own[:, None] * mapped

    def _compare_anyhow(self, mapped: Tensor, sent: Tensor) -> tuple[Tensor, Tensor]:
        """Through torch.func, in the space of messages."""
        key = self._key

        def loss(row: Tensor, known: Tensor) -> Tensor:
            if self._clip is not None:
                row = coefficients.factor(row.square().sum(), self._clip) * row
            return self._match.sent({key: row}, {key: known})

        towards, found = vmap(grad_and_value(loss))(mapped, sent)
        return found, towards


class Rows(Mapped):
    """Any linear map."""

    def __init__(
        self, layers: Sequence[Layer], parameters: Update, linear: LinearMap, match: Described, form: Compared
    ):
        super().__init__(layers, parameters, linear.key, match, form)
        self._linear = linear

    def forward(self) -> Tensor:
        """Messages [W, s] of the gradients."""
        found = self.updates()
        return self._linear.forward(torch.cat([found[name].flatten(1) for name in self._shapes], 1))

    def backward(self, towards: Tensor) -> Pull:
        """What flows into the graph for gradients [W, s] of the loss by messages."""
        parts = self._linear.adjoint(towards).split([shape.numel() for shape in self._shapes.values()], 1)
        # Contiguous: matrix products round by how their operands lie in memory, and that must not be a victim's own.
        return self.pull(
            {
                name: part.contiguous().view(-1, *shape)
                for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
            }
        )


class Summed(Mapped):
    """Every entry goes into one number of the message, with a sign."""

    def __init__(
        self, layers: Sequence[Layer], parameters: Update, linear: LinearMap, match: Described, form: Compared
    ):
        super().__init__(layers, parameters, linear.key, match, form)
        assert linear.sums is not None
        groups, negative, size = linear.sums
        self._order, self._starts = grouped(groups, size)
        like = next(iter(parameters.values()))
        self._signs = torch.where(negative, -1.0, 1.0).to(like)[self._order]
        places = groups + size * negative
        sizes = [shape.numel() for shape in self._shapes.values()]
        self._places = dict(zip(self._shapes, places.split(sizes), strict=True))

    def forward(self) -> Tensor:
        """Messages [W, s] of the gradients, whose victims lie side by side for this."""
        columns = self._signs.new_empty(len(self._order), self.layers[0].victims)
        parts = columns.split([len(places) for places in self._places.values()])
        into = dict(zip(self._places, parts, strict=True))
        for layer in self.layers:
            layer.fill_columns(into)
        return bags(columns, self._order, self._starts, self._signs).T.contiguous()

    def backward(self, towards: Tensor) -> Pull:
        """What flows into the graph for gradients [W, s] of the loss by messages."""
        both = torch.cat([towards, -towards], 1)
        return self.pull(
            {name: both.index_select(1, self._places[name]).view(-1, *shape) for name, shape in self._shapes.items()}
        )


class Picked(Mapped):
    """Every number of the message is one entry."""

    def __init__(
        self, layers: Sequence[Layer], parameters: Update, linear: PickedEntries, match: Described, form: Compared
    ):
        super().__init__(layers, parameters, linear.key, match, form)
        picked = linear.entries
        self._entries: dict[str, Entries] = {}
        start = 0
        for name, shape in self._shapes.items():
            stop = start + shape.numel()
            first, last = torch.searchsorted(picked, torch.tensor([start, stop], device=picked.device))
            index = picked[int(first) : int(last)] - start
            self._entries[name] = Entries(index, shape.numel(), shape[1:].numel())
            start = stop

    def forward(self) -> Tensor:
        """Messages [W, s] of the gradients."""
        found = {name: values for layer in self.layers for name, values in layer.picked(self._entries).items()}
        return torch.cat([found[name] for name in self._shapes], 1)

    def backward(self, towards: Tensor) -> Pull:
        """What flows into the graph for gradients [W, s] of the loss by messages."""
        parts = towards.split([len(each.index) for each in self._entries.values()], 1)
        values = dict(zip(self._entries, parts, strict=True))
        return [pair for layer in self.layers for pair in layer.pull_picked(self._entries, values)]
