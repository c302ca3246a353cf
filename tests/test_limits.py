"""Plugins and machines that misbehave: the run goes on, and every cell ends as it should."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import sqlite3
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gradleak.errors import GradleakError
from gradleak.evaluation.executors import Limits, Pending, Queue
from gradleak.evaluation.executors.base import HOPELESS
from gradleak.evaluation.faults import machine_fault
from gradleak.suite import Cell
from tests import trials

PLUGIN = """
    import ctypes, os, subprocess, time
    from dataclasses import dataclass

    import torch

    from gradleak.attack import Attack, Reconstruction


    @dataclass(frozen=True, kw_only=True)
    class Bad(Attack):
        '''Misbehaves.'''

        family = "optimisation"
        reference = "test"

        how: str

        def reconstruct(self, observation, generator):
            self.behave()
            shape = (observation.victims, observation.batch_size, *observation.shape)
            return Reconstruction(images=torch.full(shape, 0.5))

        def behave(self):
            if self.how == "sleep":
                time.sleep(3600)
            elif self.how == "spin":
                while True:
                    pass
            elif self.how == "hoard":
                kept = []
                while True:
                    kept.append(torch.empty(2**26))  # what is asked for counts, not what is used
            elif self.how == "segfault":
                ctypes.string_at(0)
            elif self.how == "exit":
                os._exit(3)
            elif self.how == "leave":
                raise SystemExit(0)
            elif self.how == "interrupt":
                raise KeyboardInterrupt
            elif self.how == "raise":
                raise RuntimeError("\\x1b[31mred" + "x" * 100000)
            elif self.how == "recurse":
                self.behave()
            elif self.how == "print":
                for line in range(100000):
                    print("\\x1b[31mline", line)
            elif self.how == "start":
                subprocess.Popen(["sleep", "271828"])
            elif self.how == "fork":
                os.fork()
            elif self.how == "full":
                raise OSError(28, "No space left on device")
"""
ENDS = {
    "sleep": ("ok", "timeout"),
    "spin": ("ok", "timeout"),
    "hoard": ("ok", "oom"),
    "leave": ("failed", None),
    "interrupt": ("failed", None),
    "raise": ("failed", None),
    "recurse": ("failed", None),
    "print": ("ok", "ok"),
    "start": ("ok", "ok"),
    "fork": ("ok", "ok"),
    "segfault": (None, None),
    "exit": (None, None),
    "full": (None, None),
}
"""Status of the cell and of its rows; None for a cell that stays to be computed."""


def bad_suite(folder: Path, hows: list[str]) -> list[str]:
    """Write a suite of one misbehaving attack each, and one that behaves; return the arguments of a run."""
    (folder / "bad.py").write_text(textwrap.dedent(PLUGIN))
    attacks = [{"name": "bad", "options": {"how": how}, "label": how} for how in hows]
    path = trials.suite(folder, seeds=[0], defenses=["none"], attacks=[*attacks, "mean-image"], engine={"timeout": 2.0})
    return ["run", str(path), "--store", str(folder / "s.sqlite"), "--plugin", str(folder / "bad.py")]


def outcomes(store: Path) -> dict[str, tuple[str, str | None]]:
    query = (
        "SELECT config, status, (SELECT group_concat(DISTINCT r.status) FROM rows r WHERE r.cell = c.id) FROM cells c"
    )
    with contextlib.closing(sqlite3.connect(store)) as database:
        found = database.execute(query).fetchall()
    return {json.loads(config)["attack"]["label"]: (status, rows) for config, status, rows in found}


def check_run(folder: Path, hows: list[str], *options: str) -> str:
    """Run misbehaving attacks; every cell must end as `ENDS` says, and nothing of theirs may live on."""
    trial = trials.run([*bad_suite(folder, hows), *options], folder / "log")
    said = trial.said()
    assert "Traceback" not in said and "\x1b" not in said
    assert outcomes(folder / "s.sqlite") == {"mean-image": ("ok", "ok")} | {
        how: ENDS[how] for how in hows if ENDS[how][0]
    }
    pending = sum(ENDS[how][0] is None for how in hows)
    assert said.count("not computed:") == 2 * pending
    assert trial.code == int(pending > 0 or any(ENDS[how][0] == "failed" for how in hows))
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"271828" in _bytes(path)]
    return said


def _bytes(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


def test_whatever_an_attack_does_the_run_goes_on(tmp_path: Path) -> None:
    check_run(tmp_path, ["sleep", "hoard", "interrupt", "print", "start", "segfault"], "--memory-limit", "0.5")


def test_a_cell_has_a_ceiling_and_can_be_repeated(tmp_path: Path) -> None:
    arguments = bad_suite(tmp_path, ["sleep"])
    trials.suite(tmp_path, seeds=[0], defenses=["none"], attacks=[{"name": "bad", "options": {"how": "sleep"}}])
    trial = trials.run([*arguments, "--executor", "local", "--cell-timeout", "1"], tmp_path / "log")
    assert trial.code == 1 and "took more than 1 s (--cell-timeout)" in trial.said()
    assert list(outcomes(tmp_path / "s.sqlite").values()) == [("failed", "timeout")]
    assert "repeat the 1 failed cells" in trial.said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_goes_on_later_and_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    path, store = trials.suite(tmp_path), tmp_path / "s.sqlite"
    arguments = ["run", str(path), "--store", str(store), "--executor", "local"]
    trial = trials.start(arguments, tmp_path / "log")
    while trial.alive() and len(trials.cells(store)) < 3:
        time.sleep(0.005)
    started = trials.descendants(trial.pid)
    os.kill(trial.pid, number)
    assert trial.wait() == (-number if number == signal.SIGKILL else 128 + number)
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    before = trials.cells(store)
    assert 3 <= len(before) < 12
    again = trials.run(arguments, tmp_path / "log")
    assert again.code == 0 and len(trials.cells(store)) == 12 and before.items() <= trials.cells(store).items()
    whole = tmp_path / "whole.sqlite"
    trials.run([*arguments[:3], str(whole), *arguments[4:]], tmp_path / "log2")
    assert trials.content(store) == trials.content(whole)


def test_two_runs_share_the_cells(tmp_path: Path) -> None:
    path, store = trials.suite(tmp_path), tmp_path / "s.sqlite"
    arguments = ["run", str(path), "--store", str(store), "--executor", "local"]
    both = [trials.start(arguments, tmp_path / f"log{number}") for number in range(2)]
    assert [trial.wait() for trial in both] == [0, 0]
    assert len(trials.cells(store)) == 12
    ran = [int(trial.said().split(" cells: ")[1].split(" run")[0]) for trial in both]
    assert sum(ran) == 12, "each cell once"


def _small_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_later(tmp_path: Path) -> None:
    path, store = trials.suite(tmp_path), tmp_path / "s.sqlite"
    arguments = ["run", str(path), "--store", str(store), "--executor", "local"]
    full = trials.run(arguments, tmp_path / "log", _small_files)
    last = full.said().strip().splitlines()[-1]
    assert full.code == 2 and "cannot be" in last and "Traceback" not in full.said(), full.said()
    assert trials.run(arguments, tmp_path / "log").code == 0 and len(trials.cells(store)) == 12


def _cell(key: str) -> Cell:
    return trials.cell(key)


def test_workers_that_die_before_anything_is_finished_stop_the_run() -> None:
    queue = Queue([_cell(key) for key in "abcdef"])
    for _ in range(HOPELESS - 1):
        cell = queue.take()
        assert cell is not None and queue.died(cell, "SIGKILL") is None
    cell = queue.take()
    assert cell is not None
    with pytest.raises(GradleakError, match=r"3 workers died before any cell was finished.*SIGKILL"):
        queue.died(cell, "SIGKILL")


def test_a_cell_that_kills_its_workers_stops_no_run_that_gets_on() -> None:
    queue = Queue([_cell(key) for key in "abcd"])
    first = queue.take()
    assert first is not None
    queue.finished(first)
    found = [queue.died(cell, "SIGSEGV") for cell in iter(queue.take, None) if cell]
    assert [each for each in found if each] == [Pending(key, "its worker died 3 times (SIGSEGV)") for key in "bcd"]


@pytest.mark.parametrize(
    ("raise_it", "is_machine"),
    [
        (lambda: OSError(errno.ENOSPC, "No space left on device"), True),
        (lambda: OSError(errno.EROFS, "Read-only file system"), True),
        (lambda: RuntimeError("PytorchStreamWriter failed: No space left on device"), True),
        (lambda: FileNotFoundError(errno.ENOENT, "no such file"), False),
        (lambda: RuntimeError("shapes do not match"), False),
    ],
)
def test_faults_of_the_machine_are_told_from_an_attacks(raise_it: Callable[[], Exception], is_machine: bool) -> None:
    assert (machine_fault(raise_it()) is not None) == is_machine
    outer = ValueError("cannot save")
    outer.__cause__ = raise_it()
    assert (machine_fault(outer) is not None) == is_machine


def test_limits_that_are_none_are_refused() -> None:
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(GradleakError, match="--cell-timeout"):
            Limits(cell_timeout=wrong)
    with pytest.raises(GradleakError, match="--memory-limit"):
        Limits(memory=1)
