"""Cocktail party attack: the gradient's rows mix the images, and independent component analysis separates them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from gradleak.attack import Attack, Reconstruction
from gradleak.defense import Defense
from gradleak.engine.restarts import Restarts, least
from gradleak.seeds import Generators
from gradleak.structure import OnPixels
from gradleak.threat import Observation, Setting

from ._first_layer import first_linear, gradients, to_inputs, to_pixels

_GAUSSIAN = 0.374567207491438  # mean of log cosh of a standard normal variable


@dataclass(frozen=True, kw_only=True)
class CocktailParty(Attack):
    """Whitens the rows of dL/dW = D^T X to B components and turns them until they are least Gaussian.

    References: Kariyappa et al., ICML 2023, arXiv:2209.05578. Their objective, the negentropy of log cosh of
    decorrelated components, is maximised by the fixed point of FastICA (Hyvärinen, 1999) instead of 25000 steps of
    Adam. Deviations: in the place of their total variation, `signals` are the differences between neighbouring
    pixels, a linear map that leaves the mixture as it is and makes images sparse. Sign and scale come from
    dL/db = D^T 1 where the layer has a bias; else a component fills [0, 1], with its skew positive. The order is
    arbitrary. The loss is minus the mean negentropy of the returned images, which also picks the restart.
    """

    family = "analytic"
    reference = "arXiv:2209.05578"
    ensembles = ("auto-v2",)

    iterations: Annotated[int, Ge(1)] = 200
    """Steps of the fixed point."""
    restarts: Annotated[int, Ge(1)] = 4
    """Random turns to start from."""
    signals: Literal["differences", "pixels"] = "differences"
    """What must be independent."""

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs a linear layer on the pixels with no fewer outputs than there are images."""
        layer = first_linear(module, bias=False)
        if layer is None or layer.weight is None:
            return "needs a model whose first layer is linear (linear, mlp), and is trained"
        width = module.get_parameter(layer.weight).shape[0]
        if setting.batch_size > width:
            return f"needs no more images than neurons: {width} neurons face a batch of {setting.batch_size}"
        return None

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Separate the mixtures and scale them to images."""
        layer, size = _layer(observation), observation.batch_size
        weight, bias = gradients(observation, layer)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, mixtures = left[..., :size], values[:, :size, None] * right[:, :size]
        signals = self._signals(layer.arranged(mixtures, observation.shape))
        white, whitening = _white(signals)
        answers = []
        for stream in Restarts(generator, self.restarts).streams:
            turn = _orthonormal(stream.normal(size, size).double())
            for _ in range(self.iterations):
                sources = turn @ white
                slope = sources.tanh()
                turn = _orthonormal(slope @ white.mT / white.shape[2] - (1 - slope.square()).mean(2, True) * turn)
            unmixing = turn @ whitening
            inputs = _scaled(unmixing, mixtures, left, bias)
            images = (
                to_pixels(inputs, layer, observation)
                if bias.any()
                else _filled(unmixing @ mixtures, layer, observation)
            )
            images = images.nan_to_num(0.5).clamp(0, 1)
            answers.append((images, -self._negentropy(images, observation)))
        images, loss = (torch.stack(parts) for parts in zip(*answers, strict=True))
        best = least(loss)
        victim = torch.arange(observation.victims, device=observation.device)
        spent = torch.full_like(best, self.iterations * self.restarts)
        return Reconstruction(
            images=images[best, victim],
            loss=loss[best, victim].to(observation.dtype),
            iterations=spent,
            candidates=images.transpose(0, 1) if self.restarts > 1 else None,
        )

    def loss(
        self, observation: Observation, images: Tensor, targets: Tensor, buffers: dict[str, Tensor]
    ) -> Tensor | None:
        """Minus the mean negentropy [N] of given images."""
        return -self._negentropy(images, observation).to(observation.dtype)

    def _signals(self, images: Tensor) -> Tensor:
        """What is taken for independent, [N, B, signals] of zero mean, from images [N, B, C, H, W]."""
        if self.signals == "pixels":
            flat = images.flatten(2)
        else:
            flat = torch.cat([images.diff(dim=-1).flatten(2), images.diff(dim=-2).flatten(2)], dim=2)
        return flat - flat.mean(2, keepdim=True)

    def _negentropy(self, images: Tensor, observation: Observation) -> Tensor:
        layer = _layer(observation)
        signals = self._signals(layer.arranged(to_inputs(images, layer), observation.shape))
        unit = signals / (signals.std(2, keepdim=True) + 1e-12)
        # log cosh u = |u| + log(1 + e^(-2 |u|)) - log 2, which does not overflow.
        smooth = unit.abs() + torch.log1p((-2 * unit.abs()).exp()) - math.log(2)
        return (smooth.mean(2) - _GAUSSIAN).square().mean(1)


def _layer(observation: Observation) -> OnPixels:
    layer = first_linear(observation.network.module, bias=False)
    assert layer is not None
    return layer


def _white(signals: Tensor) -> tuple[Tensor, Tensor]:
    """Uncorrelated signals of unit variance [N, B, S] and the matrix [N, B, B] that makes them."""
    variance, axes = torch.linalg.eigh(signals @ signals.mT / signals.shape[2])
    # Images that are alike leave directions without variance: they stay finite and are no image.
    whitening = axes.mT / variance.clamp(min=1e-24 * variance[:, -1:] + 1e-300).sqrt()[..., None]
    return whitening @ signals, whitening


def _orthonormal(matrix: Tensor) -> Tensor:
    """Nearest matrix with orthonormal rows, [N, B, B]."""
    left, _, right = torch.linalg.svd(matrix)
    nearest: Tensor = left @ right
    return nearest


def _scaled(unmixing: Tensor, mixtures: Tensor, left: Tensor, bias: Tensor) -> Tensor:
    """Scale and sign of the components [N, B, P] by which their weights sum to the bias gradient."""
    # X = diag(1/d) V R and D^T = U V^-1 diag(d), with D^T 1 = dL/db: d = V U^T dL/db.
    scale = unmixing @ torch.einsum("nob,no->nb", left, bias)[..., None]
    return unmixing @ mixtures / scale


def _filled(components: Tensor, layer: OnPixels, observation: Observation) -> Tensor:
    """Components [N, B, P] as images that fill [0, 1], their skew made positive."""
    centred = components - components.mean(2, keepdim=True)
    signed = components * torch.where(centred.pow(3).mean(2, keepdim=True) < 0, -1.0, 1.0)
    low, high = signed.amin(2, keepdim=True), signed.amax(2, keepdim=True)
    images: Tensor = layer.arranged((signed - low) / (high - low), observation.shape).to(observation.dtype)
    return images
