"""Generative attacks: exact pieces, monotone phases, and gains over a search of the code alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradleak import registry
from gradleak.attack import Reconstruction
from gradleak.attacks._latent import Trials, ramp
from gradleak.attacks.ggl import _Evolution, _transformed
from gradleak.attacks.gifd import _onto_ball
from gradleak.dataset import Data
from gradleak.engine.problem import take
from gradleak.engine.restarts import Restarts
from gradleak.errors import GradleakError
from gradleak.search.generators import Generator
from gradleak.seeds import Generators
from gradleak.testing import Scene, model
from gradleak.threat import Compute, Knowledge, Observation, Setting
from gradleak.training.priors import Recipe, train_prior

DIGITS = Data(registry.build("datasets", "digits"), "digits")
ATTACKS: dict[str, dict[str, Any]] = {
    "gifd": {"iterations": 8, "restarts": 2},
    "gias": {"iterations": 8, "restarts": 2, "weights_iterations": 8},
    "ggl": {"search": "adam", "iterations": 8, "restarts": 2},
}


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    folder: Path = tmp_path_factory.mktemp("priors")
    return train_prior(DIGITS, Recipe(latent=8, width=8, epochs=10), folder)


def observe(prior: Generator | None, victims: int = 3, batch_size: int = 1, double: bool = False) -> Observation:
    """What is seen of the first tuning victims, in float64 if `double`."""
    setting = Setting(batch_size=batch_size, precision="float64" if double else "float32")
    images, labels = DIGITS.victims(victims, batch_size, tuning=True)
    if prior is not None and double:
        prior = _double(prior)
    scene = Scene.of(model("lenet"), images, labels, setting=setting)
    return scene.observe(generator=prior, compute=Compute(width=8))


def _double(prior: Generator) -> Generator:
    import copy

    return copy.deepcopy(prior).double()


def reconstruct(
    name: str, observation: Observation, victims: list[int] | None = None, **options: Any
) -> Reconstruction:
    attack = registry.build("attacks", name, options)
    chosen = range(observation.victims) if victims is None else victims
    names = [("victim", index) for index in chosen]
    answer: Reconstruction = attack.reconstruct(observation, Generators(names, dtype=observation.dtype))
    return answer


def psnr(images: Tensor, victims: int) -> Tensor:
    truth, _ = DIGITS.victims(victims, 1, tuning=True)
    return -10 * (images - truth[:, 0]).square().flatten(1).mean(1).log10()


@given(st.integers(0, 2**31), st.integers(1, 30), st.floats(0, 20))
@settings(deadline=None, max_examples=60)
def test_projection_is_the_nearest_point_of_the_ball(seed: int, size: int, radius: float) -> None:
    points = 3 * torch.randn(4, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    projected = _onto_ball(points, radius)
    assert (projected.abs().sum(1) <= radius + 1e-9).all()
    inside = points.abs().sum(1) <= radius
    assert torch.equal(projected[inside], points[inside])
    # Soft thresholding at the level that just reaches the ball, found by bisection instead of sorting.
    low, high = torch.zeros(4, 1, dtype=torch.float64), points.abs().amax(1, keepdim=True)
    for _ in range(100):
        middle = (low + high) / 2
        outside = (points.abs() - middle).relu().sum(1, keepdim=True) > radius
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    expected = torch.where(inside[:, None], points, points.sign() * (points.abs() - high).relu())
    torch.testing.assert_close(projected, expected)


def test_ramp_moves_at_once_holds_and_ends_at_zero() -> None:
    factors = ramp(100)(torch.arange(101) / 100)
    assert 0 < factors[0] < factors[3] < factors[5]
    torch.testing.assert_close(factors[5:26], torch.ones(21))
    assert (factors[26:].diff() < 0).all()
    assert factors[-1].abs() < 1e-6


def test_evolution_finds_the_minimum_of_a_rotated_ellipsoid_in_every_row() -> None:
    generator = torch.Generator().manual_seed(0)
    size, rows, population = 6, 2, 12
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    scales = 10 ** torch.linspace(0, 4, size, dtype=torch.float64)
    target = torch.randn(rows, 1, size, generator=generator, dtype=torch.float64)

    def run(which: slice) -> Tensor:
        stream = torch.Generator().manual_seed(1)
        goal = target[which]
        strategy = _Evolution(torch.zeros(len(goal), size, dtype=torch.float64), population, 0.5)
        for _ in range(300):
            normal = torch.randn(rows, population, size, generator=stream, dtype=torch.float64)[which]
            points = strategy.ask(normal)
            strategy.tell(points, (((points - goal) @ basis).square() * scales).sum(-1))
        return strategy.mean

    together = run(slice(0, 2))
    torch.testing.assert_close(together, target[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(together[1:], run(slice(1, 2)))


def test_estimated_defense_changes_nothing_at_the_truth_and_imitates_what_it_saw() -> None:
    stream = torch.Generator().manual_seed(0)
    truth = {"conv": torch.randn(4, 3, 3, 3, generator=stream), "fc": torch.randn(10, 6, generator=stream)}
    truth["conv"][1] = 0
    same = _transformed(truth, truth)
    assert all(torch.equal(same[name], truth[name]) for name in truth)
    guess = {name: 5 * torch.randn(tensor.shape, generator=stream) for name, tensor in truth.items()}
    truth["fc"][:, 2] = 0
    changed = _transformed(guess, truth)
    norm = torch.stack([tensor.square().sum() for tensor in truth.values()]).sum()
    torch.testing.assert_close(torch.stack([tensor.square().sum() for tensor in changed.values()]).sum(), norm)
    assert (changed["conv"] == 0).sum() == 27 and (changed["fc"][:, 2] == 0).all()
    small = {name: tensor / 100 for name, tensor in guess.items()}
    kept = _transformed(small, truth)["conv"]
    assert torch.equal(kept[kept != 0], small["conv"][kept != 0])
    assert small["conv"][kept == 0].abs().max() <= kept[kept != 0].abs().min()


def test_gifd_beats_the_code_alone_and_never_loses_by_going_deeper(prior: Generator) -> None:
    observation = observe(prior)
    answers = [reconstruct("gifd", observation, iterations=60, restarts=1, depth=depth) for depth in (0, 1, 2)]
    losses = torch.stack([answer.loss for answer in answers if answer.loss is not None])
    assert (losses.diff(dim=0) <= 0).all()
    assert (psnr(answers[2].images[:, 0], 3) > psnr(answers[0].images[:, 0], 3) + 2).all()
    assert (answers[2].details["phase"] > 0).all() and (answers[0].details["phase"] == 0).all()
    # The loss is that of exactly these images.
    attack = registry.build("attacks", "gifd")
    targets = torch.nn.functional.one_hot(observation.labels, 10).float()  # type: ignore[arg-type]
    again = attack.loss(observation, answers[2].images, targets, {})
    torch.testing.assert_close(again, answers[2].loss, atol=1e-6, rtol=1e-4)


def test_gifd_with_empty_balls_is_the_code_alone(prior: Generator) -> None:
    observation = observe(prior, victims=2)
    alone = reconstruct("gifd", observation, iterations=10, restarts=1, depth=0)
    still = reconstruct("gifd", observation, iterations=10, restarts=1, radii=[0.0])
    torch.testing.assert_close(still.images, alone.images, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("radius", "relative"), [(0.01, True), (0.5, False)])
def test_gifd_stays_in_its_balls(prior: Generator, radius: float, relative: bool) -> None:
    observation = observe(prior, victims=2, batch_size=2)
    options = {"iterations": 6, "restarts": 1, "radii": [radius], "relative": relative}
    attack = registry.build("attacks", "gifd", options)
    rows = torch.arange(2)
    trials = Trials(take(attack.facts(observation), rows), Restarts(Generators([0, 1]), 1))
    phases = [outcome.variables for outcome, _ in attack.phases(observation, trials)]
    assert len(phases) == len(prior.stages)
    for variables in phases[1:]:
        flat = variables["features"].flatten(2)
        limit = radius * flat.shape[-1] if relative else radius
        size = flat.abs().sum(-1)
        assert (size <= limit * (1 + 1e-5)).all() and (size > 0.9 * limit).all()


def test_gias_adapts_a_copy_for_every_image_and_leaves_the_generator_alone(prior: Generator) -> None:
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    observation = observe(prior, victims=2, batch_size=2)
    code = reconstruct("gias", observation, iterations=20, restarts=1, weights_iterations=0)
    both = reconstruct("gias", observation, iterations=20, restarts=1, weights_iterations=20)
    assert code.loss is not None and both.loss is not None and (both.loss < code.loss).all()
    assert (both.details["phase"] == 1).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in prior.state_dict().items())


def test_ggl_searches_without_derivatives(prior: Generator) -> None:
    observation = observe(prior)
    first = reconstruct("ggl", observation, rounds=1, population=12, restarts=1)
    later = reconstruct("ggl", observation, rounds=25, population=12, restarts=1)
    assert first.loss is not None and later.loss is not None and (later.loss < first.loss).all()
    assert psnr(later.images[:, 0], 3).median() > psnr(first.images[:, 0], 3).median() + 1
    assert later.gradient_evaluations is not None and (later.gradient_evaluations == 300).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_both_backends_and_any_neighbours_give_one_answer(name: str, prior: Generator) -> None:
    observation = observe(prior, victims=3, batch_size=2, double=True)
    compute = observation.compute
    together = reconstruct(name, observation, **ATTACKS[name])
    assert together.candidates is not None and together.candidates.shape[:2] == (3, 2)
    for backend in ("sequential", "vmap"):
        other = reconstruct(name, replace(observation, compute=replace(compute, backend=backend)), **ATTACKS[name])
        torch.testing.assert_close(other.images, together.images, atol=1e-6, rtol=0)
    alone = replace(
        observation,
        message={name: tensor[1:2] for name, tensor in observation.message.items()},
        update={name: tensor[1:2] for name, tensor in observation.update.items()},
        labels=observation.labels[1:2],  # type: ignore[index]
    )
    torch.testing.assert_close(
        reconstruct(name, alone, [1], **ATTACKS[name]).images[0], together.images[1], atol=1e-6, rtol=0
    )


def test_control_samples_the_right_class(prior: Generator) -> None:
    observation = observe(prior, victims=20, batch_size=2)
    answer = reconstruct("generator-sample", observation)
    train = DIGITS.split.train
    means = torch.stack([train.images[train.labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(answer.images.flatten(0, 1).flatten(1), means.flatten(1)).argmin(1)
    assert observation.labels is not None
    assert (nearest == observation.labels.flatten()).double().mean() > 0.7


def test_control_reads_nothing_of_the_message(prior: Generator) -> None:
    seen = observe(prior, victims=20, batch_size=2)
    for labels in (seen.labels, None):
        answers = []
        for factor in (0.0, 1.0):
            spoilt = {name: factor * tensor for name, tensor in seen.message.items()}
            answers.append(reconstruct("generator-sample", replace(seen, message=spoilt, update=spoilt, labels=labels)))
        assert torch.equal(answers[0].images, answers[1].images)
        assert answers[0].labels is not None and answers[1].labels is not None
        assert torch.equal(answers[0].labels, answers[1].labels)
    # Drawn, and from all classes.
    drawn, truth = answers[0].labels, seen.labels
    assert drawn is not None and truth is not None
    assert torch.eq(drawn, truth).double().mean() < 0.4
    assert len(drawn.unique()) == 10


@pytest.mark.parametrize("name", ["gifd", "gias", "ggl", "generator-sample"])
def test_generator_is_knowledge(name: str) -> None:
    attack = registry.build("attacks", name)
    assert attack.needs.missing(Knowledge()) == ["generator: true"]
    with pytest.raises(GradleakError, match="grants none"):
        reconstruct(name, observe(None, victims=1))
