from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gradleak import registry
from gradleak.errors import GradleakError
from gradleak.model import Model, Normalise, initialise

SHAPES = [(1, 8, 8), (1, 25, 25), (1, 28, 28), (3, 32, 32), (3, 64, 64)]
TINY: dict[str, dict[str, Any]] = {
    "cnn6": {"width": 3},
    "linear": {},
    "mlp": {"widths": (16, 8)},
    "lenet": {},
    "convnet": {"width": 4},
    "resnet20": {"width": 4},
    "resnet18": {"width": 4},
    "vit": {"dim": 16, "depth": 2, "heads": 2},
}
MODELS = sorted(TINY)
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.GELU, nn.Softmax)


def build(name: str, shape: tuple[int, int, int], classes: int = 10, seed: int = 0, **options: Any) -> nn.Module:
    model: Model = registry.build("models", name, options)
    return initialise(model, shape, classes, seed)


def tiny(name: str, shape: tuple[int, int, int] = (1, 8, 8), **options: Any) -> nn.Module:
    return build(name, shape, **{**TINY[name], **options}).double().eval()


def batch(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def loss_of(network: nn.Module, labels: Tensor) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    def loss(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, parameters, (images,)), labels)

    return loss


def detached(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def test_the_registry_holds_these_models() -> None:
    assert registry.names("models") == sorted([*MODELS, "timm", "torchvision"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_defaults_take_every_shape(name: str, shape: tuple[int, int, int]) -> None:
    network = build(name, shape, classes=7)
    for mode in (True, False):  # a single image in train mode must not trip batch normalisation
        logits = network.train(mode)(torch.rand(1, *shape, generator=torch.Generator().manual_seed(1)))
        assert logits.shape == (1, 7)
        assert logits.isfinite().all()


@given(
    name=st.sampled_from(MODELS),
    images=st.integers(1, 3),
    channels=st.integers(1, 3),
    height=st.integers(2, 17),
    width=st.integers(2, 17),
    classes=st.integers(2, 5),
)
@settings(max_examples=40, deadline=None)
def test_any_size_gives_logits(name: str, images: int, channels: int, height: int, width: int, classes: int) -> None:
    network = build(name, (channels, height, width), classes, **TINY[name]).eval()
    assert network(torch.rand(images, channels, height, width)).shape == (images, classes)


@pytest.mark.parametrize("name", MODELS)
def test_normalisation_comes_first(name: str) -> None:
    layers = list(build(name, (3, 8, 8), **TINY[name]).children())
    assert isinstance(layers[0], Normalise)


# Counted by hand from the layer tables of the papers; the sources of published totals are named.
@pytest.mark.parametrize(
    ("name", "shape", "classes", "expected"),
    [
        ("linear", (1, 28, 28), 10, 784 * 10 + 10),
        ("mlp", (1, 28, 28), 10, 784 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10),
        # R-GAP's CNN6: 128 maps of 5x5 into the linear layer for CIFAR.
        (
            "cnn6",
            (3, 32, 32),
            10,
            12 * 48 + 36 * 12 * 9 + 2 * 36 * 36 * 9 + 64 * 36 * 9 + 128 * 64 * 9 + 3200 * 10,
        ),
        # DLG's network: 768 features into the linear layer for CIFAR, 588 for MNIST.
        ("lenet", (3, 32, 32), 100, (3 * 25 + 1) * 12 + 2 * (12 * 25 + 1) * 12 + 768 * 100 + 100),
        ("lenet", (1, 28, 28), 10, (1 * 25 + 1) * 12 + 2 * (12 * 25 + 1) * 12 + 588 * 10 + 10),
        # Geiping et al. 2020 state 2,904,970 for the ConvNet of width 64.
        ("convnet", (3, 32, 32), 10, 2_904_970),
        # He et al. 2016, table 6: 0.27 million; 269,722 is the exact count with option A shortcuts.
        ("resnet20", (3, 32, 32), 10, 269_722),
        # The ImageNet model's 11,689,512, less 513,000 + 9,408 for head and stem, plus 5,130 + 1,728.
        ("resnet18", (3, 32, 32), 10, 11_173_962),
        (
            "vit",
            (3, 32, 32),
            10,
            (48 * 192 + 192)  # patches
            + 192 * (1 + 65)  # class token and positions
            + 6 * (2 * 384 + (192 + 1) * 576 + (192 + 1) * 192 + (192 + 1) * 768 + (768 + 1) * 192)
            + 384
            + 1930,
        ),
    ],
)
def test_parameter_counts(name: str, shape: tuple[int, int, int], classes: int, expected: int) -> None:
    assert sum(parameter.numel() for parameter in build(name, shape, classes).parameters()) == expected


@pytest.mark.parametrize("name", MODELS)
def test_weights_follow_the_seed_alone(name: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (build(name, (1, 8, 8), seed=seed, **TINY[name]).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", MODELS)
def test_no_parameter_is_dead(name: str) -> None:
    network = tiny(name, (3, 12, 12))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    loss = F.cross_entropy(network(batch(2, 3, 12, 12)), torch.tensor([1, 3]))
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_double_backward_equals_finite_differences(name: str, training: bool) -> None:
    network = tiny(name).train(training)
    labels, images = torch.tensor([1, 3, 3]), batch(3, 1, 8, 8)
    parameters = list(network.parameters())
    stream = torch.Generator().manual_seed(6)
    weights = [torch.randn(p.shape, dtype=torch.float64, generator=stream) for p in parameters]
    direction = torch.randn(images.shape, dtype=torch.float64, generator=stream)

    def projected(point: Tensor, create_graph: bool = False) -> Tensor:
        loss = F.cross_entropy(network(point), labels)
        gradients = torch.autograd.grad(loss, parameters, create_graph=create_graph)
        return sum(((w * g).sum() for w, g in zip(weights, gradients, strict=True)), torch.zeros(()))

    point = images.clone().requires_grad_()
    (second,) = torch.autograd.grad(projected(point, create_graph=True), point)
    assert second.isfinite().all()
    step = 1e-6  # small enough that no ReLU or max-pool changes its branch
    slope = (projected(images + step * direction) - projected(images - step * direction)) / (2 * step)
    assert second.abs().max() > 0
    torch.testing.assert_close((second * direction).sum(), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_vmap_of_gradients_equals_a_loop(name: str) -> None:
    network = tiny(name)
    images, labels = batch(3, 2, 1, 8, 8), torch.tensor([4, 7])
    gradient = grad(loss_of(network, labels))
    parameters = detached(network)
    stacked = vmap(gradient, in_dims=(None, 0))(parameters, images)
    for index, victim in enumerate(images):
        single = torch.autograd.grad(F.cross_entropy(network(victim), labels), list(network.parameters()))
        for (key, rows), expected in zip(stacked.items(), single, strict=True):
            torch.testing.assert_close(rows[index], expected, rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_vmap_of_double_backward_equals_a_loop(name: str) -> None:
    network = tiny(name)
    images, labels = batch(2, 2, 1, 8, 8), torch.tensor([4, 7])
    loss, parameters = loss_of(network, labels), detached(network)

    def energy(victim: Tensor) -> Tensor:
        return sum((g.square().sum() for g in grad(loss)(parameters, victim).values()), torch.zeros(()))

    stacked = vmap(grad(energy))(images)
    for index, victim in enumerate(images):
        point = victim.clone().requires_grad_()
        gradients = torch.autograd.grad(
            F.cross_entropy(network(point), labels), list(network.parameters()), create_graph=True
        )
        (expected,) = torch.autograd.grad(torch.stack([g.square().sum() for g in gradients]).sum(), point)
        torch.testing.assert_close(stacked[index], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_every_leaf_with_parameters_runs_once(name: str) -> None:
    network = tiny(name)
    owners = [module for module in network.modules() if any(True for _ in module.parameters(recurse=False))]
    activations = [module for module in network.modules() if isinstance(module, ACTIVATIONS)]
    calls = {id(module): 0 for module in (*owners, *activations)}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[id(module)] += 1

    for module in (*owners, *activations):
        assert not list(module.children())
        module.register_forward_hook(count)
    network(batch(2, 1, 8, 8))
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_works_in_place(name: str) -> None:
    assert not any(getattr(module, "inplace", False) for module in tiny(name).modules())


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("name", ["convnet", "resnet20", "resnet18"])
def test_norm(name: str, norm: str) -> None:
    network = tiny(name, norm=norm)
    kinds = {type(module) for module in network.modules()}
    assert (nn.BatchNorm2d in kinds) == (norm == "batch")
    assert (nn.GroupNorm in kinds) == (norm == "group")
    assert network(batch(2, 1, 8, 8)).isfinite().all()


def test_group_norm_has_sixteen_channels_a_group() -> None:
    groups = [
        (module.num_channels, module.num_groups)
        for module in build("resnet20", (1, 8, 8), width=16, norm="group").modules()
        if isinstance(module, nn.GroupNorm)
    ]
    assert set(groups) == {(16, 1), (32, 2), (64, 4)}


def test_lenet_draws_from_the_interval_of_dlg() -> None:
    uniform, default = build("lenet", (3, 32, 32)), build("lenet", (3, 32, 32), initialisation="default")
    values = torch.cat([parameter.detach().flatten() for parameter in uniform.parameters()])
    assert values.abs().max() <= 0.5
    # A uniform law on (-0.5, 0.5) has standard deviation 1 / sqrt(12); 5 standard errors on each side.
    assert values.std().item() == pytest.approx(1 / math.sqrt(12), rel=5 / math.sqrt(len(values)))
    for parameter in uniform.parameters():
        assert parameter.abs().max() > 0.3
    assert max(parameter.abs().max().item() for parameter in default.parameters()) < 0.2


def test_lenet_sees_raw_pixels() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(next(build("lenet", (3, 8, 8)).children())(images), images)


def test_mlp_without_hidden_layers_is_linear() -> None:
    flat, linear = build("mlp", (1, 8, 8), widths=()), build("linear", (1, 8, 8))
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(flat(images), linear(images))


@pytest.mark.parametrize(
    ("name", "kind"), [("relu", nn.ReLU), ("gelu", nn.GELU), ("sigmoid", nn.Sigmoid), ("tanh", nn.Tanh)]
)
def test_mlp_options(name: str, kind: type[nn.Module]) -> None:
    layers = list(build("mlp", (1, 8, 8), widths=(5, 6, 7), activation=name, bias=False).children())
    assert [type(layer) for layer in layers[2:]] == [nn.Linear, kind] * 3 + [nn.Linear]
    assert all(layer.bias is None for layer in layers if isinstance(layer, nn.Linear))


def test_attention_equals_torch() -> None:
    network = tiny("vit")
    ours = next(module for module in network.modules() if type(module).__name__ == "_Attention")
    theirs = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    parameters = dict(ours.named_parameters())
    theirs.load_state_dict(
        {
            "in_proj_weight": parameters["queries_keys_values.weight"].detach(),
            "in_proj_bias": parameters["queries_keys_values.bias"].detach(),
            "out_proj.weight": parameters["output.weight"].detach(),
            "out_proj.bias": parameters["output.bias"].detach(),
        }
    )
    tokens = batch(3, 5, 16)
    torch.testing.assert_close(ours(tokens), theirs(tokens, tokens, tokens, need_weights=False)[0])


def test_vit_pads_with_what_grey_becomes() -> None:
    network = tiny("vit", (1, 6, 7), patch=4)
    twin = tiny("vit", (1, 8, 8), patch=4)
    twin.load_state_dict(network.state_dict())
    images = batch(2, 1, 6, 7)
    padded = F.pad(images, (0, 1, 0, 2), value=0.5)
    torch.testing.assert_close(network(images), twin(padded))


def test_padded_shortcut() -> None:
    from gradleak.models._residual import PaddedShortcut

    features = batch(2, 3, 5, 4)
    output = PaddedShortcut(2, 4)(features)
    assert output.shape == (2, 7, 3, 2)
    assert torch.equal(output[:, :3], features[:, :, ::2, ::2])
    assert not output[:, 3:].any()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mlp", {"widths": (8, 0)}, "greater than or equal to 1"),
        ("mlp", {"activation": "swish"}, "'relu'"),
        ("lenet", {"initialisation": "he"}, "'uniform'"),
        ("convnet", {"width": 0}, "greater than or equal to 1"),
        ("resnet18", {"norm": "layer"}, "'group'"),
        ("vit", {"dim": 10, "heads": 3}, "not a multiple of heads = 3"),
        ("vit", {"mlp_ratio": 0}, "greater than 0"),
        ("vit", {"dept": 3}, "did you mean 'depth'"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(GradleakError, match=said) as caught:
        registry.build("models", name, options)
    assert "\n" not in str(caught.value)
