from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradleak.board.compare import WORST, compare, past
from gradleak.board.results import Results, read
from gradleak.board.store import CellResult, ImageRow, Store
from gradleak.cli.main import main
from gradleak.errors import GradleakError

NOISE = np.random.default_rng(0).normal(size=16)


def cell(attack: str, psnr: Iterable[float], defense: str = "top-k", digest: str = "0", seed: int = 0) -> CellResult:
    values = list(psnr)
    parts = {"attack": attack, "defense": defense, "model": "mlp", "dataset": "digits"}
    config: dict[str, Any] = {name: {"name": label, "label": label, "options": {}} for name, label in parts.items()}
    config["dataset"]["digest"] = digest
    family = "control" if attack == "mean-image" else "optimisation"
    return CellResult(
        key=f"{attack}-{defense}-{seed}",
        config={**config, "setting": {"name": "default", "batch_size": 1}, "victims": len(values), "seed": seed},
        rows=[ImageRow(victim=victim, image=0, psnr=value) for victim, value in enumerate(values)],
        provenance={"attack_family": family, "defense_family": "compression"},
    )


def results_of(path: Path, *cells: CellResult) -> Results:
    with Store(path, create=True) as store:
        for each in cells:
            store.write(each)
        return read(store)


def line(board: Any, attack: str) -> dict[str, Any]:
    (found,) = board.table[board.table["attack"] == attack].to_dict("records")
    return dict(found)


def test_changes_are_paired_by_victim(tmp_path: Path) -> None:
    spread = 20 + 10 * NOISE
    before = results_of(tmp_path / "a", cell("dlg", spread), cell("ig", spread - 5), cell("mean-image", [10.0] * 16))
    shift = 2 + 0.1 * NOISE[::-1]
    after = results_of(
        tmp_path / "b", cell("dlg", spread), cell("ig", spread - 5 + shift), cell("mean-image", [10.0] * 16)
    )
    board = compare(before, after)
    ig = line(board, "ig")
    assert ig["change"] == pytest.approx(shift.mean()) and ig["victims"] == 16
    # The victims differ by 10 dB, their changes by 0.1 dB: only pairs see that.
    assert 1.8 < ig["change_low"] < ig["change"] < ig["change_high"] < 2.2
    dlg = line(board, "dlg")
    assert (dlg["change"], dlg["change_low"], dlg["change_high"]) == (0, 0, 0)
    worst = line(board, WORST)
    assert worst["change"] == 0 and worst["before"] == pytest.approx(spread.mean())
    assert list(past(board, 1.0)["attack"]) == ["ig"] and past(board, 2.5).empty


def test_chance_is_no_change(tmp_path: Path) -> None:
    before = results_of(tmp_path / "a", cell("dlg", [20.0] * 16))
    after = results_of(tmp_path / "b", cell("dlg", 20 + 1.5 + 10 * NOISE))
    board = compare(before, after)
    assert abs(line(board, "dlg")["change"]) > 1 and past(board, 1.0).empty


def test_a_single_victim_counts_though_it_has_no_interval(tmp_path: Path) -> None:
    before, after = results_of(tmp_path / "a", cell("dlg", [20.0])), results_of(tmp_path / "b", cell("dlg", [25.0]))
    board = compare(before, after)
    assert math.isnan(line(board, "dlg")["change_low"]) and len(past(board, 1.0)) == 2


def test_only_what_both_have_is_compared(tmp_path: Path) -> None:
    before = results_of(tmp_path / "a", cell("dlg", [20.0] * 16), cell("old", [90.0] * 16))
    after = results_of(tmp_path / "b", cell("dlg", [20.0] * 8), cell("new", [90.0] * 8))
    board = compare(before, after)
    assert line(board, WORST)["change"] == 0 and line(board, "dlg")["victims"] == 8
    assert (line(board, "old")["note"], line(board, "new")["note"]) == ("only before", "only after")
    assert past(board, 0.0).empty


def test_seeds_are_averaged_before_pairing(tmp_path: Path) -> None:
    before = results_of(tmp_path / "a", cell("dlg", [10.0] * 4), cell("dlg", [20.0] * 4, seed=1))
    after = results_of(tmp_path / "b", cell("dlg", [12.0] * 4), cell("dlg", [24.0] * 4, seed=1))
    assert line(compare(before, after), "dlg")["change"] == pytest.approx(3)


def test_other_victims_are_refused(tmp_path: Path) -> None:
    before = results_of(tmp_path / "a", cell("dlg", [20.0]))
    with pytest.raises(GradleakError, match=r"victims are 'digits//0/.*after"):
        compare(before, results_of(tmp_path / "b", cell("dlg", [20.0], digest="1")))
    with pytest.raises(GradleakError, match="nothing to compare"):
        compare(before, results_of(tmp_path / "c", cell("ig", [20.0])))


def test_the_exit_code_says_whether_a_change_is_past_the_threshold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results_of(tmp_path / "a", cell("dlg", 20 + NOISE))
    results_of(tmp_path / "b", cell("dlg", 22 + NOISE))
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["compare", *both]) == 1
    said = capsys.readouterr()
    assert "2.00 [2.00, 2.00]" in said.out and "2 changes above 1 dB" in said.err
    assert main(["compare", *both, "--threshold", "3"]) == 0
    assert main(["compare", both[0], both[0], "--threshold", "0"]) == 0
    assert "no change above 0 dB" in capsys.readouterr().err
