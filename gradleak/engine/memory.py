"""How many trials fit into memory: what one of them takes, and what there is."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

log = logging.getLogger(__name__)

SHARE = 0.6
"""Of what is available: resident memory grows by up to 1.4 times what tensors take (allocator, scratch space)."""


def fitting(step: Callable[[int], object], device: torch.device) -> int:
    """Return how many rows fit, rounded down to `whole`: what is available, by what a second row adds to a step.

    Args:
        step: computes so many rows, at least 1, and keeps nothing.
        device: where it does.
    """
    step(1)  # The first call also takes what is taken once.
    one, two = (peak(lambda width=width: step(width), device) for width in (1, 2))  # type: ignore[misc]
    each = max(two - one, 1)
    return whole(max(1, int((SHARE * available(device) - max(one - each, 0)) / each)))


def whole(width: int) -> int:
    """Round a width down to a multiple of 8, below that to a power of 2: kernels treat all rows of such alike."""
    return width - width % 8 if width >= 8 else 1 << (width.bit_length() - 1)


def half(width: int, error: RuntimeError | MemoryError) -> int:
    """Half a width that memory did not hold; another error, or memory too small for one trial, is raised."""
    if not is_out_of_memory(error):
        raise error
    if width == 1:
        reason = str(error).partition("\n")[0]
        raise torch.OutOfMemoryError(f"one trial alone is too large for the memory ({reason})") from error
    less = whole(width // 2)
    log.warning("out of memory with %d trials at once; going on with %d", width, less)
    return less


def peak(action: Callable[[], object], device: torch.device) -> int:
    """Return how many bytes of new tensors live at once while an action runs, at most.

    On CUDA as its allocator counts; elsewhere by the tensors that operations return, without what they take inside.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    meter = _Meter()
    with meter:
        action()
    return meter.peak


def available(device: torch.device) -> int:
    """Return the bytes that this process may still take: of a GPU all that is free, elsewhere its share of threads."""
    release(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _free() // max(1, cores // torch.get_num_threads())


def release(device: torch.device) -> None:
    """Give back to the system what an allocator keeps for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, on a GPU or elsewhere."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _free() -> int:
    """Bytes that the machine can give, or the container, if that is less."""
    return min([_of_machine(), *_of_container()])


def _of_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # Elsewhere nobody tells: half of all there is.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _of_container(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Bytes left to a container, of control groups version 2 or 1; files in the page cache count as left."""
    for folder, limit, used in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
            fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield max(0, most - taken + int(fields.get("inactive_file", 0)))


class _Meter(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage(), given)
        return result

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in given or key in self._known:
            return  # a view
        self._known.add(key)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size
