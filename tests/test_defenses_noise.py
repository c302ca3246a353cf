from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from torch import Tensor, nn

from gradleak import registry
from gradleak.dataset import Data
from gradleak.defense import Defense
from gradleak.defenses.censor import Censor
from gradleak.defenses.diff2 import Diff2
from gradleak.defenses.dp_sgd import DPSGD
from gradleak.defenses.gradient_noise import GradientNoise
from gradleak.defenses.outpost import Outpost
from gradleak.federation import client
from gradleak.model import initialise
from gradleak.testing import Scene, reconstruct
from gradleak.threat import Compute, Setting
from gradleak.update import LocalTraining, Network, Update, flatten, local_update, one_hot


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def update(seed: int = 0) -> Update:
    generator = seeded(seed)
    return {"w": torch.randn(40, 30, generator=generator), "b": 0.1 * torch.randn(40, generator=generator)}


# DP-SGD


@pytest.mark.parametrize("sigma, rate, steps", [(1.0, 0.01, 1000), (1.1, 256 / 60000, 14000), (4.0, 1.0, 10)])
def test_run_guarantee_is_opacus_own(sigma: float, rate: float, steps: int) -> None:
    accountant = RDPAccountant()
    for _ in range(steps):
        accountant.step(noise_multiplier=sigma, sample_rate=rate)
    found = DPSGD(sigma=sigma, sampling_rate=rate, steps=steps).run_guarantee(Setting())
    assert found is not None
    assert found.epsilon == accountant.get_epsilon(delta=1e-5)


def test_run_guarantee_golden_numbers() -> None:
    # sigma 1, q 0.01, T 1000, delta 1e-5: 2.101 by Renyi accounting in two libraries, 1.838 by Opacus' PRV.
    rdp, prv = (DPSGD(accountant=name).run_guarantee(Setting()) for name in ("rdp", "prv"))
    assert rdp is not None and prv is not None
    assert rdp.epsilon == pytest.approx(2.101, abs=1e-3)
    assert prv.epsilon == pytest.approx(1.838, abs=2e-3)
    own = PRVAccountant()
    own.history = [(1.0, 0.01, 1000)]
    assert prv.epsilon == own.get_epsilon(delta=1e-5)
    assert "1000 rounds" in rdp.unit


def test_one_message_is_not_amplified_by_sampling() -> None:
    found = DPSGD(sigma=1.0).guarantee(Setting())
    assert found is not None
    assert found.epsilon == pytest.approx(4.729, abs=1e-3)
    gaussian = registry.build("defenses", "gaussian-noise", {"sigma": 1.0}).guarantee(Setting())
    assert found.epsilon == gaussian.epsilon


@pytest.mark.parametrize("options", [{"mechanism": "laplace"}, {"sigma": 0.0}])
def test_without_an_accountant_there_is_no_guarantee(options: Any) -> None:
    assert DPSGD(**options).guarantee(Setting()) is None
    assert DPSGD(**options).run_guarantee(Setting()) is None
    assert DPSGD().guarantee(Setting(local_lr=0.1)) is None


@pytest.mark.parametrize("mechanism, order", [("gaussian", 2), ("laplace", 1)])
def test_clip_bounds_the_mechanisms_norm(mechanism: Any, order: int) -> None:
    for clip in (0.5, 1e6):
        clipped = flatten(DPSGD(clip=clip, mechanism=mechanism).per_example(update(), {}))
        norm = flatten(update()).norm(order)
        torch.testing.assert_close(clipped, flatten(update()) * min(1.0, clip / float(norm)))


@pytest.mark.parametrize("mechanism, factor", [("gaussian", 1.0), ("laplace", math.sqrt(2))])
def test_noise_has_the_declared_scale(mechanism: Any, factor: float) -> None:
    defense = DPSGD(sigma=2.0, clip=0.5, mechanism=mechanism)
    public = defense.public(update(), 4, seeded())
    draws = [flatten(defense.protect(update(), public, seeded(k))) - flatten(update()) for k in range(50)]
    noise = torch.cat(draws)
    # Scale sigma * clip / B = 0.25; a Laplace variable deviates by sqrt(2) times its scale, with kurtosis 6.
    assert float(noise.std()) == pytest.approx(0.25 * factor, rel=5 * math.sqrt(5 / 4 / len(noise)))
    kurtosis = float((noise**4).mean() / noise.square().mean() ** 2)
    assert kurtosis == pytest.approx({1.0: 3.0}.get(factor, 6.0), rel=0.15)


# Annealed noise


def test_annealed_noise_follows_its_formula() -> None:
    for rounds in (0, 9, 199):
        defense = GradientNoise(eta=0.3, gamma=0.55, round=rounds)
        noise = flatten(defense.protect(update(), {}, seeded())) - flatten(update())
        expected = math.sqrt(0.3 / (1 + rounds) ** 0.55)
        assert defense.deviation == pytest.approx(expected)
        assert float(noise.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * len(noise)))
    assert GradientNoise(eta=1.0, round=200).deviation == pytest.approx(0.233, abs=1e-3)
    assert GradientNoise().guarantee(Setting()) is None


# Differences


def test_difference_is_that_of_two_gradients() -> None:
    module = build("lenet")
    defense = Diff2(distance=0.5, sigma=0, clip=1e9)
    network = client.client_network(module, defense, Setting(precision="float64"))
    images, labels = digits(1, 2)
    targets = one_hot(labels[0], 10, torch.float64)
    found = local_update(network, images[0], targets, LocalTraining())
    plain = Network.of(module.double())
    steps = [network.buffers[f"step{index}"] for index in range(len(plain.parameters))]
    assert float(flatten(dict(enumerate(steps))).norm()) == pytest.approx(0.5)  # type: ignore[arg-type]
    last = {name: plain.parameters[name] - step for name, step in zip(plain.parameters, steps, strict=True)}
    now = local_update(plain, images[0], targets, LocalTraining())
    before = local_update(plain, images[0], targets, LocalTraining(), parameters=last)
    torch.testing.assert_close(found, {f"model.{name}": now[name] - before[name] for name in now})


def test_difference_is_clipped_relative_to_the_step() -> None:
    defense = Diff2(distance=0.01, clip=2.0, sigma=3.0)
    public = defense.public(update(), 4, seeded())
    assert float(flatten(defense.per_example(update(), public)).norm()) == pytest.approx(0.02)
    assert float(public["deviation"]) == pytest.approx(3.0 * 0.02 / 4)
    single = DPSGD(sigma=3.0).guarantee(Setting())
    assert single is not None and defense.guarantee(Setting()) is not None
    assert defense.guarantee(Setting()).epsilon == single.epsilon  # type: ignore[union-attr]


# Outpost


def test_outpost_prunes_and_noises_as_described() -> None:
    weights = {"w": 0.2 * torch.randn(40, 30, generator=seeded(5)), "b": 9 * torch.randn(40, generator=seeded(6))}
    defense = Outpost(prune=0.8, noise=0.5, share=0.4)
    public = defense.public(weights, 1, seeded())
    assert float(public["w"]) == pytest.approx(0.5 * float(np.var(weights["w"].numpy())), rel=1e-5)
    assert float(public["b"]) == 0.5  # the risk is at most 1
    message = defense.protect(update(), public, seeded())
    gradient = update()["w"].numpy()
    fisher = (gradient**2).mean(0)
    noisy = fisher >= np.sort(fisher)[-12]  # 40 % of 30 columns
    kept = np.abs(gradient) >= np.sort(np.abs(gradient).ravel())[-240]  # 20 % of 1200 entries
    sent = message["w"].numpy()
    np.testing.assert_array_equal(sent[:, ~noisy], (gradient * kept)[:, ~noisy])
    noise = (sent - gradient * kept)[:, noisy]
    assert float(noise.std()) == pytest.approx(float(public["w"]), rel=5 / math.sqrt(2 * noise.size))


def test_outpost_perturbs_less_and_less() -> None:
    defense = Outpost(round=24)  # probability 1 / 4
    public = defense.public(update(), 1, seeded())
    plain = [torch.equal(defense.protect(update(), public, seeded(k))["w"], update()["w"]) for k in range(200)]
    assert abs(sum(plain) / 200 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 200)
    assert not any(torch.equal(Outpost().protect(update(), public, seeded(k))["w"], update()["w"]) for k in range(20))


# Censor


def test_censored_tensors_are_orthogonal_and_keep_their_norms() -> None:
    exact, released = (Censor(exact=exact).protect(update(), {}, seeded()) for exact in (True, False))
    for name, gradient in update().items():
        assert abs(cosine(exact[name], gradient)) < 1e-6
        assert abs(cosine(released[name], gradient)) > 1e-3
        for sent in (exact, released):
            assert float(sent[name].norm()) == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_censor_sends_the_best_trial() -> None:
    values: list[float] = []

    def loss(step: Update) -> Tensor:
        # Linear: a trial is better the more its first entry falls.
        values.append(-float(step["w"][0, 0]))
        return -step["w"][0, 0]

    message = Censor(trials=10, lr=0.5).release(update(), {}, seeded(), loss)
    assert len(values) == 11 and values[0] == 0
    assert float(0.5 * message["w"][0, 0]) == pytest.approx(min(values))
    assert abs(cosine(message["w"], update()["w"])) < 1e-6


def test_censor_falls_back_to_the_gradient_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gradleak.defenses.censor"):
        message = Censor().release(update(), {}, seeded(), lambda step: flatten(step).norm())
    assert all(torch.equal(message[name], tensor) for name, tensor in update().items())
    assert "the gradient itself is sent" in caplog.text


def test_client_lets_a_defense_ask_for_its_loss() -> None:
    """On a real network exact orthogonality leaves little to win, so that some clients send the gradient."""
    network = client.client_network(build("lenet"), Censor(), Setting(precision="float64"))
    images, labels = digits(4, 1)
    sent = client.send(network, images, labels, 10, Censor(), Setting(precision="float64"), 1, [0, 1, 2, 3])
    angles = [
        [cosine(sent.message[name][index], tensor[index]) for name, tensor in sent.update.items()] for index in range(4)
    ]
    for row in angles:
        assert all(angle > 1 - 1e-12 for angle in row) or all(abs(angle) < 1e-12 for angle in row)
    assert 0 < sum(row[0] > 0.5 for row in angles) < 4


# The attack: who knows the defense recovers more.


class Bare(nn.Module):
    """A model under the parameter names of `diff2`, as somebody sees it who does not know that defense."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)  # type: ignore[no-any-return]


CASES: list[tuple[Defense, int, float]] = [
    (DPSGD(sigma=1e-4, clip=0.05), 2, 8),
    (DPSGD(sigma=1e-5, clip=10.0, mechanism="laplace"), 1, 1),
    (Outpost(noise=0.05), 1, 2),
    (Diff2(sigma=1e-4), 1, 20),
]


@pytest.mark.parametrize("defense, batch_size, gain", CASES)
def test_who_knows_the_defense_recovers_more(defense: Defense, batch_size: int, gain: float) -> None:
    oblivious, adaptive = (quality(defense, batch_size, known).mean() for known in (False, True))
    assert adaptive > oblivious + gain


def test_additive_noise_of_known_scale_tells_nothing_more() -> None:
    oblivious, adaptive = (quality(GradientNoise(eta=1e-4), 1, known).mean() for known in (False, True))
    assert 18 < oblivious < 25
    assert abs(adaptive - oblivious) < 2


def test_censor_leaks_where_it_falls_back_only() -> None:
    for known in (False, True):
        found = quality(Censor(), 1, known, victims=4)
        assert sorted(bool(value > 25) for value in found) == [False, False, True, True]
        assert float(found.min()) < 11


def quality(defense: Defense, batch_size: int, known: bool, victims: int = 2) -> Tensor:
    """Mean PSNR of each victim's images."""
    torch.set_num_threads(1)
    images, labels = digits(victims, batch_size)
    module, bare = build("lenet"), None
    scene = Scene.of(module, images, labels, defense, seed=1)
    if isinstance(defense, Diff2) and not known:
        bare = Network.of(Bare(module).double())
    level, compute = "public" if known else "oblivious", Compute(width=victims)
    observation = scene.observe(level, compute=compute, network=bare)
    return scene.psnr(reconstruct("inverting-gradients", observation, iterations=150, tv=0.0, signed=False))


def build(name: str) -> nn.Module:
    return initialise(registry.build("models", name), (1, 8, 8), 10, 0)


def digits(victims: int, batch_size: int) -> tuple[Tensor, Tensor]:
    images, labels = Data(registry.build("datasets", "digits"), "digits").victims(victims, batch_size)
    return images.double(), labels


def cosine(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum() / left.norm() / right.norm())
