"""The backend for trials that share a model: one flat batch through it, each victim's gradient layer by layer.

For a layer with input a and output sensitivity d (the gradient of the loss by its output), a victim's weight
gradient G is a product of its own a and d. Let V be the gradient of the matching loss by G. The image gradient
of the matching loss is then one reverse pass from all a and d together, with V^T d flowing into a and V a into
d. Everything that touches the shared weights is one large batch; only G and V are a victim's own, and where few
positions meet a large matrix not even those are formed (ghost products, after Goodfellow, arXiv:1510.01799).
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..update import Extended, Network, Update
from .objectives import _TINY as TINY
from .optimisers import Variables
from .problem import Backend, Direct, Facts, Guess, Problem, Values

log = logging.getLogger(__name__)

_PASS = 75
"""Multiplications a core does while it moves one entry of a per-victim matrix through memory a few times."""

_VECTOR = 8
"""Input channels below which a convolution is computed as a product of patches: kernels work on vectors of channels."""

_CACHE = 2**19
"""Numbers that stay in a core's cache between two passes over them."""

Pull = list[tuple[Tensor, Tensor]]
"""Tensors of the graph, each with the gradient of the matching loss that flows into it."""


class _NotUnderstoodError(Exception):
    """Why this backend cannot compute a problem."""


class Layerwise(Backend):
    """Shared parameters, FedSGD: the network sees all trials as one batch, layers tell victims apart."""

    def __init__(self) -> None:
        self._problem: Problem | None = None
        self._layers: list[_Layer] = []

    def applies(self, problem: Problem, variables: Variables, facts: Facts) -> bool:
        """Whether the model's layers are understood and its parameters are the same for all trials."""
        try:
            self._look_at(problem)
            with torch.no_grad():
                self._forward(problem, variables, facts)
        except _NotUnderstoodError as reason:
            log.debug("backend 'layerwise' does not apply: %s", reason)
            return False
        return True

    def prepare(self, problem: Problem, facts: Facts) -> Facts:
        """Replace observed gradients of low rank by their factors, where the objective allows it.

        The gradient of a linear layer has at most as many ranks as it saw positions, unless a defense changed it.
        """
        direct = _closed_form(problem)
        if direct is None:
            return facts
        observed = dict(cast(Update, facts[direct.observed]))
        left, right = {}, {}
        square = _square(observed)
        for layer in self._layers:
            if isinstance(layer, _Product) and layer.rank_pays:
                name = layer.full["weight"]
                factors = _factorise(observed[name].flatten(2), layer.positions)
                if factors is not None:
                    left[name], right[name] = factors
                    del observed[name]
        return {**facts, direct.observed: observed, "_left": left, "_right": right, "_square": square}

    def __call__(self, problem: Problem, variables: Variables, facts: Facts) -> Values:
        """Losses and gradients of W stacked trials."""
        self._look_at(problem)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in variables.items()}
        guess, scores = self._forward(problem, leaves, facts)
        batch = guess.targets.shape[1]
        loss = -(guess.targets.flatten(0, 1) * scores.log_softmax(-1)).sum() / batch
        # Sensitivities, with a graph: the second derivative flows through them.
        wanted = [tensor for layer in self._layers for tensor in layer.wanted]
        found = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
        rest = list(found)
        for layer in self._layers:
            layer.sensitivities, rest = rest[: len(layer.wanted)], rest[len(layer.wanted) :]
        with torch.no_grad():
            matching, pull = self._match(problem, facts)

        def penalise(row: Variables, known: Facts, images: Tensor, targets: Tensor) -> Tensor:
            return problem.penalty(Guess(images, targets), row, known)

        penalty = vmap(penalise)(leaves, facts, guess.images, guess.targets)
        pull = [(tensor, flow) for tensor, flow in pull if tensor.requires_grad]
        if penalty.requires_grad:
            pull.append((penalty, torch.ones_like(penalty)))
        gradients = torch.autograd.grad(
            [tensor for tensor, _ in pull],
            list(leaves.values()),
            [flow for _, flow in pull],
            allow_unused=True,
            materialize_grads=True,
        )
        for layer in self._layers:
            layer.forget()
        total = matching + penalty.detach()
        return Values(total, matching, dict(zip(leaves, gradients, strict=True)))

    def _look_at(self, problem: Problem) -> None:
        if self._problem is problem:
            return
        if problem.training.lr is not None:
            raise _NotUnderstoodError("local steps give every trial its own parameters")
        if problem.per_example is not None:
            raise _NotUnderstoodError("the gradients of single examples are changed")
        network = problem.network
        if isinstance(network.module, Extended):
            raise _NotUnderstoodError("the model adds a term to the loss")
        every = [name for name, _ in network.module.named_parameters(remove_duplicate=False)]
        if len(every) != len(network.parameters):
            raise _NotUnderstoodError("layers share parameters")
        # The copy's layers get a forward pass of ours; parameters and buffers are not copied.
        memo = {id(tensor): tensor for tensor in [*network.module.parameters(), *network.module.buffers()]}
        module = copy.deepcopy(network.module, memo)
        self._layers = list(_layers(module, "", network))
        for layer in self._layers:
            layer.module.forward = layer.forward
        for child in module.modules():
            if type(child) in _SMOOTH and getattr(child, "approximate", "none") == "none":
                child.forward = functools.partial(_Pointwise.apply, _SMOOTH[type(child)])
        self._network = Network(module, network.parameters, network.buffers)
        self._problem = problem

    def _forward(self, problem: Problem, variables: Variables, facts: Facts) -> tuple[Guess, Tensor]:
        """Decode all trials and run them through the network, whose layers take notes."""

        def decode(row: Variables, known: Facts) -> tuple[Tensor, Tensor]:
            guess = problem.decode(row, known)
            if guess.buffers or guess.parameters is not None:
                raise _NotUnderstoodError("buffers or parameters are guessed")
            return guess.images, guess.targets

        images, targets = vmap(decode)(variables, facts)
        for layer in self._layers:
            layer.forget()
            layer.victims = len(images)
        scores = self._network.logits(images.flatten(0, 1))
        for layer in self._layers:
            if layer.parameters and not layer.wanted:
                raise _NotUnderstoodError(f"{type(layer.module).__name__} is never called")
        return Guess(images, targets), scores

    def _match(self, problem: Problem, facts: Facts) -> tuple[Tensor, Pull]:
        direct = _closed_form(problem)
        if direct is not None:
            return self._match_directly(direct, facts)
        found = {name: tensor for layer in self._layers for name, tensor in layer.gradients().items()}
        update = {name: found[name] for name in self._network.parameters}
        towards, matching = vmap(grad_and_value(problem.match))(update, facts)
        return matching, [pair for layer in self._layers for pair in layer.pull(towards)]

    def _match_directly(self, direct: Direct, facts: Facts) -> tuple[Tensor, Pull]:
        """Closed forms: V = of_observed * g + of_own * G for coefficients of each victim."""
        observed = _Observed(
            cast(Update, facts[direct.observed]),
            cast(Update, facts.get("_left", {})),
            cast(Update, facts.get("_right", {})),
        )
        size = cast(Tensor, facts["_square"]) if "_square" in facts else _square(observed.dense)
        if direct.objective == "cosine":
            sums = [layer.products(observed) for layer in self._layers]
            dot = torch.stack([first for first, _ in sums]).sum(0)
            own = (torch.stack([second for _, second in sums]).sum(0) + TINY).sqrt()
            norms = own * (size + TINY).sqrt()
            matching, of_observed, of_own = 1 - dot / norms, -1 / norms, dot / (norms * own.square())
        else:
            scale = 1 / (size + TINY) if direct.objective == "relative-squared" else torch.ones_like(size)
            gap = torch.stack([layer.gap(observed).double() for layer in self._layers]).sum(0)
            matching, of_observed, of_own = gap.to(size.dtype) * scale, -2 * scale, 2 * scale
        pull = [pair for layer in self._layers for pair in layer.pull_directly(observed, of_observed, of_own)]
        return matching, pull


@dataclass(frozen=True)
class _Observed:
    """Observed updates [W, ...]; those of low rank as left @ right^T, [W, out, rank] and [W, in, rank]."""

    dense: Update
    left: Update
    right: Update


class _Layer(ABC):
    """A layer that has parameters, seen by a flat batch [W * B, ...]; keeps notes of one pass."""

    def __init__(self, module: nn.Module, prefix: str, network: Network):
        self.module = module
        self.full = {name: prefix + name for name, _ in module.named_parameters()}
        self.parameters = {name: network.parameters[full] for name, full in self.full.items()}
        own = {prefix + name: name for name, _ in module.named_buffers()}
        self.buffers = {own[full]: tensor for full, tensor in network.buffers.items() if full in own}
        self.victims = 0
        self.forget()

    def forget(self) -> None:
        """Drop the notes of the last pass and with them its graph."""
        self.wanted: list[Tensor] = []
        """Tensors of the graph by which the loss is differentiated."""
        self.sensitivities: list[Tensor] = []
        """These gradients, with a graph."""
        self._gradients: Update | None = None

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Run the layer and take notes."""

    @abstractmethod
    def compute(self) -> Update:
        """Gradient of each parameter, [W, ...], by its name in the layer."""

    @abstractmethod
    def spread(self, towards: Update) -> Pull:
        """What flows into the graph for given gradients of the loss by the layer's gradients."""

    def gradients(self) -> Update:
        """Gradient of each parameter, [W, ...], by its full name."""
        if self._gradients is None:
            own = self.compute()
            self._gradients = {self.full[name]: tensor for name, tensor in own.items()}
        return self._gradients

    def pull(self, towards: Update) -> Pull:
        """What flows into the graph for given gradients of the loss by every update, by full name."""
        return self.spread({name: towards[full] for name, full in self.full.items()})

    def products(self, observed: _Observed) -> tuple[Tensor, Tensor]:
        """Inner product with the observed gradients and squared norm, [W] each."""
        own = self.gradients()
        dot = [_dot(tensor, observed.dense[name]) for name, tensor in own.items()]
        square = [_dot(tensor, tensor) for tensor in own.values()]
        return torch.stack(dot).sum(0), torch.stack(square).sum(0)

    def gap(self, observed: _Observed) -> Tensor:
        """Squared distance from the observed gradients, [W]."""
        own = self.gradients()
        parts = [(tensor - observed.dense[name]).square().flatten(1).sum(1) for name, tensor in own.items()]
        return torch.stack(parts).sum(0)

    def pull_directly(self, observed: _Observed, of_observed: Tensor, of_own: Tensor) -> Pull:
        """What flows into the graph where V = of_observed * g + of_own * G, coefficients [W]."""
        towards = {
            name: (_rows(of_own, tensor) * tensor).addcmul_(_rows(of_observed, tensor), observed.dense[name])
            for name, tensor in self.gradients().items()
        }
        return self.pull(towards)

    def note(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Keep the input and ask for the sensitivity of the output."""
        if self.wanted:
            raise _NotUnderstoodError(f"{type(self.module).__name__} is called more than once")
        if len(inputs) % self.victims or len(output) != len(inputs):
            raise _NotUnderstoodError(f"{type(self.module).__name__} does not see the batch as its first axis")
        self.inputs = inputs
        self.wanted = [output]
        return output

    @property
    def sensitivity(self) -> Tensor:
        """Gradient of the loss by the layer's output."""
        return self.sensitivities[0]


class _Product(_Layer):
    """A layer whose output is a matrix times its input at every position: A [W, P, in], D [W, P, out], G = D^T A.

    Subclasses say how input and sensitivity become A and D, and what flows back.
    """

    positions: int
    """P: positions of one victim, all of its images together."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the matrix."""
        weight = self.parameters["weight"].flatten(1)
        return weight.shape[0], weight.shape[1]

    @property
    def ghost(self) -> bool:
        """Whether products of positions are cheaper than the matrix itself."""
        outputs, inputs = self.shape
        return 2 * self.positions**2 * (inputs + outputs) < inputs * outputs * (self.positions + _PASS)

    @property
    def rank_pays(self) -> bool:
        """Whether P factors are much smaller than the matrix."""
        outputs, inputs = self.shape
        return self.ghost and 2 * self.positions * (inputs + outputs) < inputs * outputs

    @abstractmethod
    def left(self) -> Tensor:
        """D, without a graph."""

    @abstractmethod
    def right(self) -> Tensor:
        """A, without a graph."""

    @abstractmethod
    def flow(self, into_left: Tensor, into_right: Tensor) -> Pull:
        """Turn what flows into D and A into what flows into sensitivity and input."""

    def compute(self) -> Update:
        """G = D^T A, and the sum of D for the bias."""
        left = self.left()
        weight = left.transpose(1, 2) @ self.right()
        own = {"weight": weight.view(self.victims, *self.parameters["weight"].shape)}
        if "bias" in self.parameters:
            own["bias"] = left.sum(1)
        return own

    def spread(self, towards: Update) -> Pull:
        """V A into D, V^T D into A."""
        matrix = towards["weight"].flatten(2)
        into_left = self.right() @ matrix.transpose(1, 2)
        if "bias" in towards:
            into_left = into_left + towards["bias"][:, None]
        return self.flow(into_left, self.left() @ matrix)

    def _factored(self, observed: _Observed) -> bool:
        return self.full["weight"] in observed.left

    def products(self, observed: _Observed) -> tuple[Tensor, Tensor]:
        """<G, g> and |G|^2 without G."""
        if not (self.ghost or self._factored(observed)):
            return super().products(observed)
        name = self.full["weight"]
        left, right = self.left(), self.right()
        self._grams = left @ left.transpose(1, 2), right @ right.transpose(1, 2)
        if self._factored(observed):
            # g = E F^T, so that <D^T A, g> = <A F, D E>: only small matrices.
            self._towards = right @ observed.right[name], left @ observed.left[name]
            dot = (self._towards[0] * self._towards[1]).flatten(1).sum(1)
        else:
            matrix = observed.dense[name].flatten(2)
            self._towards = right @ matrix.transpose(1, 2), left @ matrix
            dot = (self._towards[0] * left).flatten(1).sum(1)
        square = (self._grams[0] * self._grams[1]).flatten(1).sum(1)
        if "bias" in self.parameters:
            self._bias = left.sum(1)
            dot = dot + (self._bias * observed.dense[self.full["bias"]]).sum(1)
            square = square + self._bias.square().sum(1)
        return dot, square

    def gap(self, observed: _Observed) -> Tensor:
        """|G - g|^2; from factors in float64, since it is a small difference of large numbers."""
        if not self._factored(observed):
            return super().gap(observed)
        self.products(observed)
        name = self.full["weight"]
        left = torch.cat([self.left().transpose(1, 2), -observed.left[name]], 2).double()
        right = torch.cat([self.right().transpose(1, 2), observed.right[name]], 2).double()
        grams = (left.transpose(1, 2) @ left) * (right.transpose(1, 2) @ right)
        gap = grams.flatten(1).sum(1).clamp(min=0)
        if "bias" in self.parameters:
            gap = gap + (self._bias - observed.dense[self.full["bias"]]).double().square().sum(1)
        return gap

    def pull_directly(self, observed: _Observed, of_observed: Tensor, of_own: Tensor) -> Pull:
        """Without V: (c g + C G) A = c g A + C (A A^T) D, and likewise for D."""
        if self._gradients is not None:
            return super().pull_directly(observed, of_observed, of_own)
        name = self.full["weight"]
        c, own = of_observed[:, None, None], of_own[:, None, None]
        of_left, of_right = (c * towards for towards in self._towards)
        if self._factored(observed):
            of_left = of_left @ observed.left[name].transpose(1, 2)
            of_right = of_right @ observed.right[name].transpose(1, 2)
        if "bias" in self.parameters:
            bias = of_observed[:, None] * observed.dense[self.full["bias"]] + of_own[:, None] * self._bias
            of_left = of_left + bias[:, None]
        into_left = of_left.baddbmm(own * self._grams[1], self.left())
        into_right = of_right.baddbmm(own * self._grams[0], self.right())
        return self.flow(into_left, into_right)


class _Linear(_Product):
    """nn.Linear."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the layer and take notes."""
        self.positions = inputs[..., 0].numel() // self.victims
        return self.note(inputs, F.linear(inputs, self.parameters["weight"], self.parameters.get("bias")))

    def left(self) -> Tensor:
        """D: the sensitivity's rows."""
        return self.sensitivity.detach().reshape(self.victims, self.positions, -1)

    def right(self) -> Tensor:
        """A: the input's rows."""
        return self.inputs.detach().reshape(self.victims, self.positions, -1)

    def flow(self, into_left: Tensor, into_right: Tensor) -> Pull:
        """The same rows."""
        return [
            (self.sensitivity, into_left.reshape(self.sensitivity.shape)),
            (self.inputs, into_right.reshape(self.inputs.shape)),
        ]


class _Convolution(_Product):
    """nn.Conv2d: grouped convolutions with a group a victim; as a product of patches where positions are few."""

    def __init__(self, module: nn.Conv2d, prefix: str, network: Network):
        super().__init__(module, prefix, network)
        self.geometry = (tuple(module.stride), tuple(cast(Any, module.padding)), tuple(module.dilation))
        self.kernel = tuple(module.kernel_size)

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the layer and take notes."""
        weight, bias = self.parameters["weight"], self.parameters.get("bias")
        output = _Convolve.apply(inputs, weight, bias, self.geometry, self._late)
        self.positions = output[:, 0].numel() // self.victims
        return self.note(inputs, output)

    def forget(self) -> None:
        """Drop the notes of the last pass."""
        super().forget()
        self._patches: Tensor | None = None
        self._late: Late = []
        """V and D whose V^T D is still to be added to what flows into the input."""

    def left(self) -> Tensor:
        """D: the sensitivity at every position."""
        rows = self.sensitivity.detach().flatten(2).transpose(1, 2)
        return rows.reshape(self.victims, self.positions, -1)

    def right(self) -> Tensor:
        """A: the patch of the input at every position."""
        return self._columns().transpose(1, 2).reshape(self.victims, self.positions, -1)

    def flow(self, into_left: Tensor, into_right: Tensor) -> Pull:
        """Positions back to maps, patches back to images."""
        images, outputs = self.sensitivity.shape[:2]
        maps = into_left.reshape(images, -1, outputs).transpose(1, 2).reshape(self.sensitivity.shape)
        columns = into_right.reshape(images, -1, into_right.shape[-1]).transpose(1, 2)
        folded = _fold(columns, self.inputs.shape, self.kernel, self.geometry)
        return [(self.sensitivity, maps), (self.inputs, folded)]

    def compute(self) -> Update:
        """G by one convolution in groups, and the sum of the sensitivity for the bias."""
        weight = self.parameters["weight"]
        sensitivity = self.sensitivity.detach()
        if self.by_patches:
            each = sensitivity.flatten(2) @ self._columns().transpose(1, 2)
            gradient = _split(each, 0, self.victims).sum(1)
        else:
            size = (self.victims * weight.shape[0], *weight.shape[1:])
            inputs = self._group(self.inputs.detach())
            gradient = self._backward(self._group(sensitivity), inputs, weight.new_empty(1).expand(size), 1)
        own = {"weight": gradient.view(self.victims, *weight.shape)}
        if "bias" in self.parameters:
            own["bias"] = sensitivity.sum((-2, -1)).view(self.victims, -1, weight.shape[0]).sum(1)
        return own

    def spread(self, towards: Update) -> Pull:
        """V A into the sensitivity, V^T D into the input, each one convolution in groups."""
        if self.by_patches:
            return self._spread_patches(towards)
        weight = towards["weight"].flatten(0, 1).contiguous()
        stride, padding, dilation = self.geometry
        inputs, sensitivity = self._group(self.inputs.detach()), self._group(self.sensitivity.detach())
        bias = towards["bias"].flatten() if "bias" in towards else None
        forward = F.conv2d(inputs, weight, bias, stride, padding, dilation, self.victims)
        backward = self._backward(sensitivity, inputs.new_empty(1).expand(inputs.shape), weight, 0)
        return [
            (self.sensitivity, self._ungroup(forward, self.sensitivity)),
            (self.inputs, self._ungroup(backward, self.inputs)),
        ]

    @property
    def by_patches(self) -> bool:
        """Whether there are too few channels for a convolution in groups to be fast."""
        return self.parameters["weight"].shape[1] < _VECTOR

    def _columns(self) -> Tensor:
        """The patches at every position as columns, [W * B, in, P / B]."""
        if self._patches is None:
            self._patches = _unfold(self.inputs.detach(), self.kernel, self.geometry)
        return self._patches

    def _spread_patches(self, towards: Update) -> Pull:
        images = len(self.inputs) // self.victims
        weight = towards["weight"].flatten(2).repeat_interleave(images, 0)
        forward = weight @ self._columns()
        if "bias" in towards:
            forward = forward + towards["bias"].repeat_interleave(images, 0)[:, :, None]
        pull = [(self.sensitivity, forward.view(self.sensitivity.shape))]
        if self.inputs.requires_grad:
            # The reverse pass comes by here with W^T D' for the same input: one product and one fold for both.
            self._late.append((weight, self.sensitivity.detach()))
        return pull

    def _group(self, maps: Tensor) -> Tensor:
        """[W * B, C, H, W] to [B, W * C, H, W]."""
        return _split(maps, 0, self.victims).transpose(0, 1).flatten(1, 2)

    def _ungroup(self, maps: Tensor, like: Tensor) -> Tensor:
        return _split(maps, 1, self.victims).transpose(0, 1).reshape(like.shape)

    def _backward(self, sensitivity: Tensor, inputs: Tensor, weight: Tensor, which: int) -> Tensor:
        mask = [which == 0, which == 1, False]
        return _convolution_backward(sensitivity, inputs, weight, self.geometry, self.victims, mask)[which]


class _Affine(_Layer):
    """The scale and shift of a normalisation layer, after the normalisation itself."""

    def __init__(self, module: nn.Module, prefix: str, network: Network):
        super().__init__(module, prefix, network)
        self.axis = -1 if isinstance(module, nn.LayerNorm) else 1

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the layer and take notes."""
        self.per_input: tuple[Tensor, Tensor] | None = None
        module = self.module
        if isinstance(module, _BatchNorm):
            if not _on_batch(module):
                return self._fixed(inputs)
            # Statistics of each victim's own batch: victims become channels.
            grouped = _split(inputs, 0, self.victims).transpose(0, 1).flatten(1, 2)
            normal = F.batch_norm(grouped, None, None, training=True, eps=module.eps)
            normal = _split(normal, 1, self.victims).transpose(0, 1).flatten(0, 1)
        elif isinstance(module, nn.GroupNorm):
            normal = F.group_norm(inputs, module.num_groups, eps=module.eps)
        else:
            assert isinstance(module, nn.LayerNorm)
            normal = F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
        if not self.parameters:
            return normal
        output = normal * self._along(self.parameters["weight"], inputs)
        if "bias" in self.parameters:
            output = output + self._along(self.parameters["bias"], inputs)
        return self.note(normal, output)

    def _fixed(self, inputs: Tensor) -> Tensor:
        """Known statistics: one scale and shift, so that the graph has one product."""
        assert isinstance(self.module, _BatchNorm)
        scale = (self.buffers["running_var"] + self.module.eps).rsqrt()
        shift = -self.buffers["running_mean"] * scale
        if not self.parameters:
            return inputs * self._along(scale, inputs) + self._along(shift, inputs)
        weight, bias = self.parameters["weight"], self.parameters["bias"]
        self.per_input = scale, shift
        product = inputs * self._along(scale * weight, inputs) + self._along(shift * weight + bias, inputs)
        return self.note(inputs, product)

    def compute(self) -> Update:
        """Sums of D times the normalised input, and of D."""
        if not self.parameters:
            return {}
        sensitivity = self.sensitivity.detach()
        own = {"weight": self._sum(sensitivity * self._normal())}
        if "bias" in self.parameters:
            own["bias"] = self._sum(sensitivity)
        return own

    def spread(self, towards: Update) -> Pull:
        """V times the other factor."""
        if not self.parameters:
            return []
        weight = self._each(towards["weight"])
        into_sensitivity = weight * self._victims(self._normal())
        if "bias" in towards:
            into_sensitivity = into_sensitivity + self._each(towards["bias"])
        into_inputs = weight * self._victims(self.sensitivity.detach())
        if self.per_input is not None:
            into_inputs = into_inputs * self._along(self.per_input[0], self.inputs)
        return [
            (self.sensitivity, into_sensitivity.flatten(0, 1)),
            (self.inputs, into_inputs.flatten(0, 1)),
        ]

    def products(self, observed: _Observed) -> tuple[Tensor, Tensor]:
        """Inner product with the observed gradients and squared norm, [W] each."""
        if not self.parameters:
            nothing = self._nothing(observed)
            return nothing, nothing
        return super().products(observed)

    def gap(self, observed: _Observed) -> Tensor:
        """Squared distance from the observed gradients, [W]."""
        return super().gap(observed) if self.parameters else self._nothing(observed)

    def _nothing(self, observed: _Observed) -> Tensor:
        return next(iter(observed.dense.values())).new_zeros(self.victims)

    def _normal(self) -> Tensor:
        inputs = self.inputs.detach()
        if self.per_input is None:
            return inputs
        scale, shift = self.per_input
        return inputs * self._along(scale, inputs) + self._along(shift, inputs)

    def _along(self, values: Tensor, like: Tensor) -> Tensor:
        """Parameter to the axes it scales."""
        return values if self.axis == -1 else values.view(-1, *(1,) * (like.ndim - 2))

    def _victims(self, maps: Tensor) -> Tensor:
        return _split(maps, 0, self.victims)

    def _each(self, rows: Tensor) -> Tensor:
        """Gradients [W, *shape] of a parameter to the axes of [W, B, ...]."""
        inputs = self.inputs
        if self.axis == -1:
            return rows.view(self.victims, *(1,) * (inputs.ndim - rows.ndim + 1), *rows.shape[1:])
        return rows.view(self.victims, 1, -1, *(1,) * (inputs.ndim - 2))

    def _sum(self, maps: Tensor) -> Tensor:
        """Sum over the axes that the parameter does not have, [W, *shape]."""
        rows = self._victims(maps)
        if self.axis == -1:
            kept = self.parameters["weight"].ndim
            return rows.flatten(1, rows.ndim - kept - 1).sum(1)
        return rows.flatten(3).sum((1, 3)) if rows.ndim > 3 else rows.sum(1)


class _Anything(_Layer):
    """Any other module with parameters: every victim gets its own, and autograd does the rest."""

    def __init__(self, module: nn.Module, prefix: str, network: Network):
        super().__init__(module, prefix, network)
        self.original = copy.copy(module)

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the module once a victim, stacked."""
        if self.wanted:
            raise _NotUnderstoodError(f"{type(self.module).__name__} is called more than once")
        names = list(self.parameters)
        own = [self.parameters[name].expand(self.victims, *self.parameters[name].shape) for name in names]
        self.wanted = [tensor.detach().requires_grad_() for tensor in own]

        def run(parameters: list[Tensor], rows: Tensor) -> Tensor:
            state = {**self.buffers, **dict(zip(names, parameters, strict=True))}
            return cast(Tensor, functional_call(self.original, state, (rows,), strict=False))

        return vmap(run)(self.wanted, _split(inputs, 0, self.victims)).flatten(0, 1)

    def compute(self) -> Update:
        """Gradient of each parameter."""
        return {name: tensor.detach() for name, tensor in zip(self.parameters, self.sensitivities, strict=True)}

    def spread(self, towards: Update) -> Pull:
        """V itself."""
        return [(tensor, towards[name]) for name, tensor in zip(self.parameters, self.sensitivities, strict=True)]


def _layers(module: nn.Module, prefix: str, network: Network) -> list[_Layer]:
    """Layers that must tell victims apart, in the module and all that it contains."""
    kind = _kind(module)
    if kind is not None:
        return [kind(module, prefix, network)]
    if any(True for _ in module.parameters(recurse=False)):
        if not prefix:
            raise _NotUnderstoodError("the model as a whole holds parameters")
        return [_Anything(module, prefix, network)]
    return [layer for name, child in module.named_children() for layer in _layers(child, f"{prefix}{name}.", network)]


def _kind(module: nn.Module) -> Callable[[Any, str, Network], _Layer] | None:
    if type(module) is nn.Linear:
        return _Linear
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return _Convolution if plain else None
    if isinstance(module, _BatchNorm | nn.GroupNorm) and (module.affine or _on_batch(module)):
        return _Affine
    if type(module) is nn.LayerNorm and module.elementwise_affine:
        return _Affine
    return None


def _closed_form(problem: Problem) -> Direct | None:
    match = problem.match
    known = isinstance(match, Direct) and match.objective in ("cosine", "squared", "relative-squared")
    return cast(Direct, match) if known else None


def _square(update: Update) -> Tensor:
    return torch.stack([tensor.flatten(1).square().sum(1) for tensor in update.values()]).sum(0)


def _on_batch(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _split(tensor: Tensor, axis: int, victims: int) -> Tensor:
    return cast(Tensor, tensor.unflatten(axis, (victims, -1)))


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.ndim - 1))


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of each victim's rows, [W], without the product in memory."""
    return (one.flatten(1)[:, None] @ other.flatten(1)[:, :, None]).flatten()


def _factorise(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Factors [N, out, rank] and [N, in, rank] of matrices [N, out, in], or None if they have a higher rank.

    By a random projection (Halko, Martinsson, Tropp, arXiv:0909.4061), one victim after the other and in
    float64, so that the factors are as exact as the matrix and do not depend on the other victims.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrices.shape[2], rank, generator=generator, dtype=torch.float64).to(matrices.device)
    tolerance = 32 * torch.finfo(matrices.dtype).eps
    left, right = [], []
    for matrix in matrices:
        exact = matrix.double()
        basis = torch.linalg.qr((exact @ probe).nan_to_num())[0]
        # Once more through the matrix, so that its rounding errors do not tilt the basis.
        basis = torch.linalg.qr((exact @ (exact.T @ basis)).nan_to_num())[0]
        shares = exact.T @ basis
        if not (basis @ shares.T - exact).norm() <= tolerance * exact.norm() and bool(exact.isfinite().all()):
            return None
        left.append(basis.to(matrix.dtype))
        right.append(shares.to(matrix.dtype))
    return torch.stack(left), torch.stack(right)


Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Stride, padding, dilation."""


def _convolution_backward(
    sensitivity: Tensor, inputs: Tensor, weight: Tensor, geometry: Geometry, groups: int, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return cast(
        tuple[Tensor, Tensor, Tensor],
        torch.ops.aten.convolution_backward(sensitivity, inputs, weight, None, *geometry, False, (0, 0), groups, mask),
    )


def _unfold(maps: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Patches of [B, C, H, W] as columns [B, C * kernel, positions], as `F.unfold` but without its slow copy."""
    stride, padding, dilation = geometry
    patches = F.pad(maps, (padding[1], padding[1], padding[0], padding[0]))
    for axis in (0, 1):
        size = (kernel[axis] - 1) * dilation[axis] + 1
        patches = patches.unfold(2 + axis, size, stride[axis])[..., :: dilation[axis]]
    return patches.permute(0, 1, 4, 5, 2, 3).reshape(len(maps), maps.shape[1] * math.prod(kernel), -1)


def _fold(columns: Tensor, shape: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Sum columns [B, C * kernel, positions] back into maps of `shape`: the transpose of `_unfold`."""
    stride, padding, dilation = geometry
    return F.fold(columns, shape[-2:], kernel, dilation, padding, stride)


def _few(size: int, images: Tensor) -> int:
    """How many images of `size` numbers to take at a time, so that on a CPU they stay in its cache."""
    return max(1, _CACHE // size) if images.device.type == "cpu" else len(images)


def _fold_product(
    weight: Tensor, sensitivity: Tensor, shape: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry
) -> Tensor:
    """The derivative of convolutions by their inputs [B, C, H, W], each with its own weight [B, out, C * kernel]."""
    rows = sensitivity.flatten(2)
    step = _few(weight.shape[2] * rows.shape[2], rows)
    parts = [
        _fold(few.transpose(1, 2) @ row, shape, kernel, geometry)
        for few, row in zip(weight.split(step), rows.split(step), strict=True)
    ]
    return torch.cat(parts)


Late = list[tuple[Tensor, Tensor]]
"""Weights [B, out, C * kernel] and sensitivities [B, out, ...] to be added to a derivative by the input."""


class _Convolve(torch.autograd.Function):
    """A convolution with a constant weight. torch's own computes the weight's gradient in the second derivative."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, late: Late
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry, ctx.late = inputs.shape, geometry, late
        return F.conv2d(inputs, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *sensitivities: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        into = _ConvolveBack.apply(sensitivities[0], weight, ctx.shape, ctx.geometry, ctx.late)
        return into, None, None, None, None


class _ConvolveBack(torch.autograd.Function):
    """The derivative of a convolution by its input, whose own derivative is the convolution again."""

    @staticmethod
    def forward(
        ctx: Any, sensitivity: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry, late: Late
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry = geometry
        if weight.shape[1] < _VECTOR:
            every = weight.flatten(1).expand(len(sensitivity), -1, -1)
            while late:
                own, sensitivities = late.pop()
                every, sensitivity = torch.cat([every, own], 1), torch.cat([sensitivity, sensitivities], 1)
            return _fold_product(every, sensitivity, shape, tuple(weight.shape[2:]), geometry)
        inputs = sensitivity.new_empty(1).expand(shape)
        return _convolution_backward(sensitivity, inputs, weight, geometry, 1, [True, False, False])[0]

    @staticmethod
    def backward(ctx: Any, *into: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        return _Convolve.apply(into[0], weight, None, ctx.geometry, []), None, None, None, None


class _Smooth(ABC):
    """A smooth function of each entry, with its derivatives. torch's own second derivatives take many passes."""

    @staticmethod
    @abstractmethod
    def value(inputs: Tensor) -> Tensor:
        """f(x)."""

    @staticmethod
    @abstractmethod
    def slope(inputs: Tensor, value: Tensor) -> Tensor:
        """f'(x)."""

    @staticmethod
    @abstractmethod
    def bend(inputs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        """f''(x)."""


class _Sigmoid(_Smooth):
    @staticmethod
    def value(inputs: Tensor) -> Tensor:
        return inputs.sigmoid()

    @staticmethod
    def slope(inputs: Tensor, value: Tensor) -> Tensor:
        return value.addcmul(value, value, value=-1)

    @staticmethod
    def bend(inputs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        return slope.addcmul(slope, value, value=-2)


class _Gelu(_Smooth):
    """x times the normal distribution (Hendrycks and Gimpel, arXiv:1606.08415)."""

    @staticmethod
    def value(inputs: Tensor) -> Tensor:
        return F.gelu(inputs)

    @staticmethod
    def slope(inputs: Tensor, value: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(torch.ones_like(inputs), inputs)  # type: ignore[no-any-return]

    @staticmethod
    def bend(inputs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        square = inputs * inputs
        density = (square * -0.5).exp_()
        return square.neg_().add_(2).mul_(density).mul_(1 / math.sqrt(2 * math.pi))


_SMOOTH: dict[type[nn.Module], type[_Smooth]] = {nn.Sigmoid: _Sigmoid, nn.GELU: _Gelu}


class _Pointwise(torch.autograd.Function):
    """A smooth function whose first derivative is computed once for both passes."""

    @staticmethod
    def forward(ctx: Any, function: type[_Smooth], inputs: Tensor) -> Tensor:
        value = function.value(inputs)
        slope = function.slope(inputs, value)
        ctx.save_for_backward(inputs, value, slope)
        ctx.function = function
        return value

    @staticmethod
    def backward(ctx: Any, *sensitivities: Tensor) -> tuple[None, Tensor]:
        return None, _PointwiseBack.apply(ctx.function, sensitivities[0], *ctx.saved_tensors)


class _PointwiseBack(torch.autograd.Function):
    """Sensitivity times slope, and how that changes with both."""

    @staticmethod
    def forward(
        ctx: Any, function: type[_Smooth], sensitivity: Tensor, inputs: Tensor, value: Tensor, slope: Tensor
    ) -> Tensor:
        ctx.save_for_backward(sensitivity, inputs, value, slope)
        ctx.function = function
        return sensitivity * slope

    @staticmethod
    def backward(ctx: Any, *into: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        sensitivity, inputs, value, slope = ctx.saved_tensors
        bend = ctx.function.bend(inputs, value, slope)
        return None, into[0] * slope, bend.mul_(into[0]).mul_(sensitivity), None, None
