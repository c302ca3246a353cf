"""Statistics of what batch normalisation layers see: the server's running ones, and those of one batch.

Named `<layer>.mean` and `<layer>.var`, each [channels]; the variance is the biased one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import structure
from ..update import Network

Statistics = dict[str, Tensor]


def layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """Batch normalisation layers by name: those that the network calls, where it is known what it takes."""
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    if not found or structure.shape_of(module) is None:
        return found
    called = structure.of(module).called
    return {name: layer for name, layer in found.items() if name in called}


def running(module: nn.Module) -> Statistics:
    """Running statistics that the server sends with its model; empty where it keeps none."""
    found: Statistics = {}
    for name, layer in layers(module).items():
        if layer.running_mean is not None and layer.running_var is not None:
            found[f"{name}.mean"] = layer.running_mean.detach()
            found[f"{name}.var"] = layer.running_var.detach()
    return found


def of_batch(network: Network, images: Tensor, buffers: dict[str, Tensor] | None = None) -> Statistics:
    """Statistics of one batch [B, C, H, W] in [0, 1], differentiable in it and safe under vmap."""
    found: Statistics = {}

    def note(name: str) -> object:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # [B, C, ...] to all values of a channel.
            values = inputs[0].transpose(0, 1).flatten(1)
            found[f"{name}.mean"] = values.mean(1)
            found[f"{name}.var"] = values.var(1, correction=0)

        return hook

    handles = [
        layer.register_forward_pre_hook(note(name))  # type: ignore[arg-type]
        for name, layer in layers(network.module).items()
    ]
    try:
        if handles:
            network.logits(images, buffers=buffers)
    finally:
        for handle in handles:
            handle.remove()
    return found


def distance(guess: Statistics, known: Statistics) -> Tensor:
    """Sum over layers of the distances of mean and variance, relative to the sum of their norms, a scalar.

    Yin et al., CVPR 2021, arXiv:2104.07586, there without the division: 0 for equal ones, 1 for a guess of zeros.
    """
    gaps = torch.stack([_norm(guess[name] - tensor) for name, tensor in known.items()]).sum()
    return gaps / torch.stack([_norm(tensor) for tensor in known.values()]).sum()


def _norm(vector: Tensor) -> Tensor:
    # The root has a slope at zero, too.
    return (vector.square().sum() + 1e-12).sqrt()
