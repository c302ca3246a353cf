"""What a run shows of its progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..board.store import CellResult
from ..paths import printable
from ..suite import AttackCell, Cell
from .executors import Pending, cost


class Display:
    """Progress of a run: a bar on a terminal, a line for every tenth of the work elsewhere."""

    def __init__(self, console: Console, cells: int, waiting: Sequence[Cell]) -> None:
        self.console = console
        self.costs = {cell.key: cost(cell) for cell in waiting}
        self.victims = {cell.key: cell.victims if isinstance(cell, AttackCell) else 0 for cell in waiting}
        self.titles = {cell.key: cell.title for cell in waiting}
        self.skipped = cells - len(waiting)
        self.cells = cells
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
        """Show the share of a cell that is done, and its loss."""
        self.under_way[key] = share
        self.loss = loss
        self._show()

    def finished(self, result: CellResult | Pending) -> None:
        """Show that a cell has its result, or that this run gives it up."""
        self.under_way.pop(result.key, None)
        self.done.add(result.key)
        if isinstance(result, Pending):
            self._line(f"not computed: {self.titles[result.key]}: {result.reason}")
        elif result.status == "failed":
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
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


class _Log(logging.Handler):
    """Shows log lines above the bar."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(f"gradleak: {printable(record.getMessage())}", markup=False, highlight=False, soft_wrap=True)
