from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradleak import registry
from gradleak.attack import Attack, Reconstruction
from gradleak.dataset import Data
from gradleak.defense import Defense
from gradleak.evaluation import metrics
from gradleak.federation import client
from gradleak.model import initialise
from gradleak.seeds import Generators
from gradleak.testing import Scene
from gradleak.threat import Observation, Setting


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def data(name: str) -> Data:
    return Data(registry.build("datasets", name), name)


def observe(
    images: Tensor,
    labels: Tensor,
    model: str,
    options: dict[str, Any] | None = None,
    classes: int = 10,
    defense: Defense | None = None,
    seed: int = 0,
    **setting: Any,
) -> Observation:
    """What an oblivious attacker sees of victims [N, B, C, H, W], float64 unless the setting says otherwise."""
    channels, height, width = images.shape[2:]
    how = Setting(**{"batch_size": images.shape[1], "precision": "float64", **setting})
    module = initialise(registry.build("models", model, options), (channels, height, width), classes, seed)
    return Scene.of(module, images, labels, defense, how, classes, seed=1).observe(labels="none")


def victims(name: str, count: int, batch_size: int) -> tuple[Tensor, Tensor, int]:
    source = data(name)
    return *source.victims(count, batch_size), source.classes


def attack(name: str, **options: Any) -> Attack:
    plugin: Attack = registry.build("attacks", name, options)
    return plugin


def solve(name: str, observation: Observation, **options: Any) -> Reconstruction:
    names = [("victim", index) for index in range(observation.victims)]
    return attack(name, **options).reconstruct(observation, Generators(names, dtype=observation.dtype))


def decibels(answer: Reconstruction, truth: Tensor) -> Tensor:
    """PSNR [N, B] without a cap, images assigned."""
    rows = []
    for raw, images in zip(answer.images, truth.double(), strict=True):
        error = metrics.mse(metrics.clean(raw)[0][metrics.assign(raw, images)], images)
        rows.append(-10 * (error + 1e-40).log10())
    return torch.stack(rows)


def noise(sigma: float) -> Defense:
    defense: Defense = registry.build("defenses", "gaussian-noise", {"sigma": sigma, "clip": None})
    return defense


# SPEAR


@pytest.mark.parametrize(("precision", "least"), [("float64", 100.0), ("float32", 60.0)])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["digits", "photos"])
def test_spear_is_exact(name: str, batch_size: int, precision: str, least: float) -> None:
    images, labels, classes = victims(name, 2, batch_size)
    answer = solve("spear", observe(images, labels, "mlp", classes=classes, precision=precision))
    assert decibels(answer, images).min() > least
    assert answer.loss is not None and answer.loss.max() < 2 / 256
    assert answer.details["rank"].tolist() == [batch_size] * 2


def test_spear_is_exact_for_faces_of_two_classes() -> None:
    images, labels, classes = victims("faces", 2, 8)
    assert decibels(solve("spear", observe(images, labels, "mlp", classes=classes)), images).min() > 100


def test_spear_says_that_it_failed_under_noise() -> None:
    images, labels, _ = victims("digits", 3, 4)
    clear = solve("spear", observe(images, labels, "mlp"))
    noisy = solve("spear", observe(images, labels, "mlp", defense=noise(1e-3)), rounds=10)
    assert clear.details["self_check"].min() > 0.998
    assert noisy.details["self_check"].max() < 0.9
    assert noisy.loss is not None
    torch.testing.assert_close(noisy.loss, 1 - noisy.details["self_check"])
    assert decibels(noisy, images).median() < 20
    assert set(noisy.status) == {"ok"}


def test_spear_takes_the_rank_for_what_can_be_told_apart() -> None:
    images, labels, _ = victims("digits", 2, 4)
    images[0, 1], labels[0, 1] = images[0, 0], labels[0, 0]
    answer = solve("spear", observe(images, labels, "mlp"))
    assert answer.details["rank"].tolist() == [3, 4]
    assert (decibels(answer, images)[0] > 100).sum() >= 3
    assert decibels(answer, images)[1].min() > 100


def test_spear_follows_a_weight_difference() -> None:
    images, labels, _ = victims("digits", 2, 4)
    answer = solve("spear", observe(images, labels, "mlp", precision="float32", local_lr=0.1))
    assert decibels(answer, images).min() > 60


def test_spear_loss_tells_truth_from_others() -> None:
    images, labels, _ = victims("digits", 2, 4)
    observation, method = observe(images, labels, "mlp"), attack("spear")
    truth = method.loss(observation, images.double(), torch.empty(0), {})
    other = method.loss(observation, images.flip(0).double(), torch.empty(0), {})
    assert truth is not None and other is not None
    assert truth.max() < 0.002 and other.min() > 0.1


def test_spear_swaps_repair_a_wrong_choice() -> None:
    # Two classes and one hidden layer: planes of differences hold as many neurons as the right ones.
    images, labels, classes = victims("faces", 4, 2)
    answer = solve("spear", observe(images, labels, "mlp", {"widths": (256,)}, classes), rounds=30)
    assert decibels(answer, images).min() > 100
    assert answer.details["self_check"].min() > 0.99


# Linear leakage


@pytest.mark.parametrize("model", ["linear", "mlp"])
@pytest.mark.parametrize("name", ["digits", "faces", "photos"])
def test_linear_leakage_is_exact_for_one_image(name: str, model: str) -> None:
    images, labels, classes = victims(name, 3, 1)
    answer = solve("linear-leakage", observe(images, labels, model, classes=classes, precision="float32"))
    assert (answer.images - images).abs().max() < 1e-4
    assert answer.loss is not None and answer.loss.max() < 1e-8


def test_linear_leakage_leaves_out_a_layer_on_encoded_images() -> None:
    defense = registry.build("defenses", "quantum-encoding", {"encoding": "fourier"})
    module = initialise(registry.build("models", "mlp"), (1, 8, 8), 10, 0)
    assert attack("linear-leakage").unsuited(module, Setting(), defense) is None
    said = attack("linear-leakage").unsuited(defense.prepare_model(module), Setting(), defense)
    assert said is not None and "first layer" in said


def test_linear_leakage_follows_a_weight_difference() -> None:
    images, labels, _ = victims("digits", 3, 1)
    answer = solve("linear-leakage", observe(images, labels, "mlp", precision="float32", local_lr=0.1))
    assert (answer.images - images).abs().max() < 1e-3


def test_linear_leakage_averages_noise_away() -> None:
    images, labels, _ = victims("digits", 8, 1)
    observation = observe(images, labels, "mlp", defense=noise(1e-4))
    weight, bias = observation.update["2.weight"], observation.update["2.bias"]
    largest = bias.abs().argmax(1)
    index = torch.arange(len(bias))
    single = (weight[index, largest] / bias[index, largest, None]).view_as(images) * 0.5 + 0.5
    row = decibels(Reconstruction(images=single.clamp(0, 1)), images)
    assert (decibels(solve("linear-leakage", observation), images) > row + 6).all()


def test_linear_leakage_finds_images_with_a_neuron_of_their_own() -> None:
    images, labels, _ = victims("photos", 6, 4)
    answer = solve("linear-leakage", observe(images, labels, "mlp", precision="float32"))
    # Measured: every one of these images alone activates some neuron; rows that recur twice are found.
    assert (decibels(answer, images) > 60).double().mean() > 0.75


@given(st.integers(2, 9), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_linear_leakage_inverts_any_single_image(side: int, seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 1, 2, side, side, generator=stream, dtype=torch.float64)
    labels = torch.randint(3, (2, 1), generator=stream)
    answer = solve("linear-leakage", observe(images, labels, "linear", classes=3))
    torch.testing.assert_close(answer.images, images, atol=1e-9, rtol=0)


# R-GAP


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_r_gap_inverts_the_network(precision: str) -> None:
    images, labels, _ = victims("digits", 10, 1)
    answer = solve("r-gap", observe(images, labels, "cnn6", precision=precision))
    assert (decibels(answer, images) > 40).double().mean() >= 0.8
    assert answer.labels is not None and torch.equal(answer.labels, labels)
    assert answer.loss is not None and answer.loss.median() < 1e-8


def test_r_gap_collapses_under_noise() -> None:
    images, labels, _ = victims("digits", 6, 1)
    answer = solve("r-gap", observe(images, labels, "cnn6", defense=noise(1e-4)))
    assert decibels(answer, images).max() < 25
    assert answer.loss is not None and answer.loss.min() > 1e-4


def test_r_gap_with_two_classes_tries_both_labels() -> None:
    images, labels, _ = victims("digits", 6, 1)
    answer = solve("r-gap", observe(images, labels % 2, "cnn6", {"width": 6}, classes=2))
    assert (decibels(answer, images) > 40).double().mean() >= 0.8


def test_r_gap_goes_through_linear_layers() -> None:
    from torch import nn

    from gradleak import structure
    from gradleak.model import Normalise
    from gradleak.threat import Setting as ClientSetting
    from gradleak.update import Network

    images, labels, _ = victims("digits", 4, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        chain = nn.Sequential(
            Normalise(1),
            nn.Flatten(),
            nn.Linear(64, 48, bias=False),
            nn.LeakyReLU(0.1),
            nn.Linear(48, 10, bias=False),
        ).double()
    structure.mark(chain, (1, 8, 8))
    assert attack("r-gap").unsuited(chain, ClientSetting(), registry.build("defenses", "none")) is None
    network = Network.of(chain)
    none: Defense = registry.build("defenses", "none")
    how = ClientSetting(precision="float64")
    sent = client.send(network, images.double(), labels, 10, none, how, 1, [0, 1, 2, 3])
    template = observe(images, labels, "linear")
    answer = solve("r-gap", replace(template, network=network, message=sent.message, update=sent.message))
    assert decibels(answer, images).min() > 100


# Cocktail party


@pytest.mark.parametrize(("batch_size", "least"), [(2, 25.0), (4, 25.0), (8, 20.0)])
def test_cocktail_party_parts_photos(batch_size: int, least: float) -> None:
    images, labels, classes = victims("photos", 3, batch_size)
    observation = observe(images, labels, "mlp", classes=classes, precision="float32")
    answer = solve("cocktail-party", observation, restarts=2, iterations=100)
    assert decibels(answer, images).median() > least
    # Independence alone decides: the same answer with all rows turned around.
    turned = {name: -tensor for name, tensor in observation.update.items()}
    again = solve("cocktail-party", replace(observation, update=turned), restarts=2, iterations=100)
    assert decibels(again, images).median() > least


def test_cocktail_party_without_bias_is_right_up_to_sign_and_scale() -> None:
    images, labels, classes = victims("photos", 3, 4)
    observation = observe(images, labels, "mlp", {"bias": False}, classes)
    answer = solve("cocktail-party", observation, restarts=2, iterations=100)
    for found, truth in zip(answer.images, images.double(), strict=True):
        both = torch.corrcoef(torch.cat([found.flatten(1), truth.flatten(1)]))[:4, 4:].abs()
        assert both.amax(0).median() > 0.98


# TrAct


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_tract_inversion_is_exact(batch_size: int, precision: str) -> None:
    images, labels, _ = victims("digits", 3, batch_size)
    guard = registry.build("defenses", "tract", {"damping": 0.3})
    observation = observe(images, labels, "mlp", {"widths": (256,)}, defense=guard, precision=precision)
    answer = solve("tract-inversion", observation)
    assert decibels(answer, images).min() > (200 if precision == "float64" else 90)
    assert answer.loss is not None and answer.loss.max() < 1e-12
    # Whoever takes the rows for images is wrong.
    assert attack("linear-leakage").unsuited(observation.network.module, Setting(batch_size=batch_size), guard)


# APRIL


@pytest.mark.parametrize(("precision", "least"), [("float64", 150.0), ("float32", 60.0)])
@pytest.mark.parametrize("name", ["digits", "faces", "photos"])
def test_april_reads_the_patches(name: str, precision: str, least: float) -> None:
    images, labels, classes = victims(name, 2, 1)
    answer = solve("april", observe(images, labels, "vit", {"depth": 2}, classes, precision=precision))
    assert decibels(answer, images).min() > least


def test_april_shrinks_to_grey_under_noise() -> None:
    images, labels, classes = victims("photos", 2, 1)
    answer = solve("april", observe(images, labels, "vit", {"depth": 1}, classes, defense=noise(1.0)))
    assert (answer.images - 0.5).square().mean().sqrt() < 0.05


@given(st.integers(1, 3), st.integers(2, 11), st.integers(2, 11), st.integers(2, 4))
@settings(max_examples=15, deadline=None)
def test_april_takes_any_size(channels: int, height: int, width: int, patch: int) -> None:
    images = torch.rand(1, 1, channels, height, width, generator=torch.Generator().manual_seed(height * 31 + width))
    options = {"patch": patch, "dim": 48, "depth": 1, "heads": 2}
    answer = solve("april", observe(images, torch.zeros(1, 1, dtype=torch.long), "vit", options))
    assert decibels(answer, images).min() > 60


# Where they cannot run


@pytest.mark.parametrize(
    ("name", "model", "options", "batch_size", "said"),
    [
        ("spear", "linear", {}, 2, "a ReLU"),
        ("spear", "lenet", {}, 2, "a ReLU"),
        ("spear", "mlp", {"activation": "gelu"}, 2, "a ReLU"),
        ("spear", "mlp", {"bias": False}, 2, "a bias"),
        ("spear", "mlp", {"widths": (3,)}, 4, "3 neurons face a batch of 4"),
        ("linear-leakage", "lenet", {}, 1, "linear with a bias"),
        ("linear-leakage", "mlp", {"bias": False}, 1, "linear with a bias"),
        ("tract-inversion", "mlp", {}, 1, "needs defense tract"),
        ("cocktail-party", "convnet", {}, 2, "first layer is linear"),
        ("cocktail-party", "mlp", {"widths": (3,)}, 4, "3 neurons face a batch of 4"),
        ("april", "mlp", {}, 1, "learned positions"),
        ("april", "vit", {}, 2, "batch of 1, not 2"),
        ("april", "vit", {"dim": 2, "heads": 1}, 1, "4 patches face 2 dimensions"),
        ("r-gap", "lenet", {}, 1, "without biases"),
        ("r-gap", "cnn6", {}, 2, "batch of 1, not 2"),
    ],
)
def test_unsuited(name: str, model: str, options: dict[str, Any], batch_size: int, said: str) -> None:
    module = initialise(registry.build("models", model, options), (1, 8, 8), 10, 0)
    reason = attack(name).unsuited(module, Setting(batch_size=batch_size), registry.build("defenses", "none"))
    assert reason is not None and said in reason and "\n" not in reason


def test_planes_found_by_descent_separate_batches_that_chance_does_not() -> None:
    images, labels = data("digits").victims(1, 16, tuning=True)
    observation = observe(images, labels, "mlp", {"widths": [256, 64]})
    answer = solve("spear-pp", observation, rounds=20)
    assert float(answer.details["self_check"][0]) == 1
    apart = (answer.images[:, :, None] - images[:, None].double()).square().flatten(3).mean(3).amin(1)
    assert apart.max() < 1e-6
