"""Tasks of a Ray cluster: one started here for the run, or one that is there already."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ... import registry
from ...board.store import CellResult
from ...errors import GradleakError
from ...process import default_cache, tune
from ...suite import Cell
from ..apart import Apart, possible
from ..said import Forward
from ..workshop import Resources, Workshop
from .base import Alone, Desk, Executor, Limits, Pending, Queue, Report, default_workers, environment
from .crew import overdue
from .worker import Message, computed

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
    limits: Limits = field(default_factory=Limits)
    """Time limits are kept by cancelling tasks; limits of memory are Ray's own affair."""

    def __post_init__(self) -> None:
        """Refuse what is no address."""
        # Ray tries HOST:PORT for a quarter of an hour where nothing answers; a Ray client gives up soon.
        if self.address not in (None, "auto") and not self.address.startswith("ray://"):
            raise GradleakError(f"--ray-address {self.address}: neither auto nor ray://HOST:PORT")

    def run(
        self,
        cells: Sequence[Cell],
        resources: Resources,
        plugins: Sequence[Path],
        report: Report,
        desk: Desk | None = None,
    ) -> Iterator[CellResult | Pending]:
        """See `Executor.run`.

        Raises:
            GradleakError: Ray is missing, the cluster is, or a worker cannot compute cells at all.
        """
        require_ray()
        if resources.device.startswith("cuda:"):
            raise GradleakError(f"--device {resources.device}: executor 'ray' picks the GPUs itself; use cuda")
        if cells:
            with _cluster(self.address, self.workers or default_workers(resources)):
                yield from self._run(cells, resources, plugins, report, desk or Alone())

    def _run(
        self, cells: Sequence[Cell], resources: Resources, plugins: Sequence[Path], report: Report, desk: Desk
    ) -> Iterator[CellResult | Pending]:
        import ray
        from ray.exceptions import RayError

        # Ray's own retries are off: a cell has as many attempts here as with other executors.
        compute = ray.remote(num_cpus=1, num_gpus=int(resources.device == "cuda"), max_retries=0)(_compute)
        board = _start_board()
        site = _Site.here(resources, plugins)
        # Twice what the cluster computes at once: others find cells to claim, and a cluster that can grow does.
        most = self.workers or 2 * max(1, int(ray.cluster_resources().get("GPU" if site.on_gpu else "CPU", 1)))
        queue = Queue(cells, desk)
        running: dict[Any, Cell] = {}
        clock = _Clock(self.limits)
        asked = board.take.remote()
        try:
            while True:
                while len(running) < most and (cell := queue.take()) is not None:
                    running[compute.remote(cell, site, board)] = cell
                if not running and not len(queue):
                    return
                if not running:
                    time.sleep(_LOOK)
                finished = ray.wait(list(running), timeout=_LOOK)[0] if running else []
                desk.beat()
                if ray.wait([asked], timeout=0)[0]:
                    # Without news, should the board's machine be lost: it starts again elsewhere.
                    with contextlib.suppress(RayError):
                        clock.hear(ray.get(asked), {cell.key: cell for cell in running.values()}, queue, report)
                    asked = board.take.remote()
                for task in finished:
                    cell = running.pop(task)
                    kind, content = clock.answer(task)
                    if kind == "result":
                        queue.finished(cell)
                        yield content
                    elif (lost := queue.died(cell, content)) is not None:
                        yield lost
                for task, cell in list(running.items()):
                    if (late := clock.late(cell)) is not None:
                        del running[task]
                        ray.cancel(task, force=True)
                        queue.finished(cell)
                        yield late
        finally:
            for task in running:
                ray.cancel(task, force=True)
            ray.kill(board)


class _Clock:
    """What is known of the tasks under way: in which phase they are, and since when."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._phases: dict[str, tuple[str, float]] = {}
        self._begun: dict[str, float] = {}
        self._said: set[str] = set()

    def hear(self, news: dict[str, Any], under_way: dict[str, Cell], queue: Queue, report: Report) -> None:
        """Take in what workers left on the board."""
        now = time.monotonic()
        for key, (phase, told) in news.items():
            if key not in under_way:
                continue
            if phase == "cell":
                self._begun[key] = now
            if self._phases.get(key, ("", 0.0))[0] != phase:
                self._phases[key] = phase, now
            if told is not None:
                queue.trained(under_way[key])
                report(key, *told)

    def late(self, cell: Cell) -> CellResult | None:
        """Return the result of a cell that takes too long."""
        if cell.key not in self._phases:
            return None
        phase, since = self._phases[cell.key]
        now = time.monotonic()
        return overdue(cell, phase, now - since, now - self._begun.get(cell.key, since), self._limits)

    def answer(self, task: Any) -> Message:
        """Return what a task that has ended says."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            # A copy: Ray's arrays are read-only, and in memory that goes with the cluster.
            message, said = copy.deepcopy(ray.get(task))
        except RayTaskError as error:
            reason = f"{type(error.cause).__name__}: {error.cause}".splitlines()[0]
            raise GradleakError(f"a Ray worker cannot compute cells: {reason}") from error
        except RayError as error:
            return "fault", type(error).__name__
        for text in said:
            if text not in self._said:
                self._said.add(text)
                log.warning("%s", text)
        return message  # type: ignore[no-any-return]


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

    @property
    def on_gpu(self) -> bool:
        return self.resources.device == "cuda"

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
            self.phases: dict[str, str] = {}
            self.latest: dict[str, tuple[str, tuple[float, float] | None]] = {}

        def enter(self, key: str, phase: str) -> None:
            self.phases[key] = phase
            self.latest[key] = phase, None

        def put(self, key: str, share: float, loss: float) -> None:
            self.latest[key] = self.phases.get(key, "cell"), (share, loss)

        def take(self) -> dict[str, tuple[str, tuple[float, float] | None]]:
            latest, self.latest = self.latest, {}
            return latest

    return ray.remote(num_cpus=0, max_restarts=-1)(Board).remote()


@functools.lru_cache(maxsize=1)
def _workshop(resources: Resources) -> Workshop:
    """Return the workshop of this Ray worker, which computes many cells."""
    return Workshop(resources)


@functools.lru_cache(maxsize=1)
def _apart(device: str) -> Apart | None:
    """Return what runs the attacks of this Ray worker."""
    if not possible():
        return None
    apart = Apart(device=device)
    apart.wait()
    return apart


def _compute(cell: Cell, site: _Site, board: Any) -> tuple[Message, list[str]]:
    """Compute a cell in a Ray worker; return its result, or the machine's fault, and the warnings meanwhile."""
    said: list[str] = []
    Forward(said.append).install()
    tune()
    os.environ["GRADLEAK_CACHE"] = str(site.cache)
    for path in site.plugins:
        registry.add_file(path)

    def send(kind: str, content: Any) -> None:
        if kind == "progress":
            board.put.remote(cell.key, *content)
        elif kind == "phase":
            board.enter.remote(cell.key, content)

    return computed(cell, _workshop(site.resources), send, _apart(site.resources.device)), said
