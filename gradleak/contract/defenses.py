"""What a defense promises."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import vmap

from .. import registry
from ..channel import Batch, Channel
from ..dataset import Data
from ..defense import Defense, View
from ..engine.backends import Sequential, Vmap
from ..engine.objectives import relative_squared
from ..engine.optimisers import Variables
from ..engine.problem import Facts, Guess, Problem
from ..federation import client
from ..model import initialise
from ..threat import Setting
from ..update import LocalTraining, Network, Update, flatten, one_hot
from .findings import Unchecked, close, require, same
from .victims import VICTIMS, Ask, tuning_victims

DEFENSES = ("noise", "compression", "sketch", "representation", "data", "model", "aggregation", "detection", "none")
"""Families of defenses."""


# Defenses


class DefenseCase:
    """A defense on a small model, with the messages of a few clients."""

    setting = Setting(batch_size=2, precision="float64")

    def __init__(self, defense: Defense, ask: Ask | None = None):
        """Keep the defense."""
        self.defense, self._ask = defense, ask or Ask()

    @cached_property
    def data(self) -> Data:
        """What the clients have."""
        return self._ask.data("digits")

    @cached_property
    def network(self) -> Network:
        """The model as clients run it."""
        return client.client_network(self.module(), self.defense, self.setting)

    def module(self) -> nn.Module:
        """Return the model as the server has it, with initial weights; a new one each time."""
        options = {} if self._ask.model else {"widths": (12,), "activation": "sigmoid"}
        model = registry.build("models", self._ask.model or "mlp", options)
        return initialise(model, self.data.shape, self.data.classes, 0)

    @cached_property
    def batches(self) -> tuple[Tensor, Tensor]:
        """Images [N, B, C, H, W] and labels [N, B]."""
        return tuning_victims(self.data, self.setting.batch_size)

    @cached_property
    def sent(self) -> client.Sent:
        """What the clients send."""
        return self.send()

    def send(self) -> client.Sent:
        """Send once more, with the same seeds."""
        return self._send(self.defense, self.network)

    @cached_property
    def plain(self) -> client.Sent:
        """What they would send without a defense."""
        nothing: Defense = registry.build("defenses", "none")
        return self._send(nothing, client.client_network(self.module(), nothing, self.setting))

    def rows(self, update: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """One dict a victim."""
        return [{name: tensor[index] for name, tensor in update.items()} for index in range(VICTIMS)]

    def decoded(self) -> dict[str, Tensor]:
        """The messages as the server decodes them, [N, ...]."""
        public = self.sent.public
        return dict(vmap(lambda message: self.defense.decode(message, public))(self.sent.message))

    def _send(self, defense: Defense, network: Network) -> client.Sent:
        return client.send(network, *self.batches, self.data.classes, defense, self.setting, 5, list(range(VICTIMS)))


def defense_declares_itself(case: DefenseCase) -> None:
    """Declares family, reference and counter-attacks that exist."""
    defense = case.defense
    require(getattr(defense, "family", None) in DEFENSES, f"family is none of {', '.join(DEFENSES)}")
    require(getattr(defense, "reference", ""), "reference is missing")
    missing = set(defense.counter_attacks) - set(registry.names("attacks"))
    require(not missing, f"counter-attacks that do not exist: {', '.join(sorted(missing))}")


def defense_sends_what_decodes(case: DefenseCase) -> None:
    """Sends finite messages that repeat with their seeds and decode to the model's parameters."""
    sent = case.sent
    require(same(sent.message, case.send().message), "two messages with the same seeds differ")
    require(all(bool(t.isfinite().all()) for t in sent.message.values()), "a message is not finite")
    decoded = case.decoded()
    shapes = {name: tensor.shape for name, tensor in case.network.parameters.items()}
    fits = {name: tensor.shape[1:] for name, tensor in decoded.items()} == shapes
    require(fits, "decoded updates do not have the names and shapes of the parameters")
    require(all(bool(t.isfinite().all()) for t in decoded.values()), "a decoded update is not finite")


def defense_packs_its_messages(case: DefenseCase) -> None:
    """Packs messages into bytes, other messages into others."""
    packed = [case.defense.pack(message, case.sent.public) for message in case.rows(case.sent.message)]
    require(all(type(data) is bytes and data for data in packed), "pack does not return bytes, or none")
    require([len(data) for data in packed] == case.sent.bytes, "pack does not repeat its length")
    require(len(set(packed)) == VICTIMS, "different messages are packed to equal bytes")


def defense_leaves_its_input_alone(case: DefenseCase) -> None:
    """Changes neither the update nor the round's public tensors, and leaves the global generator alone."""
    defense, public = case.defense, case.sent.public
    update = case.rows(case.sent.update)[0]
    kept = [{name: tensor.clone() for name, tensor in each.items()} for each in (update, public)]
    noise = torch.get_rng_state()
    message = defense.protect(update, public, torch.Generator().manual_seed(0))
    defense.decode(message, public)
    defense.simulate(update, public)
    require(same(update, kept[0]), "the update was changed in place")
    require(same(public, kept[1]), "the public tensors were changed in place")
    require(torch.equal(torch.get_rng_state(), noise), "the global generator was used; draw from the one given")


def defense_changes_something(case: DefenseCase) -> None:
    """Changes what is sent, unless its family is `none`, or it only looks at the model."""
    plain = same(case.decoded(), case.plain.update)
    require(
        plain == (case.defense.family in ("none", "detection")),
        "the server gets the plain update" if plain else "it is changed",
    )


def defense_simulates_what_it_sends(case: DefenseCase) -> None:
    """Simulates victims in a stack as alone, and exactly what it sends where that is certain."""
    defense, public = case.defense, case.sent.public
    stacked = vmap(lambda update: defense.simulate(update, public))(case.sent.update)
    for index, update in enumerate(case.rows(case.sent.update)):
        single = defense.simulate(update, public)
        close({name: tensor[index] for name, tensor in stacked.items()}, single, "simulated in a stack and alone")
        first, second = (defense.protect(update, public, torch.Generator().manual_seed(seed)) for seed in (0, 1))
        # With a likelihood the simulation need not be the message, and an aggregate is not one client's.
        certain = same(first, second) and not defense.has_likelihood and defense.family != "aggregation"
        if certain or defense.linear:
            close(first, single, "sent and simulated (override `simulate`, or give an `nll`)")


FACTS = (
    *("linear", "additive", "simulates", "has_likelihood", "prepares", "publishes"),
    *("per_example_gradients", "softens", "is_adaptive_target"),
)
"""What a defense says of itself, each yes or no."""


def defense_is_what_it_declares(case: DefenseCase) -> None:
    """Is what it declares: linear, additive, simulated, with a likelihood, a target of adaptive attacks."""
    defense, public = case.defense, case.sent.public
    odd = [name for name in FACTS if not isinstance(getattr(defense, name), bool)]
    require(not odd, f"{', '.join(odd)} must be True or False (allowed: an attribute of the class, or a property)")
    one, other = case.rows(case.sent.update)[:2]
    for fact in ("linear", "additive"):
        if getattr(defense, fact):
            _adds_up(case, one, other, fact)
    simulated = defense.simulate(one, public)
    silent = defense.simulates or same(simulated, one)
    require(silent, "simulates = False, but `simulate` changes an update; declare simulates = True")
    _likelihood_is_declared(case, simulated)
    _shares_are_declared(case)
    if _never(defense, "per_example_gradients"):
        # Large enough for any clipping to show.
        large = {name: 1e6 * tensor for name, tensor in one.items()}
        clipped = not same(defense.per_example(large, public), large)
        require(not clipped, "per_example_gradients = False, but `per_example` changes gradients; it is never asked")
    asked = defense.simulates or defense.has_likelihood or defense.per_example_gradients or defense.softens
    require(
        defense.is_adaptive_target or not asked,
        "is_adaptive_target is False, but knowing the defense changes what a matching attack does",
    )
    require(
        asked or defense.cohort > 1 or not defense.is_adaptive_target,
        "is_adaptive_target is True, but knowing the defense changes nothing of what a matching attack does",
    )


def _adds_up(case: DefenseCase, one: Update, other: Update, fact: str) -> None:
    """Whether the message of a mean is the mean of the messages; noise is left out where there is any."""
    defense, public = case.defense, case.sent.public

    def sent(update: Update, seed: int) -> Update:
        return defense.protect(update, public, torch.Generator().manual_seed(seed))

    if fact == "linear":
        nothing = defense.simulate({name: torch.zeros_like(tensor) for name, tensor in one.items()}, public)
        require(
            not any(t.any() for t in nothing.values()), "linear = True, but an update of zeros is simulated otherwise"
        )
    certain = fact != "linear" and same(sent(one, 0), sent(one, 1))
    first, second, both = (
        sent(update, 0) if certain else defense.simulate(update, public) for update in (one, other, _mean(one, other))
    )
    close(both, _mean(first, second), f"{fact} = True, but the message of a mean is not the mean of the messages")


def _likelihood_is_declared(case: DefenseCase, simulated: Mapping[str, Tensor]) -> None:
    defense, message = case.defense, case.rows(case.sent.message)[0]
    try:
        defense.nll(message, dict(simulated), case.sent.public)
    except NotImplementedError:
        require(not defense.has_likelihood, "has_likelihood = True, but there is no `nll`")
        return
    never = _never(defense, "has_likelihood")
    require(not never, "has_likelihood = False, but there is an `nll`; declare has_likelihood = True or leave it out")


def _shares_are_declared(case: DefenseCase) -> None:
    """Whether what the server and all clients share, a model or public tensors, is told of."""
    defense, module = case.defense, case.module()
    untouched = defense.prepares or defense.prepare_model(module) is module
    require(untouched, "prepares = False, but `prepare_model` returns another model; declare prepares = True")
    silent = defense.publishes or not case.sent.public
    require(silent, "publishes = False, but `public` returns tensors; declare publishes = True")


def _never(defense: Defense, fact: str) -> bool:
    """Whether a fact is denied whatever the options; a property of the class's own may deny it for some only."""
    return inspect.getattr_static(type(defense), fact) in (False, inspect.getattr_static(Defense, fact))


def _mean(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: (tensor + other[name]) / 2 for name, tensor in one.items()}


def defense_decides_by_more_than_rounding(case: DefenseCase) -> None:
    """Sends the same of an update in float32 and in float64: whatever it compares, rounding does not decide."""
    defense, sent = case.defense, case.sent
    narrow = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in sent.public.items()}
    for index, update in enumerate(case.rows(sent.update)):
        batch = Batch(sent.images[index], sent.targets[index], {n: tensor[index] for n, tensor in sent.buffers.items()})
        low = {name: tensor.float() for name, tensor in update.items()}
        high = {name: tensor.double() for name, tensor in low.items()}
        first, second = (
            Channel(case.network, defense, public, LocalTraining()).release(
                batch, given, torch.Generator().manual_seed(index)
            )[0]
            for given, public in ((low, narrow), (high, sent.public))
        )
        gap = flatten({name: first[name].double() - tensor for name, tensor in second.items()}).norm()
        size = flatten({name: tensor.double() for name, tensor in second.items()}).norm()
        # Float32 alone is off by a millionth or so; an entry that is sent or not by its rounding makes far more.
        require(bool(gap <= 1e-3 * size), "the message is another one in float32; decide in float64 (tensor.double())")


def defense_can_be_attacked_adaptively(case: DefenseCase) -> None:
    """Gives an adaptive attacker a finite loss, twice differentiable, in a stack as alone, also of a zero guess."""
    defense, sent = case.defense, case.sent
    view = View(defense, sent.public)

    def match(update: Update, facts: Facts) -> Tensor:
        message, simulated = facts.message, view.simulate(update)
        return view.nll(message, simulated) if defense.has_likelihood else relative_squared(simulated, message)

    def decode(variables: Variables, facts: Facts) -> Guess:
        return Guess(variables["images"], facts.targets, facts.named["buffers"])

    problem = Problem(
        network=case.network,
        training=LocalTraining(),
        decode=decode,
        match=match,
        penalty=lambda guess, variables, facts: guess.images.new_zeros(()),
        per_example=view.per_example if defense.per_example_gradients else None,
    )
    images, labels = case.batches
    targets = one_hot(labels, case.data.classes, images.dtype)
    facts = Facts(targets, message=sent.message, named={"buffers": sent.buffers})
    start = {"images": 0.5 * images + 0.25}
    single, stacked = Sequential()(problem, start, facts), Vmap()(problem, start, facts)
    slopes = single.gradients["images"]
    require(slopes.isfinite().all(), "the gradient is not finite")
    require(slopes.abs().amax() > 0, "the gradient is zero: the loss does not depend on the images")
    close(stacked.total, single.total, "losses in a stack and alone")
    close(stacked.gradients, single.gradients, "gradients in a stack and alone", rtol=1e-6, atol=1e-9)
    zeros = {name: torch.zeros_like(tensor[0]) for name, tensor in sent.update.items()}
    require(
        match(zeros, Facts(message=case.rows(sent.message)[0])).isfinite(), "the loss of a zero guess is not finite"
    )
    # Last, because a defense of data or model answers by what the attacker's own model then is.
    if not defense.is_adaptive_target:
        raise Unchecked("it has no adaptive answer: neither `simulate` nor `nll` nor `per_example` is its own")
