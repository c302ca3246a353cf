"""The checks of a plugin in a process of their own: it may exit, crash or never end, and still gets its line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import GradleakError
from ..plugins import at
from .findings import Finding

_FRAME = re.compile(r'File "(.+)", line (\d+)')
"""A frame of a stack that `faulthandler` writes, the innermost first."""
_START = 300.0
"""Seconds that a process has to import what it needs, before it looks at the plugin; these are not the plugin's
fault."""
_PATIENCE = 2.0
"""Seconds that a process has to say where it is."""


@dataclass(frozen=True)
class Job:
    """A plugin to check, as it is told to the process."""

    plugin: str
    """A file, or a name of the registry."""
    group: str = ""
    """Of a name; empty where only one group has it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = ""
    model: str = ""
    shape: tuple[int, int, int] | None = None
    root: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether the plugin is a file and no name."""
        return self.plugin.endswith(".py") or os.sep in self.plugin or Path(self.plugin).exists()


def findings(job: Job, timeout: float) -> Iterator[Finding]:
    """Yield what is found as it is found.

    Args:
        job: what to check.
        timeout: seconds for each promise; the process is ended then, and what was not reached is said.

    Raises:
        GradleakError: there is no such plugin, or it cannot be asked for like this.
    """
    with tempfile.TemporaryFile("w+b") as errors, _started(job, errors) as (process, answers):
        promise, source = "can be loaded", Path(job.plugin)
        lines = _lines(answers, timeout)
        for message in lines:
            if message is None:
                place = _stack(process, errors, source)
                yield Finding(promise, False, f"took longer than {timeout:g} s{at(place)}")
                break
            if "refused" in message:
                raise GradleakError(message["refused"])
            if "done" in message:
                return
            source = Path(message.get("source") or source)
            promise = message.get("promise") or promise
            if "finding" in message:
                yield Finding(**message["finding"])
                promise = "the next promise"
        else:
            process.wait()
            yield Finding(promise, False, f"the process {_ended(process.returncode)}{at(_place(errors, source))}")
    yield Finding("keeps its other promises", None, "not reached")


@contextlib.contextmanager
def _started(job: Job, errors: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    ours, theirs = os.pipe()
    command = [sys.executable, "-m", "gradleak.contract", str(theirs), json.dumps(asdict(job))]
    # What a plugin starts is in the same group, and ends with it.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        pass_fds=[theirs],
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path) or ""},
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours)


def _lines(answers: int, timeout: float) -> Iterator[dict[str, Any] | None]:
    """Yield the messages of the process until it ends; None, and nothing more, where it says nothing for too long."""
    import select

    kept = b""
    deadline = time.monotonic() + _START
    while True:
        ready, _, _ = select.select([answers], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            yield None
            return
        read = os.read(answers, 65536)
        if not read:
            return
        *whole, kept = (kept + read).split(b"\n")
        for line in whole:
            yield json.loads(line)
        deadline = time.monotonic() + timeout


def _stack(process: subprocess.Popen[bytes], errors: IO[bytes], source: Path) -> str:
    """Ask the process where it is; `file.py:14` of the plugin."""
    process.send_signal(signal.SIGUSR1)
    until = time.monotonic() + _PATIENCE
    while not (place := _place(errors, source)) and time.monotonic() < until:
        time.sleep(0.05)
    return place


def _place(errors: IO[bytes], source: Path) -> str:
    """Return the innermost line of the plugin in the last stack that the process wrote."""
    size = os.fstat(errors.fileno()).st_size
    text = os.pread(errors.fileno(), min(size, 2**20), max(0, size - 2**20)).decode(errors="replace")
    for file, line in _FRAME.findall(text):
        if Path(file).name == source.name:
            return f"{source.name}:{line}"
    return ""


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}{', often for lack of memory' if name == 'SIGKILL' else ''}"
