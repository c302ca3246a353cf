"""An update as people hold it (a list of gradients, `param.grad`, a state dict) made one that attacks understand.

What is wrong with it is told apart in one line: another client's names, a missing victim axis, weights in place of
their change, a weight difference in place of a gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from . import structure
from .client import PLAIN, Client
from .errors import GradleakError
from .update import LocalTraining, Network, Update

_FEW = 4
"""Names that an error shows."""


def network_of(model: object, shape: Sequence[int], mode: str | None = None, client: Client = PLAIN) -> Network:
    """Return a model as its clients run it.

    Args:
        model: an `nn.Module` that maps images [B, C, H, W] in [0, 1] to logits [B, classes], or a `Network`.
        shape: of an image, (C, H, W).
        mode: train or eval; by default the mode that the module is in.
        client: whose loss and arithmetic it has.

    Raises:
        GradleakError: it is neither, or cannot take such images.
    """
    if isinstance(model, Network):
        network = model
    elif isinstance(model, nn.Module):
        network = Network.of(model, mode or ("train" if model.training else "eval"), client)
    else:
        hint = "; call it to get one" if isinstance(model, type) else ""
        raise GradleakError(f"model: {type(model).__name__} (allowed: torch.nn.Module, gradleak.update.Network){hint}")
    if len(shape) != 3 or not all(isinstance(size, Integral) and size > 0 for size in shape):
        raise GradleakError(f"shape: {shape!r} (allowed: channels, height and width of one image, such as (3, 32, 32))")
    channels, height, width = map(int, shape)
    try:
        structure.of(network.module, (channels, height, width))
    except GradleakError as error:
        swapped = width in (1, 3) and channels not in (1, 3)
        hint = "; channels come first: (C, H, W)" if swapped else ""
        raise GradleakError(f"shape {(channels, height, width)}: {error}{hint}") from error
    structure.mark(network.module, (channels, height, width))
    return network


def stacked(update: object, network: Network) -> Update:
    """Return an update with a row a victim, in the model's precision, [N, ...].

    Args:
        update: tensors by parameter name, or in the order of `model.parameters()`: of one client, each in the shape of
            its parameter, or of N clients, with an axis in front. Buffers and frozen parameters are left out.
        network: whose update it is.

    Raises:
        GradleakError: it is none of this network, or not finite, or zero.
    """
    found = _named(update, network)
    hint = "" if isinstance(update, Mapping) else "; a list has to be in the order of model.parameters()"
    rows = {name: _rows(name, found[name], tensor, hint) for name, tensor in network.parameters.items()}
    counts = {name: len(tensor) for name, tensor in rows.items()}
    if len(set(counts.values())) > 1:
        pair = list({count: name for name, count in counts.items()}.items())[:2]
        told = " and ".join(f"{count} for {name!r}" for count, name in pair)
        raise GradleakError(f"update: as many rows as victims are needed in every tensor, found {told}")
    like = next(iter(network.parameters.values()))
    rows = {name: tensor.detach().to(like) for name, tensor in rows.items()}
    for name, tensor in rows.items():
        if not tensor.isfinite().all():
            raise GradleakError(f"update: {name!r} holds NaN or infinity; nothing can be matched with it")
    if not any(tensor.any() for tensor in rows.values()):
        raise GradleakError("update: every number is zero (was it captured after zero_grad()?)")
    _refuse_weights(rows, network)
    return rows


def _named(update: object, network: Network) -> Mapping[str, Tensor]:
    wanted = list(network.parameters)
    if isinstance(update, Tensor | nn.Module) or not isinstance(update, Mapping | Sequence):
        hint = "; pass {name: parameter.grad for …}" if isinstance(update, nn.Module) else ""
        raise GradleakError(f"update: {type(update).__name__} (allowed: tensors by parameter name, or a list){hint}")
    if not isinstance(update, Mapping):
        if len(update) != len(wanted):
            raise GradleakError(f"update: {len(update)} tensors; the model trains {len(wanted)} ({_some(wanted)})")
        update = dict(zip(wanted, update, strict=True))
    constant = {*network.buffers, *(name for name, _ in network.module.named_buffers())}
    # A network in train mode has forgotten what batch normalisation counts, which a state dict still has.
    counted = ("running_mean", "running_var", "num_batches_tracked")
    strange = [
        str(name)
        for name in update
        if name not in constant and name not in wanted and str(name).rpartition(".")[2] not in counted
    ]
    lacking = [name for name in wanted if name not in update]
    if len(lacking) == len(wanted):
        raise GradleakError(
            f"update: no name is one of the model's: found {_some(strange)}, the model trains {_some(wanted)}; a list "
            "in the order of model.parameters() will do too"
        )
    if strange:
        raise GradleakError(f"update: {_some(strange)} is not a parameter of the model (allowed: {_some(wanted)})")
    if lacking:
        raise GradleakError(
            f"update: {_some(lacking)} is missing; if clients do not train it, say so by requires_grad_(False)"
        )
    return update


def _rows(name: str, given: Any, parameter: Tensor, hint: str) -> Tensor:
    if given is None:
        raise GradleakError(f"update: {name!r} is None; backward() has not reached it (or gradients were cleared)")
    tensor = given if isinstance(given, Tensor) else torch.as_tensor(given)
    if not tensor.is_floating_point():
        raise GradleakError(f"update: {name!r} is of {tensor.dtype}; floating-point numbers are needed")
    if tensor.is_meta:
        raise GradleakError(f"update: {name!r} is on the device meta, which holds no numbers (allowed: cpu, cuda)")
    if tensor.shape == parameter.shape:
        return tensor[None]
    if tensor.shape[1:] == parameter.shape and tensor.ndim == parameter.ndim + 1:
        return tensor
    allowed = f"{list(parameter.shape)}, or {['N', *parameter.shape]} of N victims"
    raise GradleakError(
        f"update: {name!r} has shape {list(tensor.shape)} (allowed: {allowed}){hint}".replace("'N'", "N")
    )


def _refuse_weights(rows: Update, network: Network) -> None:
    """Refuse the weights after training: their change is what was sent."""
    own = torch.cat([tensor.flatten() for tensor in network.parameters.values()]).double()
    given = torch.cat([tensor[0].flatten() for tensor in rows.values()]).double()
    if (given - own).norm() < 0.5 * own.norm() and given @ own > 0.8 * given.norm() * own.norm():
        raise GradleakError(
            "update: these are nearly the model's own weights; give their change (weights after training minus before)"
        )


def training_of(
    local: LocalTraining | None, weight_difference: bool | None, client: Client
) -> tuple[LocalTraining, bool]:
    """Return how a client trained, as far as it is known, and whether its update is a weight difference.

    Raises:
        GradleakError: local steps without their rate.
    """
    if local is not None and local.lr is None and (local.steps > 1 or weight_difference):
        raise GradleakError(
            "local: steps need their rate, as in LocalTraining(steps=4, lr=0.01); leave `local` out if it is unknown"
        )
    training = dataclasses.replace(local or LocalTraining(), client=client)
    return training, training.lr is not None if weight_difference is None else weight_difference


def refuse_misfits(update: Update, network: Network) -> None:
    """Refuse an update that is not one of the network's parameters, in its precision, with a row a victim.

    Raises:
        GradleakError: it is not; the line says how it differs.
    """
    if update.keys() != network.parameters.keys():
        _named(update, network)
        raise GradleakError(f"update: {_some(list(update))} is not what the model trains")
    for name, parameter in network.parameters.items():
        tensor = update[name]
        if tensor.ndim == parameter.ndim:
            raise GradleakError(
                f"update: {name!r} of shape {list(tensor.shape)} lacks the axis of victims; write tensor[None], or "
                "build it by Observation.of(model, update, …)"
            )
        if tensor.dtype != parameter.dtype:
            raise GradleakError(f"update: {name!r} is of {tensor.dtype}, the model of {parameter.dtype}")


def refuse_labels(labels: object, victims: int, batch_size: int) -> None:
    """Refuse labels that are no int64 tensor [N, B].

    Raises:
        GradleakError: they are not.
    """
    found = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
    if found != [victims, batch_size]:
        raise GradleakError(f"labels: {found} (allowed: a tensor [{victims}, {batch_size}], a row a victim)")


def refuse_other_kind(update: Update, network: Network, batch_size: int, difference: bool) -> None:
    """Refuse a weight difference given as a gradient, and the other way round.

    Of hard labels under cross-entropy, the gradient of the last layer's bias sums to zero and is negative for classes
    in the batch only. So where it does sum to zero, more negative entries than images are no gradient of them.

    Args:
        update: with a row a victim, [N, ...].
        network: whose update it is.
        batch_size: images of a victim.
        difference: whether it was given as a weight difference.

    Raises:
        GradleakError: it shows the other sign.
    """
    bias = structure.of(network.module).head.bias
    if bias is None or bias not in update:
        return
    uphill = (-update[bias] if difference else update[bias]).double()
    clean = uphill.sum(1).abs() < 1e-3 * uphill.abs().sum(1)
    negative = (uphill < 0).sum(1)
    turned = clean & (negative > batch_size)
    if not turned.any():
        return
    count, classes = int(negative[turned][0]), uphill.shape[1]
    if difference:
        told, remedy = (
            "a weight difference",
            "leave out `local`, or say weight_difference=True if it is one all the same",
        )
    else:
        told, remedy = "a gradient", "say weight_difference=True, or False if it is a gradient all the same"
    raise GradleakError(
        f"update: {bias!r} has the wrong sign for {told} of {batch_size} image{'s' * (batch_size > 1)}: {count} of its "
        f"{classes} entries, at most {batch_size} expected; {remedy}, or give the right batch_size"
    )


def known_labels(labels: object, update: Update, network: Network, batch_size: int) -> Tensor:
    """Return labels as a row a victim [N, B], beside the update.

    Raises:
        GradleakError: as `label_rows`.
    """
    like = next(iter(update.values()))
    return label_rows(labels, len(like), batch_size, structure.of(network.module).classes).to(like.device)


def label_rows(labels: object, victims: int, batch_size: int, classes: int) -> Tensor:
    """Return labels as [N, B] int64.

    Args:
        labels: a number, a list or a tensor of one victim's labels [B], or of all, [N, B].
        victims: N.
        batch_size: B.
        classes: how many there are.

    Raises:
        GradleakError: they are not as many, or no classes.
    """
    try:
        rows = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise GradleakError(f"labels: {labels!r} (allowed: numbers of classes, [{victims}, {batch_size}])") from error
    if rows.numel() == victims * batch_size * classes and rows.shape[-1] == classes > 1:
        raise GradleakError(f"labels: {list(rows.shape)} looks one-hot; give the numbers of classes, labels.argmax(-1)")
    if rows.is_floating_point() or rows.dtype is torch.bool:
        raise GradleakError(f"labels: of {rows.dtype} (allowed: int64, the numbers of classes)")
    if rows.numel() != victims * batch_size:
        raise GradleakError(f"labels: {list(rows.shape)} (allowed: [{victims}, {batch_size}], one an image)")
    rows = rows.long().reshape(victims, batch_size)
    if rows.numel() and (rows.min() < 0 or rows.max() >= classes):
        raise GradleakError(f"labels: {rows.tolist()} (allowed: 0 to {classes - 1})")
    return rows


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_FEW])
    return f"{shown}, … ({len(names)})" if len(names) > _FEW else shown
