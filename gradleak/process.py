"""What concerns a process and its machine: threads, waiting, memory, and the folder of what is kept between runs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # prctl's name for it
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # mallopt's names for what it sets


def default_cache() -> Path:
    """Return the folder of checkpoints and choices: `$GRADLEAK_CACHE`, or `~/.cache/gradleak`."""
    chosen = os.environ.get("GRADLEAK_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "gradleak"


def tune(threads: int = 1) -> None:
    """Set torch's threads, how the process waits and allocates, and full precision on GPUs.

    Changes no result of one CPU thread's work. Call it first thing in a worker: OpenMP reads how to wait when it
    starts. What the user has set in the environment stays. Without glibc the allocator is left alone.
    """
    # Spinning threads of several workers on the same cores cost more than the work itself.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_memory()
    import torch

    torch.set_num_threads(threads)
    full_precision()


def full_precision() -> None:
    """Let float32 products on CUDA be float32: TF32 keeps ten bits, of gradients whose small differences count."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def keep_memory() -> bool:
    """Let glibc keep freed memory instead of faulting its pages in again; False where that is not possible.

    An iteration frees and takes the same large tensors; given back to the system each time, their page faults
    can cost more than the arithmetic.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * 2**20}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def machine_memory() -> int | None:
    """Return the bytes of memory of this machine; None where nobody tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def memory_of(pid: int, kind: str = "VmRSS") -> int:
    """Return the bytes that a process has (`VmRSS`) or has asked for (`VmData`); 0 where nobody tells."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))
    except (OSError, StopIteration, ValueError):
        return 0


def bound(memory: int | None) -> None:
    """Let requests for more memory fail, which an attack's victims are marked for, instead of ending the machine.

    Args:
        memory: bytes beyond what this process has asked for by now; None for no bound.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800")  # if memory is short all the same, nobody else pays
    if memory is None or not sys.platform.startswith("linux"):
        return
    most = memory_of(os.getpid(), "VmData") + memory
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def stopped(pid: int) -> bool:
    """Return whether somebody has stopped a process (SIGSTOP); False where nobody tells."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "Tt"
    except (OSError, IndexError):
        return False


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it dies, whatever it computes then; Linux only."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
