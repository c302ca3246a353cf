"""Which way to compute a problem's matching loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..closed_forms import ClosedForm, Compared, Largest
from ..closed_forms import Picked as PickedEntries
from ..problem import Described, Direct, Problem
from .coefficients import KNOWN
from .examples import ClippedExamples
from .largest import LargestEntries
from .layer import Layer, NotUnderstoodError
from .mapped import Picked, Rows, Summed
from .matching import Anyhow, Ghost, Matcher


def clips(problem: Problem) -> bool:
    """Whether what a problem does to the gradients of single examples is known from its form."""
    match = problem.match
    return isinstance(match, Described) and isinstance(match.form, Compared) and match.form.clip is not None


def matcher_of(problem: Problem, layers: Sequence[Layer]) -> Matcher:
    """Return the way to compute a problem's matching loss that needs the least."""
    match = problem.match
    if isinstance(match, Direct) and match.objective in KNOWN:
        return Ghost(layers, match.objective, match.observed)
    if isinstance(match, Described) and (found := _BY_FORM[type(match.form)](problem, match, layers)) is not None:
        return found
    return Anyhow(layers, list(problem.network.parameters), match)


def _compared(problem: Problem, match: Described, layers: Sequence[Layer]) -> Matcher | None:
    form = match.form
    assert isinstance(form, Compared)
    parameters = problem.network.parameters
    if isinstance(form.linear, PickedEntries):
        return Picked(layers, parameters, form.linear, match, form)
    if form.linear is not None:
        if form.clip is not None and match.batch > 1:
            raise NotUnderstoodError("the gradients of several examples are mapped and clipped")
        kind = Rows if form.linear.sums is None else Summed
        return kind(layers, parameters, form.linear, match, form)
    objective = form.objective or match.objective
    if objective not in KNOWN:
        if form.clip is not None:
            raise NotUnderstoodError("clipped gradients are compared by an unknown loss")
        return None
    if form.clip is not None and match.batch > 1:
        return ClippedExamples(layers, objective, form.clip, form.noise, match.batch)
    return Ghost(layers, objective, "message", form.clip, form.noise)


def _largest(problem: Problem, match: Described, layers: Sequence[Layer]) -> Matcher:
    assert isinstance(match.form, Largest)
    return LargestEntries(layers, problem.network.parameters, match.form)


_BY_FORM: dict[type[ClosedForm], Callable[[Problem, Described, Sequence[Layer]], Matcher | None]] = {
    Compared: _compared,
    Largest: _largest,
}
