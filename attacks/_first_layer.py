"""What attacks share that read images from the gradient of a first linear layer on the pixels.

For z = W x + b the batch gradient is dL/dW = D^T X and dL/db = D^T 1, with the images X [B, P] as the model's first
layer sees them (normalised, flattened) and the loss's derivatives D [B, O] at the layer's outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradleak.mechanisms.quantum import AngleEncoded
from gradleak.model import Normalise
from gradleak.threat import Observation


def first_linear(module: nn.Module, bias: bool = True) -> str | None:
    """Name of the first layer with parameters if it is linear on pixels, and biased where `bias` asks for it."""
    if any(isinstance(layer, AngleEncoded) for layer in module.modules()):
        return None
    for name, layer in module.named_modules():
        if any(True for _ in layer.parameters(recurse=False)):
            return name if isinstance(layer, nn.Linear) and (layer.bias is not None or not bias) else None
    return None


def gradients(observation: Observation, name: str) -> tuple[Tensor, Tensor]:
    """Gradients of the layer's weight [N, O, P] and bias [N, O] in float64, zeros for a bias that is not there."""
    weight = observation.gradient[f"{name}.weight"].double()
    bias = observation.gradient.get(f"{name}.bias")
    return weight, weight.new_zeros(weight.shape[:2]) if bias is None else bias.double()


def to_pixels(inputs: Tensor, observation: Observation) -> Tensor:
    """Undo normalisation and flattening: inputs [..., P] to images [..., C, H, W] in the model's own precision."""
    mean, std = normalisation(observation.network.module)
    images: Tensor = (inputs.unflatten(-1, observation.shape) * std + mean).to(observation.dtype)
    return images


def to_inputs(images: Tensor, observation: Observation) -> Tensor:
    """Normalise and flatten images [..., C, H, W] to inputs [..., P] in float64."""
    mean, std = normalisation(observation.network.module)
    return ((images.double() - mean) / std).flatten(-3)


def normalisation(module: nn.Module) -> tuple[Tensor | float, Tensor | float]:
    """Mean and standard deviation of the model's own normalisation, 0 and 1 without one."""
    for layer in module.modules():
        if isinstance(layer, Normalise):
            return layer.mean.double(), layer.std.double()
    return 0.0, 1.0


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
