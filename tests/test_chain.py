from __future__ import annotations

import math

import pytest
import torch

from gradleak import registry
from gradleak.chain import Chain
from gradleak.defense import Defense
from gradleak.defenses.gaussian_noise import GaussianNoise
from gradleak.defenses.random_k import RandomK
from gradleak.defenses.sketch import Sketch
from gradleak.defenses.top_k import TopK
from gradleak.errors import GradleakError
from gradleak.federation import client
from gradleak.model import initialise
from gradleak.threat import Setting
from gradleak.update import Update


def update(seed: int = 0) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(6, 5, generator=generator), "b": torch.randn(10, generator=generator)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def send(defense: Defense) -> client.Sent:
    setting = Setting(batch_size=3)
    module = initialise(registry.build("models", "mlp", {"widths": (8,)}), (1, 4, 4), 10, 0)
    network = client.client_network(module, defense, setting)
    images = torch.rand(2, 3, 1, 4, 4, generator=seeded())
    labels = torch.tensor([[0, 1, 2], [3, 4, 5]])
    return client.send(network, images, labels, 10, defense, setting, 7, [1, 2])


def test_message_is_the_composition() -> None:
    first, second = RandomK(ratio=0.5), TopK(ratio=0.25)
    chain = Chain((first, second))
    public = chain.public(update(), 1, seeded())
    message = chain.protect(update(), public, seeded())
    assert message["values"].shape == (20,)
    assert int((message["values"] != 0).sum()) == 5
    own = {name.removeprefix("0 "): tensor for name, tensor in public.items()}
    expected = second.protect(first.protect(update(), own, seeded()), {}, seeded())
    torch.testing.assert_close(message, expected)
    torch.testing.assert_close(chain.decode(message, public), first.decode(expected, own))
    torch.testing.assert_close(chain.simulate(update(), public), first.simulate(update(), own))
    # The last one's encoding and likelihood, on the first one's messages.
    assert chain.pack(message, public) == second.pack(message, {})
    assert chain.has_likelihood
    guess = chain.simulate(update(1), public)
    torch.testing.assert_close(chain.nll(message, guess, public), second.nll(message, guess, {}))


def test_sketch_then_noise_is_the_remedy_of_sketch() -> None:
    # Two ways to write one defense must give the same message and the same guarantee.
    chained = send(Chain((Sketch(ratio=0.3), GaussianNoise(sigma=0.5, clip=0.1))))
    remedy = send(Sketch(ratio=0.3, sigma=0.5, clip=0.1))
    torch.testing.assert_close(chained.message, remedy.message, rtol=0, atol=0)
    chain = Chain((Sketch(), GaussianNoise(sigma=0.5, clip=0.1)))
    assert chain.guarantee(Setting()) == Sketch(sigma=0.5, clip=0.1).guarantee(Setting())


def test_clipping_bounds_what_is_sent() -> None:
    # Without noise: the mean of three clipped sketches has norm at most the clip.
    sent = send(Chain((Sketch(ratio=0.3), GaussianNoise(sigma=0.0, clip=0.01))))
    norms = sent.message["sketch"].norm(dim=1)
    assert float(norms.max()) <= 0.01 * (1 + 1e-6)
    assert float(norms.min()) > 0.001


def test_noise_then_sketch_sketches_the_noisy_mean() -> None:
    chain = Chain((GaussianNoise(sigma=0.5, clip=0.1), Sketch(ratio=0.3)))
    sent = send(chain)
    assert sent.message["sketch"].shape == (2, math.ceil(0.3 * (16 * 8 + 8 + 80 + 10)))
    assert not chain.has_likelihood
    assert chain.guarantee(Setting()) is not None


def test_order_that_bounds_nothing_is_refused() -> None:
    with pytest.raises(GradleakError, match="TopK is not linear, so it cannot come before GaussianNoise"):
        Chain((TopK(), GaussianNoise()))
    assert Chain((TopK(), GaussianNoise(clip=None))).has_likelihood
    assert Chain((GaussianNoise(), TopK())).per_example_gradients


def test_defense_of_the_model_does_not_hide_the_likelihood_before_it() -> None:
    class _Model(Defense):
        family = "model"
        reference = "test"

    chain = Chain((TopK(ratio=0.5), _Model()))
    message = chain.protect(update(), {}, seeded())
    assert chain.has_likelihood
    assert chain.pack(message, {}) == TopK(ratio=0.5).pack(message, {})
    # And it may stand before clipping, as it leaves the update alone.
    assert Chain((_Model(), GaussianNoise())).per_example_gradients


def test_local_steps_refuse_clipped_sketches() -> None:
    defense = Sketch(clip=1.0)
    setting = Setting(batch_size=1, local_lr=0.1)
    module = initialise(registry.build("models", "mlp", {"widths": (8,)}), (1, 4, 4), 10, 0)
    network = client.client_network(module, defense, setting)
    with pytest.raises(GradleakError, match="use FedSGD"):
        client.send(network, torch.rand(1, 1, 1, 4, 4), torch.zeros(1, 1).long(), 10, defense, setting, 0, [0])
