from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradleak import registry, structure
from gradleak.attack import GradientMatching, Reconstruction
from gradleak.dataset import Data
from gradleak.defense import Defense
from gradleak.engine import backends
from gradleak.engine.choice import choose
from gradleak.engine.problem import take
from gradleak.errors import GradleakError
from gradleak.evaluation.metrics import psnr
from gradleak.federation import client
from gradleak.federation.observation import observe as seen_by
from gradleak.mechanisms import dropout
from gradleak.model import initialise
from gradleak.seeds import Generators, generator
from gradleak.threat import Compute, Knowledge, Labels, Level, Observation, Setting
from gradleak.update import LocalTraining, Network, local_update, one_hot

SITES = {"mlp": 2, "lenet": 3, "convnet": 8, "resnet20": 19, "vit": 1 + 4 * 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"widths": (24, 16)},
    "convnet": {"width": 4},
    "resnet20": {"width": 4},
    "vit": {"dim": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0},
}
SHAPE = (1, 8, 8)


def build(name: str, **options: Any) -> nn.Module:
    return initialise(registry.build("models", name, {**OPTIONS.get(name, {}), **options}), SHAPE, 10, 0)


def guard(rate: float = 0.25) -> Defense:
    defense: Defense = registry.build("defenses", "dropout", {"rate": rate})
    return defense


def arm(**options: Any) -> GradientMatching:
    attack: GradientMatching = registry.build("attacks", "dropout-inversion", options)
    return attack


@cache
def digits() -> Data:
    return Data(registry.build("datasets", "digits"), "digits")


def sent_by(
    module: nn.Module, defense: Defense, setting: Setting, victims: int
) -> tuple[Network, client.Sent, Tensor, Tensor]:
    images, labels = digits().victims(victims, setting.batch_size, tuning=True)
    images = images.to(setting.dtype)
    network = client.client_network(module, defense, setting)
    return network, client.send(network, images, labels, 10, defense, setting, 0, [*range(victims)]), images, labels


def observe(
    module: nn.Module,
    defense: Defense,
    victims: int = 2,
    setting: Setting = Setting(precision="float64"),  # noqa: B008
    **compute: Any,
) -> tuple[Observation, client.Sent, Tensor]:
    network, sent, images, labels = sent_by(module, defense, setting, victims)
    knowledge = Knowledge(labels=Labels.KNOWN, defense=Level.ORACLE, local_training=True)
    observation = seen_by(sent, network, defense, setting, SHAPE, labels, 10, knowledge, compute=Compute(**compute))
    return observation, sent, images


def attacked(attack: GradientMatching, observation: Observation) -> Reconstruction:
    names = [*range(observation.victims)]
    return attack.reconstruct(observation, Generators(names, dtype=observation.dtype))


@pytest.mark.parametrize("name", SITES)
def test_sites_are_in_a_copy_and_change_nothing_by_themselves(name: str) -> None:
    module = build(name).eval()
    before = copy.deepcopy(module.state_dict())
    prepared = guard().prepare_model(module)
    assert sum(isinstance(layer, dropout.MaskedDropout) for layer in prepared.modules()) == SITES[name]
    assert not any(isinstance(layer, dropout.MaskedDropout) for layer in module.modules())
    assert all(torch.equal(tensor, module.state_dict()[key]) for key, tensor in before.items())
    images = torch.rand(2, *SHAPE, generator=generator("images"))
    assert torch.equal(module(images), prepared(images))


def test_transformer_sites_are_those_of_the_paper() -> None:
    shapes = dropout.mask_shapes(guard().prepare_model(build("vit")), torch.zeros(3, *SHAPE))
    # Four patches and the class token, 16 wide, two heads, 32 hidden units.
    block = [(3, 2, 5, 5), (3, 5, 16), (3, 5, 32), (3, 5, 16)]
    assert [*shapes.values()] == [(3, 5, 16), *block, *block]


def test_masked_network_is_the_formula() -> None:
    network = Network.of(guard(0.4).prepare_model(build("mlp", activation="gelu")).double())
    images = torch.rand(3, *SHAPE, dtype=torch.float64, generator=generator("images"))
    masks = guard(0.4).private_buffers(network.module, images, generator("masks"))
    weights = [network.parameters[name] for name in network.parameters if name.endswith("weight")]
    biases = [network.parameters[name] for name in network.parameters if name.endswith("bias")]
    hidden = (images.flatten(1) - 0.5) / 0.5
    for weight, bias, mask in zip(weights, biases, masks.values(), strict=False):
        linear = hidden @ weight.T + bias
        hidden = linear * 0.5 * (1 + torch.erf(linear / 2**0.5)) * mask / 0.6
    torch.testing.assert_close(network.logits(images, buffers=masks), hidden @ weights[-1].T + biases[-1])


@settings(max_examples=20, deadline=None)
@given(rate=st.floats(0.05, 0.9), name=st.sampled_from(["mlp", "lenet", "vit"]), seed=st.integers(0, 99))
def test_every_image_has_its_own_mask(rate: float, name: str, seed: int) -> None:
    network = Network.of(guard(rate).prepare_model(build(name)).double())
    images = torch.rand(1, *SHAPE, dtype=torch.float64, generator=generator(seed)).expand(3, *SHAPE)
    masks = guard(rate).private_buffers(network.module, images, generator(seed, "masks"))
    together = network.logits(images, buffers=masks)
    for row in range(3):
        alone = network.logits(images[:1], buffers={key: mask[row : row + 1] for key, mask in masks.items()})
        torch.testing.assert_close(together[row : row + 1], alone)


def test_masks_have_the_rate_and_follow_the_generator() -> None:
    module = dropout.insert(build("mlp", widths=(4000, 50)), 0.3)
    images = torch.zeros(5, *SHAPE)
    masks = guard(0.3).private_buffers(module, images, generator("a"))
    first = next(iter(masks.values()))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert abs(float(first.mean()) - 0.7) < 4 * (0.21 / first.numel()) ** 0.5
    again = guard(0.3).private_buffers(module.double(), images.double(), generator("a"))
    assert all(torch.equal(masks[key].double(), again[key]) for key in masks)
    other = guard(0.3).private_buffers(module.double(), images.double(), generator("b"))
    assert not torch.equal(other["3.1.mask"], again["3.1.mask"])


def test_a_rate_of_zero_has_no_masks() -> None:
    module = guard(0).prepare_model(build("mlp"))
    assert guard(0).private_buffers(module, torch.zeros(1, *SHAPE), generator()) == {}
    assert dropout.rates(module) == {}


def test_models_without_a_place_for_dropout_are_refused() -> None:
    with pytest.raises(GradleakError, match="no hidden activation"):
        guard().prepare_model(build("linear"))
    shared = nn.ReLU()
    model = nn.Sequential(nn.Flatten(), _Twice(shared), nn.Linear(64, 3))
    structure.mark(model, SHAPE)
    twice = dropout.insert(model, 0.5)
    with pytest.raises(GradleakError, match="called twice"):
        dropout.mask_shapes(twice, torch.zeros(1, *SHAPE))


class _Twice(nn.Module):
    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation

    def forward(self, features: Tensor) -> Tensor:
        return self.activation(self.activation(features))  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [LocalTraining(), LocalTraining(steps=4, batch_size=1, lr=0.1)])
def test_a_part_of_a_batch_is_run_with_its_own_masks(training: LocalTraining) -> None:
    network = Network.of(guard(0.5).prepare_model(build("mlp")).double())
    images = torch.rand(2, *SHAPE, dtype=torch.float64, generator=generator("images"))
    targets = one_hot(torch.tensor([3, 4]), 10, torch.float64)
    masks = guard(0.5).private_buffers(network.module, images, generator("masks"))

    def update(order: list[int], **options: Any) -> dict[str, Tensor]:
        rows = {key: mask[order] for key, mask in masks.items()}
        return local_update(network, images[order], targets[order], training, buffers=rows, **options)

    each = update([0, 1], per_example=lambda gradient: gradient)
    torch.testing.assert_close(each, update([0, 1]))
    if training.lr is None:
        halves = [update([0]), update([1])]
        torch.testing.assert_close(each, {key: (halves[0][key] + halves[1][key]) / 2 for key in each})


def test_arms_need_what_they_use() -> None:
    levels = {"ignored": Level.OBLIVIOUS, "joint": Level.PARAMETERS, "sampled": Level.PARAMETERS}
    assert {name: arm(masks=name).needs.defense for name in levels} == levels
    assert arm(masks="informed").needs.defense is Level.ORACLE


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", SITES)
def test_loss_at_the_truth_is_zero_with_the_true_masks_only(name: str, batch_size: int) -> None:
    setting = Setting(precision="float64", batch_size=batch_size)
    observation, sent, images = observe(build(name), guard(), setting=setting)
    for masks in ("joint", "informed"):
        loss = arm(masks=masks).loss(observation, images, sent.targets, sent.buffers)
        assert loss.abs().max() < 1e-12
    assert arm().loss(observation, images, sent.targets, {}).min() > 1e-3


@pytest.mark.parametrize("masks", ["joint", "ignored"])
@pytest.mark.parametrize("name", SITES)
def test_backends_agree(name: str, masks: str) -> None:
    attack = arm(masks=masks)
    observation, _, _ = observe(build(name), guard(), setting=Setting(precision="float64", batch_size=2))
    start = attack.initial(observation, Generators(["a", "b"], dtype=torch.float64))
    start = {key: (tensor.clamp(0.1, 0.9) if key.endswith(".mask") else tensor) for key, tensor in start.items()}
    problem, facts = attack.problem(observation), attack.facts(observation)
    reference = backends.Sequential()(problem, start, facts)
    assert all(gradient.abs().max() > 0 for gradient in reference.gradients.values())
    for name in backends.BACKENDS:
        backend = choose(name, problem, start, facts, 1).backend
        values = backend(problem, start, backend.prepare(problem, facts))
        torch.testing.assert_close(values.total, reference.total)
        torch.testing.assert_close(values.gradients, reference.gradients)


def test_joint_search_finds_images_and_masks_where_ignoring_fails() -> None:
    module = build("mlp", widths=(48, 48), activation="gelu")
    observation, sent, images = observe(module, guard(), setting=Setting())
    quality, guesses = {}, {}
    for masks in ("informed", "joint", "ignored", "sampled"):
        answer = attacked(arm(masks=masks, iterations=200), observation)
        quality[masks] = float(psnr(answer.images.flatten(0, 1), images.flatten(0, 1)).min())
        guesses[masks] = answer.guessed
    assert quality["informed"] > 35 and quality["joint"] > 30
    assert quality["ignored"] < 20 and quality["sampled"] < 20
    hits = [guesses["joint"][key].round() == mask for key, mask in sent.buffers.items()]
    assert torch.cat(hits, -1).double().mean() > 0.98
    assert all(torch.equal(guesses["informed"][key], mask) for key, mask in sent.buffers.items())
    assert guesses["ignored"] == {}


def test_rounded_masks_stay_rounded() -> None:
    observation, _, _ = observe(build("mlp"), guard(0.5), setting=Setting())
    relaxed = attacked(arm(iterations=20), observation).guessed["3.1.mask"]
    assert not torch.equal(relaxed, relaxed.round())
    perturb = arm(iterations=20, round_at=0.5).perturbation(observation, Generators(["a", "b"]))
    assert perturb is not None
    variables = {"3.1.mask": relaxed.clone(), "5.1.mask": torch.full((2, 1, 16), 0.6)}
    perturb(variables, torch.tensor([0, 1]), torch.tensor([9, 10]))
    assert torch.equal(variables["3.1.mask"][0], relaxed[0])
    assert torch.equal(variables["3.1.mask"][1], relaxed[1].round())
    rounded = attacked(arm(iterations=20, round_at=0.0), observation).guessed["3.1.mask"]
    assert torch.equal(rounded, rounded.round())


def test_mask_prior_is_the_distance_of_the_share_of_zeros_to_the_rate() -> None:
    observation, _, _ = observe(build("mlp"), guard(0.25))
    attack = arm(mask_prior=2.0, tv=0)
    facts = take(attack.facts(observation), 0)
    variables = {key: tensor[0] for key, tensor in attack.initial(observation, Generators([0, 1])).items()}
    variables["3.1.mask"] = torch.zeros(1, 24)
    variables["5.1.mask"] = torch.ones(1, 16)
    guess = attack.decode(variables, facts)
    assert float(sum(attack.terms(guess, variables, facts))) == pytest.approx(2 * (0.75 + 0.25))


def test_masks_stay_between_zero_and_one_and_belong_to_each_image() -> None:
    observation, sent, _ = observe(build("vit"), guard(0.5), setting=Setting(batch_size=2))
    answer = attacked(arm(iterations=5, masks="joint"), observation)
    assert answer.guessed.keys() == sent.buffers.keys()
    for key, mask in answer.guessed.items():
        assert mask.shape == sent.buffers[key].shape
        assert mask.min() >= 0 and mask.max() <= 1


@pytest.mark.parametrize("masks", ["joint", "ignored", "sampled", "informed"])
def test_without_dropout_every_arm_is_plain_cosine_matching(masks: str) -> None:
    observation, _, _ = observe(build("mlp"), registry.build("defenses", "none"))
    options = {"iterations": 10, "tv": 4e-5, "schedule": "cosine"}
    plain = attacked(registry.build("attacks", "inverting-gradients", options), observation)
    answer = attacked(arm(masks=masks, iterations=10), observation)
    assert torch.equal(answer.images, plain.images)


@pytest.mark.parametrize("masks", ["joint", "sampled"])
def test_a_victim_does_not_depend_on_its_neighbours(masks: str) -> None:
    attack = arm(masks=masks, iterations=8, restarts=2)
    both, _, _ = observe(build("mlp"), guard(), backend="sequential", width=1)
    second = replace(
        both,
        message={key: tensor[1:] for key, tensor in both.message.items()},
        update={key: tensor[1:] for key, tensor in both.update.items()},
        labels=None if both.labels is None else both.labels[1:],
    )
    together = attack.reconstruct(both, Generators(["a", "b"], dtype=torch.float64))
    alone = attack.reconstruct(second, Generators(["b"], dtype=torch.float64))
    assert torch.equal(together.images[1:], alone.images)
    other = attack.reconstruct(second, Generators(["c"], dtype=torch.float64))
    assert not torch.equal(other.images, alone.images)


def test_sampled_masks_are_new_at_every_iteration() -> None:
    observation, _, _ = observe(build("mlp"), guard(0.5))
    attack = arm(masks="sampled")
    perturb = attack.perturbation(observation, Generators(["a", "b"], dtype=torch.float64))
    assert perturb is not None
    variables = attack.initial(observation, Generators(["a", "b"], dtype=torch.float64))
    seen = []
    for step in (0, 1, 0):
        perturb(variables, torch.tensor([0, 1]), torch.tensor([step, step]))
        seen.append(variables["3.1.mask"].clone())
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0][0], seen[0][1])
    assert set(seen[0].unique().tolist()) == {0.0, 1.0}
