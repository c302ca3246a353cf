"""One call of a network, watched module by module: what each returns, and whether it draws random numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves

from ...state import random_states
from ...update import Network


@dataclass
class Call:
    """What happened in one call of a network."""

    logits: Any = None
    """What the network returned."""
    outputs: list[tuple[str, list[Tensor]]] = field(default_factory=list)
    """Name of a module and the tensors it returned, in the order in which the modules finished."""
    drawing: tuple[str, list[str]] | None = None
    """The first module that moved global generators, innermost first, and whose."""
    erasing: str | None = None
    """The first normalisation that takes its statistics of one value."""
    unfinished: list[str] = field(default_factory=list)
    """Modules that were entered and not left, outermost first: where an error came from."""


def watch(network: Network, images: Tensor, buffers: dict[str, Tensor] | None, call: Call) -> None:
    """Call a network on images [B, C, H, W] and note in `call` what its modules do."""
    states: list[dict[str, object]] = []
    names = {id(module): name for name, module in network.module.named_modules()}

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        name = names[id(module)]
        call.unfinished.append(name)
        states.append(random_states())
        if call.erasing is None and inputs and isinstance(inputs[0], Tensor) and values_of(module, inputs[0]) == 1:
            call.erasing = name

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        name, before, after = names[id(module)], states.pop(), random_states()
        call.unfinished.pop()
        moved = [whose for whose, state in before.items() if after[whose] != state]
        if moved and call.drawing is None:
            call.drawing = (name, moved)
        call.outputs.append((name, [leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]))

    handles = [module.register_forward_pre_hook(enter) for module in network.module.modules()]
    handles += [module.register_forward_hook(leave) for module in network.module.modules()]
    try:
        with torch.no_grad():
            call.logits = network.logits(images, buffers=buffers)
    finally:
        for handle in handles:
            handle.remove()


def values_of(layer: nn.Module, features: Tensor) -> int | None:
    """Return how many values of its input a normalisation layer takes each statistic of; None for what takes none."""
    spatial = features[0, 0].numel() if features.ndim > 1 and len(features) else 1
    if isinstance(layer, _BatchNorm):
        own = layer.training or layer.running_mean is None
        return len(features) * spatial if own else None
    if isinstance(layer, _InstanceNorm):
        own = layer.training or not layer.track_running_stats
        return spatial if own else None
    if isinstance(layer, nn.GroupNorm):
        return features.shape[1] // layer.num_groups * spatial
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return math.prod(layer.normalized_shape)
    return None
