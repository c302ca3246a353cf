"""What a plugin does besides answering: what it prints, what of the process it changes, how much memory it takes."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
import torch

from ..code import local_files
from ..plugins import at, place_of_caller
from .findings import require
from .scan import names

MEMORY = 2.0
"""GiB that the checks of a plugin may add to the process: their cases are small."""


@dataclass(frozen=True)
class _Setting:
    """Something that all code in a process shares."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    by: str = ""
    """The full names by which code changes it, as a regular expression."""
    shared: bool = False
    """Whether others change it with good reason, as libraries do when imported: only code that names it is blamed."""


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _set_environment(value: dict[str, str]) -> None:
    for name in os.environ.keys() - value.keys():
        del os.environ[name]
    os.environ.update(value)


SETTINGS: dict[str, _Setting] = {
    "the gradient mode": _Setting(
        torch.is_grad_enabled, torch._C._set_grad_enabled, r"torch\.(\w+\.)*(set_grad_enabled|no_grad|enable_grad)"
    ),
    "the default dtype": _Setting(
        torch.get_default_dtype, torch.set_default_dtype, r"torch\.(set_default_dtype|set_default_tensor_type)"
    ),
    "the number of threads": _Setting(torch.get_num_threads, torch.set_num_threads, r"torch\.set_num_threads"),
    "deterministic algorithms": _Setting(
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _set_deterministic,
        r"torch\.(use_deterministic_algorithms|set_deterministic_debug_mode)",
    ),
    "the precision of products": _Setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, r"torch\.set_float32_matmul_precision"
    ),
    "anomaly detection": _Setting(
        torch.is_anomaly_enabled,
        torch.autograd.set_detect_anomaly,
        r"torch\.autograd\.(\w+\.)*(set_detect_anomaly|detect_anomaly)",
    ),
    "torch's global generator": _Setting(
        lambda: torch.get_rng_state().numpy().tobytes(),
        lambda value: torch.set_rng_state(torch.frombuffer(bytearray(value), dtype=torch.uint8)),
        r"torch\.(random\.)?(manual_seed|set_rng_state|seed)",
        shared=True,  # those who draw from it break a promise of their group
    ),
    "Python's global generator": _Setting(
        random.getstate, random.setstate, r"random\.(?!getstate$)[a-z]\w*", shared=True
    ),
    "NumPy's global generator": _Setting(
        lambda: repr(np.random.get_state(legacy=False)),
        lambda value: None,
        r"numpy\.random\.(?!get_state$|default_rng$)[a-z]\w*",
        shared=True,
    ),
    "the warning filters": _Setting(
        lambda: list(warnings.filters),
        lambda value: warnings.filters.__setitem__(slice(None), value),  # type: ignore[index]
        r"warnings\.(simplefilter|filterwarnings|resetwarnings|filters)",
        shared=True,
    ),
    "the working folder": _Setting(os.getcwd, os.chdir, r"os\.f?chdir"),
    "environment variables": _Setting(
        lambda: dict(os.environ), _set_environment, r"os\.(environ|putenv|unsetenv)", shared=True
    ),
}
"""What a plugin must leave as it is."""


class _Ear(io.TextIOBase):
    """A stream that notes what plugin code writes, and passes on the rest."""

    def __init__(self, note: Callable[[str], None], behind: TextIO) -> None:
        super().__init__()
        self._note, self._behind = note, behind

    def fileno(self) -> int:
        return self._behind.fileno()

    def flush(self) -> None:
        self._behind.flush()

    def write(self, text: str) -> int:
        place = place_of_caller()
        if not place:
            return self._behind.write(text)
        if text.strip():
            self._note(f"printed {_short(text)}{at(place)}")
        return len(text)


@dataclass
class Watch:
    """Looks over a plugin's shoulder, and puts back what it changed."""

    source: Path | None
    """The plugin's file."""
    said: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    """What was changed, and where."""

    def __post_init__(self) -> None:
        """Note what there is before the plugin runs."""
        self._alive = set(threading.enumerate())
        self._memory = _peak()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Watch a block."""
        ears = [_Ear(self.said.append, stream) for stream in (sys.stdout, sys.stderr)]
        before = {name: setting.read() for name, setting in SETTINGS.items()}
        out, err = (cast(TextIO, ear) for ear in ears)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _heard(self._warned):
                yield
        finally:
            for name, setting in SETTINGS.items():
                if setting.read() != before[name]:
                    self._note(name, setting)
                    setting.write(before[name])

    def keeps_quiet(self) -> None:
        """Prints nothing and warns of nothing."""
        require(not self.said, "; ".join([*dict.fromkeys(self.said)][:3]))

    def leaves_the_process_alone(self) -> None:
        """Leaves the settings of torch and of the process as they are, and no thread behind."""
        left = [thread.name for thread in threading.enumerate() if thread not in self._alive]
        found = [f"{name}{at(place)}" for name, place in self.changed.items()]
        found += [f"{len(left)} threads that still run"] if left else []
        require(not found, f"changed {', '.join(found)}")

    def takes_little_memory(self) -> None:
        """Takes little memory for a small case."""
        taken = _peak() - self._memory
        require(taken < MEMORY, f"took {taken:.1f} GiB, more than {MEMORY:g}")

    def _warned(self, message: str, file: str, line: int) -> None:
        if self.source is not None and Path(file) == self.source:
            self.said.append(f"warned {_short(message)} ({self.source.name}:{line})")

    def _note(self, name: str, setting: _Setting) -> None:
        # What a plugin brings along counts as its own, as in `looks_only_at_what_it_is_given`.
        files = [] if self.source is None else [each for each in local_files(self.source) if each.suffix == ".py"]
        places = (
            f"{file.name}:{line}"
            for file in files
            for used, line in names(file).items()
            if re.fullmatch(setting.by, used)
        )
        place = next(places, "")
        if place or not setting.shared:
            self.changed[name] = place


@contextlib.contextmanager
def _heard(note: Callable[[str, str, int], None]) -> Iterator[None]:
    """Hand on every warning of the block instead of showing it; the filters stay as they are."""
    before = warnings.showwarning

    def show(message: Any, category: type[Warning], filename: str, lineno: int, *rest: object) -> None:
        note(str(message), filename, lineno)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = before


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else f"{line[:60]} …")


def _peak() -> float:
    """Most memory that the process has held, in GiB; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)


def limit_memory() -> None:
    """Let this process take no more address space than the machine has memory free, where the system can do that.

    A plugin that wants more gets a MemoryError in its own line, before the system ends whatever process it likes.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        page = os.sysconf("SC_PAGE_SIZE")
        held = int(Path("/proc/self/statm").read_text().split()[0]) * page
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        free = 1024 * int(found[1]) if found else os.sysconf("SC_PHYS_PAGES") * page
        most = held + max(free, 2 * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
