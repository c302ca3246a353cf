"""Convolutions, as products of patches and with gradients a victim."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...update import Network, Update
from .layer import Pull, split_tensor
from .product import Product

_VECTOR = 8
"""Input channels below which a convolution is computed as a product of patches: kernels work on vectors of channels."""


_CACHE = 2**19
"""Numbers that stay in a core's cache between two passes over them: 2 MiB of float32."""


class Convolution(Product):
    """nn.Conv2d: grouped convolutions with a group a victim; as a product of patches where positions are few."""

    def __init__(self, module: nn.Conv2d, prefix: str, network: Network):
        super().__init__(module, prefix, network)
        self.geometry = (tuple(module.stride), tuple(cast(Any, module.padding)), tuple(module.dilation))
        self.kernel = tuple(module.kernel_size)

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the layer and take notes."""
        weight, bias = self.parameters["weight"], self.parameters.get("bias")
        output = _Convolve.apply(inputs, weight, bias, self.geometry, self._late)
        self.rows = output[:, 0].numel()
        return self.note(inputs, output)

    def forget(self) -> None:
        """Drop the notes of the last pass."""
        super().forget()
        self._patches: Tensor | None = None
        self._late: Late = []
        """V and D whose V^T D is still to be added to what flows into the input."""

    def left(self) -> Tensor:
        """D: the cotangent at every position."""
        rows = self.flowing.flatten(2).transpose(1, 2)
        return rows.reshape(self.victims, self.positions, -1)

    def right(self) -> Tensor:
        """A: the patch of the input at every position."""
        return self._columns().transpose(1, 2).reshape(self.victims, self.positions, -1)

    def flow(self, into_left: Tensor, into_right: Tensor) -> Pull:
        """Positions back to maps, patches back to images."""
        images, outputs = self.cotangent.shape[:2]
        maps = into_left.reshape(images, -1, outputs).transpose(1, 2).reshape(self.cotangent.shape)
        columns = into_right.reshape(images, -1, into_right.shape[-1]).transpose(1, 2)
        folded = _fold(columns, self.inputs.shape, self.kernel, self.geometry)
        return [(self.cotangent, maps), (self.inputs, folded)]

    def compute(self) -> Update:
        """G by one convolution in groups, and the sum of the cotangent for the bias."""
        weight = self.parameters["weight"]
        cotangent = self.flowing
        if self.by_patches:
            each = cotangent.flatten(2) @ self._columns().transpose(1, 2)
            gradient = split_tensor(each, 0, self.victims).sum(1)
        else:
            size = (self.victims * weight.shape[0], *weight.shape[1:])
            inputs = self._group(self.inputs.detach())
            gradient = self._backward(self._group(cotangent), inputs, weight.new_empty(1).expand(size), 1)
        own = {"weight": gradient.view(self.victims, *weight.shape)}
        if "bias" in self.parameters:
            own["bias"] = cotangent.sum((-2, -1)).view(self.victims, -1, weight.shape[0]).sum(1)
        return own

    def vjp(self, towards: Update) -> Pull:
        """V A into the cotangent, V^T D into the input, each one convolution in groups."""
        if self.by_patches:
            return self._vjp_patches(towards)
        weight = towards["weight"].flatten(0, 1).contiguous()
        stride, padding, dilation = self.geometry
        inputs, cotangent = self._group(self.inputs.detach()), self._group(self.flowing)
        bias = towards["bias"].flatten() if "bias" in towards else None
        forward = F.conv2d(inputs, weight, bias, stride, padding, dilation, self.victims)
        backward = self._backward(cotangent, inputs.new_empty(1).expand(inputs.shape), weight, 0)
        return [
            (self.cotangent, self._ungroup(forward, self.cotangent)),
            (self.inputs, self._ungroup(backward, self.inputs)),
        ]

    @property
    def by_patches(self) -> bool:
        """Whether there are too few channels for a convolution in groups to be fast."""
        return self.parameters["weight"].shape[1] < _VECTOR

    def _columns(self) -> Tensor:
        """The patches at every position as columns, [W * B, in, P / B]."""
        if self._patches is None:
            self._patches = _unfold(self.inputs.detach(), self.kernel, self.geometry)
        return self._patches

    def _vjp_patches(self, towards: Update) -> Pull:
        images = len(self.inputs) // self.victims
        weight = towards["weight"].flatten(2).repeat_interleave(images, 0)
        forward = weight @ self._columns()
        if "bias" in towards:
            forward = forward + towards["bias"].repeat_interleave(images, 0)[:, :, None]
        pull = [(self.cotangent, forward.view(self.cotangent.shape))]
        if self.inputs.requires_grad:
            # The reverse pass comes by here with W^T D' for the same input: one product and one fold for both.
            self._late.append((weight, self.flowing))
        return pull

    def _group(self, maps: Tensor) -> Tensor:
        """[W * B, C, H, W] to [B, W * C, H, W]."""
        return split_tensor(maps, 0, self.victims).transpose(0, 1).flatten(1, 2)

    def _ungroup(self, maps: Tensor, like: Tensor) -> Tensor:
        return split_tensor(maps, 1, self.victims).transpose(0, 1).reshape(like.shape)

    def _backward(self, cotangent: Tensor, inputs: Tensor, weight: Tensor, which: int) -> Tensor:
        mask = [which == 0, which == 1, False]
        return _convolution_backward(cotangent, inputs, weight, self.geometry, self.victims, mask)[which]


Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Stride, padding, dilation."""


def _convolution_backward(
    cotangent: Tensor, inputs: Tensor, weight: Tensor, geometry: Geometry, groups: int, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return cast(
        tuple[Tensor, Tensor, Tensor],
        torch.ops.aten.convolution_backward(cotangent, inputs, weight, None, *geometry, False, (0, 0), groups, mask),
    )


def _unfold(maps: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Patches of [B, C, H, W] as columns [B, C * kernel, positions], as `F.unfold` but without its slow copy."""
    stride, padding, dilation = geometry
    patches = F.pad(maps, (padding[1], padding[1], padding[0], padding[0]))
    for axis in (0, 1):
        size = (kernel[axis] - 1) * dilation[axis] + 1
        patches = patches.unfold(2 + axis, size, stride[axis])[..., :: dilation[axis]]
    return patches.permute(0, 1, 4, 5, 2, 3).reshape(len(maps), maps.shape[1] * math.prod(kernel), -1)


def _fold(columns: Tensor, shape: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Sum columns [B, C * kernel, positions] back into maps of `shape`: the transpose of `_unfold`."""
    stride, padding, dilation = geometry
    return F.fold(columns, shape[-2:], kernel, dilation, padding, stride)


def _few(size: int, images: Tensor) -> int:
    """How many images of `size` numbers to take at a time, so that on a CPU they stay in its cache."""
    return max(1, _CACHE // size) if images.device.type == "cpu" else len(images)


def _fold_product(
    weight: Tensor, cotangent: Tensor, shape: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry
) -> Tensor:
    """The derivative of convolutions by their inputs [B, C, H, W], each with its own weight [B, out, C * kernel]."""
    rows = cotangent.flatten(2)
    step = _few(weight.shape[2] * rows.shape[2], rows)
    parts = [
        _fold(few.transpose(1, 2) @ row, shape, kernel, geometry)
        for few, row in zip(weight.split(step), rows.split(step), strict=True)
    ]
    return torch.cat(parts)


Late = list[tuple[Tensor, Tensor]]
"""Weights [B, out, C * kernel] and cotangents [B, out, ...] to be added to a derivative by the input."""


class _Convolve(torch.autograd.Function):
    """A convolution with a constant weight. torch's own computes the weight's gradient in the second derivative."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, late: Late
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry, ctx.late = inputs.shape, geometry, late
        return F.conv2d(inputs, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        into = _ConvolveBack.apply(cotangents[0], weight, ctx.shape, ctx.geometry, ctx.late)
        return into, None, None, None, None


class _ConvolveBack(torch.autograd.Function):
    """The derivative of a convolution by its input, whose own derivative is the convolution again."""

    @staticmethod
    def forward(
        ctx: Any, cotangent: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry, late: Late
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry = geometry
        if weight.shape[1] < _VECTOR:
            every = weight.flatten(1).expand(len(cotangent), -1, -1)
            while late:
                own, cotangents = late.pop()
                every, cotangent = torch.cat([every, own], 1), torch.cat([cotangent, cotangents], 1)
            return _fold_product(every, cotangent, shape, tuple(weight.shape[2:]), geometry)
        inputs = cotangent.new_empty(1).expand(shape)
        return _convolution_backward(cotangent, inputs, weight, geometry, 1, [True, False, False])[0]

    @staticmethod
    def backward(ctx: Any, *into: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        return _Convolve.apply(into[0], weight, None, ctx.geometry, []), None, None, None, None
