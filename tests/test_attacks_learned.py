"""Attacks that compare a message with those of public images: the posterior mean, and regression on messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gradleak import registry
from gradleak.attack import Reconstruction
from gradleak.attacks._imitation import class_prior
from gradleak.dataset import Images
from gradleak.seeds import Generators
from gradleak.threat import Compute, Observation, Setting
from tests.test_attacks_optimisation import Case

MLP: dict[str, Any] = {"model": "mlp", "options": {"widths": [16]}, "view": True}
SMALL: dict[str, dict[str, int]] = {
    "posterior": {"candidates": 64, "trials": 16},
    "message-regression": {"messages": 256},
}


def solve(name: str, observation: Observation, names: list[int] | None = None, **options: Any) -> Reconstruction:
    """Run an attack with small options."""
    plugin = registry.build("attacks", name, {**SMALL[name], **options})
    victims = range(observation.victims) if names is None else names
    answer: Reconstruction = plugin.reconstruct(observation, Generators([("victim", index) for index in victims]))
    return answer


def error(answer: Reconstruction, images: Tensor) -> float:
    """Mean squared error."""
    return float((answer.images - images).square().mean())


def thinned(case: Case, every: int = 6) -> Observation:
    """The observation with fewer public images, for speed."""
    public = case.observation.auxiliary
    assert public is not None
    return replace(case.observation, auxiliary=public[torch.arange(0, len(public), every)])


def test_the_posterior_is_the_nearest_public_image_without_noise_and_the_class_mean_under_noise_without_end() -> None:
    errors = []
    for sigma in (1e-6, 0.1, 0.3, 1e6):
        noise = {"sigma": sigma, "clip": 1.0}
        case = Case(victims=16, defense="gaussian-noise", defense_options=noise, **MLP)
        observation = thinned(case)
        assert observation.auxiliary is not None
        answer = solve("posterior", observation, candidates=512)
        errors.append(error(answer, case.images))
    prior = class_prior(observation, case.labels)
    assert torch.allclose(answer.images, prior, atol=0.02)
    assert errors[0] < errors[1] < errors[2] < errors[3], errors
    # A victim that is public itself is recognised, but for the width that serves others best.
    case = Case(victims=3, defense="gaussian-noise", defense_options={"sigma": 1e-6, "clip": 1.0}, **MLP)
    observation = thinned(case)
    assert observation.auxiliary is not None
    public = Images(
        torch.cat([observation.auxiliary.images, case.images[:, 0]]),
        torch.cat([observation.auxiliary.labels, case.labels[:, 0]]),
    )
    exact = solve("posterior", replace(observation, auxiliary=public), candidates=512)
    assert error(exact, case.images) < 1e-3 < 0.05 * errors[3]
    assert exact.details["effective"].max() < 2


def test_regression_beats_the_class_mean_under_sign_and_is_it_under_noise_without_end() -> None:
    case = Case(victims=8, defense="sign", **MLP)
    answer = solve("message-regression", case.observation, messages=512)
    prior = class_prior(case.observation, case.labels)
    assert error(answer, case.images) < 0.75 * float((prior - case.images).square().mean())
    assert float(answer.details["held_out_error"][0]) < float(answer.details["prior_error"][0])
    noise = {"sigma": 1e6, "clip": 1.0}
    case = Case(victims=4, defense="gaussian-noise", defense_options=noise, **MLP)
    answer = solve("message-regression", case.observation)
    assert torch.allclose(answer.images, class_prior(case.observation, case.labels), atol=0.05)


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize("defense", ["augmentation", "secure-aggregation", "mixup"])
def test_batches_sums_and_encodings_are_answered_in_the_order_of_the_labels(name: str, defense: str) -> None:
    """Whatever is drawn for imitations, victims do not depend on their neighbours."""
    size = 1 if defense == "augmentation" else 2
    options = {"clients": 2} if defense == "secure-aggregation" else {}
    setting = Setting(batch_size=1 if options else size)
    case = Case(setting, victims=4, defense=defense, defense_options=options, **MLP)
    observation = thinned(case)
    labels = case.labels.flatten()[: 4 * size].view(-1, size)
    if options:
        sums = {key: tensor.unflatten(0, (-1, 2)).mean(1) for key, tensor in observation.message.items()}
        observation = replace(observation, message=sums, update=sums, batch_size=2, labels=labels[:2])
    observation = replace(observation, labels=labels[: observation.victims])
    small: dict[str, Any] = {"candidates": 12, "trials": 3} if name == "posterior" else {"messages": 64}
    whole = solve(name, observation, None, **small)
    assert whole.images.shape == (observation.victims, size, *observation.shape)
    assert observation.labels is not None
    one = {key: tensor[1:2] for key, tensor in observation.message.items()}
    flipped = observation.labels[1:2].flip(1)
    alone = solve(name, replace(observation, message=one, update=one, labels=flipped), [1], **small)
    if observation.labels[1].unique().numel() == size:
        assert torch.allclose(alone.images.flip(1), whole.images[1:2], atol=1e-5)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_who_has_no_time_answers_the_class_mean_and_says_so(name: str) -> None:
    case = Case(victims=2, defense="sign", **MLP)
    late = replace(case.observation, compute=Compute(deadline=0.0))
    answer = solve(name, late)
    assert answer.status == ["timeout", "timeout"]
    assert torch.equal(answer.images, class_prior(late, case.labels))
