"""What public images add to a matching attack, and budgets that end when they are done."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
import torch
from torch.func import vmap

from gradleak import registry
from gradleak.dataset import Data, Images
from gradleak.engine.restarts import OnDemand, first_to_reach
from gradleak.errors import GradleakError
from gradleak.search import public_images
from gradleak.seeds import Generators
from tests.test_gauss_newton import granted
from tests.test_gradient_matching import psnr


def public() -> Images:
    """The public digits."""
    return Data(registry.build("datasets", "digits"), "digits").split.train


def test_whitening_is_the_root_of_the_precision() -> None:
    images = public()
    fitted = public_images.gaussian(images, 10)
    chosen = images.images[images.labels == 3].flatten(1).double()
    covariance = chosen.T.cov() + 2e-3 * torch.eye(chosen.shape[1], dtype=torch.float64)
    victim = images.images[:2].double()
    labels = torch.full((1, 2), 3)
    facts = {name: tensor[0] for name, tensor in fitted.facts(labels).items()}
    apart = victim.flatten(1) - chosen.mean(0)
    expected = (apart * torch.linalg.solve(covariance, apart.T).T).sum()
    torch.testing.assert_close(public_images.whiten(victim, facts).square().sum(), expected)


def test_drawn_images_have_the_labels_and_come_once() -> None:
    images, labels = public(), torch.tensor([[1, 7], [3, 3]])
    drawn = public_images.draw(images, 10, labels, 20, Generators(["a", "b"]))
    assert drawn.shape == (20, 2, 2, 1, 8, 8)
    for victim in range(2):
        for position in range(2):
            rows = drawn[:, victim, position].flatten(1)
            pool = images.images[images.labels == labels[victim, position]].flatten(1)
            assert bool((torch.cdist(rows, pool).amin(1) == 0).all())
            assert len(rows.unique(dim=0)) == 20
    alone = public_images.draw(images, 10, labels[1:], 20, Generators(["b"]))
    assert torch.equal(alone[:, 0], drawn[:, 1])


def test_the_alphabet_is_that_of_the_public_images() -> None:
    values = public_images.levels(public())
    assert values is not None
    assert len(values) == 17
    snapped = public_images.snap(torch.tensor([0.0, 0.04, 0.99, 1.0, 0.5 + 1 / 40]), values)
    assert torch.equal(snapped * 16, torch.tensor([0.0, 1.0, 16.0, 16.0, 8.0]))
    fine = Images(torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(40).long())
    assert public_images.levels(fine) is None


def test_restarts_on_demand_do_not_depend_on_which_others_ran() -> None:
    demand = OnDemand([0, 1, 0, 1, 0, 1], torch.tensor([0.1, 0.1]))
    assert demand.first() == [0, 1]
    loss = torch.tensor([0.05, 0.5, 9.0, 9.0, 9.0, 0.01])
    queue, left = demand.settle([0, 1], loss, deque())
    assert [*queue] == [3, 5]
    assert left == {2, 4}
    queue, left = demand.settle([5], loss, deque([3]))
    assert [*queue] == [3]
    assert left == set()
    losses = torch.tensor([[0.5, 0.05, 0.3], [0.09, 0.01, 0.2], [0.01, 0.5, 0.4]])
    picked, made = first_to_reach(losses, torch.full((3,), 0.1))
    assert picked.tolist() == [1, 0, 1]
    assert made.T.tolist() == [[True, True, False], [True, False, False], [True, True, True]]


def test_a_class_prior_helps_against_noise() -> None:
    case, observation = granted("gradient-noise", 3)
    options = {"alphabet": False, "restarts": 2}
    without = psnr(case.attack("gauss-newton", observation, class_prior=(), **options).images, case.images)
    with_it = psnr(case.attack("gauss-newton", observation, **options).images, case.images)
    assert float(with_it.mean()) > float(without.mean()) + 1


def test_grey_levels_finish_what_rounding_hid() -> None:
    case, observation = granted("quantise", bits=8)
    options = {"class_prior": (), "restarts": 2}
    without = psnr(case.attack("gauss-newton", observation, alphabet=False, **options).images, case.images)
    with_it = psnr(case.attack("gauss-newton", observation, **options).images, case.images)
    assert bool((without < 90).all())
    assert bool((with_it > 99).all())


def test_who_read_nothing_answers_with_the_prior() -> None:
    case, observation = granted("gaussian-noise", 3, sigma=5.0, clip=1.0)
    options = {"class_prior": (), "restarts": 1, "alphabet": False}
    answer = case.attack("gauss-newton", observation, fallback=True, **options)
    means = public_images.class_means(public(), 10)[case.labels]
    assert torch.equal(answer.images, means)
    assert answer.details["read"].tolist() == [0, 0, 0]
    clear, seen = granted("none", 3)
    answer = clear.attack("gauss-newton", seen, fallback=True, **options)
    assert answer.details["read"].tolist() == [1, 1, 1]
    assert bool((psnr(answer.images, clear.images) > 60).all())


def test_a_first_order_budget_ends_when_the_message_is_read() -> None:
    case, observation = granted("none")
    options = {"objective": "relative-squared", "optimiser": "lbfgs", "lr": 1.0, "schedule": "constant", "tv": 0.0}
    options |= {"signed": False, "iterations": 300, "restarts": 3, "initialisation": "class-mean"}
    whole = case.attack("inverting-gradients", observation, **options)
    ended = case.attack("inverting-gradients", observation, budget="ceiling", **options)
    assert whole.iterations is not None and ended.iterations is not None and ended.loss is not None
    assert bool((ended.iterations < whole.iterations / 3).all())
    assert bool((ended.loss <= 1e-6).all())
    assert ended.details["converged"].tolist() == [1, 1]
    assert "converged" not in whole.details


def test_without_public_images_nothing_of_them_is_used() -> None:
    case, observation = granted("none")
    answer = case.attack("gauss-newton", replace(observation, auxiliary=None), restarts=3)
    assert bool((psnr(answer.images, case.images) > 60).all())


def test_options_that_contradict_are_refused() -> None:
    with pytest.raises(GradleakError, match="parametrisation"):
        registry.build("attacks", "gauss-newton", {"parametrisation": "deep-prior"})
    with pytest.raises(GradleakError, match="halving"):
        registry.build("attacks", "inverting-gradients", {"budget": "ceiling", "halving": [0.5]})
    with pytest.raises(GradleakError, match="own way"):
        registry.build("attacks", "ggl", {"fallback": True})


@pytest.mark.parametrize(
    "defense", ["quantise", "qsgd", "terngrad", "gradient-noise", "dp-sgd", "sketch", "top-k", "sign"]
)
def test_residuals_at_the_truth_have_the_size_that_is_declared(defense: str) -> None:
    options = {"sketch": {"sigma": 0.1}}.get(defense, {})
    case, observation = granted(defense, 3, **options)
    attack = registry.build("attacks", "gauss-newton", {})
    targets = torch.nn.functional.one_hot(case.labels, 10)
    loss = attack.loss(observation, case.images, targets, {})
    assert bool((loss <= attack.goal(observation)).all())
    view = observation.view
    assert view is not None
    floor = vmap(view.noise_floor)(observation.message)
    assert bool((loss >= floor / 3).all())
