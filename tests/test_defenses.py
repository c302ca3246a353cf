"""What every defense promises, over all that are installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import vmap

from gradleak import client, registry
from gradleak.backends import Sequential, Vmap
from gradleak.dataset import Data
from gradleak.defense import Defense, View
from gradleak.model import initialise
from gradleak.objectives import relative_squared
from gradleak.optimisers import Variables
from gradleak.problem import Facts, Guess, Problem
from gradleak.registry import options_of
from gradleak.threat import Setting
from gradleak.update import LocalTraining, Network, Update, one_hot

BATCH, VICTIMS = 2, 3
SETTING = Setting(batch_size=BATCH, precision="float64")
every_defense = pytest.mark.parametrize("name", registry.names("defenses"))


def network_of(defense: Defense) -> Network:
    module = initialise(registry.build("models", "mlp", {"widths": (12,), "activation": "sigmoid"}), (1, 8, 8), 10, 0)
    return client.client_network(module, defense, SETTING)


def batches() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = Data(registry.build("datasets", "digits"), "digits").victims(VICTIMS, BATCH)
    return images.double(), labels


def send(defense: Defense, network: Network, seeds: list[int]) -> client.Sent:
    images, labels = batches()
    return client.send(network, images, labels, 10, defense, SETTING, 5, seeds)


def rows(update: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: tensor[index] for name, tensor in update.items()} for index in range(VICTIMS)]


def equal(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@every_defense
def test_message_is_finite_repeatable_and_decodes_to_the_parameters(name: str) -> None:
    defense: Defense = registry.build("defenses", name)
    network = network_of(defense)
    sent, again = send(defense, network, [1, 2, 3]), send(defense, network, [1, 2, 3])
    assert equal(sent.message, again.message)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in sent.message.values())
    decoded = vmap(lambda message: defense.decode(message, sent.public))(sent.message)
    shapes = {key: tensor.shape for key, tensor in network.parameters.items()}
    assert {key: tensor.shape[1:] for key, tensor in decoded.items()} == shapes
    assert all(bool(torch.isfinite(tensor).all()) for tensor in decoded.values())
    packed = [defense.pack(message, sent.public) for message in rows(sent.message)]
    assert all(type(data) is bytes and data for data in packed)
    assert [len(data) for data in packed] == sent.bytes
    # Nothing is sent twice, and the encoding is not of a constant.
    assert len(set(packed)) == VICTIMS


@every_defense
def test_input_is_left_alone(name: str) -> None:
    defense: Defense = registry.build("defenses", name)
    sent = send(defense, network_of(defense), [1, 2, 3])
    update = rows(sent.update)[0]
    public = {key: tensor.clone() for key, tensor in sent.public.items()}
    before = {key: tensor.clone() for key, tensor in update.items()}
    message = defense.protect(update, sent.public, torch.Generator().manual_seed(0))
    defense.decode(message, sent.public)
    defense.simulate(update, sent.public)
    assert equal(update, before)
    assert equal(public, sent.public)


@every_defense
def test_something_changes_but_without_a_defense(name: str) -> None:
    defense: Defense = registry.build("defenses", name)
    plain = network_of(registry.build("defenses", "none"))
    images, labels = batches()
    baseline = client.send(plain, images, labels, 10, registry.build("defenses", "none"), SETTING, 5, [1, 2, 3])
    network = network_of(defense)
    sent = client.send(network, images, labels, 10, defense, SETTING, 5, [1, 2, 3])
    decoded = vmap(lambda message: defense.decode(message, sent.public))(sent.message)
    assert equal(decoded, baseline.update) == (name == "none")


@every_defense
def test_simulation_stacks_and_equals_protection_where_linear(name: str) -> None:
    defense: Defense = registry.build("defenses", name)
    sent = send(defense, network_of(defense), [1, 2, 3])
    stacked = vmap(lambda update: defense.simulate(update, sent.public))(sent.update)
    for index, update in enumerate(rows(sent.update)):
        single = defense.simulate(update, sent.public)
        torch.testing.assert_close({key: tensor[index] for key, tensor in stacked.items()}, single)
        if defense.linear:
            message = defense.protect(update, sent.public, torch.Generator().manual_seed(index))
            torch.testing.assert_close(message, single)
            double = defense.simulate({key: 2 * tensor for key, tensor in update.items()}, sent.public)
            torch.testing.assert_close(double, {key: 2 * tensor for key, tensor in single.items()})


@every_defense
def test_adaptive_loss_is_finite_twice_differentiable_and_stacks(name: str) -> None:
    defense: Defense = registry.build("defenses", name)
    network = network_of(defense)
    images, labels = batches()
    sent = send(defense, network, [1, 2, 3])
    view = View(defense, sent.public)

    def match(update: Update, facts: Facts) -> torch.Tensor:
        message, simulated = facts["message"], view.simulate(update)
        assert isinstance(message, dict)
        return view.nll(message, simulated) if defense.has_likelihood else relative_squared(simulated, message)

    def decode(variables: Variables, facts: Facts) -> Guess:
        targets = facts["targets"]
        assert isinstance(targets, torch.Tensor)
        buffers = facts["buffers"]
        assert isinstance(buffers, dict)
        return Guess(variables["images"], targets, buffers)

    problem = Problem(
        network=network,
        training=LocalTraining(),
        decode=decode,
        match=match,
        penalty=lambda guess, variables, facts: guess.images.new_zeros(()),
        per_example=view.per_example if defense.per_example_gradients else None,
    )
    facts: Facts = {"message": sent.message, "targets": one_hot(labels, 10, images.dtype), "buffers": sent.buffers}
    start = {"images": 0.5 * images + 0.25}
    single, stacked = Sequential()(problem, start, facts), Vmap()(problem, start, facts)
    assert bool(torch.isfinite(single.gradients["images"]).all())
    assert float(single.gradients["images"].abs().amax()) > 0
    torch.testing.assert_close(stacked.total, single.total)
    torch.testing.assert_close(stacked.gradients, single.gradients, rtol=1e-6, atol=1e-9)
    # A zero guess does not break it either.
    zeros = {key: torch.zeros_like(tensor[0]) for key, tensor in sent.update.items()}
    loss = match(zeros, {"message": rows(sent.message)[0]})
    assert bool(torch.isfinite(loss))


@every_defense
def test_declares_what_a_leaderboard_shows(name: str) -> None:
    defense: Defense = registry.build("defenses", name)
    families = {"noise", "compression", "sketch", "representation", "data", "model", "aggregation", "none"}
    assert defense.family in families
    assert defense.reference
    assert set(defense.counter_attacks) <= set(registry.names("attacks"))
    rebuilt = registry.build("defenses", name, options_of(defense))
    assert rebuilt == defense
