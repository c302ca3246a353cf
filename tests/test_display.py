"""What a run says of its progress is true."""

from __future__ import annotations

import io
import runpy
from pathlib import Path

import pytest
from rich.console import Console

from gradleak.board.store import CellResult
from gradleak.evaluation.display import Display
from gradleak.evaluation.executors import Pending
from gradleak.evaluation.pace import Pace, in_order, kind_of
from gradleak.suite import Cell

REPLAY = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "perf" / "pace.py"))


@pytest.fixture(scope="module")
def published() -> tuple[list[Cell], dict[str, float]]:
    """The cells of the published small suite, and what each took."""
    found: tuple[list[Cell], dict[str, float]] = REPLAY["stored"](REPLAY["SMALL"])
    return found


def test_what_is_left_is_told_within_a_third_at_half_of_the_work(
    published: tuple[list[Cell], dict[str, float]],
) -> None:
    for workers in (1, 2, 8):
        found = REPLAY["errors"](*published, workers)
        assert abs(found[0.5]) < 1 / 3 and abs(found[0.75]) < 1 / 3, (workers, found)


def test_cells_of_every_kind_come_first(published: tuple[list[Cell], dict[str, float]]) -> None:
    cells = in_order(published[0])
    assert {cell.key for cell in cells} == set(published[1]) and len(cells) == len(published[1])
    kinds = [kind_of(cell) for cell in cells]
    assert len(set(kinds)) == len(set(kinds[: len(set(kinds))]))


def test_stored_cells_tell_of_others(published: tuple[list[Cell], dict[str, float]]) -> None:
    cells, seconds = published
    known = dict(list(seconds.items())[::2])
    pace = Pace(cells, known)
    left = sum(pace.seconds(key) for key in seconds if key not in known)
    assert abs(left / sum(value for key, value in seconds.items() if key not in known) - 1) < 1 / 3


def _display(cells: list[Cell]) -> tuple[Display, io.StringIO]:
    text = io.StringIO()
    return Display(Console(file=text, width=500), cells, cells), text


def test_lines_say_what_runs_what_failed_and_no_nonsense(published: tuple[list[Cell], dict[str, float]]) -> None:
    cells = in_order(published[0])[:4]
    shown, text = _display(cells)
    with shown:
        for cell in cells:
            shown.began(cell.key)
        shown.progress(cells[0].key, 0.5, float("nan"))
        shown.finished(CellResult(key=cells[0].key, config={}, seconds=2.0))
        shown.finished(CellResult(key=cells[1].key, config={}, status="failed", error="broken"))
        shown.finished(Pending(cells[2].key, "its worker died"))
        shown.elsewhere(cells[3].key)
        shown.tick()
    said = text.getvalue()
    assert "nan" not in said and "left" in said
    assert f"; now {cells[0].title} and 3 more" in said
    assert f"failed: {cells[1].title}: broken" in said and ", 1 failed" in said.splitlines()[-1]
    assert said.splitlines()[-1].startswith("100%  cells 4/4")


def test_a_silent_run_is_heard_of(
    published: tuple[list[Cell], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("gradleak.evaluation.display.time.monotonic", lambda: clock[0])
    shown, text = _display(published[0])
    with shown:
        shown.began(published[0][0].key)
        for _ in range(600):
            clock[0] += 0.2
            shown.tick()
    lines = [line for line in text.getvalue().splitlines() if "; now " in line]
    assert len(lines) in (3, 4), "a line every 30 of 120 seconds"
