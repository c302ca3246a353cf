from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from gradleak import registry, structure
from gradleak.dataset import Data
from gradleak.defense import Defense
from gradleak.defenses.augmentation import Augmentation
from gradleak.defenses.discrete_bottleneck import DiscreteBottleneck
from gradleak.defenses.instahide import InstaHide
from gradleak.defenses.mixup import Mixup
from gradleak.defenses.precode import Precode
from gradleak.defenses.soteria import Soteria
from gradleak.defenses.tract import TrAct
from gradleak.defenses.vib import VIB
from gradleak.engine import backends
from gradleak.engine.choice import choose
from gradleak.engine.objectives import relative_squared
from gradleak.engine.problem import Facts, Guess, Problem
from gradleak.errors import GradleakError
from gradleak.evaluation import metrics
from gradleak.federation import client
from gradleak.federation.observation import observe
from gradleak.mechanisms import bottleneck
from gradleak.mechanisms.packing import unpack_bits
from gradleak.model import initialise
from gradleak.seeds import Generators
from gradleak.threat import Compute, Knowledge, Labels, Level, Setting
from gradleak.update import LocalTraining, Network, local_update, one_hot

SHAPE = (1, 8, 8)
DOUBLE = Setting(precision="float64")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(name: str, **options: Any) -> nn.Module:
    return initialise(registry.build("models", name, options), SHAPE, 10, 0)


def digits(victims: int, batch_size: int, tuning: bool = False) -> tuple[Tensor, Tensor]:
    images, labels = Data(registry.build("datasets", "digits"), "digits").victims(victims, batch_size, tuning)
    return images.double(), labels


def gradient(network: Network, images: Tensor, labels: Tensor, **options: Any) -> dict[str, Tensor]:
    found = local_update(network, images, one_hot(labels, 10, images.dtype), LocalTraining(), **options)
    return {name: tensor.detach() for name, tensor in found.items()}


# Soteria


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.8])
def test_soteria_removes_the_features_of_least_relative_change(ratio: float) -> None:
    defense, (images, labels) = Soteria(ratio=ratio), digits(1, 2)
    network = client.client_network(build("mlp", widths=(20,), activation="sigmoid"), defense, DOUBLE)
    sent = client.send(network, images, labels, 10, defense, DOUBLE, 0, [0])
    first = network.module[:-1]  # type: ignore[index]
    jacobian = torch.func.vmap(torch.func.jacrev(lambda image: first(image[None])[0]))(images[0])
    ratios = (jacobian.flatten(2).norm(dim=2) / first(images[0]).abs()).sum(0)
    removed = ratios.argsort()[: int(ratio * 20)].tolist()
    weight = sent.message["4.defended.weight"][0]
    assert (weight == 0).all(0).nonzero().flatten().tolist() == sorted(removed)
    plain = gradient(Network.of(build("mlp", widths=(20,), activation="sigmoid").double()), images[0], labels[0])
    kept = [column for column in range(20) if column not in removed]
    torch.testing.assert_close(weight[:, kept], plain["4.weight"][:, kept])
    for name in ("2.weight", "2.bias"):
        torch.testing.assert_close(sent.message[name][0], plain[name])
    torch.testing.assert_close(sent.message["4.defended.bias"][0], plain["4.bias"])
    # Encoded: a bitmap of 20 columns, and all but the removed columns.
    row = {name: tensor[0] for name, tensor in sent.message.items()}
    data = defense.pack(row, {})
    assert unpack_bits(data[:3], 20, 1).nonzero().flatten().tolist() == kept
    assert len(data) == 3 + 4 * (sum(tensor.numel() for tensor in row.values()) - 10 * len(removed))


def test_soteria_keeps_features_that_are_zero() -> None:
    defense, (images, _) = Soteria(ratio=0.3), digits(1, 1)
    network = client.client_network(build("mlp", widths=(64,)), defense, DOUBLE)
    features = network.module[:-1](images[0])  # type: ignore[index]
    kept = next(iter(defense.private_buffers(network.module, images[0], seeded()).values()))
    assert bool((features == 0).any())
    assert bool((kept[features == 0] == 1).all())
    assert int((kept == 0).sum()) == 19


def test_soteria_defends_another_layer_or_says_why_not() -> None:
    module = build("mlp", widths=(20, 16))
    assert "4.defended.weight" in dict(Soteria(layer=-2).prepare_model(module).named_parameters())
    with pytest.raises(GradleakError, match="layer = 3, but the model has 3 linear layers"):
        Soteria(layer=3).prepare_model(module)


# Bottlenecks


@pytest.mark.parametrize("expand", [True, False])
def test_bottleneck_is_its_formula(expand: bool) -> None:
    beta, (images, labels) = 0.3, digits(1, 3)
    module = build("mlp", widths=(20,), activation="sigmoid")
    network = Network.of(bottleneck.insert(module, 7, beta, expand=expand, seed=0).double())
    ((name, shape),) = bottleneck.noise_shapes(network.module, 3).items()
    noise = torch.randn(shape, generator=seeded(), dtype=torch.float64)
    weight = {key.removeprefix("model.4."): tensor for key, tensor in network.parameters.items()}
    features = copy.deepcopy(module).double()[:-1](images[0])  # type: ignore[index]
    mean, raw = (features @ weight["0.encoder.weight"].T + weight["0.encoder.bias"]).split(7, dim=1)
    deviation = (1 + raw.exp()).log()
    for drawn, buffers in ((noise, {name: noise}), (torch.zeros_like(noise), {})):
        hidden = mean + deviation * drawn
        for layer in (1, 2)[: 1 + expand]:
            hidden = hidden @ weight[f"{layer}.weight"].T + weight[f"{layer}.bias"]
        torch.testing.assert_close(network.logits(images[0], buffers=buffers), hidden)
        standard = Normal(torch.zeros_like(mean), torch.ones_like(mean))
        divergence = kl_divergence(Normal(mean, deviation), standard).sum(1).mean() / math.log(2)
        expected = nn.functional.cross_entropy(hidden, labels[0]) + beta * divergence
        found = network.loss(images[0], one_hot(labels[0], 10, torch.float64), buffers=buffers)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("defense", [Precode(width=5), VIB(width=5)])
def test_noise_is_each_images_own_and_follows_the_generator(defense: Precode | VIB) -> None:
    network = client.client_network(build("lenet"), defense, DOUBLE)
    images, _ = digits(1, 4)
    first, again, other = (
        next(iter(defense.private_buffers(network.module, images[0], seeded(seed)).values())) for seed in (0, 0, 1)
    )
    assert first.shape == (4, 5) and first.unique().numel() == 20
    assert torch.equal(first, again) and not torch.equal(first, other)
    single = defense.private_buffers(network.module.float(), images[0].float(), seeded())
    assert torch.equal(next(iter(single.values())), first.float())


def test_deterministic_vib_has_no_noise() -> None:
    module = VIB(stochastic=False).prepare_model(build("lenet"))
    assert VIB(stochastic=False).private_buffers(module, digits(1, 1)[0][0], seeded()) == {}


@pytest.mark.parametrize("frozen", [True, False])
def test_codes_hide_what_is_before_them(frozen: bool) -> None:
    defense, (images, labels) = DiscreteBottleneck(heads=3, codes=5, frozen=frozen), digits(1, 2)
    module = build("mlp", widths=(20,), activation="sigmoid")
    network = client.client_network(module, defense, DOUBLE)
    sent = client.send(network, images, labels, 10, defense, DOUBLE, 0, [0])
    behind = ["4.0.values", "4.1.weight", "4.1.bias"]
    assert list(sent.message) == (behind if frozen else ["2.weight", "2.bias", *behind])
    # The output of the codes by hand: 20 features make three parts of 7, the last one padded.
    features = network.module[:-1](images[0])  # type: ignore[index]
    normal = (features - features.mean(1, keepdim=True)) / (features.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    parts = torch.cat([normal, torch.zeros(2, 1, dtype=torch.float64)], 1).view(2, 3, 7)
    keys, values = network.buffers["4.0.keys"], network.parameters["4.0.values"]
    nearest = torch.tensor([[int(torch.cdist(parts[i, h][None], keys[h]).argmin()) for h in range(3)] for i in (0, 1)])
    found = torch.stack([torch.cat([values[h, nearest[i, h]] for h in range(3)])[:20] for i in (0, 1)])
    last = found @ network.parameters["4.1.weight"].T + network.parameters["4.1.bias"]
    torch.testing.assert_close(network.logits(images[0]), last)
    hit = (sent.message["4.0.values"][0] != 0).any(-1)
    expected = torch.zeros(3, 5, dtype=torch.bool)
    for head in range(3):
        expected[head, nearest[:, head]] = True
    assert torch.equal(hit, expected)


# First layer


@pytest.mark.parametrize("size", [1, 3])
def test_tract_of_a_linear_layer_is_its_formula(size: int) -> None:
    images, labels = digits(1, size)
    module = build("mlp", widths=(20,), activation="sigmoid")
    plain, found = (
        gradient(Network.of(model.double()), images[0], labels[0])
        for model in (copy.deepcopy(module), TrAct(damping=0.2).prepare_model(module))
    )
    rows = (images[0].flatten(1) - 0.5) / 0.5
    # D^T X of full row rank gives D^T back.
    sensitivities = plain["2.weight"] @ torch.linalg.pinv(rows)
    kernel = rows @ rows.T / size + 0.2 * torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(found["2.weight"], sensitivities @ torch.linalg.inv(kernel) @ rows)
    for name in ("2.bias", "4.weight", "4.bias"):
        torch.testing.assert_close(found[name], plain[name])
    if size == 1:
        scale = 1 / (float(rows.square().sum()) + 0.2)
        torch.testing.assert_close(found["2.weight"], scale * plain["2.weight"])


@pytest.mark.parametrize("size", [1, 2])
def test_tract_of_a_convolution_whitens_its_patches(size: int) -> None:
    images, labels = digits(1, size)
    module = build("lenet")
    plain, defended = (Network.of(m.double()) for m in (copy.deepcopy(module), TrAct().prepare_model(module)))
    torch.testing.assert_close(plain.logits(images[0]), defended.logits(images[0]))
    before, after = gradient(plain, images[0], labels[0]), gradient(defended, images[0], labels[0])
    patches = nn.functional.unfold(images[0], 5, padding=2, stride=2).transpose(1, 2).flatten(0, 1)
    # D^T (X X^T / b + l I)^-1 X = D^T X (X^T X / b + l I)^-1
    kernel = patches.T @ patches / len(patches) + 0.1 * torch.eye(25, dtype=torch.float64)
    expected = (before["1.weight"].flatten(1) @ torch.linalg.inv(kernel)).view(12, 1, 5, 5)
    torch.testing.assert_close(after["1.weight"], expected)
    torch.testing.assert_close({**after, "1.weight": 0}, {**before, "1.weight": 0})


def test_tract_refuses_other_first_layers() -> None:
    with pytest.raises(GradleakError, match="first layer with weights is BatchNorm2d"):
        module = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3), nn.Flatten())
        structure.mark(module, (1, 8, 8))
        TrAct().prepare_model(module)


@pytest.mark.parametrize("defense", [Soteria(), TrAct(), DiscreteBottleneck(), Precode(width=4)])
def test_backends_agree(defense: Defense) -> None:
    network = client.client_network(build("lenet"), defense, DOUBLE)
    images, labels = digits(2, 2)
    sent = client.send(network, images, labels, 10, defense, DOUBLE, 0, [0, 1])
    problem = Problem(
        network=network,
        training=LocalTraining(),
        decode=lambda variables, facts: Guess(variables["images"], facts.targets),
        match=lambda update, facts: relative_squared(defense.simulate(update, sent.public), facts.message),
        penalty=lambda guess, variables, facts: guess.images.new_zeros(()),
    )
    facts = Facts(one_hot(labels, 10, torch.float64), message=sent.message)
    start = {"images": 0.5 * images + 0.25}
    reference = backends.Sequential()(problem, start, facts)
    for name in backends.BACKENDS:
        backend = choose(name, problem, start, facts, 1).backend
        values = backend(problem, start, backend.prepare(problem, facts))
        torch.testing.assert_close(values.total, reference.total)
        torch.testing.assert_close(values.gradients, reference.gradients, rtol=1e-6, atol=1e-9)


# Data


@settings(max_examples=25, deadline=None)
@given(size=st.integers(2, 6), count=st.integers(2, 6), seed=st.integers(0, 1000))
def test_mixing_is_convex_and_mixes_labels_alike(size: int, count: int, seed: int) -> None:
    defense = Mixup(count=count)
    images = torch.rand(size, *SHAPE, generator=seeded(seed), dtype=torch.float64)
    targets = torch.eye(size, dtype=torch.float64)
    mixing = defense.draw(images, seeded(seed))["mixing"]
    assert bool((mixing >= 0).all())
    torch.testing.assert_close(mixing.sum(1), torch.ones(size, dtype=torch.float64))
    encoded, soft = defense.encode(images, targets, seeded(seed))
    torch.testing.assert_close(soft, mixing)
    torch.testing.assert_close(encoded.flatten(1), mixing @ images.flatten(1))
    hidden, soft = InstaHide(count=count).encode(images, targets, seeded(seed))
    torch.testing.assert_close((hidden - 0.5).abs(), (encoded - 0.5).abs())
    torch.testing.assert_close(soft, mixing)
    assert 0 <= float(hidden.min()) and float(hidden.max()) <= 1


def test_coefficients_are_bounded_dirichlet() -> None:
    rows = torch.stack([Mixup(largest=1.0)._coefficients(seeded(seed)) for seed in range(3000)])
    mean = np.array([3, 1, 1, 1]) / 6
    bound = 5 * np.sqrt(mean * (1 - mean) / 7 / len(rows))
    assert bool((np.abs(rows.mean(0).numpy() - mean) < bound).all())
    assert max(float(Mixup()._coefficients(seeded(seed)).max()) for seed in range(500)) <= 0.65


def test_signs_are_fair_and_independent() -> None:
    signs = InstaHide().draw(torch.rand(2, 1, 64, 64, generator=seeded()), seeded())["signs"]
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 5 / math.sqrt(signs.numel())


@pytest.mark.parametrize("defense", [Mixup(), InstaHide()])
def test_a_batch_of_one_cannot_be_mixed(defense: Mixup) -> None:
    with pytest.raises(GradleakError, match="set batch_size to 2 or more"):
        defense.draw(torch.zeros(1, *SHAPE), seeded())


def test_relaxed_latents_reach_the_true_ones() -> None:
    images = torch.rand(3, *SHAPE, generator=seeded(), dtype=torch.float64)
    defense = InstaHide()
    true = defense.draw(images, seeded(1))
    shapes = {name: tensor.shape for name, tensor in true.items()}
    assert {name: torch.Size(shape) for name, shape in defense.unknowns(3, SHAPE).items()} == shapes
    numbers = {
        "mixing": true["mixing"].clamp(min=1e-12).log() - torch.eye(3, dtype=torch.float64),
        "signs": 20 * true["signs"],
    }
    torch.testing.assert_close(defense.relax(numbers), true, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name, matrix", [("rotate", "rotation"), ("shear", "shear")])
def test_warps_are_those_of_scipy(name: Any, matrix: str) -> None:
    images = torch.rand(2, 3, 9, 7, generator=seeded(), dtype=torch.float64)
    angle = 0.6 * math.pi / 4
    # Rows, then columns; from output to input coordinates.
    maps = {
        "rotation": np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]),
        "shear": np.array([[1, 0], [0.3, 1]]),
    }
    centre = np.array([4.0, 3.0])
    changed, _ = Augmentation(policy=(name,), strength=0.6).encode(images, torch.zeros(2, 1), seeded())
    expected = [
        ndimage.affine_transform(
            plane, maps[matrix], centre - maps[matrix] @ centre, order=1, mode="grid-constant", cval=0.0
        )
        for plane in images.flatten(0, 1).numpy()
    ]
    np.testing.assert_allclose(changed.flatten(0, 1).numpy(), np.stack(expected), atol=1e-12)


def test_other_transformations() -> None:
    images = torch.rand(1, 1, 4, 8, generator=seeded(), dtype=torch.float64)

    def apply(*policy: Any) -> Tensor:
        return Augmentation(policy=policy, strength=0.5).encode(images, torch.zeros(1, 1), seeded())[0]

    torch.testing.assert_close(apply("translate")[..., 1:], images[..., :-1])
    assert float(apply("translate")[..., 0].abs().max()) == 0
    torch.testing.assert_close(apply("invert", "flip"), (1 - images).flip(-1))
    torch.testing.assert_close(apply("contrast"), 0.125 + 0.75 * images)
    torch.testing.assert_close(apply("brightness"), 0.75 * images)
    assert torch.equal(apply(), images)


# The attack: who knows the defense recovers more.


def test_soteria_falls() -> None:
    """Oblivious about 6 dB; leaving the missing columns out, about 50 dB."""
    oblivious, adaptive = (quality(Soteria(ratio=0.8), known=known) for known in (False, True))
    assert adaptive > 35 and adaptive > oblivious + 25


@pytest.mark.parametrize("defense", [Precode(), VIB()])
def test_bottlenecks_fall_behind_a_linear_layer(defense: Defense) -> None:
    """The first layer's gradients give the image away in closed form, whatever the noise."""
    model = ("mlp", {"widths": (32,)})
    assert quality(defense, model=model) < 20
    assert quality(defense, known=True, model=model, attack="linear-leakage") > 90


def test_precode_falls_in_front_of_convolutions() -> None:
    """Oblivious about 4 dB; searching for the noise too, about 23 dB."""
    defense = Precode(width=16)
    oblivious = quality(defense, victims=4)
    adaptive = quality(defense, known=True, attack="bottleneck-inversion", iterations=800, tv=0.0, victims=4)
    assert adaptive > 20 and adaptive > oblivious + 15


def test_codes_leak_little() -> None:
    """The messages agree to rounding and the images do not: what is left out is lost."""
    oblivious, adaptive = (quality(DiscreteBottleneck(), known=known) for known in (False, True))
    assert oblivious + 1 < adaptive < 12


def test_tract_falls() -> None:
    oblivious, adaptive = (quality(TrAct(), known=known) for known in (False, True))
    assert adaptive > 40 and adaptive > oblivious + 20


@pytest.mark.parametrize("defense, batch_size, gain", [(Augmentation(), 1, 12), (Mixup(), 2, 5), (InstaHide(), 2, 0.1)])
def test_encodings_leak_more_to_who_searches_through_them(defense: Defense, batch_size: int, gain: float) -> None:
    size: dict[str, Any] = {"batch_size": batch_size, "victims": 4}
    oblivious = quality(defense, **size)
    adaptive = quality(defense, known=True, attack="encoding-inversion", iterations=300, tv=1e-4, **size)
    assert adaptive > oblivious + gain


@pytest.mark.parametrize("name", ["encoding-inversion", "bottleneck-inversion"])
def test_counter_attacks_say_what_they_are_for(name: str) -> None:
    attack, none = registry.build("attacks", name), registry.build("defenses", "none")
    reason = attack.unsuited(build("lenet"), Setting(), none)
    assert reason is not None and reason.startswith("needs")
    defense = {"encoding-inversion": Mixup(), "bottleneck-inversion": VIB()}[name]
    assert attack.unsuited(defense.prepare_model(build("lenet")), Setting(), defense) is None
    assert name in defense.counter_attacks


def quality(
    defense: Defense,
    known: bool = False,
    batch_size: int = 1,
    model: tuple[str, dict[str, Any]] = ("lenet", {}),
    attack: str = "inverting-gradients",
    victims: int = 8,
    **options: Any,
) -> float:
    """Mean PSNR of the images of tuning victims."""
    torch.set_num_threads(1)
    images, labels = digits(victims, batch_size, tuning=True)
    setting, module = Setting(precision="float64", batch_size=batch_size), build(model[0], **model[1])
    network = client.client_network(module, defense, setting)
    sent = client.send(network, images, labels, 10, defense, setting, 1, [*range(victims)])
    if isinstance(defense, TrAct) and not known:
        network = Network.of(module.double())
    level = Level.PUBLIC if known else Level.OBLIVIOUS
    knowledge = Knowledge(labels=Labels.KNOWN, defense=level)
    observation = observe(sent, network, defense, setting, SHAPE, labels, 10, knowledge, compute=Compute(width=victims))
    own = {"iterations": 150, "tv": 0.0, "signed": False} if attack == "inverting-gradients" else options
    plugin = registry.build("attacks", attack, own)
    found = plugin.reconstruct(observation, Generators([str(k) for k in range(victims)], dtype=torch.float64))
    scores = [
        metrics.psnr(guess[metrics.assign(guess, truth)], truth).mean()
        for guess, truth in zip(found.images, images, strict=True)
    ]
    return float(torch.stack(scores).mean())
