"""What is computed once, when trials have ended: their images, and the matching loss of exactly these."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from ..threat import Width
from ..update import Differentiate, Update, by_autograd, by_transform
from . import memory
from .choice import kind_of
from .optimisers import Variables
from .problem import Facts, Guess, Problem

log = logging.getLogger(__name__)

_stacks: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()
"""Whether trials of a kind of problem can be stacked, as long as a network lives."""


@dataclass(frozen=True)
class Final:
    """T trials as they are returned: images clamped to [0, 1] and the matching loss of exactly these."""

    images: Tensor
    targets: Tensor
    buffers: dict[str, Tensor]
    matching: Tensor


def finish(problem: Problem, variables: Variables, facts: Facts, width: Width) -> Final:
    """Decode T trials, clamp their images, and evaluate the matching loss once more, `width` at a time."""

    def decode(row: Variables, known: Facts) -> Guess:
        guess = problem.decode(row, known)
        return replace(guess, images=guess.images.clamp(0, 1))

    def one(differentiate: Differentiate, row: Variables, known: Facts) -> tuple[Any, ...]:
        guess = decode(row, known)
        matching = problem.match(problem.simulate(guess, differentiate), known)
        return guess.images, guess.targets, guess.buffers, matching

    return Final(*_each(problem, decode, one, variables, facts, width))


def evaluate(problem: Problem, guesses: dict[str, Any], facts: Facts, width: Width) -> Tensor:
    """Matching loss [N] of guesses (fields of `Guess`, stacked), `width` at a time."""

    def decode(row: dict[str, Any], known: Facts) -> Guess:
        return Guess(**row)

    def one(differentiate: Differentiate, row: dict[str, Any], known: Facts) -> Tensor:
        return problem.match(problem.simulate(decode(row, known), differentiate), known)

    matching: Tensor = _each(problem, decode, one, guesses, facts, width)
    return matching


_FILLED = 1024
"""A last chunk is filled up to its width, so that a row's digits do not depend on how many there are, but to no more
trials than these: an unlimited width must not cost an unlimited memory."""


def _each(
    problem: Problem,
    decode: Callable[[Any, Facts], Guess],
    one: Callable[[Differentiate, Any, Facts], Any],
    trials: dict[str, Any],
    facts: Facts,
    width: Width,
) -> Any:
    """Apply a function of one row to all rows of stacked trees, `width` at a time or fewer where memory is short."""
    first = tree_leaves(trials)[0]
    kind = kind_of(problem, trials, facts)
    known = _stacks.setdefault(problem.network.module, {})
    if kind not in known:
        known[kind] = _can_be_stacked(problem, decode, one, trials, facts)
    if not known[kind]:
        return _one_by_one(one, trials, facts)

    def stacked(rows: Any, known: Facts) -> Any:
        return vmap(lambda row, about: one(by_transform, row, about))(rows, known)

    rows = trials, facts
    if width == "auto":
        fits = memory.fitting(lambda several: stacked(*next(chunks(rows, several))), first.device)
        part = min(fits, len(first))
    else:
        part = min(width, max(_FILLED, len(first)))
    while True:
        try:
            return join([stacked(*chunk) for chunk in chunks(rows, part)], len(first))
        except (RuntimeError, MemoryError) as error:
            part = memory.half(part, error)
        # Only here is what the error held free again.
        memory.release(first.device)


def _one_by_one(one: Callable[[Differentiate, Any, Facts], Any], trials: Any, facts: Facts) -> Any:
    total = len(tree_leaves(trials)[0])
    parts = [one(by_autograd, *tree_map(lambda tensor, i=i: tensor[i], (trials, facts))) for i in range(total)]
    return tree_map(lambda *tensors: torch.stack(tensors).detach(), *parts)


def _can_be_stacked(
    problem: Problem,
    decode: Callable[[Any, Facts], Guess],
    one: Callable[[Differentiate, Any, Facts], Any],
    trials: Any,
    facts: Facts,
) -> bool:
    """Whether two rows, stacked, have the updates that the first has alone, and the loss can be stacked too."""
    pair = next(chunks((trials, facts), 2))
    try:
        vmap(lambda row, known: one(by_transform, row, known))(*pair)
        several = vmap(lambda row, known: problem.simulate(decode(row, known), by_transform))(*pair)
    except Exception as error:  # whatever a model meets that was not written for stacks
        if memory.is_out_of_memory(error):
            return True  # there it is computed in smaller parts
        log.debug("answers are evaluated one by one: %s", error)
        return False
    row, known = tree_map(lambda tensor: tensor[0], pair)
    return _equal(
        {name: tensor[0] for name, tensor in several.items()}, problem.simulate(decode(row, known), by_autograd)
    )


def _equal(one: Update, other: Update) -> bool:
    """Whether two updates are the same up to rounding; what is not finite says nothing."""
    error = torch.stack([(one[name] - tensor).double().norm() for name, tensor in other.items()]).norm()
    size = torch.stack([tensor.double().norm() for tensor in other.values()]).norm()
    # Far above what float32 loses in a deep model, far below what a mix of two victims makes.
    return not bool(size.isfinite()) or bool(error <= 1e-2 * size)


def chunks(rows: tuple[Any, ...], width: int) -> Iterator[tuple[Any, ...]]:
    """Cut stacked trees into chunks of one width; the last is filled up with repeats of the last row."""
    total = len(tree_leaves(rows)[0])
    for begin in range(0, total, width):
        index = torch.arange(begin, begin + width).clamp(max=total - 1)
        yield tree_map(lambda tensor, index=index: tensor[index.to(tensor.device)], rows)


def join(parts: list[Any], total: int) -> Any:
    """Put chunks together again, without the repeats."""
    return tree_map(lambda *tensors: torch.cat(tensors)[:total].detach(), *parts)
