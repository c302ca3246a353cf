"""Runs a suite: cells that the store lacks go to an executor, and what comes back into the store."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console

from .. import registry, suite
from .. import secret as secrets
from ..board import finished, left_out
from ..board.claims import Claim, Claims
from ..board.store import CellResult, Store, is_blank, victim_list
from ..errors import GradleakError
from ..plugins import blamed, near_misses
from ..secret import Secret
from ..suite import AttackCell, Cell, LeftOut
from . import check, renewal
from .display import Display
from .executors import Executor, Pending
from .pace import Pace
from .summary import Summary
from .workshop import Resources, Workshop

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The cells of a suite, and what a store has of them."""

    cells: list[Cell]
    statuses: dict[str, str]
    """ok or failed, by key, for the cells that are stored."""
    left_out: list[LeftOut] = field(default_factory=list)
    """What the grid leaves out, and why."""
    anew: list[str] = field(default_factory=list)
    """Why cells that the store has from other code are computed anew, a line for each reason."""
    secret: Secret | None = None
    """What private randomness is drawn from: the store's, or the one that a new store gets."""
    timed: dict[str, float] = field(default_factory=dict)
    """Seconds of the cells that are stored, by key."""

    def estimate(self, retry_failed: bool = False) -> float:
        """Return about how many seconds one worker takes for the cells to run, by those that are stored, if any."""
        pace = Pace(self.cells, self.timed)
        return sum(pace.seconds(cell.key) for cell in self.waiting(retry_failed))

    def waiting(self, retry_failed: bool = False) -> list[Cell]:
        """Return the cells to run."""
        done = ("ok",) if retry_failed else ("ok", "failed")
        return [cell for cell in self.cells if self.statuses.get(cell.key) not in done]


def plan(
    path: Path, store: Path, resources: Resources, plugins: Sequence[Path] = (), secret: Secret | None = None
) -> Plan:
    """Read and check a suite and a store; nothing is written.

    Raises:
        GradleakError: the suite, a plugin file or the store is not as it should be, a cell cannot run, or the store
            has another secret than is asked for.
    """
    return _plan(path, store, Workshop(resources), plugins, secret)


def _plan(path: Path, store: Path, workshop: Workshop, plugins: Sequence[Path], wanted: Secret | None) -> Plan:
    for plugin in plugins:
        for group, name in registry.add_file(plugin):
            for line in near_misses(registry.load(group, name)):
                log.warning("--plugin %s: %s", plugin, line)
    chosen = suite.read(path)
    statuses: dict[str, str] = {}
    timed: dict[str, float] = {}
    secret = wanted or secrets.draw()
    if not is_blank(store):
        with Store(store) as found:
            statuses, timed = found.statuses(), found.seconds()
            secret = found.secret or secret
    if wanted is not None and wanted != secret:
        raise GradleakError(f"store {store}: has the secret {secret.digest}, not {wanted.digest}; use a new store")
    unrun: list[LeftOut] = []
    try:
        with blamed():
            cells = suite.expand(chosen, workshop.digest, workshop.resources.data_root, unrun.append, secret)
            # Cells that were computed were checked before that, and a large suite takes its time.
            waiting = [cell for cell in cells if cell.key not in statuses]
            new = {cell.key for cell in check.check(waiting, workshop, unrun.append)}
        cells = [cell for cell in cells if cell.key in statuses or cell.key in new]
    except GradleakError as error:
        raise GradleakError(f"suite {path}: {error}") from error
    keys, anew = {cell.key for cell in cells}, list[str]()
    if statuses and new:
        with Store(store) as found:
            anew = renewal.reasons(found, [cell for cell in cells if cell.key in new])
    return Plan(cells, {key: status for key, status in statuses.items() if key in keys}, unrun, anew, secret, timed)


def _settled(path: Path, store: Path, workshop: Workshop, plugins: Sequence[Path], wanted: Secret | None) -> Plan:
    """Return the plan by the secret that the store keeps from now on."""
    found = _plan(path, store, workshop, plugins, wanted)
    if not found.cells or found.secret is None:
        return found
    with Store(store, create=True) as target:
        kept = target.keep_secret(found.secret)
    # The keys of cells depend on the secret, and another run may have made the store meanwhile.
    return found if kept == found.secret else _plan(path, store, workshop, plugins, wanted)


def run(
    path: Path,
    store: Path,
    executor: Executor,
    resources: Resources,
    plugins: Sequence[Path] = (),
    retry_failed: bool = False,
    console: Console | None = None,
    secret: Secret | None = None,
    watch: finished.Watch | None = None,
) -> Summary:
    """Run the cells of a suite that the store lacks; the store is made if it is not there.

    Every cell is committed as it finishes. Ctrl-C, SIGTERM and SIGHUP stop the workers and return a summary that says
    so. Several runs on one store share its cells (`gradleak.board.claims`).

    Args:
        path: the suite.
        store: the SQLite file.
        executor: computes the cells.
        resources: where things are.
        plugins: plugin files that the suite may name.
        retry_failed: run failed cells again.
        console: where progress is shown; standard error by default.
        secret: what private randomness is drawn from; by default the store's, and of a new store a new one. With the
            secret of another store the same suite gives its table again.
        watch: from before anything was imported; remembered if the store is complete (`gradleak.board.finished`).

    Raises:
        GradleakError: as `plan`, or the store cannot be written.
    """
    started = time.monotonic()
    workshop = Workshop(resources)
    found = _settled(path, store, workshop, plugins, secret)
    waiting = found.waiting(retry_failed)
    for line in found.anew:
        log.warning("%s", line)
    titles = {cell.key: cell.title for cell in found.cells}
    ran, ended, pending = 0, 0, dict[str, str]()
    with Store(store, create=True) as target:
        try:
            _note(target, found, workshop)
            with _shown(console, found, waiting) as display, _endable():
                for result in _results(target, waiting, executor, resources, plugins, retry_failed, display):
                    if isinstance(result, Pending):
                        pending[titles[result.key]] = result.reason
                    else:
                        with _undisturbed():
                            # Another run may have written the same cell meanwhile.
                            ran += target.offer(result)
                    display.finished(result)
        except KeyboardInterrupt as error:
            ended = error.number if isinstance(error, _Ended) else signal.SIGINT
        failed = {titles[key]: error for key, error in target.failed().items() if key in titles}
        there = target.statuses()
        stored = len(titles.keys() & there.keys())
        if waiting:
            target.confirm()
    _remember(watch, path, store, resources, {key: there.get(key) for key in titles})
    return Summary(len(titles), ran, stored, failed, time.monotonic() - started, int(ended), pending)


def _shown(console: Console | None, plan: Plan, waiting: Sequence[Cell]) -> Display:
    return Display(console or Console(stderr=True), plan.cells, waiting, plan.timed)


def _note(store: Store, plan: Plan, workshop: Workshop) -> None:
    """Keep what a plan says of its cells: labels, victims, what it leaves out."""
    store.rename({cell.key: cell.stored() for cell in plan.cells})
    left_out.note(store, plan.left_out, {cell.place for cell in suite.attacking(plan.cells)})
    _write_victims(store, plan.cells, workshop)


def _remember(
    watch: finished.Watch | None, path: Path, store: Path, resources: Resources, statuses: Mapping[str, str | None]
) -> None:
    """Remember that a store has all cells of a suite, if it does."""
    if watch is not None and statuses and set(statuses.values()) == {"ok"}:
        finished.remember(store, watch, finished.watch(path, resources.data_root), statuses)


def _results(
    store: Store,
    cells: Sequence[Cell],
    executor: Executor,
    resources: Resources,
    plugins: Sequence[Path],
    retry_failed: bool,
    display: Display,
) -> Iterator[CellResult | Pending]:
    """Yield what becomes of cells, those left out that other runs on the store compute."""
    if not cells:
        return
    claims = Claims(store, retry_failed)
    desk = _Watched(claims, display)
    try:
        with contextlib.closing(executor.run(cells, resources, plugins, display.progress, desk)) as results:  # type: ignore[type-var]
            yield from results
    finally:
        claims.end()


@dataclass(frozen=True)
class _Watched:
    """The desk of a run, whose display hears which cells begin, and is wound every few seconds."""

    claims: Claims
    display: Display

    def take(self, key: str) -> Claim:
        """Ask for a cell."""
        found = self.claims.take(key)
        if found is Claim.MINE:
            self.display.began(key)
        elif found is Claim.STORED:
            self.display.elsewhere(key)
        return found

    def release(self, key: str) -> None:
        """Leave a cell to others."""
        self.claims.release(key)

    def beat(self) -> None:
        """Give a sign of life."""
        self.claims.beat()
        self.display.tick()


def _write_victims(store: Store, cells: Sequence[Cell], workshop: Workshop) -> None:
    """Keep the true images of every list of victims that the cells attack."""
    longest: dict[str, AttackCell] = {}
    for cell in suite.attacking(cells):
        name = victim_list(cell.stored())
        if name not in longest or cell.victims > longest[name].victims:
            longest[name] = cell
    for name, cell in longest.items():
        store.write_victims(name, *workshop.victims_of(cell))


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a run in good order: Ctrl-C, `kill`, a closed terminal."""


class _Ended(KeyboardInterrupt):
    """A signal that ends the run as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def _endable() -> Iterator[None]:
    """Let every signal of `_ENDING` end the block as Ctrl-C does, unless it is ignored (nohup)."""
    with _handled(_end, [number for number in _ENDING[1:] if signal.getsignal(number) is not signal.SIG_IGN]):
        yield


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended(number)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put these signals off to the end of the block."""
    received: list[int] = []
    with _handled(lambda number, frame: received.append(number), _ENDING):
        yield
    for number in received[:1]:
        signal.raise_signal(number)


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], numbers: Iterable[int]) -> Iterator[None]:
    """Have signals handled so in the block; only a program's main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
