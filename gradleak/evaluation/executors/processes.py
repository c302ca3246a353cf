"""Worker processes on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ... import registry
from ...board.store import CellResult
from ...suite import Cell
from ..apart import nursery
from ..workshop import Resources
from .base import Alone, Desk, Executor, Limits, Pending, Queue, Report, context_for, default_workers
from .crew import Crew
from .worker import Worker


@dataclass(frozen=True)
class Processes(Executor):
    """Worker processes that take a cell each. A worker that dies costs its cell another attempt, nothing else.

    Workers are copies of this process where the system can copy it safely: what it has imported they need not.
    """

    workers: int | None = None
    """By default one a core, or one a GPU."""
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
        desk = desk or Alone()
        devices = _devices(resources)
        count = min(self.workers or default_workers(resources), len(cells))
        for path in plugins:
            registry.add_file(path)
        context = context_for(resources)
        memory = self.limits.memory_of(resources)
        workers = [
            Worker(
                context,
                replace(resources, device=devices[i % len(devices)]),
                plugins,
                memory,
                nursery(resources.device),
            )
            for i in range(count)
        ]
        yield from Crew(workers, Queue(cells, desk), desk, self.limits, report).run()


def _devices(resources: Resources) -> list[str]:
    if resources.device == "cuda":
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [resources.device]
