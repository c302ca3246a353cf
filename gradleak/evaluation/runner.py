"""Runs a suite: cells that the store lacks go to an executor, and what comes back into the store."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import registry, suite
from ..board.store import CellResult, Store, victim_list
from ..errors import GradleakError
from ..plugins import blamed, near_misses
from ..suite import Cell
from . import check, workshop
from .executors import Executor, cost
from .workshop import Resources

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The cells of a suite, and what a store has of them."""

    cells: list[Cell]
    statuses: dict[str, str]
    """ok or failed, by key, for the cells that are stored."""

    def waiting(self, retry_failed: bool = False) -> list[Cell]:
        """Return the cells to run."""
        done = ("ok",) if retry_failed else ("ok", "failed")
        return [cell for cell in self.cells if self.statuses.get(cell.key) not in done]


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    cells: int
    """Cells of the suite."""
    ran: int
    """Cells computed by this run."""
    stored: int
    """Cells of the suite that are in the store now, failed ones included."""
    failed: dict[str, str]
    """Errors of the suite's failed cells that are in the store, by their titles."""
    seconds: float
    interrupted: bool = False


def plan(path: Path, store: Path, resources: Resources, plugins: Sequence[Path] = ()) -> Plan:
    """Read and check a suite and a store; nothing is written.

    Raises:
        GradleakError: the suite, a plugin file or the store is not as it should be, or a cell cannot run.
    """
    for plugin in plugins:
        for group, name in registry.add_file(plugin):
            for line in near_misses(registry.load(group, name)):
                log.warning("--plugin %s: %s", plugin, line)
    chosen = suite.read(path)
    statuses: dict[str, str] = {}
    if store.exists():
        with Store(store) as found:
            statuses = found.statuses()
    try:
        with blamed():
            cells = suite.expand(chosen, workshop.digest(resources), resources.data_root)
            cells = check.check(cells, resources)
    except GradleakError as error:
        raise GradleakError(f"suite {path}: {error}") from error
    keys = {cell.key for cell in cells}
    return Plan(cells, {key: status for key, status in statuses.items() if key in keys})


def run(
    path: Path,
    store: Path,
    executor: Executor,
    resources: Resources,
    plugins: Sequence[Path] = (),
    retry_failed: bool = False,
    console: Console | None = None,
) -> Summary:
    """Run the cells of a suite that the store lacks; the store is made if it is not there.

    Every cell is committed as it finishes. Ctrl-C stops the workers and returns a summary that says so.

    Args:
        path: the suite.
        store: the SQLite file.
        executor: computes the cells.
        resources: where things are.
        plugins: plugin files that the suite may name.
        retry_failed: run failed cells again.
        console: where progress is shown; standard error by default.

    Raises:
        GradleakError: as `plan`, or the store cannot be written.
    """
    started = time.monotonic()
    found = plan(path, store, resources, plugins)
    waiting = found.waiting(retry_failed)
    titles = {cell.key: cell.title for cell in found.cells}
    ran, interrupted = 0, False
    with Store(store, create=True) as target:
        try:
            target.rename({cell.key: cell.config for cell in found.cells})
            _write_victims(target, found.cells, resources)
            with _Display(console or Console(stderr=True), found, waiting) as display:
                results = executor.run(waiting, resources, plugins, display.progress)
                with contextlib.closing(results):  # type: ignore[type-var]
                    for result in results:
                        # Another run may have written the same cell meanwhile.
                        with _undisturbed():
                            if not target.has(result.key):
                                target.write(result)
                            ran += 1
                        display.finished(result)
        except KeyboardInterrupt:
            interrupted = True
        cells = target.cells()
    cells = cells[cells["key"].isin(list(titles))]
    lost = cells[cells["status"] == "failed"]
    failed = {titles[key]: error for key, error in zip(lost["key"], lost["error"], strict=True)}
    return Summary(len(titles), ran, len(cells), failed, time.monotonic() - started, interrupted)


def _write_victims(store: Store, cells: Sequence[Cell], resources: Resources) -> None:
    """Keep the true images of every list of victims that the cells attack."""
    longest: dict[str, Cell] = {}
    for cell in cells:
        if cell.is_utility:
            continue
        name = victim_list(cell.config)
        if name not in longest or cell.config["victims"] > longest[name].config["victims"]:
            longest[name] = cell
    for name, cell in longest.items():
        store.write_victims(name, *workshop.victims_of(cell, resources))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put Ctrl-C off to the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if received:
            signal.raise_signal(signal.SIGINT)


class _Display:
    """Progress of a run: a bar on a terminal, a line for every tenth of the work elsewhere."""

    def __init__(self, console: Console, found: Plan, waiting: Sequence[Cell]) -> None:
        self.console = console
        self.costs = {cell.key: cost(cell) for cell in waiting}
        self.victims = {cell.key: int(cell.config["victims"]) for cell in waiting}
        self.titles = {cell.key: cell.title for cell in waiting}
        self.skipped = len(found.cells) - len(waiting)
        self.cells = len(found.cells)
        self.under_way: dict[str, float] = {}
        self.done: set[str] = set()
        self.loss = float("nan")
        self.started = time.monotonic()
        self.next_line = 0.1
        self.bar = Progress(
            TextColumn("cells {task.fields[cells]}"),
            BarColumn(),
            TextColumn("victims {task.fields[victims]}"),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=600,
        )
        self.log = logging.getLogger("gradleak")
        self.handler = _Log(console)

    def __enter__(self) -> Self:
        # Some libraries give the root logger a handler of their own, which would say everything twice.
        self.log.propagate = False
        self.log.addHandler(self.handler)
        if self.console.is_terminal and self.costs:
            self.task = self.bar.add_task("", total=sum(self.costs.values()), **self._fields())
            self.bar.start()
        elif self.costs:
            self._line(f"{len(self.costs)} cells to run, {self.skipped} of {self.cells} stored already")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal and self.costs:
            self.bar.stop()
        self.log.removeHandler(self.handler)
        self.log.propagate = True

    def progress(self, key: str, share: float, loss: float) -> None:
        self.under_way[key] = share
        self.loss = loss
        self._show()

    def finished(self, result: CellResult) -> None:
        self.under_way.pop(result.key, None)
        self.done.add(result.key)
        if result.status == "failed":
            self._line(f"failed: {self.titles[result.key]}: {result.error}")
        self._show()

    def _show(self) -> None:
        work = sum(self.costs[key] for key in self.done)
        work += sum(share * self.costs[key] for key, share in self.under_way.items())
        if self.console.is_terminal:
            self.bar.update(self.task, completed=work, **self._fields())
            return
        share = work / sum(self.costs.values())
        if share < self.next_line:
            return
        self.next_line = int(share * 10 + 1e-9) / 10 + 0.1
        elapsed = time.monotonic() - self.started
        left = elapsed * (1 - share) / share
        values = ", ".join(f"{name} {value}" for name, value in self._fields().items())
        self._line(f"{share:4.0%}  {values}, {elapsed:.0f} s, {left:.0f} s left")

    def _fields(self) -> dict[str, Any]:
        victims = sum(self.victims[key] for key in self.done)
        victims += sum(int(share * self.victims[key]) for key, share in self.under_way.items())
        return {
            "cells": f"{self.skipped + len(self.done)}/{self.cells}",
            "victims": f"{victims}/{sum(self.victims.values())}",
            "loss": f"{self.loss:.3g}",
        }

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Log(logging.Handler):
    """Shows log lines above the bar."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(f"gradleak: {record.getMessage()}", markup=False, highlight=False, soft_wrap=True)
