"""A device that is not the CPU though the CPU computes it: whatever is left on the other side is an error here too.

    python -m tests.elsewhere SUITE

computes the cells of a suite on the CPU and there, and prints a line of JSON for each. Its tensors have a device of
their own, and an operation of tensors on both sides is refused as on a GPU; numbers are those of the CPU but for
rounding. Run it in a process of its own: torch has only one device of this kind, and starts a thread for it.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("elsewhere")
DEVICE = torch.device("elsewhere", 0)
_MAY_MIX = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
)
"""Moves, and picking by numbers that lie on the CPU, which GPUs take too."""
_PHYSICAL = {
    torch.ops.aten._conj.default: torch.ops.aten._conj_physical.default,
    torch.ops.aten._neg_view.default: torch.ops.aten.neg.default,
}
"""What would only note on a tensor how it is to be read, which is not looked at any more where these are called."""
_FACTORIES = (
    "arange",
    "arange.start",
    "arange.start_step",
    "empty.memory_format",
    "empty_strided",
    "eye",
    "eye.m",
    "linspace",
    "logspace",
    "tril_indices",
    "triu_indices",
)
"""Others are made of these."""


class Elsewhere(Tensor):
    """A tensor that says that it lies elsewhere."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Elsewhere:
        """Wrap a tensor of the CPU."""
        there: Elsewhere = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        there.raw = raw
        return there

    def tolist(self) -> list[Any]:
        """Return the values, as `item` does."""
        found: list[Any] = self.raw.tolist()
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute on the CPU what lies there altogether."""
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(tensor.raw): tensor for tensor in given if isinstance(tensor, Elsewhere)}
    if func not in _MAY_MIX and any(tensor.ndim and not isinstance(tensor, Elsewhere) for tensor in given):
        raise RuntimeError(f"{func} of tensors on two devices")
    target = kwargs.get("device")
    stays = target is None or torch.device(target).type == DEVICE.type
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    answer = _PHYSICAL.get(func, func)(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    if func is torch.ops.aten.copy_.default:
        return args[0]

    def placed(found: Any) -> Any:
        if not isinstance(found, Tensor):
            return found
        if not stays:
            return found.clone() if id(found) in there else found
        return there[id(found)] if id(found) in there else Elsewhere(found)

    return tree_map(placed, answer)


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, Elsewhere) else value


def _factory(name: str) -> Callable[..., Tensor]:
    operation, _, overload = name.partition(".")
    function = getattr(getattr(torch.ops.aten, operation), overload or "default")

    def made(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
        return Elsewhere(function(*args, device=torch.device("cpu"), **kwargs))

    return made


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _raw(target).copy_(_raw(source))
    return target


def register() -> torch.library.Library:
    """Make the device known to torch; for as long as what is returned is kept."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.inference_mode = torch.no_grad  # type: ignore[assignment,misc]  # where no tensors of another kind can be made
    library = torch.library.Library("aten", "IMPL")
    for name in _FACTORIES:
        library.impl(name, _factory(name), "PrivateUse1")
    library.impl("_copy_from", _copied, "PrivateUse1")
    return library


def main(path: Path) -> None:
    """Compute the cells of a suite on both devices and print how they compare."""
    library = register()
    from gradleak import suite
    from gradleak.evaluation import check, evaluate
    from gradleak.evaluation.workshop import Resources, Workshop
    from gradleak.suite import AttackCell

    shops = [Workshop(Resources(device=device)) for device in ("cpu", str(DEVICE))]
    cells = check.check(suite.expand(suite.read(path), shops[0].digest), shops[0])
    for cell in cells:
        if not isinstance(cell, AttackCell):
            continue
        here, there = (evaluate.evaluate(cell, shop) for shop in shops)
        psnr = [[row.psnr for row in result.rows] for result in (here, there)]
        found = {"cell": cell.title, "error": there.error, "expected": here.error, "here": psnr[0], "there": psnr[1]}
        print(json.dumps(found), flush=True)
    del library


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
