"""The backend for trials that share a model: one flat batch through it, each victim's gradient layer by layer.

For a layer with input a and output cotangent d (the gradient of the loss by its output), a victim's weight
gradient G is a product of its own a and d. Let V be the gradient of the matching loss by G. The image gradient
of the matching loss is then one reverse pass from all a and d together, with V^T d flowing into a and V a into
d. Everything that touches the shared weights is one large batch; only G and V are a victim's own, and where few
positions meet a large matrix not even those are formed (ghost products, after Goodfellow, arXiv:1510.01799).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from ...update import Extended, Network
from ..memory import is_out_of_memory
from ..optimisers import Variables
from ..problem import Backend, Facts, Guess, PlainDecode, PlainPenalty, Problem, Values
from .affine import Affine
from .anything import Anything
from .convolution import Convolution
from .layer import Layer, NotUnderstoodError, Pulled, on_batch
from .matchers import clips, matcher_of
from .pointwise import SMOOTH, Pointwise
from .probe import Hidden, private_copy, probe, run, unusual
from .product import LinearProduct


class Layerwise(Backend):
    """Shared parameters, FedSGD: the network sees all trials as one batch, layers tell victims apart."""

    def __init__(self) -> None:
        self._problem: Problem | None = None
        self._layers: list[Layer] = []

    def refusal(self, problem: Problem, variables: Variables, facts: Facts) -> str | None:
        """Say why the model's layers are not understood, or why its parameters are not the same for all trials."""
        try:
            self._look_at(problem)
            with torch.no_grad():
                images = self._decode(problem, variables, facts).images
                self._let_copy(images)
                probe(problem.network, self._network, self._layers, images[0])
        except NotUnderstoodError as reason:
            return str(reason)
        except Exception as error:  # whatever a model does with a batch that is not one victim's
            if is_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return None

    def prepare(self, problem: Problem, facts: Facts) -> Facts:
        """Facts with what the matching loss needs of observed messages, computed once."""
        return self._matcher.prepare(facts)

    def __call__(self, problem: Problem, variables: Variables, facts: Facts) -> Values:
        """Losses and gradients of W stacked trials."""
        self._look_at(problem)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in variables.items()}
        guess, scores = self._forward(problem, leaves, facts)
        batch = guess.targets.shape[1]
        loss = -(guess.targets.flatten(0, 1) * scores.log_softmax(-1)).sum() / batch
        # Cotangents, with a graph: the second derivative flows through them.
        wanted = [tensor for layer in self._layers for tensor in layer.wanted]
        found = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
        rest = list(found)
        for layer in self._layers:
            layer.cotangents, rest = rest[: len(layer.wanted)], rest[len(layer.wanted) :]
        with torch.no_grad():
            matching, pull = self._matcher(facts)

        penalty, more = self._penalise(problem, leaves, facts, guess)
        pull = [(tensor, flow) for tensor, flow in [*pull, more] if tensor.requires_grad]
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
            raise NotUnderstoodError("local steps give every trial its own parameters")
        if not problem.network.client.plain or problem.network.client.accumulation > 1:
            raise NotUnderstoodError("the client's loss is not the plain cross-entropy of its batch")
        if problem.per_example is not None and not clips(problem):
            raise NotUnderstoodError("the gradients of single examples are changed")
        network = problem.network
        unusual(network.module)
        if isinstance(network.module, Extended):
            raise NotUnderstoodError("the model adds a term to the loss")
        every = [name for name, _ in network.module.named_parameters(remove_duplicate=False)]
        if len(every) != len(network.parameters):
            raise NotUnderstoodError("layers share parameters")
        module = private_copy(network.module)
        self._layers = list(_layers(module, "", network))
        for layer in self._layers:
            layer.module.forward = layer.run
        stacked = {child for layer in self._layers if isinstance(layer, Anything) for child in layer.module.modules()}
        for child in set(module.modules()) - stacked:
            if type(child) in SMOOTH and getattr(child, "approximate", "none") == "none":
                child.forward = functools.partial(Pointwise.apply, SMOOTH[type(child)])
        # Layers know their parameters: whoever else reads them gets what shows.
        hidden = {name: tensor.new_full((), math.nan).expand_as(tensor) for name, tensor in network.parameters.items()}
        self._network = Hidden.of_copy(module, hidden, network)
        self._matcher = matcher_of(problem, self._layers)
        self._problem = problem

    def _penalise(self, problem: Problem, variables: Variables, facts: Facts, guess: Guess) -> tuple[Tensor, Pulled]:
        """Penalty of all trials, and what flows from it into the graph."""
        if isinstance(problem.penalty, PlainPenalty):
            penalty, slope = problem.penalty.rows(guess.images.detach(), facts)
            return penalty, (guess.images, slope)

        def penalise(row: Variables, known: Facts, images: Tensor, targets: Tensor) -> Tensor:
            return problem.penalty(Guess(images, targets), row, known)

        penalty = vmap(penalise)(variables, facts, guess.images, guess.targets)
        return penalty, (penalty, torch.ones_like(penalty))

    def _decode(self, problem: Problem, variables: Variables, facts: Facts) -> Guess:
        """Images and targets of all trials."""
        if isinstance(problem.decode, PlainDecode):
            return problem.decode.rows(variables, facts)

        def decode(row: Variables, known: Facts) -> tuple[Tensor, Tensor]:
            guess = problem.decode(row, known)
            if guess.buffers or guess.parameters is not None:
                raise NotUnderstoodError("buffers or parameters are guessed")
            return guess.images, guess.targets

        return Guess(*vmap(decode)(variables, facts))

    def _let_copy(self, images: Tensor) -> None:
        """Find the layers whose output is changed in place by what comes next; they hand on copies."""
        run(self._network, self._layers, images)
        changed = [layer for layer in self._layers if layer.overwritten]
        if not changed:
            return
        for layer in changed:
            layer.copies = True
        run(self._network, self._layers, images)
        for layer in self._layers:
            if layer.overwritten:
                raise NotUnderstoodError(f"the input of {type(layer.module).__name__} is changed in place afterwards")

    def _forward(self, problem: Problem, variables: Variables, facts: Facts) -> tuple[Guess, Tensor]:
        """Decode all trials and run them through the network, whose layers take notes."""
        guess = self._decode(problem, variables, facts)
        scores = run(self._network, self._layers, guess.images)
        if any(layer.overwritten for layer in self._layers):
            raise NotUnderstoodError("a layer's output is changed in place")
        return guess, scores


def _layers(module: nn.Module, prefix: str, network: Network) -> list[Layer]:
    """Layers that must tell victims apart, in the module and all that it contains."""
    kind = _kind(module)
    if kind is not None:
        return [kind(module, prefix, network)]
    if any(True for _ in module.parameters(recurse=False)):
        if not prefix:
            raise NotUnderstoodError("the model as a whole holds parameters")
        return [Anything(module, prefix, network)]
    return [layer for name, child in module.named_children() for layer in _layers(child, f"{prefix}{name}.", network)]


_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)


def _kind(module: nn.Module) -> Callable[[Any, str, Network], Layer] | None:
    if type(module) is nn.Linear:
        return LinearProduct
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return Convolution if plain else None
    # Exact types: a subclass may do more.
    if type(module) in _NORMALISATIONS and (module.affine or on_batch(module)):
        return Affine
    if type(module) is nn.LayerNorm and module.elementwise_affine:
        return Affine
    return None
