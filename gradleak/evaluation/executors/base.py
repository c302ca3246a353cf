"""What every executor is made of: its contract, the queue of its cells, and what workers need."""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Protocol

import torch

from ...board.claims import Claim
from ...board.store import CellResult
from ...errors import GradleakError
from ...process import machine_memory
from ...suite import Cell
from ..pace import in_order
from ..workshop import Resources

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Times that a cell is tried whose worker dies, since one may be killed for what others on the machine do; then it is
left to another run."""
HOPELESS = 3
"""Different cells whose workers have died, before any cell was finished, at which a run stops: it is not the cells."""
PAUSE = 0.5
"""Seconds between two looks for cells that other runs had."""

Report = Callable[[str, float, float], None]
"""Told the key of a cell under way, the share of it that is done in [0, 1], and the attack's mean loss."""


@dataclass(frozen=True)
class Limits:
    """What a cell may take; a worker that takes more is ended, and the run goes on."""

    cell_timeout: float = 86400.0
    """Seconds for a cell with all that it needs: training, attack and scores."""
    memory: int | None = None
    """Bytes that a worker may take beyond what it has at its start; by default four fifths of the machine's memory."""
    grace: float = 5.0
    """Seconds, and a tenth of the limit, that an attack has after `engine.timeout` to end by itself."""

    def __post_init__(self) -> None:
        """Refuse what is no limit."""
        if not 0 < self.cell_timeout < math.inf:
            raise GradleakError(f"--cell-timeout {self.cell_timeout:g}: has to be a number of seconds above 0")
        if self.memory is not None and self.memory < 2**20:
            raise GradleakError("--memory-limit: has to be 0.001 GiB or more")

    def memory_of(self, resources: Resources) -> int | None:
        """Return the bytes that a worker may ask for; none by default with a GPU, whose driver reserves what it likes.

        Addresses are counted, so this says no long before the machine is out of memory.
        """
        if self.memory is not None or resources.device != "cpu":
            return self.memory
        total = machine_memory()
        return None if total is None else total * 4 // 5


@dataclass(frozen=True)
class Pending:
    """A cell that this run could not compute, though nothing is wrong with it; it stays to be computed."""

    key: str
    reason: str


class Desk(Protocol):
    """Where an executor asks for cells, so that several runs share them (`gradleak.board.claims.Claims`)."""

    def take(self, key: str) -> Claim:
        """Ask for a cell."""

    def release(self, key: str) -> None:
        """Leave a cell to others."""

    def beat(self) -> None:
        """Give a sign of life; called every few seconds."""


class Alone:
    """The desk of a run that shares its cells with nobody."""

    def take(self, key: str) -> Claim:
        """Grant every cell."""
        return Claim.MINE

    def release(self, key: str) -> None:
        """Do nothing."""

    def beat(self) -> None:
        """Do nothing."""


class Executor(ABC):
    """A way to compute cells."""

    @abstractmethod
    def run(
        self,
        cells: Sequence[Cell],
        resources: Resources,
        plugins: Sequence[Path],
        report: Report,
        desk: Desk | None = None,
    ) -> Iterator[CellResult | Pending]:
        """Yield the result of every cell once, as they finish, in any order. Closing the iterator stops the work.

        Args:
            cells: what to compute.
            resources: where things are.
            plugins: files whose plugins the cells may name.
            report: called while cells are under way.
            desk: asked before a cell is computed; one that another run has stored is left out.

        Raises:
            GradleakError: workers die again and again before any cell is finished.
        """


class Queue:
    """Cells to hand out, in the order of `pace.in_order`.

    Cells that share a model to be trained wait until the first of them has trained it.
    """

    def __init__(self, cells: Sequence[Cell], desk: Desk | None = None):
        """Line the cells up."""
        self._waiting = in_order(cells)
        self._desk = desk or Alone()
        self._attempts: Counter[str] = Counter()
        self._training: set[Hashable] = set()
        self._trained: set[Hashable] = set()
        self._held: set[str] = set()
        self._look = 0.0
        self._finished = False
        self._died: Counter[str] = Counter()

    def __len__(self) -> int:
        """Return how many cells wait, those that other runs compute now included."""
        return len(self._waiting)

    def take(self) -> Cell | None:
        """Return the next cell that can start now, if any."""
        if time.monotonic() < self._look:
            return None
        place = 0
        while place < len(self._waiting):
            cell = self._waiting[place]
            model = _trained_model(cell)
            if model in self._training:
                place += 1
                continue
            claim = Claim.MINE if cell.key in self._held else self._desk.take(cell.key)
            if claim is Claim.TAKEN:
                place += 1
                continue
            self._waiting.pop(place)
            if claim is Claim.MINE:
                if model is not None and model not in self._trained:
                    self._training.add(model)
                self._held.add(cell.key)
                self._attempts[cell.key] += 1
                return cell
        self._look = time.monotonic() + PAUSE
        return None

    def trained(self, cell: Cell) -> None:
        """Note that the model of a cell is there."""
        model = _trained_model(cell)
        if model is not None:
            self._training.discard(model)
            self._trained.add(model)
            self._look = 0.0

    def finished(self, cell: Cell) -> None:
        """Note that a cell has its result."""
        self._finished = True
        self.trained(cell)

    def give_up(self, cell: Cell) -> None:
        """Let the next cell that needs this one's model train it."""
        self._training.discard(_trained_model(cell))
        self._look = 0.0

    def put_back(self, cell: Cell) -> None:
        """Line up a cell once more, at the front."""
        self.give_up(cell)
        self._waiting.insert(0, cell)

    def died(self, cell: Cell, reason: str) -> Pending | None:
        """Line up once more a cell whose worker died; after `ATTEMPTS`, return that it stays to be computed.

        Raises:
            GradleakError: `HOPELESS` different cells have died so, and none was finished: it is not the cells.
        """
        self._died[cell.key] += 1
        if not self._finished and len(self._died) >= HOPELESS:
            raise GradleakError(
                f"{self._died.total()} workers died before any cell was finished, the last of {reason}; "
                "nothing was stored, and the same command goes on"
            )
        if self._attempts[cell.key] < ATTEMPTS:
            log.warning("a worker died (%s); trying again: %s", reason, cell.title)
            self.give_up(cell)
            self._waiting.append(cell)  # behind all others, which may have better luck
            return None
        self.give_up(cell)
        self._desk.release(cell.key)
        return Pending(cell.key, f"its worker died {ATTEMPTS} times ({reason})")


def _trained_model(cell: Cell) -> Hashable:
    """Return what the trained model of a cell is known by, None for an untrained one."""
    epochs = cell.setting.epochs
    return (cell.model, cell.dataset, epochs, cell.seed) if epochs else None


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables, for processes that start in the block."""
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


def context_for(resources: Resources) -> BaseContext:
    """Return how workers start: as copies of this process, unless a copy could not compute.

    It cannot with macOS's libraries, nor where torch sees a GPU: torch starts a thread for every GPU that it sees with
    its first gradient, which a plan may have taken here, and a copy of a process with such threads can take none.
    """
    copies = sys.platform.startswith("linux") and resources.device == "cpu" and not torch.cuda.is_available()
    return multiprocessing.get_context("fork" if copies else "spawn")


def default_workers(resources: Resources) -> int:
    """Return one worker a core, or one a GPU."""
    if resources.device == "cuda":
        return torch.cuda.device_count()
    if resources.device.startswith("cuda"):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
