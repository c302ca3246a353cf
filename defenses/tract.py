"""TrAct: the first layer is updated by what its pre-activations want, not by the gradient."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, TypeGuard, cast

import torch
from annotated_types import Gt
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.defense import Defense
from gradleak.errors import GradleakError


@dataclass(frozen=True, kw_only=True)
class TrAct(Defense):
    """Replaces the first layer's weight gradient D^T X by D^T (X X^T / b + damping I)^-1 X.

    References: Petersen, Borgelt, Ermon, NeurIPS 2024, arXiv:2410.23970. D holds the gradients by the layer's
    pre-activations, X its inputs, one of b rows a position (for a convolution the patches of all images). It is
    an optimiser that has been proposed as a defense: the server prescribes it, so whoever knows it simulates it
    exactly, and for one image in front of a linear layer it merely scales the gradient. Biases are left alone.
    """

    family = "representation"
    reference = "arXiv:2410.23970"

    damping: Annotated[float, Gt(0)] = 0.1
    """Weight of the identity."""

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """Return a copy whose first layer has this weight gradient.

        Raises:
            GradleakError: the first layer with weights is neither linear nor a plain convolution.
        """
        changed = copy.deepcopy(module)
        name, layer = next(
            ((n, m) for n, m in changed.named_modules() if n and [*m.parameters(recurse=False)]), ("", module)
        )
        if not name or not _understood(layer):
            raise GradleakError(
                f"defense 'tract': the first layer with weights is {type(layer).__name__}; it must be Linear, or "
                "Conv2d with zero padding and one group"
            )
        changed.set_submodule(name, _FirstLayer(layer, self.damping))
        return changed


def _understood(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


class _FirstLayer(nn.Module):
    """A linear layer or convolution with TrAct's weight gradient, under the same parameter names."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, damping: float):
        super().__init__()
        self.damping = damping
        self.weight, self.bias = layer.weight, layer.bias
        self.plain = [layer]  # in a list, so that its parameters are not counted twice

    def forward(self, inputs: Tensor) -> Tensor:
        layer = self.plain[0]
        rows = _patches(inputs, layer) if isinstance(layer, nn.Conv2d) else inputs
        whitened = self._whiten(rows.reshape(-1, rows.shape[-1])).view_as(rows)
        # Only the weight sees the whitened rows; the value is that of the plain layer.
        weight = self.weight.flatten(1)
        outputs = F.linear(whitened, weight, self.bias) + F.linear(rows - whitened, weight.detach())
        if isinstance(layer, nn.Linear):
            return outputs
        height = _positions(inputs.shape[-2], layer)
        return cast(Tensor, outputs.transpose(1, 2).unflatten(2, (height, -1)))

    def _whiten(self, rows: Tensor) -> Tensor:
        """(X X^T / b + damping I)^-1 X of rows X [b, n], by the smaller of both Gram matrices."""
        count, width = rows.shape
        # X (X^T X / b + damping I)^-1 is the same.
        gram = (rows @ rows.T if count <= width else rows.T @ rows) / count
        damped = gram + self.damping * torch.eye(len(gram)).to(gram)
        if count <= width:
            return cast(Tensor, torch.linalg.solve(damped, rows))
        return cast(Tensor, torch.linalg.solve(damped, rows.T)).T


def _patches(images: Tensor, layer: nn.Conv2d) -> Tensor:
    """What each position of a convolution sees, [B, positions, C * kernel]."""
    padding = cast(tuple[int, int], layer.padding)
    return F.unfold(images, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)


def _positions(pixels: int, layer: nn.Conv2d) -> int:
    """Rows of a convolution's output for so many rows of pixels."""
    padding = cast(tuple[int, int], layer.padding)
    return (pixels + 2 * padding[0] - layer.dilation[0] * (layer.kernel_size[0] - 1) - 1) // layer.stride[0] + 1
