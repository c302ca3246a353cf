"""What users name on a command line: `module:function`, `file.py:function`, and files of tensors."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import GradleakError
from .plugins import said


def imported(source: str, where: str) -> Callable[..., Any]:
    """Return what `module:name` or `path/to/file.py:name` names; modules are also looked for in the current folder.

    Raises:
        GradleakError: it cannot be imported, or cannot be called; `where` opens the line.
    """
    home, _, name = source.rpartition(":")
    if not home or not name:
        raise GradleakError(f"{where} {source}: write module:function, or path/to/file.py:function")
    try:
        found = getattr(_file(Path(home)) if home.endswith(".py") else _module(home), name)
    except AttributeError as error:
        raise GradleakError(f"{where} {source}: {home} has no {name!r}") from error
    except (Exception, SystemExit) as error:
        raise GradleakError(f"{where} {source}: cannot be imported ({said(error)})") from error
    if not callable(found):
        raise GradleakError(f"{where} {source}: {type(found).__name__} cannot be called; name a function")
    call: Callable[..., Any] = found
    return call


def _module(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _file(path: Path) -> Any:
    full = f"_gradleak_source_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if full in sys.modules:
        return sys.modules[full]
    if not path.is_file():
        raise GradleakError("no such file")
    spec = importlib.util.spec_from_file_location(full, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[full]
        raise
    return module


def tensors(path: Path | str, where: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or of a state dict, by name, on the CPU; no code of the file is run.

    Raises:
        GradleakError: it is neither; `where` opens the line.
    """
    if not Path(path).is_file():
        raise GradleakError(f"{where} {path}: no such file")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise GradleakError(
            f"{where} {path}: not a state dict, or it holds more than tensors; code in it is never run"
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise GradleakError(f"{where} {path}: cannot be read as tensors: {reason}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise GradleakError(f"{where} {path}: holds no tensors by name (torch.save(model.state_dict(), FILE))")
    return dict(state)


def network(source: str, weights: Path | None, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a user's model in eval mode.

    Args:
        source: see `imported`; called with the options it returns the module.
        weights: its safetensors file or state dict; None keeps what the function returned.
        options: keywords of the function.

    Raises:
        GradleakError: it returns no module, or the weights are not its own.
    """
    build = imported(source, "--model")
    try:
        module = build(**(options or {}))
    except (Exception, SystemExit) as error:
        raise GradleakError(f"--model {source}: {said(error)}") from error
    if not isinstance(module, nn.Module):
        raise GradleakError(f"--model {source}: returned {type(module).__name__}; a torch.nn.Module is needed")
    if weights is not None:
        load(module, tensors(weights, "--weights"), f"--weights {weights}")
    return module.eval()


def load(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict; names that begin with `module.` (data parallel, Opacus) are understood.

    Raises:
        GradleakError: a tensor is missing, unknown, or of another shape.
    """
    own = module.state_dict()
    for prefix in ("module.", "_module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state) and not all(name in own for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for name, tensor in own.items():
        if name not in state:
            raise GradleakError(f"{where}: {name!r} is missing; the file is of another network")
        if state[name].shape != tensor.shape:
            shapes = f"{list(state[name].shape)}, the model's is {list(tensor.shape)}"
            raise GradleakError(f"{where}: {name!r} has shape {shapes}")
    if extra := [name for name in state if name not in own]:
        raise GradleakError(f"{where}: {extra[0]!r} is not a tensor of the model; the file is of another network")
    module.load_state_dict(dict(state))
