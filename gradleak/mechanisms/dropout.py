"""Dropout with explicit masks: sites that can be put into any model, and the masks to run them with.

A mask is a buffer of its site, so that a client draws it, an oracle is shown it and an attacker searches for
it like anything else that a network is called with (`Network.logits(buffers=...)`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import structure
from ..errors import GradleakError
from ..update import copied

MaskShapes = dict[str, tuple[int, ...]]
"""Shape [B, ...] of every site's mask, by buffer name."""


class MaskedDropout(nn.Module):
    """Multiplies features by `mask / (1 - rate)`: inverted dropout with a given mask (Srivastava et al. 2014).

    The mask is as large as the features [B, ...], so every image has its own. An empty mask, the default, is
    no dropout, as in eval mode.
    """

    mask: Tensor

    def __init__(self, rate: float):
        """Keep the rate, the probability in [0, 1) that a unit is dropped."""
        super().__init__()
        self.rate = rate
        self.register_buffer("mask", torch.empty(0), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Mask features [B, ...]."""
        return features * self.mask / (1 - self.rate) if self.mask.numel() else features


def insert(module: nn.Module, rate: float) -> nn.Module:
    """Return a copy of a model with dropout sites.

    They are where the model calls dropout layers of its own; without any, after every activation it calls. A module
    may name further places with an attribute `dropout_after`: names of modules inside it, "" for itself.

    Raises:
        GradleakError: the model has no such place.
    """
    found = structure.of(module)
    changed = copied(module)
    own = [name for name in found.called if isinstance(changed.get_submodule(name), nn.modules.dropout._DropoutNd)]
    if own:
        for name in _everywhere(changed, own):
            changed.set_submodule(name, MaskedDropout(rate))
    else:
        _follow(changed, [*_everywhere(changed, found.activations), *_asked(changed)], rate)
    if not _sites(changed):
        raise GradleakError("dropout: the model has no hidden activation to put it after; use one with hidden layers")
    return changed


def _everywhere(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Every name of these modules, since one module may stand in several places."""
    wanted = {id(module.get_submodule(name)) for name in names}
    return [name for name, layer in module.named_modules(remove_duplicate=False) if id(layer) in wanted]


def _asked(module: nn.Module) -> list[str]:
    """Places that modules name themselves."""
    return [
        f"{name}.{inner}".strip(".")
        for name, layer in module.named_modules()
        for inner in getattr(layer, "dropout_after", ())
    ]


def _follow(module: nn.Module, names: list[str], rate: float) -> None:
    """Put a site behind each of these modules, in place."""
    # Inner modules first: a wrapped one has another name.
    for name in sorted(filter(None, names), key=lambda name: -name.count(".")):
        layer = module.get_submodule(name)
        if isinstance(layer, nn.Sequential):
            layer.append(MaskedDropout(rate))
        else:
            module.set_submodule(name, nn.Sequential(layer, MaskedDropout(rate)))


def rates(module: nn.Module) -> dict[str, float]:
    """Rate of every site that drops anything, by the name of its mask."""
    return {f"{name}.mask": site.rate for name, site in _sites(module).items() if site.rate > 0}


def mask_shapes(module: nn.Module, images: Tensor) -> MaskShapes:
    """Shape [B, ...] of every mask that a batch of images [B, C, H, W] needs; empty without sites that drop.

    Raises:
        GradleakError: one site is called twice, so that one mask would have to serve two features.
    """
    shapes: MaskShapes = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def record(site: nn.Module, inputs: tuple[Tensor]) -> None:
            if name in shapes:
                raise GradleakError(f"dropout: site {name!r} is called twice; give each call its own activation module")
            shapes[name] = tuple(inputs[0].shape)

        return record

    dropping = {name: site for name, site in _sites(module).items() if site.rate > 0}
    hooks = [site.register_forward_pre_hook(recorder(f"{name}.mask")) for name, site in dropping.items()]
    try:
        if hooks:
            with torch.no_grad():
                module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def bernoulli(uniform: Tensor, rate: float) -> Tensor:
    """Return the mask of uniform numbers in [0, 1): 0 with probability `rate`, else 1."""
    return (uniform >= rate).to(uniform.dtype)


def _sites(module: nn.Module) -> dict[str, MaskedDropout]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, MaskedDropout)}
