"""How far stacked victims' gradients are from what was observed, and what that makes flow into the layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from ...update import Update
from ..problem import Facts
from . import coefficients
from .layer import Layer, ObservedUpdates, Pull
from .product import Product

_NOISE = 1e-3
"""Share of a message's squared norm that is noise, from which its distance may be a difference of float32 norms."""


class Matcher(ABC):
    """A matching loss of stacked victims, from what layers know of one pass."""

    def __init__(self, layers: Sequence[Layer]):
        self.layers = layers

    def prepare(self, facts: Facts) -> Facts:
        """Facts of all victims with what else is needed of the observed message, computed once."""
        return facts

    @abstractmethod
    def __call__(self, facts: Facts) -> tuple[Tensor, Pull]:
        """Loss [W], and what flows into the graph."""

    def updates(self) -> Update:
        """Gradients [W, ...] of every parameter."""
        return {name: tensor for layer in self.layers for name, tensor in layer.gradients().items()}

    def pull(self, towards: Update) -> Pull:
        """What flows into the graph for given gradients of the loss by every update."""
        return [pair for layer in self.layers for pair in layer.pull(towards)]


class Anyhow(Matcher):
    """Any function of one victim's update, through torch.func."""

    def __init__(self, layers: Sequence[Layer], names: Sequence[str], match: Callable[[Update, Facts], Tensor]):
        super().__init__(layers)
        self._names, self._match = names, match

    def __call__(self, facts: Facts) -> tuple[Tensor, Pull]:
        """Loss [W], and what flows into the graph."""
        found = self.updates()
        towards, loss = vmap(grad_and_value(self._match))({name: found[name] for name in self._names}, facts)
        return loss, self.pull(towards)


class Ghost(Matcher):
    """Functions of <G, g> and |G|^2, where no G is formed that a ghost product serves as well."""

    def __init__(
        self,
        layers: Sequence[Layer],
        objective: str,
        observed: Literal["update", "message"],
        clip: float | None = None,
        noise: float = 0.0,
    ):
        super().__init__(layers)
        self._objective, self._observed, self._clip = objective, observed, clip
        entries = sum(tensor.numel() for layer in layers for tensor in layer.parameters.values())
        self._noisy = entries * noise**2 > _NOISE

    def prepare(self, facts: Facts) -> Facts:
        """Replace observed gradients of low rank by their factors.

        The gradient of a linear layer has at most as many ranks as it saw positions, unless a defense changed it.
        """
        observed = dict(facts[self._observed])
        left, right = {}, {}
        square = _square(observed)
        for layer in self.layers:
            if isinstance(layer, Product) and layer.rank_pays:
                name = layer.full["weight"]
                factors = _factorise(observed[name].flatten(2), layer.positions)
                if factors is not None:
                    left[name], right[name] = factors
                    del observed[name]
        ready = facts.plus(own={"_square": square}, named={"_left": left, "_right": right})
        return replace(ready, message=observed) if self._observed == "message" else replace(ready, update=observed)

    def __call__(self, facts: Facts) -> tuple[Tensor, Pull]:
        """Loss [W], and what flows into the graph."""
        observed = ObservedUpdates(facts[self._observed], facts.named.get("_left", {}), facts.named.get("_right", {}))
        size = facts.own["_square"] if "_square" in facts.own else _square(observed.dense)
        loss, of_observed, of_own = self._coefficients(observed, size)
        return loss, [pair for layer in self.layers for pair in layer.pull_directly(observed, of_observed, of_own)]

    def _coefficients(self, observed: ObservedUpdates, size: Tensor) -> coefficients.Coefficients:
        relative = self._objective == "relative-squared"
        if self._clip is None and self._objective != "cosine" and not self._noisy:
            return coefficients.squared(self._gap(observed, None), size, relative)
        sums = [layer.products(observed) for layer in self.layers]
        dot = torch.stack([first for first, _ in sums]).sum(0)
        own = torch.stack([second for _, second in sums]).sum(0)
        factor = torch.ones_like(own) if self._clip is None else coefficients.factor(own, self._clip)
        if self._objective == "cosine":
            found = coefficients.cosine(factor * dot, factor.square() * own, size)
        elif self._noisy:
            share = factor.double()
            gap = size.double() - 2 * share * dot.double() + share.square() * own.double()
            found = coefficients.squared(gap, size, relative)
        else:
            found = coefficients.squared(self._gap(observed, factor), size, relative)
        return found if self._clip is None else coefficients.through_clip(found, dot, own, self._clip)

    def _gap(self, observed: ObservedUpdates, factor: Tensor | None) -> Tensor:
        return torch.stack([layer.gap(observed, factor).double() for layer in self.layers]).sum(0)


def _square(update: Update) -> Tensor:
    return torch.stack([tensor.flatten(1).square().sum(1) for tensor in update.values()]).sum(0)


def _factorise(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Factors [N, out, rank] and [N, in, rank] of matrices [N, out, in], or None if they have a higher rank.

    By a random projection (Halko, Martinsson, Tropp, arXiv:0909.4061), one victim after the other and in
    float64, so that the factors are as exact as the matrix and do not depend on the other victims.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrices.shape[2], rank, generator=generator, dtype=torch.float64).to(matrices.device)
    tolerance = 32 * torch.finfo(matrices.dtype).eps
    left, right = [], []
    for matrix in matrices:
        exact = matrix.double()
        basis = torch.linalg.qr((exact @ probe).nan_to_num())[0]
        # Once more through the matrix, so that its rounding errors do not tilt the basis.
        basis = torch.linalg.qr((exact @ (exact.T @ basis)).nan_to_num())[0]
        shares = exact.T @ basis
        if not (basis @ shares.T - exact).norm() <= tolerance * exact.norm() and bool(exact.isfinite().all()):
            return None
        left.append(basis.to(matrix.dtype))
        right.append(shares.to(matrix.dtype))
    return torch.stack(left), torch.stack(right)
