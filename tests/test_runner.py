"""Running suites: every cell once, whatever dies, and the same numbers from every executor."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gradleak import registry
from gradleak.board.store import CellResult, Store
from gradleak.errors import GradleakError
from gradleak.evaluation import executors, runner
from gradleak.evaluation.executors import Desk, Executor, Local, Pending, Processes, Queue, Report
from gradleak.evaluation.workshop import Resources
from gradleak.suite import Cell
from tests.trials import cell

SMOKE = Path(__file__).parents[1] / "benchmarks" / "smoke.yaml"

PLUGIN = """
    import os
    from dataclasses import dataclass
    from pathlib import Path

    import torch

    from gradleak.attack import Attack, Reconstruction


    @dataclass(frozen=True, kw_only=True)
    class Fragile(Attack):
        '''Dies or raises until it has been called `calls` times.'''

        family = "analytic"
        reference = "test"

        folder: str = ""
        calls: int = 1
        how: str = "raise"

        def reconstruct(self, observation, generator):
            attempts = len(list(Path(self.folder).iterdir()))
            Path(self.folder, str(attempts)).touch()
            if attempts < self.calls:
                if self.how == "die":
                    os._exit(9)
                raise RuntimeError("not today")
            shape = (observation.victims, observation.batch_size, *observation.shape)
            return Reconstruction(images=torch.full(shape, 0.5))
"""


@pytest.fixture(autouse=True)
def _own_cache_and_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADLEAK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "_files", {})


def _fragile(folder: Path, **options: Any) -> tuple[Path, Path]:
    """A suite with one fragile cell, and its plugin file."""
    (folder / "calls").mkdir()
    plugin = folder / "fragile.py"
    plugin.write_text(textwrap.dedent(PLUGIN))
    content = {**yaml.safe_load(SMOKE.read_text()), "controls": "listed"}
    content["attacks"] = ["mean-image", {"fragile": {"folder": str(folder / "calls"), **options}}]
    content["defenses"] = ["none"]
    path = folder / "fragile.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, plugin


def _rows(path: Path) -> Any:
    with Store(path) as store:
        return store.rows().drop(columns=["seconds"])


def _cell(key: str, iterations: int = 1, epochs: int = 0, seed: int = 0) -> Cell:
    return cell(key, {"iterations": iterations}, epochs, seed)


def test_long_cells_go_first() -> None:
    queue = Queue([_cell("short", 1), _cell("long", 100), _cell("middle", 10)])
    taken = [cell.key for cell in iter(queue.take, None) if cell]
    assert taken == ["long", "middle", "short"]


def test_a_model_is_trained_by_one_cell_only() -> None:
    first, second, other = _cell("a", 3, epochs=1), _cell("b", 2, epochs=1), _cell("c", 1, epochs=1, seed=1)
    queue = Queue([first, second, other])
    assert queue.take() == first
    assert queue.take() == other, "the cell of the same model waits, that of another does not"
    assert queue.take() is None
    queue.trained(first)
    assert queue.take() == second
    queue = Queue([first, second])
    assert queue.take() == first
    queue.put_back(first)
    assert queue.take() == first, "a worker that died in training frees the model"


def test_executors_agree_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    stores = {}
    for name, executor in {"local": Local(), "processes": Processes(2)}.items():
        stores[name] = tmp_path / f"{name}.sqlite"
        summary = runner.run(SMOKE, stores[name], executor, Resources())
        assert (summary.ran, summary.stored, summary.failed) == (10, 10, {})
        again = runner.run(SMOKE, stores[name], executor, Resources())
        assert (again.ran, again.stored) == (0, 10)
    first, second = (_rows(path) for path in stores.values())
    assert len(first) == 20
    assert first.equals(second)
    with Store(stores["local"]) as one, Store(stores["processes"]) as other:
        for key in one.statuses():
            assert np.array_equal(one.reconstruction(key, 1), other.reconstruction(key, 1))
        (name,) = one.victim_lists()
        images, labels = one.truth(name, 0)
        assert images.shape == (1, 1, 8, 8) and labels.shape == (1,)


def test_a_worker_that_dies_costs_a_retry(tmp_path: Path) -> None:
    path, plugin = _fragile(tmp_path, calls=2, how="die")
    summary = runner.run(path, tmp_path / "s.sqlite", Processes(1), Resources(), [plugin])
    assert (summary.ran, summary.failed) == (2, {})
    assert len(list((tmp_path / "calls").iterdir())) == 3


@pytest.mark.parametrize("executor", [Local(), Processes(1)], ids=["local", "processes"])
def test_a_worker_that_dies_always_leaves_its_cell_to_be_computed(tmp_path: Path, executor: Executor) -> None:
    path, plugin = _fragile(tmp_path, calls=99, how="die")
    summary = runner.run(path, tmp_path / "s.sqlite", executor, Resources(), [plugin])
    assert summary.ran == summary.stored == 1 and not summary.failed
    (reason,) = summary.pending.values()
    assert "died 3 times" in reason and "exit code 9" in reason
    assert len(list((tmp_path / "calls").iterdir())) == executors.ATTEMPTS


def test_a_failed_cell_is_kept_and_repeated_only_on_demand(tmp_path: Path) -> None:
    path, plugin = _fragile(tmp_path, calls=1)
    store = tmp_path / "s.sqlite"
    first = runner.run(path, store, Local(), Resources(), [plugin])
    (error,) = first.failed.values()
    assert error.startswith("RuntimeError: not today (fragile.py:")
    second = runner.run(path, store, Local(), Resources(), [plugin])
    assert (second.ran, second.failed) == (0, first.failed)
    third = runner.run(path, store, Local(), Resources(), [plugin], retry_failed=True)
    assert (third.ran, third.failed) == (1, {})


class _Interrupted(Executor):
    """Computes some cells, then acts as if Ctrl-C had been pressed."""

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self.closed = False

    def run(
        self,
        cells: Sequence[Cell],
        resources: Resources,
        plugins: Sequence[Path],
        report: Report,
        desk: Desk | None = None,
    ) -> Iterator[CellResult | Pending]:
        try:
            yield from Local().run(cells[: self.cells], resources, plugins, report, desk)
            raise KeyboardInterrupt
        finally:
            self.closed = True


def test_an_interrupted_run_loses_nothing_and_goes_on(tmp_path: Path) -> None:
    store = tmp_path / "s.sqlite"
    executor = _Interrupted(4)
    summary = runner.run(SMOKE, store, executor, Resources())
    assert (summary.interrupted, summary.ran, summary.stored, summary.cells) == (signal.SIGINT, 4, 4, 10)
    assert executor.closed
    rest = runner.run(SMOKE, store, Local(), Resources())
    assert (rest.interrupted, rest.ran, rest.stored) == (0, 6, 10)
    whole = tmp_path / "whole.sqlite"
    runner.run(SMOKE, whole, Local(), Resources())
    assert _rows(store).equals(_rows(whole))


def test_names_of_executors() -> None:
    assert executors.build("processes", 3) == Processes(3)
    assert isinstance(executors.build("local"), Local)
    with pytest.raises(GradleakError, match="did you mean 'processes'"):
        executors.build("process")
    with pytest.raises(GradleakError, match="one worker"):
        executors.build("local", 2)


def test_a_new_label_is_taken_over_and_computes_nothing(tmp_path: Path) -> None:
    content = {**yaml.safe_load(SMOKE.read_text()), "controls": "listed"}
    path, store = tmp_path / "named.yaml", tmp_path / "s.sqlite"
    for label in ("before", "after"):
        content["attacks"] = [{"name": "mean-image", "label": label}]
        content["settings"] = [{"name": f"setting {label}"}]
        path.write_text(yaml.safe_dump(content))
        summary = runner.run(path, store, Local(), Resources())
        assert summary.ran == (summary.cells if label == "before" else 0)
    with Store(store) as found:
        assert set(found.cells()["attack"]) == {"after"} and set(found.cells()["setting"]) == {"setting after"}
