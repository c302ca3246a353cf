"""What a network must be like for its trials to be told apart in one flat batch, and how that is found out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.utils import parametrize

from ...update import Network, Update, copied, twice_differentiable_kernels
from .layer import Layer, NotUnderstoodError, split_tensor

_FAR = 1e4
"""How far the probe's neighbours are from images: no threshold of a model is out of their reach."""
_TOLERANCE = 1e-3
"""Relative difference that float32 may leave between a victim alone and among neighbours; a layer that mixes them makes
far more, as these are `_FAR` away."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def unusual(module: nn.Module) -> None:
    """Refuse modules whose call is more than their type's forward pass.

    Raises:
        NotUnderstoodError: one has hooks, reparametrised weights or a forward pass of its own.
    """
    for part in module.modules():
        name = type(part).__name__
        if any(getattr(part, hooks) for hooks in _HOOKS):
            raise NotUnderstoodError(f"{name} has hooks")
        if parametrize.is_parametrized(part):
            raise NotUnderstoodError(f"{name} has reparametrised weights")
        if "forward" in vars(part):
            raise NotUnderstoodError(f"{name} has a forward pass that is not its type's")


def private_copy(module: nn.Module) -> nn.Module:
    """Copy a module, but not its parameters and buffers, and let torch's activations not work in place."""
    memo = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    module = copied(module, memo)
    for part in module.modules():
        if getattr(part, "inplace", False) is True and type(part).__module__.startswith("torch.nn.modules."):
            part.inplace = False  # type: ignore[assignment]
    return module


class Hidden(Network):
    """A private copy of a model, called directly: its layers hold their parameters, and others read what shows."""

    @classmethod
    def of_copy(cls, module: nn.Module, shown: Update, network: Network) -> Hidden:
        """Let a private copy of a network's module show other parameters, and hold the network's buffers."""
        for name, tensor in {**network.buffers, **shown}.items():
            owner, _, leaf = name.rpartition(".")
            part = module.get_submodule(owner)
            if leaf in part._parameters:
                part._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            elif leaf in part._buffers:
                part._buffers[leaf] = tensor
        return cls(module, shown, network.buffers)

    def logits(
        self, images: Tensor, parameters: Update | None = None, buffers: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Class scores [B, classes] of images [B, C, H, W]."""
        assert parameters is None and buffers is None
        with twice_differentiable_kernels(self.module, images):
            return cast(Tensor, self.module(images))


def run(network: Network, layers: Sequence[Layer], images: Tensor) -> Tensor:
    """Run victims' images [W, B, ...] as one flat batch; the layers take notes. Scores [W * B, classes].

    Raises:
        NotUnderstoodError: a layer is not called, or not as one is that sees a batch.
    """
    for layer in layers:
        layer.forget()
        layer.victims = len(images)
    scores = network.logits(images.flatten(0, 1))
    for layer in layers:
        if layer.parameters and not layer.wanted:
            raise NotUnderstoodError(f"{type(layer.module).__name__} is never called")
    return scores


def probe(network: Network, flat: Network, layers: Sequence[Layer], images: Tensor) -> None:
    """Let one victim [B, C, H, W] stand among strange neighbours, and look whether it notices.

    Args:
        network: the model.
        flat: the same, with layers that tell victims apart.
        layers: these layers.
        images: the victim.

    Raises:
        NotUnderstoodError: the network's answer for the victim, or what a layer sees of it, depends on the others.
        RuntimeError: in torch's words, where the network decides by its data what it computes.
    """
    # Stacked, every victim decides for itself; torch refuses what would have to be decided for all.
    vmap(network.logits)(torch.stack([images, images.flip(-1)]))
    alone = network.logits(images)
    if not bool(alone.isfinite().all()):
        return
    crowd = torch.stack([images, torch.full_like(images, math.nan), _FAR * (1 + images), -_FAR * (1 + images)])
    scores = split_tensor(run(flat, layers, crowd), 0, len(crowd))[0]
    for layer in layers:
        for each in layer.activations:
            if bool(split_tensor(each, 0, len(crowd))[0].isnan().any()):
                raise NotUnderstoodError(
                    f"{type(layer.module).__name__} sees several victims at once, or its weights are read by others"
                )
        layer.forget()
    if not bool((scores - alone).norm() <= _TOLERANCE * alone.norm()):
        raise NotUnderstoodError("the model mixes the images of a batch, or its layers are used in an unusual way")
