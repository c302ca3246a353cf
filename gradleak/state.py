"""The global state of a process that a plugin may change and the next cell would meet: watched and put back."""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class _Part:
    """How one part of the global state is read and set."""

    get: Callable[[], Any]
    put: Callable[[Any], Any]
    value: Callable[[Any], Any] = lambda state: state
    """What two states are compared by."""


def random_states() -> dict[str, object]:
    """Return the states of all global generators, by whose they are; equal states compare as equal."""
    return {name: part.value(part.get()) for name, part in _generators().items()}


@contextlib.contextmanager
def restored(tell: Callable[[list[str]], None] | None = None) -> Iterator[None]:
    """Put the global state back as it was before the block, however that ends.

    It is torch's grad mode, default dtype and device, threads, precision, deterministic and cuDNN flags and anomaly
    mode, the generators of torch, CUDA, numpy and Python, and the filters of warnings.

    Args:
        tell: called with the names of what the block changed, if it changed anything. Filters of warnings and Python's
            generator are left out where modules were imported, which bring filters and draw names of their own.
    """
    parts, modules = {**_FLAGS, **_generators()}, len(sys.modules)
    before = {name: part.get() for name, part in parts.items()}
    try:
        yield
    finally:
        changed = [name for name, part in parts.items() if part.value(part.get()) != part.value(before[name])]
        for name in changed:
            parts[name].put(before[name])
        told = [name for name in changed if name not in _IMPORTS_CHANGE or len(sys.modules) == modules]
        if told and tell is not None:
            tell(told)


def _generators() -> dict[str, _Part]:
    parts = {
        "torch's generator": _Part(torch.get_rng_state, torch.set_rng_state, _bytes),
        "numpy's generator": _Part(np.random.get_state, np.random.set_state, _words),
        _PYTHON: _Part(random.getstate, random.setstate),
    }
    if torch.cuda.is_initialized():
        parts["CUDA's generators"] = _Part(
            torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all, lambda states: [*map(_bytes, states)]
        )
    return parts


def _bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _words(state: Any) -> tuple[object, ...]:
    kind, words, *rest = state
    return (kind, words.tobytes(), *rest)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _cudnn() -> tuple[bool, ...]:
    flags = torch.backends.cudnn
    return flags.enabled, flags.benchmark, flags.deterministic, flags.allow_tf32


def _set_cudnn(values: tuple[bool, ...]) -> None:
    flags = torch.backends.cudnn
    flags.enabled, flags.benchmark, flags.deterministic, flags.allow_tf32 = values


def _set_device(device: torch.device) -> None:
    # The CPU by name would be looked up by every factory; None is the CPU for nothing.
    torch.set_default_device(None if device.type == "cpu" else device)


def _set_filters(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    with warnings.catch_warnings():  # which tells Python's cache of filters that they changed
        pass


_FILTERS, _PYTHON = "the filters of warnings", "Python's generator"
_IMPORTS_CHANGE = (_FILTERS, _PYTHON)

_FLAGS = {
    "grad mode": _Part(torch.is_grad_enabled, torch.set_grad_enabled),
    "the default dtype": _Part(torch.get_default_dtype, torch.set_default_dtype),
    "the default device": _Part(torch.get_default_device, _set_device),
    "torch's threads": _Part(torch.get_num_threads, torch.set_num_threads),
    "the precision of float32 products": _Part(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic algorithms": _Part(
        _deterministic, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])
    ),
    "cuDNN's flags": _Part(_cudnn, _set_cudnn),
    "anomaly mode": _Part(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    _FILTERS: _Part(lambda: list(warnings.filters), _set_filters),
}
