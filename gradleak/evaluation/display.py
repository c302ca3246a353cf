"""What a run shows of its progress."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..board.store import CellResult
from ..paths import printable
from ..suite import AttackCell, Cell
from .executors import Pending
from .pace import Pace, in_words

QUIET = 30.0
"""Most seconds between two lines where there is no terminal."""


class Display:
    """Progress of a run: a bar on a terminal; elsewhere a line for every tenth of the work, and every 30 seconds."""

    def __init__(
        self, console: Console, cells: Sequence[Cell], waiting: Sequence[Cell], known: Mapping[str, float] | None = None
    ) -> None:
        """Start with nothing shown.

        Args:
            console: where to.
            cells: of the suite.
            waiting: those to run.
            known: seconds of those that are stored, by key.
        """
        self.console = console
        self.pace = Pace(cells, known)
        self.victims = {cell.key: cell.victims if isinstance(cell, AttackCell) else 0 for cell in waiting}
        self.titles = {cell.key: cell.title for cell in waiting}
        self.skipped = len(cells) - len(waiting)
        self.cells = len(cells)
        self.under_way: dict[str, float] = {}
        self.done: dict[str, float] = {}
        """Seconds of the cells that are done with, by key."""
        self.failed = 0
        self.loss = math.nan
        self.started = self.said = time.monotonic()
        self.begun: float | None = None
        self.next_line = 0.1
        self.work, self.looked_again = (0.0, 0.0), 0.0
        self.bar = Progress(
            TextColumn("cells {task.fields[cells]}"),
            BarColumn(),
            TextColumn("victims {task.fields[victims]}{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}{task.fields[now]}"),
            console=console,
            transient=True,
        )
        self.log = logging.getLogger("gradleak")
        self.handler = _Log(console)

    def __enter__(self) -> Self:
        # Some libraries give the root logger a handler of their own, which would say everything twice.
        self.log.propagate = False
        self.log.addHandler(self.handler)
        if self.console.is_terminal and self.titles:
            self.task = self.bar.add_task("", total=1.0, **self._fields())
            self.bar.start()
        elif self.titles:
            self._line(f"{len(self.titles)} cells to run, {self.skipped} of {self.cells} stored already")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal and self.titles:
            self.bar.stop()
        self.log.removeHandler(self.handler)
        self.log.propagate = True

    def began(self, key: str) -> None:
        """Note that a cell is computed now."""
        self.begun = self.begun or time.monotonic()
        self.under_way.setdefault(key, 0.0)

    def elsewhere(self, key: str) -> None:
        """Note that another run has computed a cell."""
        self.done.setdefault(key, 0.0)

    def progress(self, key: str, share: float, loss: float) -> None:
        """Show the share of a cell that is done, and its loss."""
        self.began(key)
        self.under_way[key] = min(1.0, max(0.0, share))
        self.loss = loss
        self.tick()

    def finished(self, result: CellResult | Pending) -> None:
        """Show that a cell has its result, or that this run gives it up."""
        self.under_way.pop(result.key, None)
        self.done[result.key] = 0.0 if isinstance(result, Pending) else result.seconds
        if isinstance(result, Pending):
            self._line(f"not computed: {self.titles[result.key]}: {result.reason}")
        elif result.status == "failed":
            self.failed += 1
            self._line(f"failed: {self.titles[result.key]}: {result.error}")
        else:
            self.pace.note(result.key, result.seconds)
        self.tick()

    def tick(self) -> None:
        """Show how things are, if it is time to; called every few seconds at least."""
        if not self.titles:
            return
        if self.console.is_terminal:
            self.bar.update(self.task, completed=self.share, **self._fields())
            return
        now = time.monotonic()
        if self.share < self.next_line and now < self.said + QUIET:
            return
        self.said = now
        self.next_line = int(self.share * 10 + 1e-9) / 10 + 0.1
        fields = self._fields()
        counts = f"cells {fields['cells']}, victims {fields['victims']}{fields['loss']}"
        self._line(f"{self.share:4.0%}  {counts}, {now - self.started:.0f} s{fields['left']}{fields['now']}")

    @property
    def share(self) -> float:
        """Share of the work that is done, in [0, 1], as far as can be told."""
        work, left = self._work()
        return 1.0 if len(self.done) == len(self.titles) else work / (work + left or 1.0)

    def left(self) -> float | None:
        """Return the seconds that are left, at the rate so far; None before anything is done."""
        work, left = self._work()
        if self.begun is None or not work:
            return None
        return left * (time.monotonic() - self.begun) / work

    def _work(self) -> tuple[float, float]:
        """Return the seconds of cells that are done, and that are left, however many run at a time."""
        now = time.monotonic()
        if now < self.looked_again:
            return self.work
        work, left = sum(self.done.values()), 0.0
        for key in self.titles.keys() - self.done.keys():
            seconds, share = self.pace.seconds(key), self.under_way.get(key, 0.0)
            work, left = work + share * seconds, left + (1 - share) * seconds
        # Of many cells this takes its time, and must not take the run's.
        self.work, self.looked_again = (work, left), now + 50 * (time.monotonic() - now)
        return self.work

    def _fields(self) -> dict[str, Any]:
        victims = sum(self.victims[key] for key in self.done)
        victims += sum(int(share * self.victims[key]) for key, share in self.under_way.items())
        failed, left = f", {self.failed} failed" if self.failed else "", self.left()
        now = [self.titles[key] for key in self.under_way]
        more = f" and {len(now) - 1} more" if len(now) > 1 else ""
        return {
            "cells": f"{self.skipped + len(self.done)}/{self.cells}{failed}",
            "victims": f"{victims}/{sum(self.victims.values())}",
            "loss": f", loss {self.loss:.3g}" if math.isfinite(self.loss) else "",
            "left": "" if left is None else f", about {in_words(left)} left",
            "now": f"; now {printable(now[0])}{more}" if now else "",
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
