"""Which parameters a client trains, and so sends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from .. import structure
from ..errors import GradleakError, unknown

Trainable = Literal["all", "head"] | tuple[str, ...]
"""All that the model lets train, its last layer, or parameters and modules by name."""


def choose(module: nn.Module, trainable: Trainable) -> nn.Module:
    """Freeze, in place, every parameter but the chosen ones, and return the module; what is frozen already stays so.

    Args:
        module: as its defense has prepared it.
        trainable: names are those of the model, also where a defense has wrapped it.

    Raises:
        GradleakError: a name is not there, the model has no layer whose output is the logits, or nothing is left.
    """
    if trainable == "all":
        return module
    names = [name for name, _ in module.named_parameters()]
    if trainable == "head":
        chosen = set(structure.of(module).head.owned)
        if not chosen:
            raise GradleakError(f"trainable: head: {structure.NO_HEAD}; name its parameters instead")
    else:
        chosen = set().union(*(_named(wanted, names) for wanted in trainable))
    kept = [tensor for name, tensor in module.named_parameters() if name in chosen and tensor.requires_grad]
    if not kept:
        raise GradleakError("trainable: the model keeps all that is named from being trained (requires_grad)")
    module.requires_grad_(False)
    for tensor in kept:
        tensor.requires_grad_()
    return module


def _named(wanted: str, names: list[str]) -> set[str]:
    """Parameters of one name: one of its own, or all below a module."""
    found = {name for name in names if f"{name}.".startswith(f"{wanted}.")}
    first = {name.partition(".")[0] for name in names}
    if not found and len(first) == 1:
        # The defense has put the model into another module.
        inner = {name: name.partition(".")[2] for name in names}
        found = {name for name, short in inner.items() if f"{short}.".startswith(f"{wanted}.")}
    if not found:
        raise unknown("parameter or module", wanted, _allowed(names), "trainable")
    return found


def _allowed(names: Iterable[str]) -> list[str]:
    modules = {name.rpartition(".")[0] for name in names} - {""}
    return [*sorted(modules), *names]
