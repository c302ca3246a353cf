"""One cell after the other, on this machine."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ... import registry
from ...board.store import CellResult
from ...suite import Cell
from ..apart import nursery
from ..workshop import Resources
from .base import Alone, Desk, Executor, Limits, Pending, Queue, Report
from .crew import Crew
from .worker import Worker


@dataclass(frozen=True)
class Local(Executor):
    """One cell after the other in one worker, a copy of this process where the system can copy it safely.

    So a cell that never ends, takes all memory or crashes costs the run nothing but that cell.
    """

    limits: Limits = field(default_factory=Limits)

    def run(
        self,
        cells: Sequence[Cell],
        resources: Resources,
        plugins: Sequence[Path],
        report: Report,
        desk: Desk | None = None,
    ) -> Iterator[CellResult | Pending]:
        """See `Executor.run`."""
        for path in plugins:
            registry.add_file(path)
        desk = desk or Alone()
        context = multiprocessing.get_context("fork" if _copies(resources) else "spawn")
        worker = Worker(context, resources, plugins, self.limits.memory_of(resources), nursery(resources.device))
        yield from Crew([worker], Queue(cells, desk), desk, self.limits, report).run()


def _copies(resources: Resources) -> bool:
    """Whether a copy of this process can compute: not with macOS's libraries, nor where torch sees a GPU.

    Torch starts a thread for every GPU that it sees with its first gradient, which a plan may have taken here, and
    a copy of a process with such threads can take none.
    """
    return sys.platform.startswith("linux") and resources.device == "cpu" and not torch.cuda.is_available()
