"""A model as clients run it is a function: equal images, equal logits, and nothing else moves."""

from __future__ import annotations

import torch
from torch import Tensor

from ...update import LocalTraining, Network, Update, local_update, one_hot
from .watch import Call, watch

_APART = 1e-3
"""How far, relative to the largest logit, an example's logits may lie from those it has on its own: rounding."""


def refusal(network: Network, images: Tensor, classes: int, buffers: dict[str, Tensor], step: int) -> str | None:
    """Say why a network is no function of a batch [B, C, H, W] that gives logits [B, classes], or None.

    Args:
        network: as clients run it.
        images: a client's batch.
        classes: number of classes.
        buffers: the randomness that the defense declares, with a row an image.
        step: images in a local step.
    """
    part = {name: tensor[:step] for name, tensor in buffers.items()}
    before = {name: tensor.clone() for name, tensor in _kept(network).items()}
    first, second = Call(), Call()
    for call in (first, second):
        try:
            watch(network, images[:step], part, call)
        except Exception as error:
            if call.erasing is not None:
                return _erases(network, call.erasing, step)
            where = _layer(network, call.unfinished[-1]) if call.unfinished else "the model"
            reason = " ".join(str(error).split())
            return f"{where} cannot take images {list(images[:step].shape)} ({type(error).__name__}: {reason})"
    return (
        _no_logits(first.logits, step, classes)
        or _draws(network, first)
        or _moves(network, before)
        or _differs(network, first, second)
        or (None if first.erasing is None else _erases(network, first.erasing, step))
    )


def ignores_images(network: Network, images: Tensor, others: Tensor, classes: int) -> str | None:
    """Say so if the gradient of a batch is the same, bit by bit, for other images [B, C, H, W] with its labels."""
    targets = one_hot(torch.arange(len(images)) % classes, classes, images.dtype)
    one, other = (local_update(network, batch, targets, LocalTraining()) for batch in (images, others))
    nothing = not any(tensor.any() for tensor in one.values())
    if nothing or torch.equal(images, others) or not _same(one, other):
        return None
    return "its gradient does not depend on the images (allowed: a model that looks at them)"


def mixes_examples(network: Network, images: Tensor, buffers: dict[str, Tensor]) -> str | None:
    """Say so if an example's logits depend on the others of its batch [B, C, H, W]."""
    with torch.no_grad():
        together = network.logits(images, buffers=buffers)
        alone = torch.cat(
            [
                network.logits(images[i : i + 1], buffers={name: rows[i : i + 1] for name, rows in buffers.items()})
                for i in range(len(images))
            ]
        )
    if float((together - alone).abs().max()) <= _APART * max(float(together.abs().max()), 1e-30):
        return None
    return (
        "it mixes the examples of a batch, but the defense clips each example's gradient; "
        "use a model that treats every example by itself, or mode 'eval' if that does"
    )


def _no_logits(logits: object, size: int, classes: int) -> str | None:
    allowed = f"(allowed: a tensor of logits, [{size}, {classes}] here)"
    if not isinstance(logits, Tensor):
        return f"it returns {type(logits).__name__} {allowed}; return the logits alone"
    if logits.shape != (size, classes):
        return f"it returns {list(logits.shape)} for {size} images of {classes} classes {allowed}"
    if not logits.is_floating_point():
        return f"it returns {str(logits.dtype).removeprefix('torch.')} {allowed}"
    return None if logits.isfinite().all() else "its logits are not finite, untrained, on images in [0, 1]"


def _draws(network: Network, call: Call) -> str | None:
    if call.drawing is None:
        return None
    name, whose = call.drawing
    return f"{_layer(network, name)} draws from {' and '.join(whose)}, which nobody can repeat; {_remedy(network)}"


def _moves(network: Network, before: dict[str, Tensor]) -> str | None:
    now = _kept(network)
    moved = [name for name, tensor in before.items() if not _equal(tensor, now[name])]
    if not moved:
        return None
    names = f"{'buffer' if len(moved) == 1 else 'buffers'} {', '.join(map(repr, moved[:3]))}"
    return f"calling it changes its {names}, so that no two calls are alike; {_remedy(network)}"


def _differs(network: Network, first: Call, second: Call) -> str | None:
    again = f"when called again on the same images; {_remedy(network)}"
    for (name, one), (_, other) in zip(first.outputs, second.outputs, strict=False):
        if len(one) != len(other) or not all(map(_equal, one, other)):
            return f"{_layer(network, name)} returns something else {again}"
    same = isinstance(second.logits, Tensor) and _equal(first.logits, second.logits)
    return None if same else f"it returns other logits {again}"


def _erases(network: Network, name: str, size: int) -> str:
    return (
        f"{_layer(network, name)} normalises over one value, which erases it, for {size} "
        f"{'image' if size == 1 else 'images'} a step (allowed: two values or more; larger batches or groups, "
        "or batch normalisation in mode 'eval')"
    )


def _remedy(network: Network) -> str:
    if network.module.training:
        return "use mode 'eval', or the defense 'dropout', whose masks are declared"
    return "leave it out, or declare it as buffers of a defense (`private_buffers`)"


def _layer(network: Network, name: str) -> str:
    kind = type(network.module.get_submodule(name)).__name__
    return f"its layer {name!r} ({kind})" if name else f"its outermost module ({kind})"


def _kept(network: Network) -> Update:
    """All tensors that outlive a call."""
    own = {**dict(network.module.named_buffers()), **dict(network.module.named_parameters())}
    return {**own, **network.buffers, **network.parameters}


def _same(left: Update, right: Update) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left.nan_to_num(), right.nan_to_num())
