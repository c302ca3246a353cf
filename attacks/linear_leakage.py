"""Linear leakage: the input of a biased linear layer in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.attack import Attack, Reconstruction
from gradleak.defense import Defense
from gradleak.model import Normalise
from gradleak.seeds import Generators
from gradleak.threat import Observation, Setting
from gradleak.update import Network


@dataclass(frozen=True, kw_only=True)
class LinearLeakage(Attack):
    """Divides the first layer's weight gradient by its bias gradient: exact for a batch of one.

    Row j of dL/dW is a mean of the inputs weighted by dL/db_j. One image: least squares over all rows,
    x = dW^T db / |db|^2, the best estimate under white noise on dW. More images: every row is a candidate
    mean, rows inside [0, 1] that recur most (an image that alone activates several neurons) come first.
    References: Phong et al., 2018; Geiping et al., arXiv:2003.14053, proposition 3.1.
    """

    family = "analytic"
    reference = "arXiv:2003.14053"

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs a linear layer with bias right on the pixels."""
        if _first_layer(module) is None:
            return "needs a model whose first layer is linear with a bias (linear, mlp)"
        return None

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Return the ratios of weight and bias gradients as images."""
        name = _first_layer(observation.network.module)
        assert name is not None
        weight, bias = observation.gradient[f"{name}.weight"], observation.gradient[f"{name}.bias"]
        if observation.batch_size == 1:
            energy = bias.square().sum(1, keepdim=True)
            inputs = (torch.einsum("nop,no->np", weight, bias) / energy)[:, None]
        else:
            inputs = _recurring_rows(weight, bias, observation)
        images = _to_pixels(inputs, observation)
        return Reconstruction(images=images.nan_to_num(0.5).clamp(0, 1), labels=observation.labels)


def _first_layer(module: nn.Module) -> str | None:
    """Name of the first layer with parameters, if it is a biased linear one."""
    for name, layer in module.named_modules():
        if any(True for _ in layer.parameters(recurse=False)):
            return name if isinstance(layer, nn.Linear) and layer.bias is not None else None
    return None


def _recurring_rows(weight: Tensor, bias: Tensor, observation: Observation) -> Tensor:
    """Pick B distinct rows a victim, those first whose ratio recurs in most other rows, [N, B, pixels]."""
    ratios = (weight / bias[..., None]).nan_to_num(posinf=1e6, neginf=-1e6)
    boxed = _to_pixels(ratios, observation).flatten(2)
    outside = (boxed - boxed.clamp(0, 1)).abs().amax(-1)
    apart = torch.cdist(boxed, boxed) / boxed.shape[-1] ** 0.5
    same = apart < 1e-3
    votes = same.sum(-1).to(ratios.dtype) - 1e3 * (outside > 1e-3) - 1e6 * (bias == 0)
    picked = []
    for _ in range(observation.batch_size):
        # Ties go to the row of the largest bias gradient, which rounding hurts least.
        best = (votes + bias.abs() / (bias.abs().amax(1, keepdim=True) + 1e-30) * 0.5).argmax(1)
        picked.append(best)
        twins = same[torch.arange(len(best), device=best.device), best]
        votes = votes - 1e9 * twins
    rows = torch.stack(picked, dim=1)
    return ratios.gather(1, rows[..., None].expand(-1, -1, ratios.shape[-1]))


def _to_pixels(inputs: Tensor, observation: Observation) -> Tensor:
    """Undo the model's normalisation, [..., pixels] to [..., C, H, W]."""
    images = inputs.unflatten(-1, observation.shape)
    return _denormalise(images, observation.network)


def _denormalise(images: Tensor, network: Network) -> Tensor:
    for layer in network.module.modules():
        if isinstance(layer, Normalise):
            return images * layer.std + layer.mean
    return images
