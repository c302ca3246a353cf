"""Where cells are computed: in this process, or in worker processes. Results come back as they finish.

An executor only computes; the caller writes the store. Every cell is computed with one torch thread, so that
its result does not depend on the executor or on the number of workers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from . import registry
from .errors import GradleakError, unknown
from .evaluate import Progress, Resources, evaluate, identity
from .process import tune
from .store import CellResult
from .suite import Cell

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""A cell whose worker died is tried so often; then it has failed."""

Report = Callable[[str, float, float], None]
"""Told the key of a cell under way, the share of it that is done in [0, 1], and the attack's mean loss."""


class Executor(ABC):
    """A way to compute cells."""

    @abstractmethod
    def run(
        self, cells: Sequence[Cell], resources: Resources, plugins: Sequence[Path], report: Report
    ) -> Iterator[CellResult]:
        """Yield the result of every cell once, as they finish, in any order. Closing the iterator stops the work.

        Args:
            cells: what to compute.
            resources: where things are.
            plugins: files whose plugins the cells may name.
            report: called while cells are under way.
        """


class Local(Executor):
    """One cell after the other in this process."""

    def run(
        self, cells: Sequence[Cell], resources: Resources, plugins: Sequence[Path], report: Report
    ) -> Iterator[CellResult]:
        """See `Executor.run`."""
        for path in plugins:
            registry.add_file(path)
        threads = torch.get_num_threads()
        tune()
        queue = Queue(cells)
        try:
            while (cell := queue.take()) is not None:
                key = cell.key
                yield evaluate(cell, resources, _throttled(lambda share, loss, key=key: report(key, share, loss)))  # type: ignore[misc]
                queue.trained(cell)
        finally:
            torch.set_num_threads(threads)


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
        count = min(self.workers or _default_workers(resources, devices), len(cells))
        workers = [_Worker(replace(resources, device=devices[i % len(devices)]), plugins) for i in range(count)]
        attempts = dict.fromkeys((cell.key for cell in cells), 0)
        said: set[str] = set()
        try:
            while True:
                for worker in workers:
                    if worker.cell is None and (cell := queue.take()) is not None:
                        attempts[cell.key] += 1
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
                        if attempts[cell.key] < ATTEMPTS:
                            log.warning("a worker died (exit code %s); trying again: %s", code, cell.title)
                            queue.put_back(cell)
                        else:
                            queue.give_up(cell)
                            yield _died(cell, code)
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


EXECUTORS = ("local", "processes")
"""Names that `build` knows."""


def build(name: str, workers: int | None = None) -> Executor:
    """Return an executor by name.

    Raises:
        GradleakError: no executor has this name, or `workers` is given to `local`.
    """
    if name not in EXECUTORS:
        raise unknown("executor", name, EXECUTORS)
    if name == "processes":
        return Processes(workers)
    if workers not in (None, 1):
        raise GradleakError(f"--workers {workers}: executor 'local' has one worker; use processes")
    return Local()


def cost(cell: Cell) -> float:
    """Rough work of a cell in gradients of one image; only ratios matter."""
    config = cell.config
    options, setting = config["attack"]["options"], config["setting"]
    if cell.is_utility:
        rounds = options["rounds"] * len(options["lr"]) * setting["local_steps"]
        return float(rounds * options["clients"] * setting["batch_size"])
    steps = options.get("iterations", 1) * options.get("restarts", 1) * setting.get("local_steps", 1)
    return float(config["victims"] * setting["batch_size"] * (20 + steps))


class Queue:
    """Cells to hand out, long ones first so that workers end together.

    Cells that share a model to be trained wait until the first of them has trained it.
    """

    def __init__(self, cells: Sequence[Cell]):
        """Line the cells up."""
        self._waiting = sorted(cells, key=cost, reverse=True)
        self._training: set[str] = set()
        self._trained: set[str] = set()

    def take(self) -> Cell | None:
        """Return the next cell that can start now, if any."""
        for place, cell in enumerate(self._waiting):
            model = _trained_model(cell)
            if model in self._training:
                continue
            if model is not None and model not in self._trained:
                self._training.add(model)
            return self._waiting.pop(place)
        return None

    def trained(self, cell: Cell) -> None:
        """Note that the model of a cell is there."""
        model = _trained_model(cell)
        if model is not None:
            self._training.discard(model)
            self._trained.add(model)

    def give_up(self, cell: Cell) -> None:
        """Let the next cell that needs this one's model train it."""
        self._training.discard(_trained_model(cell) or "")

    def put_back(self, cell: Cell) -> None:
        """Line up a cell once more, at the front."""
        self.give_up(cell)
        self._waiting.insert(0, cell)


def _trained_model(cell: Cell) -> str | None:
    config = cell.config
    if not config["setting"]["epochs"]:
        return None
    parts = [config["model"], config["dataset"], config["setting"]["epochs"], config["seed"]]
    return json.dumps(parts, sort_keys=True)


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
            with _environment(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE"):
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        return process, ours


def _work(connection: Connection, resources: Resources, plugins: Sequence[Path]) -> None:
    """Compute cells until the driver is gone. Warnings travel as text, progress as pairs."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.captureWarnings(True)
    logging.getLogger().handlers = [_Forward(connection)]
    tune()
    for path in plugins:
        registry.add_file(path)
    while True:
        try:
            cell: Cell = connection.recv()
        except EOFError:
            return
        connection.send(evaluate(cell, resources, _throttled(lambda share, loss: connection.send((share, loss)))))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class _Forward(logging.Handler):
    """Sends a worker's log to the driver, which shows each line once."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self.connection.send(record.getMessage())


def _throttled(report: Progress) -> Progress:
    """Pass on the first report, then no more than five a second."""
    last = -1.0

    def passed(share: float, loss: float) -> None:
        nonlocal last
        if last < 0 or time.monotonic() - last > 0.2:
            last = time.monotonic()
            report(share, loss)

    return passed


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _devices(resources: Resources) -> list[str]:
    if resources.device == "cuda":
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [resources.device]


def _default_workers(resources: Resources, devices: Sequence[str]) -> int:
    if resources.device.startswith("cuda"):
        return len(devices)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _died(cell: Cell, code: int | None) -> CellResult:
    error = f"its worker died {ATTEMPTS} times (exit code {code}; -9 is often a lack of memory)"
    config: dict[str, Any] = cell.config
    facts = {} if cell.is_utility else identity(config)
    return CellResult(key=cell.key, config=config, status="failed", error=error, provenance=facts)
