"""What attacks share that read images from the gradient of a first linear layer on the pixels.

For z = W x + b the batch gradient is dL/dW = D^T X and dL/db = D^T 1, with the images X [B, P] as the model's first
layer sees them (normalised, in its own order) and the loss's derivatives D [B, O] at the layer's outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradleak import structure
from gradleak.structure import OnPixels
from gradleak.threat import Observation


def first_linear(module: nn.Module, bias: bool = True) -> OnPixels | None:
    """First linear layer that sees all pixels of an image at once and whose weight's gradient is sent.

    With `bias` its bias's gradient must be sent too.
    """
    for layer in structure.of(module).on_pixels:
        sent = layer.weight is not None and (layer.bias is not None or not bias)
        if layer.linear and layer.plain and layer.whole and layer.index.ndim == 1 and sent:
            return layer
    return None


def gradients(observation: Observation, layer: OnPixels) -> tuple[Tensor, Tensor]:
    """Gradients of the layer's weight [N, O, P] and bias [N, O] in float64, zeros for a bias that is not there."""
    assert layer.weight is not None
    weight = observation.gradient[layer.weight].double()
    bias = None if layer.bias is None else observation.gradient[layer.bias].double()
    return weight, weight.new_zeros(weight.shape[:2]) if bias is None else bias


def to_pixels(inputs: Tensor, layer: OnPixels, observation: Observation) -> Tensor:
    """Undo normalisation and order: inputs [..., P] to images [..., C, H, W] in the model's own precision."""
    images: Tensor = layer.to_images(inputs, observation.shape).to(observation.dtype)
    return images


def to_inputs(images: Tensor, layer: OnPixels) -> Tensor:
    """Normalise and order images [..., C, H, W] as inputs [..., P] in float64."""
    return layer.to_inputs(images.double())


def noise_floor(weight: Tensor, batch_size: int, dtype: torch.dtype) -> Tensor:
    """Standard deviation [N] of the noise on the entries of dL/dW [N, O, P], whose rank is at most the batch size.

    What singular values beyond the batch size hold, and no less than the rounding of the message (its entries') and
    of the factorisation (its largest singular value's) leave behind.
    """
    values = torch.linalg.svdvals(weight)
    free = (weight.shape[1] - batch_size) * (weight.shape[2] - batch_size)
    beyond = (values[:, batch_size:].square().sum(1) / max(free, 1)).sqrt()
    rounding = torch.finfo(dtype).eps * weight.abs().amax((1, 2)) + torch.finfo(values.dtype).eps * values[:, 0]
    return torch.maximum(beyond, rounding)
