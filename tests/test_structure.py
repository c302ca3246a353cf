"""Structure is found by running a network, whatever its modules are called and in whatever order they stand."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from gradleak import registry, structure
from gradleak.attack import Attack
from gradleak.defense import Defense
from gradleak.errors import GradleakError
from gradleak.federation import client
from gradleak.mechanisms import batch_statistics, dropout
from gradleak.search import labels as label_rules
from gradleak.seeds import Generators
from gradleak.suite.schema import Utility
from gradleak.suite.settings import build_setting, stored_setting
from gradleak.testing import Scene
from gradleak.threat import Knowledge, Observation, Setting
from gradleak.update import Network

SHAPE, CLASSES = (3, 8, 8), 5
PIXELS = 3 * 8 * 8


class Net(nn.Module):
    """A network of two layers with everything odd that is asked for."""

    def __init__(self, head: str = "plain", front: str = "plain", aux: str = "none"):
        super().__init__()
        self.kind, self.front = head, front
        if aux == "before":
            self.aux = nn.Linear(24, CLASSES)
        if head == "functional":
            self.matrix = nn.Parameter(0.2 * torch.randn(CLASSES, 24))
            self.shift = nn.Parameter(0.1 * torch.randn(CLASSES))
        elif head == "transposed":
            self.matrix = nn.Parameter(0.2 * torch.randn(24, CLASSES))
        elif head == "nested":
            self.head: nn.Module = nn.Sequential(nn.Sequential(nn.Dropout(0.0), nn.Linear(24, CLASSES)), nn.Identity())
        elif head == "convolution":
            self.head = nn.Sequential(nn.Conv2d(6, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        else:
            self.head = nn.Linear(24, CLASSES)
        self.first = nn.Linear(PIXELS, 24)
        self.activation = nn.ReLU()
        self.register_buffer("centre", torch.tensor([0.4, 0.5, 0.6])[:, None, None])
        if aux == "after":
            self.aux = nn.Linear(24, CLASSES)

    def pixels(self, images: Tensor) -> Tensor:
        if self.front == "by hand":
            images = (images - self.get_buffer("centre")) / 0.25
        if self.front == "255":
            images = 255 * images - 128
        if self.front == "permuted":
            return ((images - 0.5) * 2).permute(0, 2, 3, 1).flatten(1)
        if self.front == "mixed":
            images = images.cumsum(-1)
        if self.front == "squared":
            images = images**2
        return images.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.activation(self.first(self.pixels(images)))
        if self.kind == "functional":
            return F.linear(features, self.matrix, self.shift)
        if self.kind == "transposed":
            return features @ self.matrix  # type: ignore[no-any-return]
        if self.kind == "convolution":
            features = features.unflatten(1, (6, 2, 2))
        scores: Tensor = self.head(features)
        return scores.log_softmax(-1) if self.kind == "logarithm" else -scores if self.kind == "negated" else scores


def marked(module: nn.Module) -> nn.Module:
    structure.mark(module, SHAPE)
    return module.eval()


def net(*args: str, **kwargs: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return marked(Net(*args, **kwargs))


def none() -> Defense:
    defense: Defense = registry.build("defenses", "none")
    return defense


def victims(count: int = 6, batch: int = 1) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(1)
    images = torch.rand(count, batch, *SHAPE, generator=stream, dtype=torch.float64)
    return images, torch.randint(CLASSES, (count, batch), generator=stream)


def observe(module: nn.Module, batch: int = 1, defense: Defense | None = None, **setting: Any) -> Observation:
    how = Setting(batch_size=batch, precision="float64", **setting)
    return Scene.of(module, *victims(batch=batch), defense, how, CLASSES, seed=1).observe(labels="none")


def attack(name: str, **options: Any) -> Attack:
    plugin: Attack = registry.build("attacks", name, options)
    return plugin


def error(name: str, module: nn.Module, batch: int = 1, **options: Any) -> float:
    """Largest distance of a pixel from the truth."""
    plugin, observation = attack(name, **options), observe(module, batch)
    assert plugin.unsuited(observation.network.module, Setting(batch_size=batch), none()) is None
    streams = Generators([("victim", i) for i in range(observation.victims)], dtype=torch.float64)
    images, truth = plugin.reconstruct(observation, streams).images, victims(batch=batch)[0]
    gaps = (images[:, :, None] - truth[:, None]).abs().flatten(3).amax(-1)
    return float(gaps.amin(1).max())


# The head


@pytest.mark.parametrize("aux", ["none", "before", "after"])
@pytest.mark.parametrize("head", ["plain", "functional", "transposed", "nested", "convolution", "logarithm"])
def test_labels_are_read_from_the_layer_whose_output_is_the_logits(head: str, aux: str) -> None:
    module = net(head=head, aux=aux)
    observation = observe(module)
    found = structure.of(observation.network.module).head
    assert label_rules.lacking(found) is None
    for rule in ("auto", "row-sign", "wainakh"):
        inferred = label_rules.infer(observation.gradient, found, 1, rule)
        assert torch.equal(inferred, victims()[1]), rule
    assert not {found.weight, found.bias} & {"aux.weight", "aux.bias"}


@pytest.mark.parametrize("head", ["plain", "nested", "logarithm"])
def test_the_heads_layer_is_found_inside_its_wrappers(head: str) -> None:
    module = net(head=head, aux="after")
    found = structure.of(module).head
    assert found.layer is not None and module.get_parameter(f"{found.layer}.weight").shape == (CLASSES, 24)
    assert found.owned == (f"{found.layer}.weight", f"{found.layer}.bias")
    for defense in ("precode", "vib", "soteria"):
        registry.build("defenses", defense).prepare_model(module)


def test_a_head_that_is_none_is_refused() -> None:
    class Softmax(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).softmax(-1)

    for module in (marked(Softmax()), marked(nn.Sequential(nn.Conv2d(3, CLASSES, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                                                           nn.Flatten()))):  # fmt: skip
        reason = attack("inverting-gradients").unsuited(module, Setting(), none())
        assert reason is not None and "no linear layer whose output is the logits" in reason
        known = Setting(grants=build_setting({"grants": {"labels": "known"}}).grants)
        assert attack("inverting-gradients").unsuited(module, known, none()) is None
        with pytest.raises(GradleakError, match="output is the logits"):
            registry.build("defenses", "precode").prepare_model(module)


def test_a_negated_head_is_not_taken_for_one_with_a_bias() -> None:
    # Minus the logits turn every sign that a rule of the bias reads.
    assert structure.of(net(head="negated")).head.bias is None


def test_shared_weights_are_no_head_but_its_bias_is() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(PIXELS, CLASSES)
            self.second = nn.Linear(CLASSES, CLASSES)
            self.head = nn.Linear(CLASSES, CLASSES)
            self.head.weight = self.second.weight

        def forward(self, images: Tensor) -> Tensor:
            features = self.second(self.first(images.flatten(1)).relu()).relu()
            return self.head(features)  # type: ignore[no-any-return]

    found = structure.of(marked(Tied())).head
    assert found.weight is None and found.bias == "head.bias"
    with pytest.raises(GradleakError, match="frozen, shared or reparametrised"):
        label_rules.infer({}, found, 1, "wainakh")


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "old_weight_norm", "pruned"])
def test_a_reparametrised_head_shows_labels_by_its_bias(kind: str) -> None:
    module = net()
    assert isinstance(module.head, nn.Linear)
    if kind == "pruned":
        prune.l1_unstructured(module.head, "weight", 0.5)
    elif kind == "old_weight_norm":
        nn.utils.weight_norm(module.head)
    else:
        getattr(parametrizations, kind)(module.head)
    found = structure.of(module).head
    assert found.weight is None and found.bias == "head.bias"
    assert len(found.owned) == (2 if kind in ("spectral_norm", "pruned") else 3)
    images, labels = victims()
    for image, label in zip(images.float(), labels, strict=True):
        (slope,) = torch.autograd.grad(F.cross_entropy(module(image), label), module.head.bias)
        assert torch.equal(label_rules.infer({"head.bias": slope[None]}, found, 1)[0], label)


# The pixels


@pytest.mark.parametrize("front", ["plain", "by hand", "255", "permuted"])
@pytest.mark.parametrize(("name", "batch"), [("linear-leakage", 1), ("spear", 2)])
def test_images_are_read_through_any_affine_map_of_the_pixels(name: str, batch: int, front: str) -> None:
    assert error(name, net(front=front, aux="before"), batch) < 1e-5


def test_the_cocktail_party_keeps_the_order_of_pixels() -> None:
    answers = []
    for front in ("permuted", "plain"):
        module = net(front=front)
        observation = observe(module, 2)
        streams = Generators([("victim", i) for i in range(6)], dtype=torch.float64)
        answers.append(attack("cocktail-party", restarts=1).reconstruct(observation, streams))
    assert answers[0].images.shape == answers[1].images.shape
    losses = [attack("cocktail-party").loss(observe(net(front="permuted"), 2), victims(batch=2)[0], Tensor(), {})]
    losses.append(attack("cocktail-party").loss(observe(net(), 2), victims(batch=2)[0], Tensor(), {}))
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("front", ["mixed", "squared"])
def test_other_maps_of_the_pixels_are_refused(front: str) -> None:
    module = net(front=front)
    assert structure.of(module).on_pixels == ()
    for name in ("linear-leakage", "spear", "cocktail-party", "april", "r-gap"):
        assert attack(name).unsuited(module, Setting(), none()) is not None, name


def test_normalisation_is_measured() -> None:
    found = structure.of(net(front="by hand"))
    assert found.mean is not None and found.std is not None
    torch.testing.assert_close(found.mean.flatten(), torch.tensor([0.4, 0.5, 0.6]).double())
    torch.testing.assert_close(found.std.flatten(), torch.full((3,), 0.25).double())
    network = Network.of(net(front="by hand"))
    mean, std = attack("inverting-gradients").coordinates(network)  # type: ignore[attr-defined]
    assert torch.equal(mean.flatten(), torch.tensor([0.4, 0.5, 0.6])) and (std == 0.25).all()
    mean, std = attack("inverting-gradients").coordinates(Network.of(net(front="mixed")))  # type: ignore[attr-defined]
    assert (mean == 0).all() and (std == 1).all()


class Tokens(nn.Module):
    """Patches as rows of a linear layer, positions registered first, the class token last."""

    def __init__(self, convolution: bool):
        super().__init__()
        self.place = nn.Parameter(torch.randn(5, 20))
        self.head = nn.Linear(20, CLASSES)
        self.project: nn.Module = nn.Conv2d(3, 20, 4, 4) if convolution else nn.Linear(48, 20)

    def forward(self, images: Tensor) -> Tensor:
        images = (images - 0.3) / 0.5
        if isinstance(self.project, nn.Conv2d):
            tokens = self.project(images).flatten(2).mT
        else:
            patches = images.unfold(2, 4, 4).unfold(3, 4, 4)
            tokens = self.project(patches.permute(0, 2, 3, 4, 5, 1).reshape(len(images), 4, 48))
        tokens = torch.cat([tokens, tokens.new_zeros(len(tokens), 1, 20)], 1) + self.place
        weights = (tokens @ tokens.mT / 20).softmax(-1)
        return self.head((weights @ tokens).tanh().mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("convolution", [True, False])
def test_april_finds_patches_and_positions(convolution: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = marked(Tokens(convolution))
    assert error("april", module) < 1e-5
    module.get_parameter("place").requires_grad_(False)
    assert attack("april").unsuited(module, Setting(), none()) is not None


def test_r_gap_follows_the_calls() -> None:
    class Chain(nn.Module):
        def __init__(self, skip: bool) -> None:
            super().__init__()
            self.skip = skip
            self.last = nn.Linear(40, CLASSES, bias=False)
            self.slope = nn.LeakyReLU(0.3)
            self.front = nn.Linear(PIXELS, 40, bias=False)
            self.never = nn.Linear(3, 3)

        def forward(self, images: Tensor) -> Tensor:
            features = self.front((2 * images - 1).flatten(1))
            return self.last(self.slope(features) + (features if self.skip else 0))  # type: ignore[no-any-return]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        straight, skipping = marked(Chain(False)), marked(Chain(True))
    assert [link.name for link in structure.of(straight).chain] == ["front", "slope", "last"]
    assert attack("r-gap").unsuited(straight, Setting(), none()) is None
    assert attack("r-gap").unsuited(skipping, Setting(), none()) is not None


# Sites


def test_dropout_stands_where_the_model_calls_it() -> None:
    own = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 9), nn.ReLU(), nn.Dropout(0.1), nn.Linear(9, CLASSES))
    assert list(dropout.rates(dropout.insert(marked(own), 0.5))) == ["3.mask"]

    class Swish(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features * features.sigmoid()

    odd = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 9), Swish(), nn.LayerNorm(9, elementwise_affine=False),
                        nn.Linear(9, CLASSES))  # fmt: skip
    assert list(dropout.rates(dropout.insert(marked(odd), 0.5))) == ["2.1.mask"]


def test_batch_normalisation_that_is_never_called_has_no_statistics() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.BatchNorm2d(3)
            self.used = nn.BatchNorm2d(3)
            self.head = nn.Linear(PIXELS, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.used(images).flatten(1))  # type: ignore[no-any-return]

    assert list(batch_statistics.layers(marked(Unused()))) == ["used"]


def test_a_probe_leaves_no_trace() -> None:
    class Counting(Net):
        def forward(self, images: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(images + 0 * torch.rand(1))

    module = marked(Counting()).train()
    before, noise = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    found = structure.of(module)
    assert structure.of(module) is found
    assert torch.equal(torch.get_rng_state(), noise) and module.training and not hasattr(module, "calls")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    with pytest.raises(GradleakError, match="shape of the images that the network takes"):
        structure.of(Net())


# What is sent is what is trained


def test_frozen_parameters_are_constants() -> None:
    module = net()
    module.get_submodule("first").requires_grad_(False)
    observation = observe(module)
    assert list(observation.message) == ["head.weight", "head.bias"] == list(observation.network.parameters)
    assert torch.equal(observation.network.buffers["first.weight"], module.get_parameter("first.weight").double())
    assert attack("linear-leakage").unsuited(observation.network.module, Setting(), none()) is not None
    again = observation.network.to("cpu", torch.float32)
    assert list(again.parameters) == ["head.weight", "head.bias"]
    with pytest.raises(GradleakError, match="no parameter that is trained"):
        Network.of(module.requires_grad_(False))


@pytest.mark.parametrize(
    ("trainable", "names"),
    [
        ("head", ["head.weight", "head.bias"]),
        (("first", "head.bias"), ["head.bias", "first.weight", "first.bias"]),
        ("all", ["head.weight", "head.bias", "first.weight", "first.bias"]),
    ],
)
@pytest.mark.parametrize("how", [{}, {"local_lr": 0.1, "local_steps": 2}])
def test_a_setting_chooses_what_is_trained(trainable: Any, names: list[str], how: dict[str, Any]) -> None:
    module = net()
    setting = Setting(trainable=trainable, precision="float64", **how)
    network = client.client_network(module, none(), setting)
    images, labels = victims(2)
    sent = client.send(network, images, labels, CLASSES, none(), setting, 1, [0, 1])
    assert list(sent.message) == names
    assert sent.dense_bytes == sent.bytes[0] == 4 * sum(module.get_parameter(name).numel() for name in names)
    whole = client.client_network(module, none(), Setting(precision="float64"))
    every = client.send(whole, images, labels, CLASSES, none(), Setting(precision="float64"), 1, [0, 1])
    if not how:
        assert all(torch.equal(sent.message[name], every.message[name]) for name in names)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_clipping_sees_what_is_trained() -> None:
    clip = registry.build("defenses", "dp-sgd", {"sigma": 1e-9, "clip": 0.01})
    observation = observe(net(), defense=clip, trainable="head")
    norms = torch.stack([tensor.flatten(1).square().sum(1) for tensor in observation.message.values()]).sum(0).sqrt()
    torch.testing.assert_close(norms, torch.full_like(norms, 0.01), rtol=1e-4, atol=0)


def test_what_is_not_there_cannot_be_trained() -> None:
    with pytest.raises(GradleakError, match=r"trainable: unknown .*'haed'; did you mean 'head'.*allowed: .*first"):
        client.client_network(net(), none(), Setting(trainable=("haed",)))
    with pytest.raises(GradleakError, match="trainable: expected all, head or a list of names, found some"):
        build_setting({"trainable": "some"})
    frozen = net()
    frozen.get_submodule("head").requires_grad_(False)
    with pytest.raises(GradleakError, match="keeps all that is named from being trained"):
        client.client_network(frozen, none(), Setting(trainable="head"))


def test_names_are_those_of_the_model_under_a_defense_too() -> None:
    guard = registry.build("defenses", "precode")
    network = client.client_network(net(), guard, Setting(trainable=("first",)))
    assert list(network.parameters) == ["model.first.weight", "model.first.bias"]
    network = client.client_network(net(), guard, Setting(trainable="head"))
    assert len(network.parameters) == 2


def test_labels_need_the_head_to_be_sent() -> None:
    network = client.client_network(net(), none(), Setting(trainable=("first",)))
    reason = attack("inverting-gradients").unsuited(network.module, Setting(), none())
    assert reason is not None and "labels must be granted" in reason
    reason = attack("idlg", features=1.0).unsuited(network.module, Setting(grants=Knowledge()), none())
    assert reason is not None and "features" in reason


def test_cells_keep_their_keys() -> None:
    assert "trainable" not in stored_setting(Setting())
    assert stored_setting(build_setting({"trainable": ["head"]}))["trainable"] == ["head"]
    assert build_setting(stored_setting(build_setting({"trainable": "head"}))).trainable == "head"
    assert "trainable" not in Utility().model_dump(exclude={"seeds"})
    recipe = Utility(trainable="head", batch_size=16)
    assert recipe.setting().trainable == recipe.model_dump()["trainable"] == "head"


def test_a_gradient_that_did_not_arrive_is_no_evidence() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Silent(type(none())):  # type: ignore[misc]
        def protect(self, update: dict[str, Tensor], public: Any, generator: Any) -> dict[str, Tensor]:
            return {n: t if n.startswith("head") else torch.zeros_like(t) for n, t in update.items()}

    observation = observe(net(), defense=Silent())
    streams = Generators([("victim", i) for i in range(6)], dtype=torch.float64)
    answer = attack("linear-leakage").reconstruct(observation, streams)
    assert answer.loss is not None and (answer.loss == 1).all()
