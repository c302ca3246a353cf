"""Whether a model can be attacked through its gradient at all: it must be differentiable twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..threat import Setting
from ..update import LocalTraining, Network, by_autograd, local_update, twice_differentiable_kernels
from .comparison import failure

_REMEDY = "replace it by one that is twice differentiable"
_REMEDIES = {
    "Hardsigmoid": "nn.Hardsigmoid by nn.Sigmoid, or by relu6(x + 3) / 6, which is the same function",
}


def twice_differentiable(network: Network, images: Tensor, targets: Tensor) -> str | None:
    """Say in one line why a client's gradient cannot be computed or not be differentiated by its images, or None.

    Args:
        network: the model as the client runs it.
        images: a batch of the size and shape that it will see, [B, C, H, W].
        targets: class probabilities, [B, classes].

    Raises:
        torch.OutOfMemoryError: and what else says that memory is short.
    """
    reason = _failing(network, images, targets)
    if reason is not None:
        return reason
    try:
        inputs = images.detach().requires_grad_()
        update = local_update(network, inputs, targets, LocalTraining(), differentiate=by_autograd)
        loss = torch.stack([tensor.square().sum() for tensor in update.values()]).sum()
        torch.autograd.grad(loss, inputs, allow_unused=True)
    except Exception as error:
        return f"the model is not twice differentiable: {_where(network, images, failure(error))}"
    return None


def not_computable(
    network: Network, shape: tuple[int, int, int], classes: int, setting: Setting, twice: bool
) -> str | None:
    """Say in one line why clients of a setting cannot run a model or, where `twice`, nobody can attack its gradient.

    Tried on a batch of random images of the size of a local step, but no larger than two: no size above behaves
    otherwise in normalisation.

    Args:
        network: the model as the client runs it.
        shape: image shape (C, H, W).
        classes: number of classes.
        setting: how the client trains.
        twice: whether its gradient must be differentiable.
    """
    stream = torch.Generator().manual_seed(0)
    size = min(setting.local_batch_size or setting.batch_size, 2)
    like = next(iter(network.parameters.values()))
    images = torch.rand(size, *shape, generator=stream).to(like)
    targets = torch.full((size, classes), 1 / classes).to(like)
    return twice_differentiable(network, images, targets) if twice else _failing(network, images, targets)


def _failing(network: Network, images: Tensor, targets: Tensor) -> str | None:
    try:
        with torch.no_grad():
            network.loss(images, targets)
    except Exception as error:  # a model may raise anything
        return f"the model cannot compute a batch of {len(images)} ({failure(error)})"
    return None


def _where(network: Network, images: Tensor, said: str) -> str:
    """Name the innermost module that has no second derivative by itself, or what torch said."""
    calls: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls.append((name, module, inputs, named))

        return hook

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in network.module.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            network.logits(images)
    finally:
        for handle in handles:
            handle.remove()
    for name, module, inputs, named in sorted(calls, key=lambda call: -call[0].count(".")):
        reason = _second(module, inputs, named)
        if reason is not None:
            kind = type(module).__name__
            return f"{name} ({kind}) is not ({reason}); {_REMEDIES.get(kind, _REMEDY)}"
    return f"{said}; {_REMEDY}"


def _second(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> str | None:
    """Differentiate one module twice, by its inputs; return what was raised."""

    def leaf(value: Any) -> Any:
        moving = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().clone().requires_grad_() if moving else value

    inputs, named = tree_map(leaf, (inputs, named))
    leaves = [value for value in tree_leaves((inputs, named)) if isinstance(value, Tensor) and value.requires_grad]
    if not leaves:
        return None
    try:
        with twice_differentiable_kernels(module, leaves[0]):
            # Squares of activations that may work in place are taken of a copy.
            output = module(*tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs), **named)
        total = torch.stack([part.square().sum() for part in tree_leaves(output) if _moves(part)]).sum()
        first = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        again = [slope.square().sum() for slope in first if slope.requires_grad]
        if again:
            torch.autograd.grad(torch.stack(again).sum(), leaves, allow_unused=True)
    except Exception as error:
        return failure(error)
    return None


def _moves(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
