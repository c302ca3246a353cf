"""What plugins answer, looked at where it is first used: a wrong answer names the hook, its file and its line.

Shapes and types are read only, so that the same checks hold inside torch.func's transforms and cost nothing there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..plugins import PluginError, at, is_foreign, owner_of, place_of_hook
from ..update import Update, by_autograd
from .optimisers import Variables
from .problem import Facts, Guess, Problem, take

_GRAPH = "it must be differentiable in the guess (no detach, no item)"


def wrong(plugin: object, hook: str, found: str, needed: str, *others: str) -> PluginError:
    """Return the error of a hook that answered something else than what is needed."""
    return PluginError(f"{hook} returned {found}; {needed}{at(place_of_hook(plugin, hook, *others))}")


def kind(value: object) -> str:
    """Return what a value is in a few words."""
    if isinstance(value, Tensor):
        return f"shape {list(value.shape)}"
    if value is None or isinstance(value, bool | int | float):
        return f"{value}"
    return f"a {type(value).__module__.replace('builtins', '')}.{type(value).__qualname__}".replace(" .", " ")


def scalar(value: Any, plugin: object, hook: str, depends_on: Update | None = None) -> Tensor:
    """Return a hook's scalar as it is.

    Raises:
        PluginError: it is no floating-point tensor without dimensions, or has lost the graph of what it depends on.
    """
    if not isinstance(value, Tensor):
        raise wrong(plugin, hook, kind(value), "a scalar tensor is needed")
    if value.ndim:
        raise wrong(plugin, hook, kind(value), "a scalar is needed")
    if not value.is_floating_point():
        raise wrong(plugin, hook, str(value.dtype), "a floating-point scalar is needed")
    if depends_on is not None and not value.requires_grad and _any_graph(depends_on):
        raise wrong(plugin, hook, "a scalar without a graph", _GRAPH)
    return value


def differentiable(value: dict[str, Tensor], plugin: object, hook: str, depends_on: Update) -> dict[str, Tensor]:
    """Return a hook's tensors as they are.

    Raises:
        PluginError: they have lost the graph of what they depend on.
    """
    if _any_graph(depends_on) and not _any_graph(value):
        raise wrong(plugin, hook, "tensors without a graph", _GRAPH)
    return value


def _any_graph(update: Mapping[str, Tensor]) -> bool:
    return any(tensor.requires_grad for tensor in update.values())


def tensors(value: Any, plugin: object, hook: str, *others: str) -> dict[str, Tensor]:
    """Return a hook's tensors by name as they are.

    Raises:
        PluginError: it is no dict of tensors, or an empty one.
    """
    needed = "a dict of tensors by name is needed"
    if not isinstance(value, dict):
        raise wrong(plugin, hook, kind(value), needed, *others)
    odd = [f"{kind(item)} for {name!r}" for name, item in value.items() if not isinstance(item, Tensor)]
    if odd or not value:
        raise wrong(plugin, hook, odd[0] if odd else "an empty dict", needed, *others)
    return value


def shaped(
    value: Any, like: Mapping[str, Tensor], what: str, plugin: object, hook: str, *others: str, skip: int = 0
) -> dict[str, Tensor]:
    """Return a hook's tensors, which must have the names and shapes of others, as they are.

    Args:
        value: what was answered.
        like: whose names and shapes are needed.
        what: what these are, in words.
        plugin: whose hook it is.
        hook: name of the hook.
        others: hooks to blame where the plugin has not got this one.
        skip: leading dimensions of `value` that do not count.

    Raises:
        PluginError: names or shapes differ.
    """
    found = tensors(value, plugin, hook, *others)
    for name, tensor in like.items():
        if name not in found:
            raise wrong(plugin, hook, f"no {name!r}", f"the names of {what} are needed", *others)
        shape, needed = list(found[name].shape[skip:]), list(tensor.shape)
        if shape != needed:
            raise wrong(plugin, hook, f"shape {shape} for {name!r}", f"{needed} is needed, as in {what}", *others)
    return found


def stacked(value: Any, victims: int, plugin: object, hook: str) -> Variables:
    """Return a hook's variables, which must be stacked over victims, as they are.

    Raises:
        PluginError: no floating-point tensors, or their first dimension is not the victims.
    """
    found = tensors(value, plugin, hook)
    for name, tensor in found.items():
        if tensor.ndim == 0 or len(tensor) != victims:
            raise wrong(plugin, hook, f"{kind(tensor)} for {name!r}", f"[{victims}, ...] is needed, a row a victim")
        if not tensor.is_floating_point():
            raise wrong(plugin, hook, f"{tensor.dtype} for {name!r}", "floating-point numbers are needed")
    return found


def guess(value: Any, shape: tuple[int, ...], classes: int, plugin: object) -> Guess:
    """Return a hook's guess of images of a shape [B, C, H, W] as it is.

    Raises:
        PluginError: it is no guess, or its images or targets have another shape.
    """
    if not isinstance(value, Guess):
        raise wrong(plugin, "decode", kind(value), "a Guess is needed")
    needed = {"images": list(shape), "targets": [shape[0], classes]}
    for name, size in needed.items():
        tensor = getattr(value, name)
        if not isinstance(tensor, Tensor) or list(tensor.shape) != size:
            raise wrong(plugin, "decode", f"{name} of {kind(tensor)}", f"{size} is needed", "initial")
    return value


@contextlib.contextmanager
def draws_its_own(plugin: object, hook: str, *others: str) -> Iterator[None]:
    """Refuse a hook that draws from torch's global generator, whose numbers nothing can repeat.

    Raises:
        PluginError: the block moved the global generator.
    """
    before = torch.get_rng_state()
    yield
    if not torch.equal(before, torch.get_rng_state()):
        place = at(place_of_hook(plugin, hook, *others))
        raise PluginError(f"{hook} drew from the global generator; draw from the one it is given{place}")


@dataclass(frozen=True)
class Hook:
    """A method of a plugin, to be blamed."""

    plugin: object
    name: str

    @property
    def foreign(self) -> bool:
        """Whether it is no method of ours."""
        home = owner_of(type(self.plugin), self.name)
        return home is not None and is_foreign(home.__module__)

    @property
    def place(self) -> str:
        """(file.py:14), or nothing."""
        return at(place_of_hook(self.plugin, self.name))


def try_first(match: Hook, penalty: Hook, problem: Problem, start: Variables, facts: Facts, owner: Tensor) -> None:
    """Compute the loss of one trial as plainly as possible, so that what is wrong with a hook is said as such.

    A plugin's loss that is finite at the start of no trial is a mistake; of some, it is these victims' misfortune.

    Args:
        match: what computes the matching loss.
        penalty: what computes the prior.
        problem: one trial's loss.
        start: initial variables, [T, ...].
        facts: what is known of the N victims, [N, ...].
        owner: victim of each trial, [T].

    Raises:
        PluginError: a hook answers something else than its contract says, or changes what it was handed.
    """
    broken = ""
    for trial, victim in enumerate(owner.tolist()):
        leaves = {name: tensor[trial].detach().requires_grad_() for name, tensor in start.items()}
        broken = _try(match, penalty, problem, leaves, take(facts, victim))
        if not broken:
            return
    raise PluginError(broken)


def _try(match: Hook, penalty: Hook, problem: Problem, variables: Variables, known: Facts) -> str:
    """Return which plugin's hook is not finite at a trial's start, if one is."""
    imagined = problem.decode(variables, known)
    update = problem.simulate(imagined, by_autograd)
    versions = {name: tensor._version for name, tensor in update.items()}
    matching = problem.match(update, known)
    changed = [name for name, tensor in update.items() if tensor._version != versions[name]]
    if changed:
        raise PluginError(f"{match.name} changed {changed[0]!r} of the guess in place; make new tensors{match.place}")
    losses = {match: matching, penalty: problem.penalty(imagined, variables, known)}
    given = [*update.values(), *tree_leaves(known)]
    if not all(bool(tensor.isfinite().all()) for tensor in given if tensor.is_floating_point()):
        return ""
    for hook, loss in losses.items():
        if hook.foreign and not bool(loss.isfinite()):
            found = f"{hook.name} returned {float(loss.detach())} at the start of every trial"
            return f"{found}; a finite number is needed{hook.place}"
    return ""
