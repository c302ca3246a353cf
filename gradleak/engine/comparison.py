"""Whether a backend is right on the problem at hand: its answer for some trials against `sequential`'s."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .backends import Sequential, width_of
from .memory import is_out_of_memory
from .optimisers import Variables
from .problem import Backend, Facts, Problem, Values, take

_CLOSE = {torch.float64: 1e-6}
"""Relative differences that need no second look; in float32 a thousandth."""
_MOST = 1e-2
"""The largest relative difference that rounding may explain."""
_ENOUGH = 2
"""Trials that must say something."""
_WORDS = 160
"""Characters of an error's message that are repeated."""
_NUDGE = 4
"""By how many units in the last place variables are moved to see what rounding alone does."""


def disagreement(backend: Backend, problem: Problem, variables: Variables, facts: Facts, ready: Facts) -> str | None:
    """Say in what a backend's answer for a chunk of trials differs from `sequential`'s, or that it has none.

    The whole chunk is computed, so that the trials compared have neighbours. A difference must be larger than
    what rounding does to the reference itself; where that leaves a doubt, both are computed once more in float64.

    Args:
        backend: the one in question; it has not refused the problem.
        problem: one trial's loss.
        variables: those of the chunk's trials, [W, ...].
        facts: what is known of each trial's victim, [W, ...].
        ready: the same as the backend likes it.

    Raises:
        torch.OutOfMemoryError: and what else says that memory is short.
    """
    try:
        answer = backend(problem, variables, ready)
    except Exception as error:  # whatever a model meets in a backend that it was not written for
        return failure(error)
    gap, rows = _largest(answer, problem, variables, facts)
    if gap <= _CLOSE.get(_dtype(variables), 1e-3):
        return None
    if _dtype(variables) is not torch.float64:
        try:
            exact, twin = _in_double(problem, variables, facts), type(backend)()
            if twin.refusal(*exact) is None:
                gap, rows = _largest(twin(exact[0], exact[1], twin.prepare(exact[0], exact[2])), *exact)
                problem, variables, facts = exact
            if gap <= _CLOSE[torch.float64]:
                return None
        except Exception as error:  # what the loss holds besides the network may be of one type only
            if is_out_of_memory(error):
                raise
    if gap <= _MOST and gap <= 10 * _noise(problem, variables, facts, rows):
        return None
    return f"its answer is {gap:.1%} off" if gap < 10 else f"its answer is off by a factor of {gap:.0g}"


def difference(answer: Values, truth: Values) -> float:
    """Largest relative difference of two answers for a chunk, over its trials; the second is the reference."""
    return max(_gap(_row(answer, row), _row(truth, row)) for row in range(len(truth.total)))


def failure(error: Exception) -> str:
    """Say in one line what was raised.

    Raises:
        torch.OutOfMemoryError: it says that memory is short, which is no fault of a backend.
    """
    if is_out_of_memory(error):
        raise error
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:_WORDS]}"


def _largest(answer: Values, problem: Problem, variables: Variables, facts: Facts) -> tuple[float, list[int]]:
    """Largest relative difference over some trials, and which these were."""
    width = width_of(variables)
    largest, rows = 0.0, []
    for row in dict.fromkeys([0, width - 1, width // 2, width // 3]):
        truth = _alone(problem, variables, facts, row)
        gap = _gap(_row(answer, row), truth)
        largest = max(largest, gap)
        if gap > 0 or _says_something(truth):
            rows.append(row)
        if len(rows) == _ENOUGH:
            break
    return largest, rows


def _noise(problem: Problem, variables: Variables, facts: Facts, rows: list[int]) -> float:
    """What a change of the variables by their rounding does to the reference, the largest over rows."""
    nudged = dict(_nudged(variables))
    pairs = [(_alone(problem, given, facts, row) for given in (nudged, variables)) for row in rows]
    return max((_gap(*pair) for pair in pairs), default=0.0)


def _nudged(variables: Variables) -> Iterator[tuple[str, Tensor]]:
    stream = torch.Generator().manual_seed(0)
    for name, tensor in variables.items():
        noise = torch.randn(tensor.shape, generator=stream, dtype=torch.float64).to(tensor)
        unit = torch.finfo(tensor.dtype).eps * (tensor.abs() + (tensor.square().mean().sqrt() or 1.0))
        yield name, tensor + _NUDGE * unit * noise


def _alone(problem: Problem, variables: Variables, facts: Facts, row: int) -> Values:
    only = {name: tensor[row : row + 1] for name, tensor in variables.items()}
    return Sequential()(problem, only, take(facts, slice(row, row + 1)))


def _row(values: Values, row: int) -> Values:
    only = slice(row, row + 1)
    gradients = {name: tensor[only] for name, tensor in values.gradients.items()}
    return Values(values.total[only], values.matching[only], gradients)


def _says_something(truth: Values) -> bool:
    size = _norm(truth)
    return bool(size.isfinite()) and float(size) > 0


def _norm(values: Values) -> Tensor:
    sizes = torch.stack([tensor.double().norm() for tensor in values.gradients.values()])
    return sizes.square().sum().sqrt()


def _gap(one: Values, other: Values) -> float:
    """Largest relative difference of losses and of each variable's gradient; the second is the reference.

    What is finite in neither says nothing; of a variable that hardly matters, a thousandth of all does not either.
    """
    whole = float(_norm(other))
    found = [_difference(one.total, other.total, 0.0), _difference(one.matching, other.matching, 0.0)]
    found += [_difference(one.gradients[name], truth, 1e-3 * whole) for name, truth in other.gradients.items()]
    return max(found)


def _difference(one: Tensor, other: Tensor, least: float) -> float:
    given, wanted = one.double(), other.double()
    finite = bool(given.isfinite().all()), bool(wanted.isfinite().all())
    if finite != (True, True):
        return 0.0 if finite == (False, False) else torch.inf
    error = float((given - wanted).norm())
    if error == 0:
        return 0.0
    size = max(float(wanted.norm()), least if least < torch.inf else 0.0)
    return error / size if size else torch.inf


def _dtype(variables: Variables) -> torch.dtype:
    return next(iter(variables.values())).dtype


def _in_double(problem: Problem, variables: Variables, facts: Facts) -> tuple[Problem, Variables, Facts]:
    def double(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    device = next(iter(variables.values())).device
    network = problem.network.to(device, torch.float64)
    return replace(problem, network=network), tree_map(double, variables), tree_map(double, facts)
