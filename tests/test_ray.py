"""Cells on a Ray cluster of two workers: the same table, whatever dies or is interrupted."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from gradleak import registry, report
from gradleak.board import leaderboard, results
from gradleak.board.store import Store
from gradleak.errors import GradleakError
from gradleak.evaluation import runner
from gradleak.evaluation.executors import Local, Ray, base
from gradleak.evaluation.summary import Summary
from gradleak.evaluation.workshop import Resources
from gradleak.secret import Secret

ray = pytest.importorskip("ray", reason="Ray is not installed")

SECRET = "0123456789abcdef" * 2
"""What all runs draw from, so that their tables are equal."""
SMOKE = Path(__file__).parents[1] / "benchmarks" / "smoke.yaml"

PLUGIN = """
    import logging
    import os
    import signal
    import time
    from dataclasses import dataclass
    from pathlib import Path

    from gradleak.attack import Attack, Reconstruction


    @dataclass(frozen=True, kw_only=True)
    class Once(Attack):
        '''Is killed, or hangs, where there is no file `mark` in `folder` yet.'''

        family = "analytic"
        reference = "test"

        folder: str = ""
        how: str = "kill"

        def reconstruct(self, observation, generator):
            logging.getLogger("gradleak").warning("said by a worker")
            mark = Path(self.folder) / "mark"
            if not mark.exists():
                mark.touch()
                if self.how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(600)
            return Reconstruction(images=generator.uniform(observation.batch_size, *observation.shape))
"""


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_files", {})


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with base.environment(RAY_USAGE_STATS_ENABLED="0"):
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def _suite(folder: Path, name: str, how: str) -> tuple[Path, Path, Path]:
    """A suite with one cell that is killed or hangs the first time, its plugin file, and the mark it leaves."""
    stem = name.replace("-", "_")
    plugin, mark = folder / f"{stem}.py", folder / "mark"
    plugin.write_text(textwrap.dedent(PLUGIN))
    content = {**yaml.safe_load(SMOKE.read_text()), "controls": "listed"}
    content["attacks"] = ["mean-image", {name: {"folder": str(folder), "how": how}}]
    content["defenses"] = ["none"]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, plugin, mark


def _run(path: Path, store: Path, executor: Any, *plugins: Path) -> tuple[Summary, str]:
    """Run a suite; return the summary and what was shown meanwhile."""
    shown = io.StringIO()
    console, secret = Console(file=shown), Secret.of(SECRET)
    summary = runner.run(path, store, executor, Resources(), plugins, console=console, secret=secret)
    return summary, shown.getvalue()


def _tables(path: Path) -> list[str]:
    """Both boards and all rows as CSV, without the columns of time."""
    with Store(path) as store:
        found = results.read(store)
        rows = store.rows().drop(columns=["seconds"]).to_csv()
    boards = [leaderboard.defense_board(found), leaderboard.attack_board(found)]
    timeless = [
        replace(board, table=board.table.drop(columns=["seconds", "client_seconds"], errors="ignore"))
        for board in boards
    ]
    return [rows, report.render(timeless, "csv")]


def test_the_table_is_that_of_one_process(tmp_path: Path, cluster: None) -> None:
    stores = {"local": Local(), "ray": Ray(2)}
    for name, executor in stores.items():
        summary, _ = _run(SMOKE, tmp_path / name, executor)
        assert (summary.ran, summary.stored, summary.failed) == (10, 10, {})
    assert ray.is_initialized(), "the program's own cluster is left running"
    assert _tables(tmp_path / "local") == _tables(tmp_path / "ray")
    with Store(tmp_path / "local") as one, Store(tmp_path / "ray") as other:
        for key in one.statuses():
            assert np.array_equal(one.reconstruction(key, 1), other.reconstruction(key, 1))


def test_a_killed_worker_costs_a_retry(tmp_path: Path, cluster: None) -> None:
    path, plugin, mark = _suite(tmp_path, "killed-once", "kill")
    summary, shown = _run(path, tmp_path / "ray", Ray(2), plugin)
    assert mark.exists() and (summary.ran, summary.failed) == (2, {})
    assert shown.count("trying again: killed-once") == 1 and "SIGKILL" in shown
    assert shown.count("said by a worker") == 1
    _run(path, tmp_path / "local", Local(), plugin)
    assert _tables(tmp_path / "local") == _tables(tmp_path / "ray")


def test_a_worker_killed_too_often_leaves_its_cell_to_be_computed(
    tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "ATTEMPTS", 1)
    path, plugin, _ = _suite(tmp_path, "killed", "kill")
    summary, shown = _run(path, tmp_path / "ray", Ray(2), plugin)
    assert list(summary.pending.values()) == ["its worker died 1 times (SIGKILL, often a lack of memory)"]
    assert (summary.ran, summary.stored, summary.failed) == (1, 1, {}) and "trying again" not in shown


def test_a_machine_without_the_plugin_file_is_one_line(tmp_path: Path, cluster: None) -> None:
    cells = runner.plan(SMOKE, tmp_path / "absent.sqlite", Resources()).cells[:1]
    absent = tmp_path / "absent.py"
    with pytest.raises(GradleakError, match=f"^a Ray worker cannot compute cells: .*--plugin {absent}: no such file$"):
        list(Ray(1).run(cells, Resources(), [absent], lambda key, share, loss: None))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are counted in /proc")
def test_an_interrupted_run_ends_its_cluster_and_goes_on(tmp_path: Path) -> None:
    path, plugin, mark = _suite(tmp_path, "hanging", "hang")
    store = tmp_path / "s.sqlite"
    command = [sys.executable, "-m", "gradleak", "run", path, "--store", store, "--plugin", plugin, "--secret", SECRET]
    process = subprocess.Popen(
        [*map(str, command), "--executor", "ray", "--workers", "1"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:9", "RUN": str(tmp_path)},  # the address is for `auto` only
    )
    try:
        _wait(lambda: mark.exists() and _stored(store) == 1)
        assert len(_processes(tmp_path)) > 3
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        _, shown = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 130
    _wait(lambda: not _processes(tmp_path))
    assert "interrupted: 1 of 2 cells" in shown and "Traceback" not in shown
    summary, _ = _run(path, store, Local(), plugin)
    assert (summary.ran, summary.stored, summary.failed) == (1, 2, {})
    _run(path, tmp_path / "whole", Local(), plugin)
    assert _tables(store) == _tables(tmp_path / "whole")


def _processes(run: Path) -> list[str]:
    """Processes that carry the run's mark in their environment."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"RUN={run}".encode() in file.read_bytes().split(b"\0"):
                found.append(file.parent.name)
    return found


def _stored(path: Path) -> int:
    if not path.exists():
        return 0
    with Store(path) as store:
        return len(store.statuses())


def _wait(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
