"""Watches workers: hands out cells, hears results, ends whoever takes too long or too much, starts others."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from typing import Literal

from ...board.schema import CellResult, ImageRow
from ...process import memory_of, stopped
from ...suite import AttackCell, Cell
from ..apart import death
from ..evaluate import failed
from ..identity import identity
from .base import Desk, Limits, Pending, Queue, Report
from .worker import Worker

log = logging.getLogger(__name__)

LOOK = 0.2
"""Seconds between two looks at workers that say nothing."""
START = 600.0
"""Seconds that a worker has to import what it needs: torch may come from a cold disk that many share."""
STOPPED = 30.0
"""Seconds after which a worker that somebody has stopped is given up."""


class Crew:
    """Workers and the cells they have."""

    def __init__(self, workers: Sequence[Worker], queue: Queue, desk: Desk, limits: Limits, report: Report):
        """Take the cells of a queue; nothing starts yet."""
        self.workers, self.queue, self.desk, self.limits, self.report = workers, queue, desk, limits, report
        self._said: set[str] = set()
        self._stopped: dict[int, float] = {}

    def run(self) -> Iterator[CellResult | Pending]:
        """Yield what becomes of every cell; see `Executor.run`."""
        try:
            while True:
                for worker in self.workers:
                    if worker.cell is None and (cell := self.queue.take()) is not None:
                        worker.give(cell)
                busy = [worker for worker in self.workers if worker.cell is not None]
                if not busy and not len(self.queue):
                    return
                if not busy:
                    time.sleep(LOOK)  # others have the rest
                else:
                    wait([worker.connection for worker in busy if worker.connection is not None], timeout=LOOK)
                self.desk.beat()
                for worker in busy:
                    if (found := self._look_at(worker)) is not None:
                        yield found
        finally:
            for worker in self.workers:
                worker.end()

    def _look_at(self, worker: Worker) -> CellResult | Pending | None:
        """Hear a worker; if it is done with its cell in whatever way, return how."""
        cell = worker.cell
        assert cell is not None
        try:
            dead = worker.is_dead()  # before listening: what it said last still counts
            for kind, content in worker.hear():
                if kind == "result":
                    if content.key != cell.key:
                        continue
                    worker.cell = None
                    self.queue.finished(cell)
                    return content  # type: ignore[no-any-return]
                if kind == "fault":
                    worker.cell = None
                    return self.queue.died(cell, content)
                self._note(worker, cell, kind, content)
        except EOFError:
            dead = True
        if dead:
            worker.cell = None
            return self.queue.died(cell, death(worker.end()))
        return self._hold_to_limits(worker, cell)

    def _note(self, worker: Worker, cell: Cell, kind: str, content: object) -> None:
        if kind == "said" and isinstance(content, str):
            if content not in self._said:
                self._said.add(content)
                log.warning("%s", content)
        elif kind == "phase":
            worker.enter(str(content))
            if worker.phase == "attack":
                self.queue.trained(cell)
        elif kind == "attacker":
            worker.attacked_by(int(str(content)))
        elif kind == "progress" and isinstance(content, tuple):
            if worker.phase == "cell":
                self.queue.trained(cell)
            self.report(cell.key, *content)

    def _hold_to_limits(self, worker: Worker, cell: Cell) -> CellResult | Pending | None:
        now = time.monotonic()
        if worker.phase == "start":
            return self._lost(worker, cell, f"no start in {START:g} s") if now - worker.since > START else None
        if (late := overdue(cell, worker.phase, now - worker.since, now - worker.begun, self.limits)) is not None:
            return self._ended(worker, late)
        if self.limits.memory is not None:
            if memory_of(worker.pid) + worker.attacker_memory() - worker.base > 1.05 * self.limits.memory + 2**26:
                error = f"took more than {self.limits.memory / 2**30:.3g} GiB (--memory-limit)"
                return self._ended(worker, _without_answer(cell, "oom", error))
        if not stopped(worker.pid):
            self._stopped.pop(worker.pid, None)
        elif now - self._stopped.setdefault(worker.pid, now) > STOPPED:
            return self._lost(worker, cell, f"it was stopped for {STOPPED:g} s")
        return None

    def _ended(self, worker: Worker, result: CellResult) -> CellResult:
        """End a worker whose cell has this result."""
        assert worker.cell is not None
        self.queue.finished(worker.cell)
        worker.cell = None
        worker.end()
        return result

    def _lost(self, worker: Worker, cell: Cell, reason: str) -> Pending | None:
        worker.cell = None
        worker.end()
        return self.queue.died(cell, reason)


def overdue(cell: Cell, phase: str, seconds: float, total: float, limits: Limits) -> CellResult | None:
    """Return the result of a cell that takes too long, None for others.

    Args:
        cell: under way.
        phase: of it.
        seconds: since the phase began.
        total: seconds since the cell did.
        limits: of the run.
    """
    own = cell.engine.timeout if isinstance(cell, AttackCell) else None
    if phase == "attack" and own and seconds > 1.1 * own + limits.grace:
        return _without_answer(cell, "timeout", "")
    if total > limits.cell_timeout:
        return _without_answer(cell, "timeout", f"took more than {limits.cell_timeout:g} s (--cell-timeout)")
    return None


def _without_answer(cell: Cell, status: str, error: str) -> CellResult:
    """Return the result of a cell whose worker was ended: every victim counts as not reconstructed.

    A limit of the suite's is part of the cell; one of this run's makes a failed cell, which another run may repeat.
    """
    if not isinstance(cell, AttackCell):
        return failed(cell, error or f"{status} in training")
    places = itertools.product(range(cell.victims), range(cell.setting.batch_size))
    rows = [ImageRow(victim=victim, image=image, status=status) for victim, image in places]
    outcome: Literal["ok", "failed"] = "failed" if error else "ok"
    return CellResult(
        key=cell.key, config=cell.stored(), status=outcome, error=error, rows=rows, provenance=identity(cell).stored()
    )
