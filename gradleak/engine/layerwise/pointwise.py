"""Smooth activations whose second derivative is computed in one pass."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Smooth(ABC):
    """A smooth function of each entry, with its derivatives. torch's own second derivatives take many passes."""

    @staticmethod
    @abstractmethod
    def value(inputs: Tensor) -> Tensor:
        """f(x)."""

    @staticmethod
    @abstractmethod
    def slope(inputs: Tensor, value: Tensor) -> Tensor:
        """f'(x)."""

    @staticmethod
    @abstractmethod
    def bend(inputs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        """f''(x)."""


class _Sigmoid(_Smooth):
    @staticmethod
    def value(inputs: Tensor) -> Tensor:
        return inputs.sigmoid()

    @staticmethod
    def slope(inputs: Tensor, value: Tensor) -> Tensor:
        return value.addcmul(value, value, value=-1)

    @staticmethod
    def bend(inputs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        return slope.addcmul(slope, value, value=-2)


class _Gelu(_Smooth):
    """x times the normal distribution (Hendrycks and Gimpel, arXiv:1606.08415)."""

    @staticmethod
    def value(inputs: Tensor) -> Tensor:
        return F.gelu(inputs)

    @staticmethod
    def slope(inputs: Tensor, value: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(torch.ones_like(inputs), inputs)  # type: ignore[no-any-return]

    @staticmethod
    def bend(inputs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        square = inputs * inputs
        density = (square * -0.5).exp_()
        return square.neg_().add_(2).mul_(density).mul_(1 / math.sqrt(2 * math.pi))


SMOOTH: dict[type[nn.Module], type[_Smooth]] = {nn.Sigmoid: _Sigmoid, nn.GELU: _Gelu}


class Pointwise(torch.autograd.Function):
    """A smooth function whose first derivative is computed once for both passes."""

    @staticmethod
    def forward(ctx: Any, function: type[_Smooth], inputs: Tensor) -> Tensor:
        """Value of the function; slopes are kept."""
        value = function.value(inputs)
        slope = function.slope(inputs, value)
        ctx.save_for_backward(inputs, value, slope)
        ctx.function = function
        return value

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, Tensor]:
        """Cotangent times slope, itself differentiable."""
        return None, _PointwiseBack.apply(ctx.function, cotangents[0], *ctx.saved_tensors)


class _PointwiseBack(torch.autograd.Function):
    """Cotangent times slope, and how that changes with both."""

    @staticmethod
    def forward(
        ctx: Any, function: type[_Smooth], cotangent: Tensor, inputs: Tensor, value: Tensor, slope: Tensor
    ) -> Tensor:
        ctx.save_for_backward(cotangent, inputs, value, slope)
        ctx.function = function
        return cotangent * slope

    @staticmethod
    def backward(ctx: Any, *into: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        cotangent, inputs, value, slope = ctx.saved_tensors
        bend = ctx.function.bend(inputs, value, slope)
        return None, into[0] * slope, bend.mul_(into[0]).mul_(cotangent), None, None
