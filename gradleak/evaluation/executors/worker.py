"""A worker process: takes cells from its driver, computes them, says how it goes, and ends when it is told to."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from ... import registry
from ...process import end_with_parent, memory_of, tune
from ...suite import Cell
from ..evaluate import evaluate, failed
from ..faults import MachineFault
from ..workshop import Resources, Workshop
from .base import Forward, environment, throttled

Message = tuple[str, Any]
"""What a worker says: `said` text, a new `phase`, `progress` (share, loss), a `result`, a `fault` of the machine."""

_LINES = 100
"""Lines that a worker may print; a plugin that never stops would fill memory."""


class Worker:
    """A worker as its driver sees it: a process that is started when there is a cell for it."""

    def __init__(self, context: BaseContext, resources: Resources, plugins: Sequence[Path], memory: int | None) -> None:
        """Start nothing yet."""
        self._context = context
        self._arguments = (resources, list(plugins), memory)
        self._process: Any = None
        self.cell: Cell | None = None
        self.connection: Connection | None = None
        self.phase, self.since = "start", time.monotonic()
        self.begun = self.since
        self.base = 0

    @property
    def pid(self) -> int:
        """Number of the process."""
        number: int = self._process.pid
        return number

    def give(self, cell: Cell) -> None:
        """Hand out a cell, to a new process if there is none."""
        self.cell = cell
        if self._process is None or self._process.exitcode is not None:
            self.end()
            self._start()
        self.enter("start")
        assert self.connection is not None
        # One that has died meanwhile is found out by its silence.
        with contextlib.suppress(OSError):
            self.connection.send(cell)

    def enter(self, phase: str) -> None:
        """Note what the worker does now."""
        self.phase, self.since = phase, time.monotonic()
        if phase == "cell":
            self.begun = self.since
            self.base = memory_of(self.pid)

    def hear(self) -> list[Message]:
        """Return what the worker has said.

        Raises:
            EOFError: it says nothing any more, or nothing that makes sense.
        """
        said = []
        assert self.connection is not None
        try:
            while self.connection.poll():
                said.append(self.connection.recv())
        except Exception as error:
            if not said:
                raise EOFError from error
        return said

    def is_dead(self) -> bool:
        """Return whether the process has ended."""
        return self._process is None or self._process.exitcode is not None

    def end(self) -> int | None:
        """End the process, if there is one, and all that it started; return its exit code."""
        if self._process is None:
            return None
        self._process.join(0)
        ended = self._process.exitcode
        for kill in (lambda: os.killpg(self.pid, signal.SIGKILL), self._process.kill):
            with contextlib.suppress(OSError):
                kill()
        self._process.join()
        code = self._process.exitcode if ended is None else ended
        if self.connection is not None:
            self.connection.close()
        self._process = self.connection = None
        return code  # type: ignore[no-any-return]

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        target = (theirs, *self._arguments)
        self._process = self._context.Process(target=_work, args=target)  # type: ignore[attr-defined]
        # Ctrl-C and the like are for the driver, which tells its workers; they inherit the mask.
        told = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, told)
        try:
            with environment(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE"):
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self.connection = ours


def _work(connection: Connection, resources: Resources, plugins: Sequence[Path], memory: int | None) -> None:
    """Compute cells until the driver is gone."""
    # A group of its own: what plugins start ends with their worker, and the terminal's signals do not reach it.
    os.setsid()
    end_with_parent()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    send = _Sender(connection)
    _say_through(send)
    tune()
    for path in plugins:
        registry.add_file(path)
    _bound(memory)
    here, workshop = os.getpid(), Workshop(resources)
    while True:
        try:
            cell: Cell = connection.recv()
        except EOFError:
            return
        said = computed(cell, workshop, send)
        if os.getpid() != here:  # an attack forked, and this is the other one
            os._exit(0)
        send(*said)


def computed(cell: Cell, workshop: Workshop, send: Callable[[str, Any], None]) -> Message:
    """Compute a cell and return its result, or the fault of the machine that it met; say meanwhile how it goes."""
    progress = throttled(lambda share, loss: send("progress", (share, loss)))
    send("phase", "cell")
    try:
        return "result", evaluate(cell, workshop, progress, lambda name: send("phase", name))
    except MachineFault as fault:
        return "fault", str(fault)
    except BaseException as error:  # an attack's own KeyboardInterrupt or SystemExit
        return "result", failed(cell, f"{type(error).__name__}: {error}"[:500])


class _Sender:
    """Sends messages of several threads one after the other."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._lines = 0

    def __call__(self, kind: str, content: Any) -> None:
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._connection.send((kind, content))

    def say(self, text: str) -> None:
        self._lines += 1
        if self._lines <= _LINES:
            self("said", text[:1000])


class _Printed(io.TextIOBase):
    """Stands for standard output: what plugins print is said in lines, and never reaches what the driver prints."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._rest = say, ""

    def write(self, text: str) -> int:
        *lines, rest = (self._rest + text).split("\n")
        self._rest = rest[-1000:]
        for line in filter(str.strip, lines):
            self._say(line)
        return len(text)


def _say_through(send: _Sender) -> None:
    ours = logging.getLogger("gradleak")
    ours.handlers.clear()  # of the driver, where this process is a copy of it
    ours.propagate = True
    Forward(send.say).install()
    with contextlib.suppress(OSError):
        os.dup2(2, 1)
    sys.stdout = _Printed(send.say)


def _bound(memory: int | None) -> None:
    """Let requests for more memory fail, which an attack's victims are marked for, instead of ending the machine."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800")  # if memory is short all the same, nobody else pays
    if memory is None or not sys.platform.startswith("linux"):
        return
    bound = memory_of(os.getpid(), "VmData") + memory
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    with contextlib.suppress(OSError):
        os.killpg(os.getpgid(0), signal.SIGKILL)
    os._exit(1)
