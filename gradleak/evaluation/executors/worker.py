"""A worker process: takes cells from its driver, computes them, says how it goes, and ends when it is told to."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from ... import registry
from ...process import bound, end_with_parent, memory_of, tune
from ...suite import Cell
from ..apart import Apart
from ..evaluate import evaluate, failed
from ..faults import MachineFault
from ..said import Forward, Printed, Sayer, throttled
from ..workshop import Resources, Workshop
from .base import environment

Message = tuple[str, Any]
"""What a worker says: `said` text, a new `phase`, the number of an `attacker`, `progress` (share, loss), a `result`, a
`fault` of the machine."""


class Worker:
    """A worker as its driver sees it: a process that is started when there is a cell for it."""

    def __init__(
        self,
        context: BaseContext,
        resources: Resources,
        plugins: Sequence[Path],
        memory: int | None,
        control: socket.socket | None = None,
    ) -> None:
        """Start nothing yet; `control` is of the nursery of attacks, None to run them in the worker itself."""
        self._context = context
        self._arguments = (resources, list(plugins), memory, control)
        self._attacker = self._attacker_base = 0
        """Number of the process that runs its attack, and the bytes that it had at its start."""
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

    def attacker_memory(self) -> int:
        """Return the bytes that the process of its attack has taken."""
        if not self._attacker or self.phase != "attack":
            return 0
        return max(0, memory_of(self._attacker) - self._attacker_base)

    def attacked_by(self, pid: int) -> None:
        """Note the process that runs its attack."""
        self._attacker, self._attacker_base = pid, memory_of(pid)

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


def _work(
    connection: Connection,
    resources: Resources,
    plugins: Sequence[Path],
    memory: int | None,
    control: socket.socket | None,
) -> None:
    """Compute cells until the driver is gone."""
    # A group of its own: what plugins start ends with their worker, and the terminal's signals do not reach it.
    os.setsid()
    end_with_parent()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    send = Sayer(lambda kind, content: connection.send((kind, content)))
    _say_through(send)
    tune()
    for path in plugins:
        registry.add_file(path)
    bound(memory)
    apart = None
    if control is not None:
        apart = Apart(control, memory, resources.device)
        apart.told = lambda pid: send("attacker", pid)
        apart.wait()
    here, workshop = os.getpid(), Workshop(resources)
    while True:
        try:
            cell: Cell = connection.recv()
        except EOFError:
            return
        said = computed(cell, workshop, send, apart)
        if os.getpid() != here:  # an attack forked, and this is the other one
            os._exit(0)
        send(*said)


def computed(cell: Cell, workshop: Workshop, send: Callable[[str, Any], None], apart: Apart | None = None) -> Message:
    """Compute a cell and return its result, or the fault of the machine that it met; say meanwhile how it goes."""
    progress = throttled(lambda share, loss: send("progress", (share, loss)))
    send("phase", "cell")
    try:
        return "result", evaluate(cell, workshop, progress, lambda name: send("phase", name), apart)
    except MachineFault as fault:
        return "fault", str(fault)
    except BaseException as error:  # an attack's own KeyboardInterrupt or SystemExit
        return "result", failed(cell, f"{type(error).__name__}: {error}"[:500])


def _say_through(send: Sayer) -> None:
    ours = logging.getLogger("gradleak")
    ours.handlers.clear()  # of the driver, where this process is a copy of it
    ours.propagate = True
    Forward(send.say).install()
    with contextlib.suppress(OSError):
        os.dup2(2, 1)
    sys.stdout = Printed(send.say)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    with contextlib.suppress(OSError):
        os.killpg(os.getpgid(0), signal.SIGKILL)
    os._exit(1)
