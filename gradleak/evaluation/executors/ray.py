"""Tasks of a Ray cluster: one started here for the run, or one that is there already."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ... import registry
from ...board.store import CellResult
from ...errors import GradleakError
from ...process import default_cache, tune
from ...suite import Cell
from ..evaluate import evaluate
from ..workshop import Resources
from .base import Executor, Forward, Queue, Report, default_workers, environment, throttled

log = logging.getLogger(__name__)

_LOOK = 0.5
"""Seconds between two looks at the progress of the cells under way."""


def require_ray() -> None:
    """Raise GradleakError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise GradleakError("executor 'ray' needs the package ray; install gradleak[ray]")


@dataclass(frozen=True)
class Ray(Executor):
    """A Ray task for each cell, on one CPU, and on one GPU if the device is cuda.

    A worker that dies costs its cell another attempt, nothing else. Every machine of a cluster needs the same
    versions of gradleak and torch, and sees data, plugin files and the cache under the driver's paths. A program
    that has called `ray.init` has its cluster used and left running.
    """

    workers: int | None = None
    """Cells at a time: by default one a core or one a GPU here, and on another cluster as many as it takes."""
    address: str | None = None
    """Of a cluster that is there: auto (found on this machine, or by $RAY_ADDRESS) or ray://HOST:PORT."""

    def __post_init__(self) -> None:
        """Refuse what is no address."""
        # Ray tries HOST:PORT for a quarter of an hour where nothing answers; a Ray client gives up soon.
        if self.address not in (None, "auto") and not self.address.startswith("ray://"):
            raise GradleakError(f"--ray-address {self.address}: neither auto nor ray://HOST:PORT")

    def run(
        self, cells: Sequence[Cell], resources: Resources, plugins: Sequence[Path], report: Report
    ) -> Iterator[CellResult]:
        """See `Executor.run`.

        Raises:
            GradleakError: Ray is missing, the cluster is, or a worker cannot compute cells at all.
        """
        require_ray()
        if resources.device.startswith("cuda:"):
            raise GradleakError(f"--device {resources.device}: executor 'ray' picks the GPUs itself; use cuda")
        if cells:
            with _cluster(self.address, self.workers or default_workers(resources)):
                yield from self._run(cells, resources, plugins, report)

    def _run(
        self, cells: Sequence[Cell], resources: Resources, plugins: Sequence[Path], report: Report
    ) -> Iterator[CellResult]:
        import ray
        from ray.exceptions import RayError, RayTaskError

        # Ray's own retries are off: a cell has as many attempts here as with other executors.
        compute = ray.remote(num_cpus=1, num_gpus=int(resources.device == "cuda"), max_retries=0)(_compute)
        board = _start_board()
        site = _Site.here(resources, plugins)
        queue = Queue(cells)
        running: dict[Any, Cell] = {}
        said: set[str] = set()
        asked = board.take.remote()
        try:
            while True:
                while len(running) < (self.workers or len(cells)) and (cell := queue.take()) is not None:
                    running[compute.remote(cell, site, board)] = cell
                if not running:
                    return
                finished, _ = ray.wait(list(running), timeout=_LOOK)
                if ray.wait([asked], timeout=0)[0]:
                    # Without news, should the board's machine be lost: it starts again elsewhere.
                    with contextlib.suppress(RayError):
                        under_way = {cell.key: cell for cell in running.values()}
                        for key, (share, loss) in ray.get(asked).items():
                            if key in under_way:
                                queue.trained(under_way[key])
                                report(key, share, loss)
                    asked = board.take.remote()
                for task in finished:
                    cell = running.pop(task)
                    try:
                        # A copy: Ray's arrays are read-only, and in memory that goes with the cluster.
                        result, said_there = copy.deepcopy(ray.get(task))
                    except RayTaskError as error:
                        reason = f"{type(error.cause).__name__}: {error.cause}".splitlines()[0]
                        raise GradleakError(f"a Ray worker cannot compute cells: {reason}") from error
                    except RayError as error:
                        lost = queue.died(cell, type(error).__name__)
                        if lost is not None:
                            yield lost
                        continue
                    for text in said_there:
                        if text not in said:
                            said.add(text)
                            log.warning("%s", text)
                    queue.trained(cell)
                    yield result
        finally:
            for task in running:
                ray.cancel(task, force=True)
            ray.kill(board)


@contextlib.contextmanager
def _cluster(address: str | None, workers: int) -> Iterator[None]:
    """Connect to a cluster, or start one of `workers` CPUs, for the length of the block."""
    import ray

    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with environment(RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE"):
            if address is None:
                ray.init("local", num_cpus=workers, include_dashboard=False, **quiet)
            else:
                _connect(address, quiet)
        yield
    finally:
        ray.shutdown()


def _connect(address: str, options: dict[str, Any]) -> None:
    import ray

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Ray Client connection timed out", UserWarning)
            ray.init(address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise GradleakError(f"--ray-address {address}: no Ray cluster answers ({reason})") from error


@dataclass(frozen=True)
class _Site:
    """What a worker has to know of the driver, with absolute paths."""

    resources: Resources
    plugins: tuple[Path, ...]
    cache: Path

    @classmethod
    def here(cls, resources: Resources, plugins: Sequence[Path]) -> _Site:
        root, cache = resources.data_root, resources.cache
        resources = replace(resources, data_root=root and root.absolute(), cache=cache and cache.absolute())
        return cls(resources, tuple(path.absolute() for path in plugins), default_cache().absolute())


def _start_board() -> Any:
    """Start an actor where workers leave their cells' latest progress until the driver looks.

    Its class is a local one, which travels whole: importing this module, and torch, would take seconds.
    """
    import ray

    class Board:
        def __init__(self) -> None:
            self.latest: dict[str, tuple[float, float]] = {}

        def put(self, key: str, share: float, loss: float) -> None:
            self.latest[key] = share, loss

        def take(self) -> dict[str, tuple[float, float]]:
            latest, self.latest = self.latest, {}
            return latest

    return ray.remote(num_cpus=0, max_restarts=-1)(Board).remote()


def _compute(cell: Cell, site: _Site, board: Any) -> tuple[CellResult, list[str]]:
    """Compute a cell in a Ray worker; return its result and the warnings meanwhile."""
    said: list[str] = []
    Forward(said.append).install()
    tune()
    os.environ["GRADLEAK_CACHE"] = str(site.cache)
    for path in site.plugins:
        registry.add_file(path)
    progress = throttled(lambda share, loss: board.put.remote(cell.key, share, loss))
    return evaluate(cell, site.resources, progress), said
