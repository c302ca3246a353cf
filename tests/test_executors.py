"""Names and options of executors, and what a worker's death costs; see test_runner and test_ray for the work itself."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from gradleak.errors import GradleakError
from gradleak.evaluation import executors
from gradleak.evaluation.executors import ATTEMPTS, Pending, Queue
from gradleak.suite import Cell
from tests.trials import cell


def _cell() -> Cell:
    return cell("key", epochs=1, attack="mean-image", defense="none")


def test_a_cell_has_as_many_attempts_as_said() -> None:
    queue = Queue([_cell()])
    for attempt in range(1, ATTEMPTS + 1):
        cell = queue.take()
        assert cell is not None
        lost = queue.died(cell, "struck by lightning")
        assert (lost is None) == (attempt < ATTEMPTS)
    assert lost == Pending("key", f"its worker died {ATTEMPTS} times (struck by lightning)")
    assert queue.take() is None


def test_options_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GradleakError, match="use --executor ray"):
        executors.build("processes", 2, "auto")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert executors.build("ray", 3, "ray://head:10001") == executors.Ray(3, "ray://head:10001")
    with pytest.raises(GradleakError, match="neither auto nor ray://"):
        executors.build("ray", None, "head:6379")


def test_a_missing_ray_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GradleakError, match=r"^executor 'ray' needs the package ray; install gradleak\[ray\]$"):
        executors.build("ray")


def test_only_a_run_imports_ray() -> None:
    imports = "from gradleak.cli import main; from gradleak.evaluation import executors"
    code = f"import sys; sys.modules['ray'] = None; {imports}; executors.build('processes')"
    subprocess.run([sys.executable, "-c", code], check=True)
