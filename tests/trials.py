"""Runs of the command line that tests disturb: copies of this process, so that one costs no imports."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import sys
import time
import traceback
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gradleak.cli.main import main
from gradleak.evaluation import runner
from gradleak.suite import AttackCell, DatasetPart, Part
from gradleak.threat import Level, Setting

assert runner  # imported here, once for all trials

SUITE: dict[str, Any] = {
    "name": "trial",
    "victims": 2,
    "seeds": [0, 1],
    "candidates": 10,
    "knowledge": ["oblivious"],
    "controls": "listed",
    "datasets": ["digits"],
    "models": [{"name": "mlp", "options": {"widths": [16]}, "label": "mlp"}],
    "settings": [{"name": "fedsgd", "batch_size": 1, "grants": {"labels": "known"}}],
    "attacks": ["linear-leakage", "mean-image", {"name": "idlg", "options": {"iterations": 20}, "label": "idlg"}],
    "defenses": ["none", {"name": "top-k", "options": {"ratio": 0.1}, "label": "top-k"}],
}
"""A dozen small cells."""


def suite(folder: Path, **changes: Any) -> Path:
    """Write a suite and return its path."""
    path = folder / "trial.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}))
    return path


def cell(
    key: str,
    options: Mapping[str, Any] | None = None,
    epochs: int = 0,
    seed: int = 0,
    attack: str = "x",
    defense: str = "x",
) -> AttackCell:
    """Return a cell that nothing is computed of, under a key of the test's."""
    made = AttackCell(
        attack=Part(attack, "x", options or {}),
        defense=Part(defense, "x"),
        model=Part("x", "x"),
        dataset=DatasetPart("x", "x"),
        setting=Setting(name="s", epochs=epochs),
        knowledge=Level.OBLIVIOUS,
        victims=1,
        seed=seed,
    )
    vars(made)["key"] = key
    return made


@dataclass
class Trial:
    """A run under way."""

    pid: int
    log: Path
    code: int | None = None

    def alive(self) -> bool:
        """Return whether it still runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def wait(self, seconds: float = 300.0) -> int:
        """Return the exit code; a run that does not end is killed, and the test fails."""
        end = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > end:
                self.kill_all()
                raise AssertionError(f"did not end in {seconds} s: {self.said()[-500:]}")
            time.sleep(0.02)
        assert self.code is not None
        return self.code

    def said(self) -> str:
        """Return all that it printed."""
        return self.log.read_text(errors="replace")

    def kill_all(self) -> None:
        """End it and what it started."""
        for pid in [*descendants(self.pid), self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.code is None:
            os.waitpid(self.pid, 0)
            self.code = -signal.SIGKILL


def start(arguments: list[str], log: Path, before: Callable[[], None] | None = None) -> Trial:
    """Start `gradleak ARGUMENTS` in a copy of this process."""
    pid = os.fork()
    if pid:
        return Trial(pid, log)
    code = 99
    try:
        os.setsid()
        target = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        # Workers that are spawned import the main module; this one is not the command's.
        sys.modules["__main__"] = types.ModuleType("__main__")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if before is not None:
            before()
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run(arguments: list[str], log: Path, before: Callable[[], None] | None = None, seconds: float = 300.0) -> Trial:
    """Run `gradleak ARGUMENTS` to its end."""
    trial = start(arguments, log, before)
    trial.wait(seconds)
    return trial


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and these others, that still run."""
    found, ask = list[int](), [pid]
    while ask:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{ask[0]}/task/{ask[0]}/children").read_text().split()
            found += map(int, children)
            ask += map(int, children)
        ask.pop(0)
    return found


def cells(store: Path) -> dict[str, str]:
    """Return the status of every cell by its key; nothing where the tables are not there yet."""
    if not store.exists():
        return {}
    with contextlib.closing(sqlite3.connect(store, timeout=60)) as database:
        try:
            return dict(database.execute("SELECT key, status FROM cells"))
        except sqlite3.Error:
            return {}


def content(store: Path) -> list[list[tuple[Any, ...]]]:
    """Return all that a store holds of its cells, without times: equal for equal runs."""
    with contextlib.closing(sqlite3.connect(store, timeout=60)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert not database.execute("PRAGMA foreign_key_check").fetchall()
        names = [line[1] for line in database.execute("PRAGMA table_info(rows)") if line[1] not in ("cell", "seconds")]
        columns = ", ".join(f"r.{name}" for name in names)
        rows = f"SELECT c.key, c.status, c.config, {columns} FROM cells c JOIN rows r ON r.cell = c.id"
        blobs = "SELECT c.key, b.victim, b.kind, b.shape, b.data FROM cells c JOIN blobs b ON b.cell = c.id"
        ordered = (
            f"{rows} ORDER BY 1, r.victim, r.image",
            f"{blobs} ORDER BY 1, 2, 3",
            "SELECT * FROM victims ORDER BY 1, 2",
        )
        return [database.execute(query).fetchall() for query in ordered]
