from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradleak import seeds
from gradleak.engine.optimisers import LBFGS, SCHEDULES, Adam, Optimiser, Variables

ROWS = 4


def normal(*shape: int, name: str = "") -> Tensor:
    return torch.randn(shape, generator=seeds.generator("optimisers", name, *shape), dtype=torch.float64)


FEATURES = normal(20, 5, name="features")
LABELS = (normal(20, name="labels") > 0).double()


def rosenbrock(point: Tensor) -> Tensor:
    """A curved valley, not convex; minimum 0 at ones."""
    return (100 * (point[1:] - point[:-1] ** 2) ** 2 + (1 - point[:-1]) ** 2).sum() / 100


def logistic(point: Tensor) -> Tensor:
    """A strictly convex fit."""
    scores = FEATURES[:, : len(point)] @ point
    return torch.nn.functional.softplus(scores).mean() - (LABELS * scores).mean() + 1e-2 * point.square().sum()


def wave(point: Tensor) -> Tensor:
    """Not convex: where the curvature is negative L-BFGS must not store a pair."""
    return (torch.cos(2 * point) + 0.5 * point**2).sum() + 0.1 * (point[1:] * point[:-1]).sum()


FUNCTIONS = [rosenbrock, logistic, wave]


def gradients(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    leaves = [row.detach().clone().requires_grad_() for row in rows]
    return torch.stack([torch.autograd.grad(function(leaf), leaf)[0] for leaf in leaves])


def run_stacked(
    optimiser: Optimiser, function: Callable[[Tensor], Tensor], start: Tensor, rate: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """All iterates [steps + 1, rows, size] and which rows could still move after each step [steps, rows]."""
    # Two variables, so that the optimiser must keep several tensors apart.
    variables = {"left": start[:, :2].clone(), "right": start[:, 2:].clone()}
    optimiser.start(variables)
    path, moving = [start], []
    for _ in range(steps):
        gradient = gradients(function, torch.cat(list(variables.values()), 1))
        parts = {"left": gradient[:, :2], "right": gradient[:, 2:]}
        moving.append(optimiser.step(variables, parts, rate))
        path.append(torch.cat(list(variables.values()), 1))
    return torch.stack(path), torch.stack(moving)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_adam_is_torch_adam_row_by_row(function: Callable[[Tensor], Tensor]) -> None:
    start = normal(ROWS, 5, name="start")
    rates = [0.01, 0.03, 0.1, 0.3]
    path, moving = run_stacked(Adam(), function, start, torch.tensor(rates, dtype=torch.float64), 30)
    assert moving.all()
    for row, rate in enumerate(rates):
        point = start[row].clone().requires_grad_()
        reference = torch.optim.Adam([point], lr=rate)
        for step in range(30):
            reference.zero_grad()
            function(point).backward()
            reference.step()
            torch.testing.assert_close(path[step + 1, row], point.detach(), rtol=1e-12, atol=1e-13)


def test_signed_adam_sees_only_the_sign_of_the_variables_named() -> None:
    start = {"pixels": normal(ROWS, 3), "labels": normal(ROWS, 2)}
    slopes = {"pixels": normal(ROWS, 3, name="p"), "labels": normal(ROWS, 2, name="l")}
    rate = torch.full((ROWS,), 0.1, dtype=torch.float64)

    def after(signs: frozenset[str], given: Variables) -> Variables:
        variables = {name: tensor.clone() for name, tensor in start.items()}
        optimiser = Adam(signs=signs)
        optimiser.start(variables)
        for _ in range(3):
            optimiser.step(variables, given, rate)
        return variables

    signed = after(frozenset({"pixels"}), slopes)
    expected = after(frozenset(), {"pixels": slopes["pixels"].sign(), "labels": slopes["labels"]})
    plain = after(frozenset(), slopes)
    assert torch.equal(signed["pixels"], expected["pixels"]) and torch.equal(signed["labels"], expected["labels"])
    assert not torch.equal(signed["pixels"], plain["pixels"])


def test_adam_multiplies_the_rate_of_single_variables() -> None:
    variables = {"pixels": normal(ROWS, 3), "mask": normal(ROWS, 3)}
    start = {name: tensor.clone() for name, tensor in variables.items()}
    optimiser = Adam(rates={"mask": 0.5})
    optimiser.start(variables)
    slope = normal(ROWS, 3, name="slope")
    optimiser.step(variables, {"pixels": slope, "mask": slope}, torch.full((ROWS,), 0.1, dtype=torch.float64))
    moved = {name: tensor - start[name] for name, tensor in variables.items()}
    torch.testing.assert_close(moved["mask"], 0.5 * moved["pixels"], rtol=1e-9, atol=0)


def torch_lbfgs(
    function: Callable[[Tensor], Tensor], start: Tensor, rate: float, steps: int, history: int, inner: int
) -> list[Tensor]:
    """The points at which torch's L-BFGS asks for a gradient, `inner` iterations to one call of its step()."""
    point = start.clone().requires_grad_()
    seen: list[Tensor] = []
    reference = torch.optim.LBFGS([point], lr=rate, max_iter=inner, max_eval=10**9, history_size=history)

    def closure() -> Tensor:
        reference.zero_grad()
        if not seen or not torch.equal(seen[-1], point):
            seen.append(point.detach().clone())  # torch evaluates the last point of a call again in the next
        loss = function(point)
        loss.backward()
        return loss

    while len(seen) < steps:
        reference.step(closure)
    return seen[:steps]


@pytest.mark.parametrize("inner", [1, 20])
@pytest.mark.parametrize("history", [3, 100])
# Where the curvature is negative rounding errors grow, so that path is compared for fewer steps.
@pytest.mark.parametrize(("function", "steps"), [(rosenbrock, 30), (logistic, 30), (wave, 12)])
def test_lbfgs_is_torch_lbfgs_row_by_row(
    function: Callable[[Tensor], Tensor], steps: int, history: int, inner: int
) -> None:
    start = 0.5 * normal(ROWS, 5, name="start")
    rate = torch.tensor([0.1, 0.15, 0.2, 0.3], dtype=torch.float64)
    path, _ = run_stacked(LBFGS(history=history), function, start, rate, steps)
    for row in range(ROWS):
        expected = torch_lbfgs(function, start[row], float(rate[row]), steps, history, inner)
        torch.testing.assert_close(path[:steps, row], torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_lbfgs_converges_on_rosenbrock() -> None:
    start = 0.5 * normal(ROWS, 4, name="start")
    path, moving = run_stacked(LBFGS(), rosenbrock, start, torch.full((ROWS,), 0.5, dtype=torch.float64), 150)
    values = torch.tensor([float(rosenbrock(row)) for row in path[-1]])
    assert (values < 1e-8).any(), values
    assert not moving[-1].all()  # a row at its minimum says so


@settings(max_examples=10, deadline=None)
@given(row=st.integers(0, ROWS - 1), seed=st.integers(0, 1000), kind=st.sampled_from(["adam", "lbfgs"]))
def test_rows_are_independent(row: int, seed: int, kind: str) -> None:
    def new() -> Optimiser:
        return Adam() if kind == "adam" else LBFGS(history=5)

    start = normal(ROWS, 4, name=str(seed))
    rate = torch.full((ROWS,), 0.1, dtype=torch.float64)
    path, moving = run_stacked(new(), logistic, start, rate, 12)
    others = normal(ROWS, 4, name="others" + str(seed))
    others[row] = start[row]
    again, still = run_stacked(new(), logistic, others, rate, 12)
    assert torch.equal(path[:, row], again[:, row])
    assert torch.equal(moving[:, row], still[:, row])


@pytest.mark.parametrize("history", [60, 30])
def test_how_much_neighbours_remember_changes_no_bit(history: int) -> None:
    # A size that is no multiple of a line of memory, and in float32, where kernels differ most.
    scale = torch.linspace(0.1, 1.0, 74)
    start, fresh = normal(ROWS, 74, name="start").float(), normal(74, name="fresh").float()
    rate = torch.full((ROWS,), 0.5, dtype=torch.float64)

    def slope(rows: Tensor) -> Tensor:
        return scale * rows + 0.1 * rows**3

    def run(begin: Tensor, steps: int, restarted: int | None = None) -> Tensor:
        optimiser, variables = LBFGS(history=history, tolerance_gradient=0, tolerance_change=0), {"all": begin.clone()}
        optimiser.start(variables)
        for step in range(steps):
            if step == restarted:
                variables["all"][2] = fresh
                optimiser.restart(torch.tensor([2]))
            optimiser.step(variables, {"all": slope(variables["all"])}, rate)
        return variables["all"]

    mixed = run(start, 50, restarted=37)
    assert torch.equal(mixed[2], run(fresh.expand(ROWS, -1), 13)[0])
    assert torch.equal(mixed[0], run(start[[2, 3, 0, 1]], 50)[2])


@pytest.mark.parametrize("new", [Adam, lambda: LBFGS(history=4)])
def test_a_restarted_row_starts_afresh_and_the_others_go_on(new: Callable[[], Optimiser]) -> None:
    start, fresh = normal(ROWS, 4, name="start"), normal(4, name="fresh")
    rate = torch.full((ROWS,), 0.1, dtype=torch.float64)
    undisturbed, _ = run_stacked(new(), logistic, start, rate, 14)
    alone, _ = run_stacked(new(), logistic, fresh.expand(ROWS, 4), rate, 8)

    variables = {"all": start.clone()}
    optimiser = new()
    optimiser.start(variables)
    for step in range(14):
        if step == 6:
            variables["all"][2] = fresh
            optimiser.restart(torch.tensor([2]))
        optimiser.step(variables, {"all": gradients(logistic, variables["all"])}, rate)
    assert torch.equal(variables["all"][2], alone[8, 2])
    for row in (0, 1, 3):
        assert torch.equal(variables["all"][row], undisturbed[14, row])


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("constant", {0.0: 1.0, 0.99: 1.0}),
        # A tenth at 3/8, 5/8 and 7/8 (Geiping et al., arXiv:2003.14053).
        ("step", {0.0: 1.0, 0.374: 1.0, 0.376: 0.1, 0.624: 0.1, 0.626: 0.01, 0.876: 0.001}),
        ("cosine", {0.0: 1.0, 0.5: 0.5, 1.0: 0.0}),
    ],
)
def test_schedules(name: str, golden: dict[float, float]) -> None:
    done = torch.tensor(list(golden), dtype=torch.float64)
    torch.testing.assert_close(SCHEDULES[name](done), torch.tensor(list(golden.values()), dtype=torch.float64))
