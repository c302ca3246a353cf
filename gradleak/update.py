"""What a client computes from its batch, as a differentiable function of one victim's images.

Shared by the client and by the attacker who simulates it. `differentiate` decides how the inner gradient is
taken: `by_autograd` (plain double backward) or `by_transform` (torch.func, can be stacked with vmap).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from . import structure
from .client import PLAIN, Client, cross_entropy
from .errors import GradleakError

Update = dict[str, Tensor]
"""One tensor a parameter: a gradient (FedSGD) or a weight difference (FedAvg)."""

Loss = Callable[[Update], Tensor]


class Differentiate(Protocol):
    """The gradient of a scalar loss of the parameters, itself differentiable."""

    def __call__(self, loss: Loss, parameters: Update) -> Update: ...  # noqa: D102


def by_transform(loss: Loss, parameters: Update) -> Update:
    """Gradient through torch.func, for stacking with vmap."""
    return cast(Update, grad(loss)(parameters))


def by_autograd(loss: Loss, parameters: Update) -> Update:
    """Gradient through plain reverse mode with a graph, the reference."""
    leaves = {
        name: tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        for name, tensor in parameters.items()
    }
    gradients = torch.autograd.grad(
        loss(leaves), list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, gradients, strict=True))


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """A client's protocol: one gradient (FedSGD, `lr` None) or the weight difference of local steps (FedAvg)."""

    steps: int = 1
    batch_size: int | None = None
    lr: float | None = None
    order: Literal["fixed", "shuffled"] = "fixed"
    """How each pass goes through the client's batch: in its own order, or in one that the client draws every time."""
    client: Client = PLAIN
    """Its optimiser."""

    def batches(self, size: int) -> list[slice]:
        """Slice of the client's batch that each step uses: consecutive slices, starting over at the end.

        Raises:
            GradleakError: `batch_size` does not divide the client's batch.
        """
        width = self.batch_size or size
        if size % width:
            raise GradleakError(f"local_batch_size {width} does not divide the batch of {size} images")
        starts = range(0, size, width)
        return [slice(starts[k % len(starts)], starts[k % len(starts)] + width) for k in range(self.steps)]

    def drawn(self, size: int, generator: torch.Generator) -> Tensor | None:
        """Draw the images [steps, width] that each step uses; None where the order is fixed.

        Raises:
            GradleakError: as `batches`.
        """
        if self.order == "fixed" or self.lr is None:
            return None
        used = self.batches(size)
        passes = -(-self.steps * (used[0].stop - used[0].start) // size)
        order = torch.cat([torch.randperm(size, generator=generator) for _ in range(passes)])
        return order[: self.steps * (used[0].stop - used[0].start)].view(self.steps, -1)


class Extended(nn.Module):
    """A model with a term of its own in the loss (a bottleneck's divergence).

    Called with images [B, C, H, W] alone it returns class scores [B, classes]; called with targets [B, classes]
    too, the scores and the term, a scalar. Only the outermost module of a network is asked.
    """


@dataclass(frozen=True)
class Network:
    """A model as a function: its architecture, and the parameters and buffers to call it with.

    `parameters` are those that clients train and send; what they do not train is constant, with the buffers.
    """

    module: nn.Module
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    client: Client = PLAIN
    """The loss that clients minimise, and their arithmetic."""

    @classmethod
    def of(cls, module: nn.Module, mode: str = "eval", client: Client = PLAIN) -> Network:
        """Freeze a copy of `module`; in train mode its batch normalisation uses the batch and keeps no state.

        Raises:
            GradleakError: train mode with a sampling dropout layer, whose draws nobody could repeat, or no parameter
                that requires a gradient.
        """
        sent = structure.sent_of(module)
        if not sent:
            raise GradleakError("the model has no parameter that is trained (requires_grad), so nothing would be sent")
        module = copied(module).train(mode == "train").requires_grad_(False)
        for name, layer in module.named_modules():
            if isinstance(layer, _BatchNorm) and mode == "train":
                layer.track_running_stats = False
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            if isinstance(layer, nn.modules.dropout._DropoutNd) and mode == "train" and layer.p > 0:
                raise GradleakError(
                    f"model layer {name!r} is {type(layer).__name__}, which draws masks nobody can repeat; "
                    "call model.eval() if it was not active, or use the defense 'dropout'"
                )
        structure.mark_sent(module, sent)
        every = {name: tensor.detach() for name, tensor in module.named_parameters()}
        constants = {name: tensor for name, tensor in every.items() if name not in sent}
        buffers = {name: tensor.detach() for name, tensor in module.named_buffers()}
        return cls(module, {name: every[name] for name in every if name in sent}, {**constants, **buffers}, client)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Network:
        """Copy to a device and a floating point type."""
        mode = "train" if self.module.training else "eval"
        return Network.of(copied(self.module).to(device, dtype), mode, self.client)

    def logits(
        self, images: Tensor, parameters: Update | None = None, buffers: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Class scores [B, classes] of images [B, C, H, W]; given tensors replace the network's own."""
        return cast(Tensor, self._call((images,), parameters, buffers))

    def loss(
        self,
        images: Tensor,
        targets: Tensor,
        parameters: Update | None = None,
        buffers: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Loss of images [B, C, H, W] against class probabilities `targets` [B, classes]: of the client, a mean.

        An `Extended` model adds its own term.
        """
        if isinstance(self.module, Extended):
            scores, term = cast(tuple[Tensor, Tensor], self._call((images, targets), parameters, buffers))
        else:
            scores, term = self.logits(images, parameters, buffers), images.new_zeros(())
        return self.client.objective(scores, targets) + term

    def _call(
        self, inputs: tuple[Tensor, ...], parameters: Update | None, buffers: dict[str, Tensor] | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        state = {**self.buffers, **(buffers or {}), **self.parameters, **(parameters or {})}
        with twice_differentiable_kernels(self.module, next(iter(state.values()), None)):
            if self.client.forward == "float32":
                return cast(Tensor, functional_call(self.module, state, inputs, strict=False))
            # Without its cache, which would hand one trial's weights on to another.
            with torch.autocast(inputs[0].device.type, torch.bfloat16, cache_enabled=False):
                answer = functional_call(self.module, state, inputs, strict=False)
            return cast(Tensor, tree_map(lambda scores: scores.to(inputs[0].dtype), answer))


@contextlib.contextmanager
def twice_differentiable_kernels(module: nn.Module, like: Tensor | None = None) -> Iterator[None]:
    """Let torch use only kernels that have a second derivative, where it has such.

    Fused attention, the fast path of `nn.TransformerEncoder` and cuDNN's recurrent layers have none.

    Args:
        module: what is called inside.
        like: a tensor that lies where it is called.
    """
    if torch.compiler.is_compiling():
        yield
        return
    recurrent = like is not None and like.is_cuda and any(isinstance(m, nn.RNNBase) for m in module.modules())
    plain = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    # Set by hand: `torch.nn.attention.sdpa_kernel` takes longer than a small layer.
    usual = [enabled() for enabled, _ in _FAST]
    try:
        for _, enable in _FAST:
            enable(False)
        with plain:
            yield
    finally:
        for (_, enable), was in zip(_FAST, usual, strict=True):
            enable(was)


_FAST: tuple[tuple[Callable[[], bool], Callable[[bool], Any]], ...] = (
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)
"""Kernels without a second derivative: whether they are allowed, and how to say so."""


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a module with its parameters, also one whose weights are computed before every call.

    Pruning and the hooks of `weight_norm` and `spectral_norm` keep the last such weight as a plain attribute
    with a graph, which cannot be copied and need not be.

    Args:
        module: what is copied.
        memo: tensors that are shared instead, by their id, as for `copy.deepcopy`.
    """
    memo = dict(memo or {})
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and id(value) not in memo:
                wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
                if wrapped or not value.is_leaf:
                    memo[id(value)] = torch.zeros(value.shape) if wrapped else value.detach().clone()
    return copy.deepcopy(module, memo)


def loss_after(
    network: Network, images: Tensor, targets: Tensor, buffers: dict[str, Tensor]
) -> Callable[[Update], Tensor]:
    """Return the loss of a batch after a step from the network's parameters, without a graph.

    It is computed in float64, so that what a defense decides by it does not hang on the rounding of a machine.
    """
    exact: list[Network] = []

    def loss(step: Update) -> Tensor:
        if not exact:  # Most defenses never ask.
            exact.append(network.to(images.device, torch.float64))
        with torch.no_grad():
            parameters = {name: tensor + step[name].double() for name, tensor in exact[0].parameters.items()}
            drawn = {
                name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in buffers.items()
            }
            return exact[0].loss(images.double(), targets.double(), parameters, drawn)

    return loss


def local_update(
    network: Network,
    images: Tensor,
    targets: Tensor,
    training: LocalTraining,
    *,
    per_example: Callable[[Update], Update] | None = None,
    buffers: dict[str, Tensor] | None = None,
    parameters: Update | None = None,
    order: Tensor | None = None,
    differentiate: Differentiate = by_autograd,
) -> Update:
    """Update of one client, differentiable in images, targets and buffers.

    Args:
        network: the model as the client runs it.
        images: the client's batch, [B, C, H, W] in [0, 1].
        targets: class probabilities, [B, classes].
        training: FedSGD or FedAvg with its steps.
        per_example: applied to each example's gradient before averaging (clipping); None computes one gradient.
        buffers: replaced buffers with a row an image, such as dropout masks, [B, ...].
        parameters: where the gradient is taken; the network's own when None.
        order: images that each local step uses, [steps, width]; by default one slice of the batch after the other.
        differentiate: how the gradient is taken.

    Raises:
        GradleakError: `accumulation` does not divide the images of a step, or local steps with a `per_example` that
            leaves the space of the parameters.
    """
    start = dict(network.parameters if parameters is None else parameters)

    def gradient(at: Update, batch: slice | Tensor) -> Update:
        if per_example is None:
            parts = _parts(batch, len(images), network.client.accumulation)
            each = [
                differentiate(
                    lambda p, part=part: network.loss(images[part], targets[part], p, _rows(buffers, part)),  # type: ignore[misc]
                    at,
                )
                for part in parts
            ]
            return (
                each[0] if len(each) == 1 else {name: torch.stack([one[name] for one in each]).mean(0) for name in at}
            )
        rows = _each_gradient(network, images[batch], targets[batch], _rows(buffers, batch), at, differentiate)
        limited = [per_example(row) for row in rows]
        return {name: torch.stack([row[name] for row in limited]).mean(0) for name in limited[0]}

    if training.lr is None:
        return gradient(start, slice(None))
    current, state = start, training.client.begin(start)
    for batch in training.batches(len(images)) if order is None else order:
        step = gradient(current, batch)
        if step.keys() != current.keys():
            raise GradleakError(
                "the defense takes each example's gradient out of the space of the parameters, where local steps "
                "(local_lr) cannot follow; use FedSGD"
            )
        current, state = training.client.step(current, step, state, training.lr)
    return {name: current[name] - start[name] for name in start}


def _each_gradient(
    network: Network,
    images: Tensor,
    targets: Tensor,
    buffers: dict[str, Tensor] | None,
    at: Update,
    differentiate: Differentiate,
) -> list[Update]:
    # A batch is at most a few images here, and a loop works under both ways of differentiating.
    return [
        differentiate(
            lambda p, one=slice(i, i + 1): network.loss(images[one], targets[one], p, _rows(buffers, one)),  # type: ignore[misc]
            at,
        )
        for i in range(len(images))
    ]


def _parts(batch: slice | Tensor, size: int, count: int) -> Sequence[slice | Tensor]:
    """Cut a step's images into equal parts."""
    if count == 1:
        return [batch]
    start, stop = batch.indices(size)[:2] if isinstance(batch, slice) else (0, len(batch))
    if (stop - start) % count:
        raise GradleakError(f"accumulation {count} does not divide a step of {stop - start} images")
    width = (stop - start) // count
    slices = [slice(first, first + width) for first in range(start, stop, width)]
    return slices if isinstance(batch, slice) else [batch[part] for part in slices]


def _rows(buffers: dict[str, Tensor] | None, batch: slice | Tensor) -> dict[str, Tensor]:
    return {name: tensor[batch] for name, tensor in (buffers or {}).items()}


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Class probabilities [..., classes] of integer labels [...].

    >>> one_hot(torch.tensor([2, 0]), 3, torch.float32).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    return nn.functional.one_hot(labels, classes).to(dtype)


def stack(updates: list[Update]) -> Update:
    """Stack dictionaries of tensors along a new first axis."""
    return {name: torch.stack([update[name] for update in updates]) for name in updates[0]}


def flatten(update: Update) -> Tensor:
    """All tensors of one update as one vector [d]."""
    return torch.cat([tensor.flatten() for tensor in update.values()])


def unflatten(vector: Tensor, shapes: Mapping[str, Sequence[int]]) -> Update:
    """Cut one vector [d] into tensors of these shapes; the inverse of `flatten`.

    >>> update = {"w": torch.rand(2, 3), "b": torch.rand(3)}
    >>> back = unflatten(flatten(update), {name: tensor.shape for name, tensor in update.items()})
    >>> all(torch.equal(back[name], tensor) for name, tensor in update.items())
    True
    """
    parts = vector.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.reshape(tuple(shape)) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def dot(left: Update, right: Update) -> Tensor:
    """Inner product over all tensors of two updates, a scalar.

    >>> dot({"w": torch.ones(2), "b": torch.ones(1)}, {"w": torch.full((2,), 2.0), "b": torch.ones(1)})
    tensor(5.)
    """
    return torch.stack([(left[name] * right[name]).sum() for name in left]).sum()


def squared_norm(update: Update) -> Tensor:
    """Squared Euclidean norm over all tensors of an update, a scalar.

    >>> squared_norm({"w": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])})
    tensor(25.)
    """
    return dot(update, update)


__all__ = [
    "Differentiate",
    "Extended",
    "LocalTraining",
    "Network",
    "Update",
    "by_autograd",
    "by_transform",
    "copied",
    "cross_entropy",
    "dot",
    "flatten",
    "local_update",
    "one_hot",
    "squared_norm",
    "stack",
    "twice_differentiable_kernels",
    "unflatten",
]
