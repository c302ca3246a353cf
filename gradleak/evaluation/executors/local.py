"""One cell after the other, on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ... import registry
from ...board.store import CellResult
from ...suite import Cell
from ..apart import nursery
from ..workshop import Resources
from .base import Alone, Desk, Executor, Limits, Pending, Queue, Report, context_for
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
        memory, control = self.limits.memory_of(resources), nursery(resources.device)
        worker = Worker(context_for(resources), resources, plugins, memory, control)
        yield from Crew([worker], Queue(cells, desk), desk, self.limits, report).run()
