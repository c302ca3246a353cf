"""Matching losses of means of examples' gradients that are clipped one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem import Facts
from . import coefficients
from .anything import Anything
from .layer import Layer, NotUnderstoodError, Pull, dot, on_batch, rows
from .matching import Ghost


class ClippedExamples(Ghost):
    """The update is the sum of c_i G_i, with c_i = min(1, clip / |G_i|) and G_i the share of one image.

    So it is what the layers see if an image's cotangents are multiplied by its c_i; and the norms are what they see if
    every image is a victim.
    """

    def __init__(self, layers: Sequence[Layer], objective: str, clip: float, noise: float, batch: int):
        super().__init__(layers, objective, "message", None, noise)
        if any(isinstance(layer, Anything) or on_batch(layer.module) for layer in layers):
            raise NotUnderstoodError(
                "the gradients of several examples are clipped, and a layer does not tell them apart"
            )
        self._limit, self._batch = clip / batch, batch

    def __call__(self, facts: Facts) -> tuple[Tensor, Pull]:
        """Loss [W], and what flows into the graph."""
        victims = self.layers[0].victims
        self._see(victims * self._batch)
        squares = torch.stack([layer.square() for layer in self.layers]).sum(0)
        factor = coefficients.factor(squares, self._limit)
        self._see(victims, factor)
        loss, pull = super().__call__(facts)
        pull, by_factor = self._weighted(pull, factor)
        self._see(victims * self._batch)
        of_own = 2 * coefficients.factor_slope(squares, factor) * by_factor
        pull += [pair for layer in self.layers for pair in layer.pull_own(of_own)]
        self._see(victims)
        return loss, pull

    def _weighted(self, pull: Pull, factor: Tensor) -> tuple[Pull, Tensor]:
        """What flows through the factors into the cotangents, and the gradient of the loss by the factors."""
        cotangents = {id(layer.cotangent) for layer in self.layers if layer.cotangents}
        weighted, by_factor = [], torch.zeros_like(factor)
        for tensor, flow in pull:
            if id(tensor) in cotangents:
                by_factor += dot(flow, tensor.detach())
                flow = rows(factor, flow) * flow
            weighted.append((tensor, flow))
        return weighted, by_factor

    def _see(self, victims: int, weights: Tensor | None = None) -> None:
        for layer in self.layers:
            layer.see(victims, weights)
