"""Which defenses are random: their clients draw, wherever they do it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradleak import registry
from gradleak.dataset import Data
from gradleak.federation import client
from gradleak.model import initialise
from gradleak.suite import build_defense
from gradleak.threat import Setting

SETTING = Setting(batch_size=2, precision="float64")
RANDOM = {
    **dict.fromkeys(("censor", "diff2", "dp-sgd", "gaussian-noise", "gradient-noise", "outpost"), True),
    **dict.fromkeys(("qsgd", "terngrad", "mixup", "instahide", "dropout", "precode", "vib"), True),
    **dict.fromkeys(("none", "dgc", "quantise", "sign", "top-k", "augmentation", "discrete-bottleneck"), False),
    **dict.fromkeys(("quantum-encoding", "soteria", "tract", "secure-aggregation"), False),
    **dict.fromkeys(("architecture-check", "d-snr", "head-check", "row-similarity", "weight-balance"), False),
    # Their randomness is the round's, which the server knows.
    **dict.fromkeys(("random-k", "sketch"), False),
}
OPTIONS: list[tuple[str, dict[str, Any], bool]] = [
    ("gaussian-noise", {"sigma": 0.0}, False),
    ("dp-sgd", {"sigma": 0.0}, False),
    ("diff2", {"sigma": 0.0}, False),
    ("gradient-noise", {"eta": 0.0}, False),
    ("vib", {"stochastic": False}, False),
    ("sketch", {"sigma": 0.1}, True),
    ("mixup + top-k", {}, True),
    ("sketch + dp-sgd", {}, True),
    ("dp-sgd + secure-aggregation", {}, True),
    ("soteria + top-k", {}, False),
]


def test_every_defense_is_in_the_table() -> None:
    assert set(RANDOM) == set(registry.names("defenses"))


@pytest.mark.parametrize("name, options, random", [*((name, {}, random) for name, random in RANDOM.items()), *OPTIONS])
def test_who_draws_sends_another_message_next_time(name: str, options: dict[str, Any], random: bool) -> None:
    defense = build_defense(name, options)
    module = initialise(registry.build("models", "mlp", {"widths": (12,), "activation": "sigmoid"}), (1, 8, 8), 10, 0)
    network = client.client_network(module, defense, SETTING)
    images, labels = Data(registry.build("datasets", "digits"), "digits").victims(3, 2)
    first, second = (
        client.send(network, images.double(), labels, 10, defense, SETTING, 5, seeds)
        for seeds in ([1, 2, 3], [4, 5, 6])
    )
    differ = any(not torch.equal(first.message[key], second.message[key]) for key in first.message)
    assert (first.drew, second.drew, differ) == (random, random, random)
