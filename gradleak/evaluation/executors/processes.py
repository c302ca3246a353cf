"""Worker processes on this machine."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from ... import registry
from ...board.store import CellResult
from ...process import tune
from ...suite import Cell
from ..evaluate import evaluate
from ..workshop import Resources
from .base import Executor, Forward, Queue, Report, default_workers, environment, throttled

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes(Executor):
    """Worker processes that take a cell each. A worker that dies costs its cell another attempt, nothing else."""

    workers: int | None = None
    """By default one a core, or one a GPU."""

    def run(
        self, cells: Sequence[Cell], resources: Resources, plugins: Sequence[Path], report: Report
    ) -> Iterator[CellResult]:
        """See `Executor.run`."""
        queue = Queue(cells)
        devices = _devices(resources)
        count = min(self.workers or default_workers(resources), len(cells))
        workers = [_Worker(replace(resources, device=devices[i % len(devices)]), plugins) for i in range(count)]
        said: set[str] = set()
        try:
            while True:
                for worker in workers:
                    if worker.cell is None and (cell := queue.take()) is not None:
                        worker.give(cell)
                busy = {worker.connection: worker for worker in workers if worker.cell is not None}
                if not busy:
                    return
                for ready in wait(list(busy)):
                    assert isinstance(ready, Connection)
                    worker = busy[ready]
                    cell = worker.cell
                    assert cell is not None
                    try:
                        found = ready.recv()
                    except (EOFError, OSError):
                        code = worker.restart()
                        lost = queue.died(cell, f"exit code {code}; -9 is often a lack of memory")
                        if lost is not None:
                            yield lost
                        continue
                    if isinstance(found, str):
                        if found not in said:
                            said.add(found)
                            log.warning("%s", found)
                        continue
                    queue.trained(cell)
                    if isinstance(found, CellResult):
                        worker.cell = None
                        yield found
                    else:
                        report(cell.key, *found)
        finally:
            for worker in workers:
                worker.stop()


class _Worker:
    """A worker process and the cell it has."""

    def __init__(self, resources: Resources, plugins: Sequence[Path]) -> None:
        self.arguments = (resources, list(plugins))
        self.cell: Cell | None = None
        self.process, self.connection = self._start()

    def give(self, cell: Cell) -> None:
        self.cell = cell
        # A worker that died before shows up as the end of its connection.
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(cell)

    def restart(self) -> int | None:
        self.process.join()
        code = self.process.exitcode
        self.connection.close()
        self.cell = None
        self.process, self.connection = self._start()
        return code

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()

    def _start(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, *self.arguments), daemon=True)
        # Ctrl-C reaches the whole process group, and only the driver may act on it: workers inherit the mask.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with environment(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE"):
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        return process, ours


def _work(connection: Connection, resources: Resources, plugins: Sequence[Path]) -> None:
    """Compute cells until the driver is gone. Warnings travel as text, progress as pairs."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    Forward(connection.send).install()
    tune()
    for path in plugins:
        registry.add_file(path)
    while True:
        try:
            cell: Cell = connection.recv()
        except EOFError:
            return
        connection.send(evaluate(cell, resources, throttled(lambda share, loss: connection.send((share, loss)))))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _devices(resources: Resources) -> list[str]:
    if resources.device == "cuda":
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [resources.device]
