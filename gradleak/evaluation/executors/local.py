"""One cell after the other in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ... import registry
from ...board.store import CellResult
from ...process import tune
from ...suite import Cell
from ..evaluate import evaluate
from ..workshop import Resources
from .base import Executor, Queue, Report, throttled


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
                yield evaluate(cell, resources, throttled(lambda share, loss, key=key: report(key, share, loss)))  # type: ignore[misc]
                queue.trained(cell)
        finally:
            torch.set_num_threads(threads)
