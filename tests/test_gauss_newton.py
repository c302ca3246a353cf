"""Second-order steps: products with the Jacobian, Levenberg-Marquardt in the engine's slots, and the attack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn

from gradleak import registry
from gradleak.dataset import Data
from gradleak.engine import loop
from gradleak.engine.backends import Vmap
from gradleak.engine.gauss_newton import LevenbergMarquardt, Linearisation, lanczos, residuals_of
from gradleak.engine.loop import Outcome, Plan
from gradleak.engine.optimisers import Scene, Variables, constant
from gradleak.engine.problem import Facts, Guess, Problem, take
from gradleak.threat import Compute, Observation
from gradleak.update import LocalTraining, Network, Update, one_hot
from tests.test_gradient_matching import Case, psnr

UNKNOWNS = 5


def curved(pixels: Tensor) -> Tensor:
    """Residuals [9] of [5] unknowns, as nonlinear as Rosenbrock's."""
    ends = pixels[1:] - pixels[:-1].square()
    return torch.cat([3 * ends, 1 - pixels])


def problem_of(model: str) -> tuple[Problem, Variables, Facts]:
    """A matching problem of three tuning victims in float64, and where to start."""
    case = Case(3, model=model, model_options={"widths": [8]} if model == "mlp" else None)
    network = case.network.to("cpu", torch.float64)
    targets = one_hot(case.labels, case.observation.classes, torch.float64)

    def residual(update: Update, facts: Facts) -> Tensor:
        return torch.cat([(tensor - facts.update[name]).flatten() for name, tensor in update.items()])

    def decode(variables: Variables, facts: Facts) -> Guess:
        return Guess(variables["pixels"], facts.targets)

    problem = Problem(
        network=network,
        training=LocalTraining(),
        decode=decode,
        match=lambda update, facts: residual(update, facts).square().sum(),
        penalty=lambda guess, variables, facts: guess.images.new_zeros(()),
        residual=residual,
    )
    facts = Facts(targets, update={name: t.double() for name, t in case.observation.update.items()})
    noise = torch.rand(case.images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return problem, {"pixels": 0.7 * case.images.double() + 0.3 * noise}, facts


def small_problem() -> Problem:
    """A problem whose update is the residual itself: `curved` minus the fact `offset`."""
    network = Network.of(nn.Linear(1, 1))

    class Curved(Problem):
        def simulate(self, guess: Guess, differentiate: Any) -> Update:
            return {"rows": curved(guess.images.flatten())}

    return Curved(
        network=network,
        training=LocalTraining(),
        decode=lambda variables, facts: Guess(variables["pixels"], torch.zeros(1, 1)),
        match=lambda update, facts: (update["rows"] - facts.own["offset"]).square().sum(),
        penalty=lambda guess, variables, facts: guess.images.new_zeros(()),
        residual=lambda update, facts: update["rows"] - facts.own["offset"],
    )


def run(start: Tensor, offset: Tensor, low: float, high: float, width: int = 8, **options: Any) -> Outcome:
    """Minimise the small problem from stacked starts [T, 5] in a box."""

    def project(variables: Variables) -> None:
        variables["pixels"].clamp_(low, high)

    plan = Plan(
        optimiser=lambda: LevenbergMarquardt(tolerance=1e-13, **options),
        rate=1.0,
        schedule=constant,
        iterations=200,
        project=project,
    )
    return loop.minimise(
        small_problem(),
        {"pixels": start.clone()},
        Facts(own={"offset": offset}),
        torch.arange(len(start)),
        plan,
        Compute(backend="vmap", width=width),
    )


def starts(count: int) -> tuple[Tensor, Tensor]:
    """Starts [T, 5] in [-1, 1] and offsets [T, 9]."""
    stream = torch.Generator().manual_seed(1)
    start = 2 * torch.rand(count, UNKNOWNS, generator=stream, dtype=torch.float64) - 1
    return start, 0.3 * torch.randn(count, 2 * UNKNOWNS - 1, generator=stream, dtype=torch.float64)


@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_products_with_the_jacobian_are_those_of_finite_differences(model: str) -> None:
    problem, variables, facts = problem_of(model)
    linear = Linearisation(problem, variables, facts)
    stream = torch.Generator().manual_seed(2)
    moves = torch.randn(linear.point.shape, generator=stream, dtype=torch.float64)
    step = 1e-5

    def shifted(sign: float) -> Tensor:
        moved = {"pixels": variables["pixels"] + sign * step * moves.view_as(variables["pixels"])}
        return Linearisation(problem, moved, facts).residuals.detach()

    slopes = (shifted(1) - shifted(-1)) / (2 * step)
    torch.testing.assert_close(linear.forward(moves), slopes, rtol=1e-5, atol=1e-7)
    changes = torch.randn(linear.residuals.shape, generator=stream, dtype=torch.float64)
    left, right = (linear.backward(changes) * moves).sum(1), (changes * linear.forward(moves)).sum(1)
    torch.testing.assert_close(left, right)


def test_the_gram_matrix_is_that_of_plain_autograd() -> None:
    problem, variables, facts = problem_of("mlp")
    gram = Linearisation(problem, variables, facts).gram()
    for index in range(3):
        known = take(facts, index)

        def residuals(pixels: Tensor, known: Facts = known) -> Tensor:
            return residuals_of(problem, {"pixels": pixels}, known)

        (jacobian,) = torch.autograd.functional.jacobian(residuals, (variables["pixels"][index],))
        flat = jacobian.flatten(1)
        torch.testing.assert_close(gram[index], flat.mT @ flat)


def test_all_of_the_krylov_space_gives_the_dense_step() -> None:
    problem, variables, facts = problem_of("mlp")
    linear = Linearisation(problem, variables, facts)
    slope = linear.backward(linear.residuals.detach())
    damping = torch.tensor([1e-1, 1e-2, 1e-3], dtype=torch.float64)
    gram, unit = linear.gram(), torch.eye(slope.shape[1], dtype=torch.float64)
    space = lanczos(linear.curvature, slope, slope.shape[1])
    scale = space.matrix.diagonal(dim1=1, dim2=2).sum(1) / (space.matrix.diagonal(dim1=1, dim2=2) > 0).sum(1)
    dense = torch.linalg.solve(gram + (damping * scale)[:, None, None] * unit, slope)
    torch.testing.assert_close(space(damping), dense, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("low", "high"), [(-5.0, 5.0), (0.0, 0.4)])
@pytest.mark.parametrize("dense", [128, 0])
def test_it_ends_where_scipy_does(low: float, high: float, dense: int) -> None:
    start, offset = starts(4)
    start = start.clamp(low + 0.01, high - 0.01)
    outcome = run(start, offset, low, high, dense=dense)
    for row in range(4):

        def residuals(x: Any, row: int = row) -> Any:
            return (curved(torch.tensor(x)) - offset[row]).numpy()

        found = least_squares(
            residuals,
            start[row].numpy(),
            bounds=(low, high),
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
        )
        assert float(outcome.total[row]) <= 2 * found.cost * (1 + 1e-6)
        if abs(float(outcome.total[row]) - 2 * found.cost) < 1e-6 * found.cost:
            np.testing.assert_allclose(outcome.variables["pixels"][row].numpy(), found.x, atol=1e-3)
    assert bool((outcome.variables["pixels"] >= low).all() and (outcome.variables["pixels"] <= high).all())


def test_neighbours_change_no_bit() -> None:
    start, offset = starts(12)
    together = run(start, offset, -5.0, 5.0, width=4)
    others = torch.tensor([7, 2, 11, 2, 9, 2, 0, 5])
    apart = run(start[others], offset[others], -5.0, 5.0, width=4)
    assert torch.equal(together.variables["pixels"][others], apart.variables["pixels"])
    assert torch.equal(together.iterations[others], apart.iterations)


def test_each_trial_has_its_own_damping() -> None:
    easy, hard = torch.ones(1, UNKNOWNS), torch.tensor([[-1.2, 1.0, -1.2, 1.0, -1.2]])
    optimiser = LevenbergMarquardt()
    current = {"pixels": torch.cat([easy, hard]).double()}
    offset = torch.zeros(2, 2 * UNKNOWNS - 1, dtype=torch.float64)
    offset[0] = 0.1
    problem, facts = small_problem(), Facts(own={"offset": offset})
    optimiser.start(current)
    for _ in range(3):
        values = Vmap()(problem, current, facts)
        optimiser.see(Scene(problem, facts, values.total, None))
        optimiser.step(current, values.gradients, torch.ones(2, dtype=torch.float64))
    (damping,) = optimiser._stacked()
    assert damping.shape == (2,)
    assert float(damping[0]) != float(damping[1])
    optimiser.restart(torch.tensor([1]))
    assert float(damping[1]) == optimiser.damping


def granted(defense: str, victims: int = 2, **options: Any) -> tuple[Case, Observation]:
    """Clients under a defense, and what an attacker with public images sees who knows the defense."""
    case = Case(victims, model="mlp", model_options={"widths": [64]}, defense=defense, options=options)
    auxiliary = Data(registry.build("datasets", "digits"), "digits").split.train
    return case, replace(case.adaptive(), auxiliary=auxiliary)


@pytest.mark.parametrize("defense", ["random-k", "top-k"])
def test_a_tenth_of_the_entries_gives_all_away(defense: str) -> None:
    case, observation = granted(defense, ratio=0.1)
    answer = case.attack("gauss-newton", observation, alphabet=False, class_prior=())
    assert bool((psnr(answer.images, case.images) > 80).all())
    assert answer.details["converged"].tolist() == [1, 1]
