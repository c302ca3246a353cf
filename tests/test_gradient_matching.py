"""Matching attacks on real images: they reconstruct what the gradient tells, and nothing without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradleak import registry
from gradleak.attack import Reconstruction
from gradleak.dataset import Data
from gradleak.defense import View
from gradleak.engine.objectives import OBJECTIVES, cosine, relative_squared, squared
from gradleak.model import initialise
from gradleak.seeds import Generators
from gradleak.testing import Scene
from gradleak.threat import Compute, Observation, Setting
from gradleak.update import one_hot


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Median-ready PSNR [N] of the first image of every victim, dB."""
    return -10 * (images - truth).square().flatten(2).mean(-1).clamp(min=1e-10).log10()[:, 0]


class Case:
    """Clients of one dataset and model under a defense, and what an attacker sees of them."""

    def __init__(
        self,
        victims: int = 3,
        dataset: str = "digits",
        model: str = "lenet",
        defense: str = "none",
        options: dict[str, Any] | None = None,
        setting: Setting | None = None,
        model_options: dict[str, Any] | None = None,
    ):
        """Let the first tuning victims of a dataset send their messages."""
        self.setting = setting or Setting()
        data = Data(registry.build("datasets", dataset), dataset)
        self.images, self.labels = data.victims(victims, self.setting.batch_size, tuning=True)
        self.images = self.images.to(self.setting.dtype)
        self.defense = registry.build("defenses", defense, options)
        module = initialise(registry.build("models", model, model_options), data.shape, data.classes, 0)
        scene = Scene.of(module, self.images, self.labels, self.defense, self.setting, data.classes)
        self.network, self.sent, self.observation = scene.network, scene.sent, scene.observe()

    def adaptive(self) -> Observation:
        """The same, to an attacker who knows the defense."""
        return replace(self.observation, view=View(self.defense, self.sent.public))

    def attack(self, name: str, observation: Observation | None = None, **options: Any) -> Reconstruction:
        """Let an attack answer."""
        plugin = registry.build("attacks", name, options)
        names = [f"victim {index}" for index in range(len(self.images))]
        answer: Reconstruction = plugin.reconstruct(
            observation or self.observation, Generators(names, dtype=self.setting.dtype)
        )
        return answer


def test_inverting_gradients_reconstructs_digits() -> None:
    case = Case()
    answer = case.attack("inverting-gradients", iterations=300)
    assert psnr(answer.images, case.images).min() > 30
    assert answer.images.min() >= 0 and answer.images.max() <= 1


def test_dlg_finds_image_and_label_together() -> None:
    case = Case(victims=4)
    answer = case.attack("dlg", iterations=200)
    assert answer.labels is not None
    found = psnr(answer.images, case.images) > 35
    assert found.sum() >= 3
    assert torch.equal(answer.labels[found], case.labels[found])


def test_idlg_infers_the_label_it_is_not_told() -> None:
    case = Case()
    answer = case.attack("idlg", replace(case.observation, labels=None), iterations=200)
    assert answer.labels is not None and torch.equal(answer.labels, case.labels)
    assert psnr(answer.images, case.images).median() > 35


def test_another_victims_gradient_is_worth_nothing() -> None:
    case = Case()
    rolled = {name: tensor.roll(-1, 0) for name, tensor in case.observation.message.items()}
    other = replace(case.observation, message=rolled, update=rolled, labels=case.labels.roll(-1, 0))
    answer = case.attack("wrong-gradient", other, iterations=100)
    assert psnr(answer.images, case.images).max() < 15


def test_the_returned_loss_is_the_loss_of_the_returned_images() -> None:
    case = Case()
    plugin = registry.build("attacks", "dlg", {"iterations": 30})
    answer = plugin.reconstruct(case.observation, Generators(["a", "b", "c"]))
    assert answer.loss is not None
    inverting = registry.build("attacks", "inverting-gradients", {"iterations": 30, "restarts": 2})
    answer = inverting.reconstruct(case.observation, Generators(["a", "b", "c"]))
    again = inverting.loss(case.observation, answer.images, one_hot(case.labels, 10, torch.float32), {})
    assert torch.allclose(again, answer.loss, atol=1e-6)


def test_restarts_are_picked_by_the_attackers_own_loss() -> None:
    case = Case()
    plugin = registry.build("attacks", "inverting-gradients", {"iterations": 20, "restarts": 4})
    answer = plugin.reconstruct(case.observation, Generators(["a", "b", "c"]))
    assert answer.candidates is not None and answer.candidates.shape[:2] == (3, 4)
    targets = one_hot(case.labels, 10, torch.float32)
    losses = torch.stack([plugin.loss(case.observation, answer.candidates[:, r], targets, {}) for r in range(4)], dim=1)
    assert torch.allclose(losses.min(1).values, answer.loss, atol=1e-6)


def test_the_truth_is_a_minimum_of_every_adaptive_loss_without_noise() -> None:
    for defense, options in (("none", {}), ("top-k", {"ratio": 0.05}), ("gaussian-noise", {"sigma": 0.0})):
        case = Case(defense=defense, options=options, setting=Setting(precision="float64"))
        plugin = registry.build("attacks", "inverting-gradients")
        loss = plugin.loss(case.adaptive(), case.images, one_hot(case.labels, 10, torch.float64), {})
        assert loss.abs().max() < 1e-12, defense


def test_knowing_the_mask_beats_taking_zeros_for_gradients() -> None:
    case = Case(defense="top-k", options={"ratio": 0.05})
    blind = case.attack("inverting-gradients", iterations=200)
    aware = case.attack("inverting-gradients", case.adaptive(), iterations=200)
    assert psnr(aware.images, case.images).median() > psnr(blind.images, case.images).median() + 5


def test_clipping_alone_does_not_hide_the_direction() -> None:
    case = Case(defense="gaussian-noise", options={"sigma": 0.0, "clip": 0.01})
    assert psnr(case.attack("inverting-gradients", iterations=300).images, case.images).min() > 30
    aware = case.attack("inverting-gradients", case.adaptive(), iterations=300)
    assert psnr(aware.images, case.images).min() > 30


def test_a_batch_is_clipped_example_by_example() -> None:
    setting = Setting(batch_size=3, precision="float64")
    case = Case(victims=1, defense="gaussian-noise", options={"sigma": 0.0, "clip": 0.5}, setting=setting)
    each = Case(victims=3, setting=Setting(precision="float64"))
    assert torch.equal(each.images.flatten(0, 1), case.images.flatten(0, 1))
    total: dict[str, Tensor] = {}
    for victim in range(3):
        row = {name: tensor[victim] for name, tensor in each.sent.update.items()}
        norm = torch.cat([tensor.flatten() for tensor in row.values()]).norm()
        factor = min(1.0, 0.5 / float(norm))
        total = {name: total.get(name, 0) + factor * tensor / 3 for name, tensor in row.items()}
    for name, tensor in case.sent.message.items():
        assert torch.allclose(tensor[0], total[name], atol=1e-12)


def test_unrolled_local_steps_are_simulated_when_granted() -> None:
    setting = Setting(batch_size=2, local_steps=4, local_batch_size=1, local_lr=0.05, precision="float64")
    case = Case(victims=2, setting=setting)
    plugin = registry.build("attacks", "inverting-gradients", {"iterations": 150})
    targets = one_hot(case.labels, 10, torch.float64)
    told = replace(case.observation, training=setting.local_training)
    assert plugin.loss(told, case.images, targets, {}).abs().max() < 1e-12
    assert plugin.loss(case.observation, case.images, targets, {}).min() > 1e-6
    answer = plugin.reconstruct(told, Generators(["a", "b"], dtype=torch.float64))
    assert psnr(answer.images, case.images).median() > 20


def test_one_local_step_is_a_gradient() -> None:
    step = Setting(local_lr=0.1, precision="float64")
    fedavg, fedsgd = Case(setting=step), Case(setting=Setting(precision="float64"))
    told = replace(fedavg.observation, training=step.local_training)
    for name, tensor in told.gradient.items():
        assert torch.allclose(tensor, fedsgd.sent.update[name], atol=1e-12)


@pytest.mark.parametrize("backend", ["sequential", "vmap"])
def test_both_backends_reconstruct(backend: str) -> None:
    case = Case(victims=2)
    chosen = replace(case.observation, compute=Compute(backend=backend))
    answer = case.attack("inverting-gradients", chosen, iterations=100)
    assert answer.backend == backend
    assert psnr(answer.images, case.images).min() > 25


def test_a_deadline_marks_those_who_were_not_done() -> None:
    case = Case()
    late = replace(case.observation, compute=Compute(deadline=0.0))
    answer = case.attack("inverting-gradients", late, iterations=1000)
    assert [state.value for state in answer.status] == ["timeout"] * 3


updates = st.integers(0, 2**31).map(
    lambda seed: {
        "a": torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
        "b": torch.randn(5, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64),
    }
)


@settings(deadline=None, max_examples=30)
@given(updates, updates, st.floats(1e-3, 1e3))
def test_cosine_is_blind_to_scale_and_spans_all_tensors(
    left: dict[str, Tensor], right: dict[str, Tensor], scale: float
) -> None:
    value = cosine(left, right)
    scaled = cosine({name: scale * tensor for name, tensor in left.items()}, right)
    assert torch.allclose(value, scaled, atol=1e-12)
    flat = [torch.cat([tensor.flatten() for tensor in side.values()]) for side in (left, right)]
    assert torch.allclose(value, 1 - torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0), atol=1e-12)
    assert torch.allclose(squared(left, right), (flat[0] - flat[1]).square().sum())


@given(updates)
@settings(deadline=None, max_examples=10)
def test_every_objective_is_least_at_the_observation(observed: dict[str, Tensor]) -> None:
    for name, objective in OBJECTIVES.items():
        at = objective(observed, observed)
        moved = objective({key: tensor + 0.1 * tensor.flip(0) for key, tensor in observed.items()}, observed)
        assert at.abs() < 1e-12 and moved > at, name
    zero = {key: torch.zeros_like(tensor) for key, tensor in observed.items()}
    assert torch.allclose(relative_squared(zero, observed), torch.ones((), dtype=torch.float64))
