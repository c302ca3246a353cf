"""What every executor is made of: its contract, the queue of its cells, and what workers need."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ...board.store import CellResult
from ...suite import Cell
from ..identity import identity
from ..workshop import Progress, Resources

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
        self._attempts: Counter[str] = Counter()
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
            self._attempts[cell.key] += 1
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

    def died(self, cell: Cell, reason: str) -> CellResult | None:
        """Line up once more a cell whose worker died; after `ATTEMPTS`, return its failed result instead."""
        if self._attempts[cell.key] < ATTEMPTS:
            log.warning("a worker died (%s); trying again: %s", reason, cell.title)
            self.put_back(cell)
            return None
        self.give_up(cell)
        config: dict[str, Any] = cell.config
        facts = {} if cell.is_utility else identity(config)
        error = f"its worker died {ATTEMPTS} times ({reason})"
        return CellResult(key=cell.key, config=config, status="failed", error=error, provenance=facts)


def _trained_model(cell: Cell) -> str | None:
    config = cell.config
    if not config["setting"]["epochs"]:
        return None
    parts = [config["model"], config["dataset"], config["setting"]["epochs"], config["seed"]]
    return json.dumps(parts, sort_keys=True)


class Forward(logging.Handler):
    """Hands on the text of a worker's warnings, for the driver to show each line once."""

    def __init__(self, send: Callable[[str], None]) -> None:
        """Send lines to `send`."""
        super().__init__(logging.WARNING)
        self.send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send one line."""
        self.send(record.getMessage())

    def install(self) -> None:
        """Take the place of this process's handlers, for `warnings` too."""
        logging.captureWarnings(True)
        logging.getLogger().handlers = [self]


def throttled(report: Progress) -> Progress:
    """Pass on the first report, then no more than five a second."""
    last = -1.0

    def passed(share: float, loss: float) -> None:
        nonlocal last
        if last < 0 or time.monotonic() - last > 0.2:
            last = time.monotonic()
            report(share, loss)

    return passed


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


def default_workers(resources: Resources) -> int:
    """Return one worker a core, or one a GPU."""
    if resources.device == "cuda":
        return torch.cuda.device_count()
    if resources.device.startswith("cuda"):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
