from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradleak
from gradleak import registry, seeds, testing
from gradleak.attack import Reconstruction
from gradleak.engine import choice, final
from gradleak.engine.backends import BACKENDS
from gradleak.engine.choice import choose
from gradleak.engine.layerwise import Layerwise
from gradleak.engine.loop import Status
from gradleak.engine.objectives import OBJECTIVES
from gradleak.engine.optimisers import Variables
from gradleak.engine.problem import Direct, Facts, Guess, Problem, Values
from gradleak.errors import GradleakError
from gradleak.model import initialise
from gradleak.search.penalties import total_variation
from gradleak.seeds import Generators
from gradleak.testing import Scene
from gradleak.threat import Compute, Observation, Setting
from gradleak.update import LocalTraining, Network, Update, flatten, local_update, squared_norm, stack

FAST = [name for name in BACKENDS if name != "sequential"]
VICTIMS, CLASSES, SHAPE = 3, 10, (1, 8, 8)

MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "linear": ("linear", {}, "eval"),
    "mlp": ("mlp", {"widths": (20, 12)}, "eval"),
    "mlp-wide": ("mlp", {"widths": (200,), "activation": "tanh"}, "eval"),
    "mlp-no-bias": ("mlp", {"widths": (20,), "bias": False}, "eval"),
    "lenet": ("lenet", {}, "eval"),
    "cnn6": ("cnn6", {}, "eval"),
    "convnet-eval": ("convnet", {"width": 2}, "eval"),
    "convnet-train": ("convnet", {"width": 2}, "train"),
    "convnet-group": ("convnet", {"width": 16, "norm": "group"}, "eval"),
    "resnet20-train": ("resnet20", {"width": 2}, "train"),
    "resnet18-eval": ("resnet18", {"width": 4}, "eval"),
    "resnet18-wide": ("resnet18", {"width": 16, "norm": "none"}, "eval"),
    "vit": ("vit", {"dim": 12, "depth": 2, "heads": 2}, "eval"),
}
"""Every model of the registry, small, with options that take another path through a backend."""


def normal(*shape: int, name: object = "", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeds.generator("backends", name, *shape), dtype=torch.float64).to(dtype)


def network_of(key: str) -> Network:
    name, options, mode = MODELS[key]
    module = initialise(registry.build("models", name, options), SHAPE, CLASSES, 0).double()
    for index, (layer, tensor) in enumerate(module.named_buffers()):
        if "running" in layer:  # statistics that are not those of an untrained model
            tensor.copy_(normal(*tensor.shape, name=index).square() + 0.5)
    return Network.of(module, mode)


def layer_by_layer(update: Update, facts: Facts) -> Tensor:
    """A match that no backend knows a closed form of: weights, order and absolute values matter."""
    observed = facts.update
    parts = [
        (1 + index) * (update[name] - observed[name]).square().sum() / (squared_norm({name: observed[name]}) + 1e-3)
        for index, name in enumerate(update)
    ]
    vector, other = flatten(update), flatten(observed)
    return torch.stack(parts).sum() + (vector[1:] * other[:-1]).abs().sum().sqrt()


MATCHES: dict[str, Callable[[Update, Facts], Tensor]] = {
    **{name: Direct(name) for name in OBJECTIVES},
    "layer-by-layer": layer_by_layer,
}


def problem_of(
    network: Network,
    match: Callable[[Update, Facts], Tensor] = MATCHES["cosine"],
    batch: int = 2,
    training: LocalTraining | None = None,
    per_example: Callable[[Update], Update] | None = None,
) -> tuple[Problem, Variables, Facts]:
    """A problem with guessed labels and a prior, three trials of it, and what is known of their victims."""
    training = training or LocalTraining()

    def decode(row: Variables, known: Facts) -> Guess:
        return Guess((row["pixels"] * known.own["scale"]).sigmoid(), row["labels"].softmax(-1))

    def penalty(guess: Guess, row: Variables, known: Facts) -> Tensor:
        return 0.01 * total_variation(guess.images) + 0.001 * row["labels"].square().sum()

    truth = normal(VICTIMS, batch, *SHAPE, name="truth").sigmoid()
    soft = (3 * normal(VICTIMS, batch, CLASSES, name="classes")).softmax(-1)
    sent = [
        local_update(network, images, targets, training, per_example=per_example)
        for images, targets in zip(truth, soft, strict=True)
    ]
    facts = Facts(
        update={name: tensor.detach() for name, tensor in stack(sent).items()},
        own={"scale": torch.tensor([1.0, 0.7, 1.3], dtype=torch.float64)},
    )
    variables = {"pixels": normal(VICTIMS, batch, *SHAPE), "labels": normal(VICTIMS, batch, CLASSES)}
    problem = Problem(
        network=network, training=training, decode=decode, match=match, penalty=penalty, per_example=per_example
    )
    return problem, variables, facts


def answer(name: str, problem: Problem, variables: Variables, facts: Facts) -> Values:
    backend = BACKENDS[name]()
    assert backend.applies(problem, variables, facts)
    return backend(problem, variables, backend.prepare(problem, facts))


def assert_equal_up_to_rounding(values: Values, reference: Values, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(values.matching, reference.matching, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(values.total, reference.total, rtol=tolerance, atol=tolerance)
    assert values.gradients.keys() == reference.gradients.keys()
    for name, expected in reference.gradients.items():
        for row, other in zip(values.gradients[name], expected, strict=True):
            error, size = (row - other).norm(), other.norm()
            assert size > 0 and error <= tolerance * size, (name, float(error / size))


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("key", MODELS)
def test_every_backend_agrees_with_sequential(key: str, match: str) -> None:
    trials = problem_of(network_of(key), MATCHES[match])
    reference = answer("sequential", *trials)
    for name in FAST:
        assert_equal_up_to_rounding(answer(name, *trials), reference)


def test_all_models_of_the_registry_are_covered() -> None:
    # What other libraries bring is in the zoo (test_zoo.py).
    assert {name for name, _, _ in MODELS.values()} == set(registry.names("models")) - {"timm", "torchvision"}


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("key", ["mlp-wide", "lenet", "convnet-eval", "vit"])
def test_batch_sizes(key: str, batch: int) -> None:
    trials = problem_of(network_of(key), batch=batch)
    reference = answer("sequential", *trials)
    for name in FAST:
        assert_equal_up_to_rounding(answer(name, *trials), reference)


def test_sequential_is_the_derivative_of_its_own_loss() -> None:
    # Independent of automatic second derivatives: central differences along random directions.
    problem, variables, facts = problem_of(network_of("vit"))
    values = answer("sequential", problem, variables, facts)
    for name, tensor in variables.items():
        direction = normal(*tensor.shape, name="direction")
        sides = [
            answer("sequential", problem, {**variables, name: tensor + step * direction}, facts).total
            for step in (1e-5, -1e-5)
        ]
        slope = (values.gradients[name] * direction).flatten(1).sum(1)
        torch.testing.assert_close(slope, (sides[0] - sides[1]) / 2e-5, rtol=1e-6, atol=1e-9)


class _Shift(nn.Module):
    """Parameters that no known layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(normal(1, 8, 8, name="shift"))
        self.inner = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.inner(images) + self.shift)


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.tanh(self.layer(rows))))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight

    def forward(self, rows: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(rows)))  # type: ignore[no-any-return]


class _Mixing(nn.Module):
    """Looks at the whole batch, and has no parameters that would give it away."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(0)


class _MixesGradients(torch.autograd.Function):
    """Hands images on and mixes what comes back: nothing in the forward pass tells."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return rows.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *into: Tensor) -> Tensor:
        return into[0] - 0.1 * into[0].mean(0)


class _MixingBackwards(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return _MixesGradients.apply(rows)  # type: ignore[no-any-return]


def plain(*layers: nn.Module) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network.of(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, CLASSES)).double())


UNUSUAL = {
    "own parameters": (plain(_Shift()), True),
    "depthwise": (
        plain(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 1, 1)),
        True,
    ),
    "circular": (plain(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")), True),
    "padding by name": (plain(nn.Conv2d(1, 1, 3, padding="same")), True),
    "dilated and strided": (plain(nn.Conv2d(1, 4, 3, (2, 2), 2, 2), nn.Tanh()), True),
    "transposed": (plain(nn.ConvTranspose2d(1, 1, 3, padding=1)), True),
    "instance norm": (plain(nn.InstanceNorm2d(1, affine=True)), True),
    "no affine": (plain(nn.BatchNorm2d(1, affine=False), nn.LayerNorm(8, elementwise_affine=False)), True),
    "layer norm of maps": (plain(nn.LayerNorm([1, 8, 8]), nn.LayerNorm([8, 8], bias=False)), True),
    "layer called twice": (plain(nn.Flatten(), _Twice()), False),
    "tied": (plain(nn.Flatten(), _Tied()), False),
}


@pytest.mark.parametrize("key", UNUSUAL)
def test_unusual_layers_are_right_or_left_to_vmap(key: str, caplog: pytest.LogCaptureFixture) -> None:
    network, understood = UNUSUAL[key]
    trials = problem_of(network)
    reference = answer("sequential", *trials)
    with caplog.at_level(logging.DEBUG, "gradleak"):
        name, backend, *_ = choose("layerwise", *trials, iterations=10)
    assert name == ("layerwise" if understood else "vmap")
    assert ("does not apply" in caplog.text) is not understood
    assert_equal_up_to_rounding(backend(trials[0], trials[1], backend.prepare(trials[0], trials[2])), reference)


def test_an_unused_layer_is_left_to_vmap() -> None:
    network = plain()
    network.module.add_module("extra", nn.Identity())
    extra = nn.Linear(3, 3).double()
    identity = network.module.get_submodule("extra")
    identity.add_module("unused", extra)
    trials = problem_of(Network.of(network.module))
    assert choose("layerwise", *trials, iterations=10)[0] == "vmap"


def halve(gradient: Update) -> Update:
    """Clip to norm 0.5, differentiably."""
    factor = (0.5 / (squared_norm(gradient) + 1e-12).sqrt()).clamp(max=1)
    return {name: factor * tensor for name, tensor in gradient.items()}


@pytest.mark.parametrize(
    "how",
    [
        {"training": LocalTraining(steps=3, batch_size=1, lr=0.1)},
        {"training": LocalTraining(steps=1, lr=0.1)},
        {"per_example": halve},
    ],
)
def test_local_steps_and_clipped_examples(how: dict[str, Any]) -> None:
    trials = problem_of(network_of("lenet"), **how)
    reference = answer("sequential", *trials)
    assert_equal_up_to_rounding(answer("vmap", *trials), reference)
    assert not Layerwise().applies(*trials)
    assert choose("layerwise", *trials, iterations=10)[0] == "vmap"


@pytest.mark.parametrize("match", ["cosine", "squared", "relative-squared"])
def test_observed_gradients_of_low_rank_are_factored_and_others_are_not(match: str) -> None:
    problem, variables, facts = problem_of(network_of("mlp-wide"), MATCHES[match], batch=1)
    backend = Layerwise()
    assert backend.applies(problem, variables, facts)
    ready = backend.prepare(problem, facts)
    dense, left = ready.update, ready.named["_left"]
    assert len(left) == 2
    for name, factor in left.items():
        assert name not in dense and factor.shape == (VICTIMS, problem.network.parameters[name].shape[0], 1)

    noisy = replace(facts, update={key: t + 1e-8 * normal(*t.shape) for key, t in facts.update.items()})
    assert backend.prepare(problem, noisy).named["_left"] == {}
    for known in (facts, noisy):
        assert_equal_up_to_rounding(
            answer("layerwise", problem, variables, known), answer("sequential", problem, variables, known)
        )


def test_squared_distances_near_the_truth_keep_their_digits() -> None:
    # As a difference of norms the distance would end at 1e-7 of them in float32.
    problem, variables, _ = problem_of(network_of("mlp-wide"), MATCHES["relative-squared"], batch=1)
    network = Network.of(problem.network.module.float())
    observed = [
        local_update(network, image.sigmoid(), label.softmax(-1), LocalTraining())
        for image, label in zip(variables["pixels"].float(), variables["labels"].float(), strict=True)
    ]
    known = Facts(update={n: t.detach() for n, t in stack(observed).items()}, own={"scale": torch.ones(VICTIMS)})
    near = {name: (tensor + 1e-5 * normal(*tensor.shape, name="near")).float() for name, tensor in variables.items()}
    trials = replace(problem, network=network), near, known
    reference = answer("sequential", *trials)
    assert reference.matching.max() < 1e-7
    torch.testing.assert_close(answer("layerwise", *trials).matching, reference.matching, rtol=0.05, atol=0)


# Order of differentiation: reverse mode over forward mode is silently wrong in torch 2.14 for these layers.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "layer", [nn.LayerNorm([1, 8, 8]), nn.InstanceNorm2d(1, affine=True), nn.BatchNorm2d(1), nn.GroupNorm(1, 1)]
)
def test_gradients_are_right_where_reverse_over_forward_is_not(layer: nn.Module, backend: str) -> None:
    module = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(64, CLASSES)).double()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, name=index))
    problem, variables, facts = problem_of(Network.of(module, "train"))
    values = answer(backend, problem, variables, facts)
    direction = normal(*variables["pixels"].shape, name="direction")
    sides = [
        answer(backend, problem, {**variables, "pixels": variables["pixels"] + step * direction}, facts).total
        for step in (1e-5, -1e-5)
    ]
    slope = (values.gradients["pixels"] * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope, (sides[0] - sides[1]) / 2e-5, rtol=1e-6, atol=1e-9)


def test_nothing_uses_forward_mode() -> None:
    root = Path(gradleak.__file__).parent
    sources = [path for folder in ("", "attacks", "defenses", "models") for path in (root / folder).glob("*.py")]
    assert len(sources) > 30
    forward = re.compile(r"\bjvp\b|forward_ad|jacfwd|make_dual|\bhessian\b")
    assert [path.name for path in sources if forward.search(path.read_text())] == []


# A victim's result depends on the width of its chunk alone.


def observe(victims: int, mode: str = "eval", model: str = "lenet", **options: Any) -> Observation:
    setting = Setting(mode=mode, batch_size=2)  # type: ignore[arg-type]
    images = normal(victims, 2, *SHAPE, name="victims").sigmoid().float()
    labels = torch.arange(2 * victims).view(victims, 2) % CLASSES
    module = testing.model(model, SHAPE, CLASSES, **options)
    return Scene.of(module, images, labels, setting=setting, classes=CLASSES).observe()


def reconstruct(
    observation: Observation, victims: list[int], backend: str, width: int, **options: Any
) -> Reconstruction:
    rows = torch.tensor(victims)
    assert observation.labels is not None
    part = replace(
        observation,
        message={name: tensor[rows] for name, tensor in observation.message.items()},
        update={name: tensor[rows] for name, tensor in observation.update.items()},
        labels=observation.labels[rows],
        compute=Compute(backend=backend, width=width),
    )
    options = {"attack": "inverting-gradients", "iterations": 6, **options}
    attack = registry.build("attacks", options.pop("attack"), options)
    answer: Reconstruction = attack.reconstruct(part, Generators(victims))
    assert answer.backend == backend
    return answer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("attack", ["inverting-gradients", "dlg"])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("lenet", {}),
        ("mlp", {"widths": (300,)}),
        ("convnet", {"width": 2}),
        ("vit", {"dim": 12, "depth": 1, "heads": 2}),
    ],
)
def test_neighbours_and_order_change_no_bit(model: str, options: dict[str, Any], attack: str, backend: str) -> None:
    observation = observe(8, "train" if model == "convnet" else "eval", model, **options)
    together = reconstruct(observation, [0, 1, 2, 3], backend, 4, attack=attack)
    for others in ([3, 1, 0, 2], [0, 5, 6, 7], [7, 6, 5, 0]):
        again = reconstruct(observation, others, backend, 4, attack=attack)
        for place, victim in enumerate(others):
            if victim < 4:
                assert torch.equal(again.images[place], together.images[victim])


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_are_refilled_as_if_nothing_had_been_there(backend: str) -> None:
    observation = observe(8)
    queued = reconstruct(observation, [0, 1, 2, 3, 4, 5], backend, 2)
    for pair in ([0, 1], [2, 3], [4, 5]):
        alone = reconstruct(observation, pair, backend, 2)
        assert torch.equal(queued.images[pair], alone.images)
    # Of unequal length: a victim at its target leaves early, and the next takes its slot at once.
    options = {"attack": "dlg", "iterations": 30, "tolerance": 2.0}
    queued = reconstruct(observation, [0, 1, 2, 3, 4], backend, 2, **options)
    assert queued.iterations is not None and len(set(queued.iterations.tolist())) > 1
    for victim in range(5):
        alone = reconstruct(observation, [victim, 7], backend, 2, **options)
        assert alone.iterations is not None
        assert int(alone.iterations[0]) == int(queued.iterations[victim])
        assert torch.equal(queued.images[victim], alone.images[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("attack", ["inverting-gradients", "dlg"])
def test_a_trial_that_is_not_finite_leaves_and_touches_nobody(attack: str, backend: str) -> None:
    observation = observe(4)
    whole = reconstruct(observation, [0, 1, 2, 3], backend, 2, attack=attack)
    for name in observation.update:
        observation.update[name][1] = torch.nan
    broken = reconstruct(observation, [0, 1, 2, 3], backend, 2, attack=attack)
    assert broken.status == [Status.OK, Status.DIVERGED, Status.OK, Status.OK]
    for victim in (0, 2, 3):
        assert torch.equal(broken.images[victim], whole.images[victim])


# `auto`


def timed(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    kinds = {kind: name for name, kind in BACKENDS.items()}

    def pretend(backend: Any, problem: Problem, variables: Variables, facts: Facts) -> float:
        return seconds[kinds[type(backend)]]

    monkeypatch.setattr(choice, "_seconds", pretend)
    monkeypatch.setenv("GRADLEAK_CACHE", tempfile.mkdtemp())


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        # `sequential` is timed on one of the three trials.
        ({"sequential": 1.0, "vmap": 2.0, "layerwise": 1.0}, "layerwise"),
        ({"sequential": 1.0, "vmap": 1.0, "layerwise": 2.0}, "vmap"),
        ({"sequential": 1.0, "vmap": 2.9, "layerwise": 2.8}, "sequential"),
        ({"sequential": 1.0, "vmap": 9.0, "layerwise": 2.7}, "layerwise"),
    ],
)
def test_auto_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], expected: str) -> None:
    timed(monkeypatch, seconds)
    trials = problem_of(network_of("lenet"))
    assert choose("auto", *trials, iterations=100)[0] == expected
    assert choose("auto", *trials, iterations=1)[0] == "sequential"  # too short to look around


def test_auto_decides_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {"sequential": 1.0, "vmap": 2.0, "layerwise": 0.1})
    trials = problem_of(network_of("lenet"))
    assert choose("auto", *trials, iterations=100)[0] == "layerwise"
    monkeypatch.setattr(choice, "_seconds", lambda *arguments: pytest.fail("timed again"))
    assert choose("auto", *trials, iterations=100)[0] == "layerwise"
    assert choose("auto", *problem_of(network_of("lenet")), iterations=100)[0] == "layerwise"


def test_auto_trusts_nobody(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    timed(monkeypatch, {"sequential": 1.0, "vmap": 0.5, "layerwise": 0.1})
    mixing = problem_of(plain(nn.Flatten(), _Mixing()))
    assert choose("auto", *mixing, iterations=100)[0] == "vmap"
    hidden = problem_of(plain(nn.Flatten(), _MixingBackwards()))
    assert choose("auto", *hidden, iterations=100)[0] == "vmap"
    name, _, reason, *_ = choose("layerwise", *hidden, iterations=100)
    assert name == "vmap" and "off" in reason and "answers otherwise" in caplog.text and reason[-5:] in caplog.text
    assert choose("auto", *problem_of(plain()), iterations=100)[0] == "layerwise"


def test_auto_passes_over_what_cannot_be_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {"sequential": 1.0, "vmap": 0.1, "layerwise": 0.1})

    def unstackable(update: Update, facts: Facts) -> Tensor:
        distance = layer_by_layer(update, facts)
        return distance if float(distance.detach()) > 0 else -distance

    trials = problem_of(network_of("lenet"), unstackable)
    assert choose("auto", *trials, iterations=100)[0] == "sequential"


def test_unknown_backends_are_named() -> None:
    with pytest.raises(GradleakError, match=r"unknown backend 'layer'.*'layerwise'"):
        choose("layer", *problem_of(network_of("linear")), iterations=1)


def test_a_huge_width_computes_the_trials_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, start, facts = problem_of(network_of("mlp"))
    widths: list[int] = []
    chunks = final.chunks

    def counted(rows: tuple[Any, ...], width: int) -> Iterator[tuple[Any, ...]]:
        widths.append(width)
        return chunks(rows, width)

    monkeypatch.setattr(final, "chunks", counted)
    wide, narrow = (final.finish(problem, start, facts, width) for width in (10**9, 4))
    assert max(widths) <= 1024
    torch.testing.assert_close(wide.matching, narrow.matching)
