"""A first layer whose weight gradient sees whitened inputs, and the way from these back to the inputs."""

from __future__ import annotations

from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import structure
from ..errors import GradleakError
from ..update import copied


class WhitenedLayer(nn.Module):
    """A linear layer or convolution with weight gradient D^T V in the place of D^T X, under the same parameter names.

    D holds the gradients by the layer's outputs, X its inputs, one of b rows a position (for a convolution the patches
    of all images), V = (X X^T / b + damping I)^-1 X.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, damping: float):
        """Take the plain layer."""
        super().__init__()
        self.damping = damping
        self.weight, self.bias = layer.weight, layer.bias
        self.plain = [layer]  # in a list, so that its parameters are not counted twice

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the plain layer does."""
        layer = self.plain[0]
        rows = _patches(inputs, layer) if isinstance(layer, nn.Conv2d) else inputs
        whitened = whiten(rows.reshape(-1, rows.shape[-1]), self.damping).view_as(rows)
        # Only the weight sees the whitened rows; the value is that of the plain layer.
        weight = self.weight.flatten(1)
        outputs = F.linear(whitened, weight, self.bias) + F.linear(rows - whitened, weight.detach())
        if isinstance(layer, nn.Linear):
            return outputs
        height = _positions(inputs.shape[-2], layer)
        return cast(Tensor, outputs.transpose(1, 2).unflatten(2, (height, -1)))


def insert(module: nn.Module, damping: float, where: str) -> nn.Module:
    """Return a copy whose first layer on the pixels is whitened.

    Raises:
        GradleakError: that layer is neither linear nor a plain convolution; the line begins with `where`.
    """
    changed = copied(module)
    found = structure.of(module)
    weighted = (n for n in found.called if [*changed.get_submodule(n).parameters(recurse=False)])
    name = next((layer.name for layer in found.on_pixels), next(weighted, ""))
    layer = changed.get_submodule(name)
    if not name or not found.on_pixels or not _understood(layer):
        raise GradleakError(
            f"{where}: the first layer with weights is {type(layer).__name__}; it must be Linear, or "
            "Conv2d with zero padding and one group, and see the pixels as they are"
        )
    changed.set_submodule(name, WhitenedLayer(layer, damping))
    return changed


def whiten(rows: Tensor, damping: float) -> Tensor:
    """(X X^T / b + damping I)^-1 X of rows X [..., b, n], by the smaller of both Gram matrices."""
    count, width = rows.shape[-2:]
    # X (X^T X / b + damping I)^-1 is the same.
    gram = (rows @ rows.mT if count <= width else rows.mT @ rows) / count
    damped = gram + damping * torch.eye(gram.shape[-1]).to(gram)
    if count <= width:
        return cast(Tensor, torch.linalg.solve(damped, rows))
    return cast(Tensor, torch.linalg.solve(damped, rows.mT)).mT


def restore(whitened: Tensor, damping: float) -> Tensor:
    """Inputs X [..., b, n] of whitened ones, b <= n; exact where no singular value of X is below sqrt(b damping).

    A singular value s becomes t = s / (s^2 / b + damping): t s^2 / b - s + t damping = 0. Two s solve that, their
    product is b damping, and the larger one is taken.
    """
    left, values, right = torch.linalg.svd(whitened, full_matrices=False)
    count = whitened.shape[-2]
    root = (1 - 4 * damping * values.square() / count).clamp(min=0).sqrt()
    # Of nothing nothing is restored.
    safe = torch.where(values > 0, values, 1.0)
    restored = torch.where(values > 0, count * (1 + root) / (2 * safe), 0.0)
    return cast(Tensor, (left * restored.unsqueeze(-2)) @ right)


def _understood(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


def _patches(images: Tensor, layer: nn.Conv2d) -> Tensor:
    """What each position of a convolution sees, [B, positions, C * kernel]."""
    padding = cast(tuple[int, int], layer.padding)
    return F.unfold(images, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)


def _positions(pixels: int, layer: nn.Conv2d) -> int:
    """Rows of a convolution's output for so many rows of pixels."""
    padding = cast(tuple[int, int], layer.padding)
    return (pixels + 2 * padding[0] - layer.dilation[0] * (layer.kernel_size[0] - 1) - 1) // layer.stride[0] + 1
