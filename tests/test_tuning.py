"""`gradleak tune`: on tuning victims only, within declared bounds, repeatable, and written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gradleak import registry
from gradleak.cli.main import main
from gradleak.cli.tune import searched
from gradleak.errors import GradleakError
from gradleak.evaluation.tuning import Choice, Range, space_of

SUITE = """
name: tuning
tuning: TUNING
victims: 2
candidates: 10
knowledge: [oblivious]
datasets: [digits]
models: [{mlp: {widths: [16]}}]
settings: [{grants: {labels: known}}]
attacks: [mean-image]
defenses: [none]
"""


def suite(folder: Path, tuning: str = "true") -> Path:
    path = folder / "tuning.yaml"
    path.write_text(SUITE.replace("TUNING", tuning))
    return path


def test_a_search_is_recorded_and_repeats_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    out = tmp_path / "tuned.json"
    command = ["tune", "inverting-gradients", "--suite", str(suite(tmp_path)), "--trials", "3", "--out", str(out)]
    command += ["--workers", "1", "--set", "iterations=15", "--range", "lr=0.001..0.3", "--range", "tv=1e-6..1e-2"]
    assert main(command) == 0
    record, said = json.loads(out.read_text()), capsys.readouterr().out
    assert [set(trial["options"]) for trial in record["trials"]] == [{"lr", "tv"}] * 3
    assert record["trials"][0]["options"] == {"lr": 0.1, "tv": 1e-4}, "the defaults first"
    assert all(0.001 <= trial["options"]["lr"] <= 0.3 and 0 < trial["value"] < 54 for trial in record["trials"])
    assert record["best"]["value"] == max(trial["value"] for trial in record["trials"])
    assert record["fixed"] == {"iterations": 15} and record["suite"]["name"] == "tuning"
    assert record["code"] == registry.fingerprint("attacks", "inverting-gradients")
    line = "lr, tv: 3 trials on 2 tuning victims of digits (mlp) under none"
    assert record["tuning"] == line and f'tuning = "{line}"' in said
    assert main(command) == 0
    again = json.loads(out.read_text())
    assert [(each["options"], each["value"]) for each in again["trials"]] == [
        (each["options"], each["value"]) for each in record["trials"]
    ]


def test_what_cannot_be_searched_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "unknown option": ["--range", "rate=0..1"],
        "Input should be greater than 0": ["--range", "lr=0..1"],
        "first end": ["--range", "lr=1..0.1"],
        "NAME=LOW..HIGH": ["--range", "lr"],
        "is also given by --set": ["--range", "lr=0.1..1", "--set", "lr=0.1"],
        "unknown attack": [],
    }
    for said, arguments in wrong.items():
        name = "dlgg" if said == "unknown attack" else "inverting-gradients"
        assert main(["tune", name, "--suite", str(suite(tmp_path)), *arguments]) == 2
        assert said in capsys.readouterr().err, said


def test_evaluation_victims_are_never_tuned_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    command = ["tune", "inverting-gradients", "--suite", str(suite(tmp_path, "false")), "--range", "lr=0.1..1"]
    assert main([*command, "--out", str(tmp_path / "tuned.json")]) == 2
    assert "tuning: true" in capsys.readouterr().err and not (tmp_path / "tuned.sqlite").exists()
    assert main([*command[:3], str(suite(tmp_path)), *command[4:], "--objective", "psnrr"]) == 2
    assert "did you mean 'psnr'" in capsys.readouterr().err


def test_optuna_is_asked_for_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["tune", "inverting-gradients", "--suite", str(suite(tmp_path)), "--range", "lr=0.1..1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("pip install 'gradleak[tune]'")


def test_ranges_are_read_as_they_are_meant() -> None:
    assert searched("lr=0.01..1") == ("lr", Range(0.01, 1.0)) and searched("lr=0.01..1")[1] != Range(0.01, 1, True)
    assert searched("steps=2..8") == ("steps", Range(2, 8, whole=True))
    assert searched("tv=1e-6..1e-2")[1] == Range(1e-6, 1e-2)
    assert searched("signed=true,false,soft")[1] == Choice((True, False, "soft"))
    for wrong in ("lr=..1", "lr=1..", "lr=0.1", "=1..2", "l r=1..2", "lr=a..b"):
        with pytest.raises(GradleakError, match=r"NAME=LOW\.\.HIGH"):
            searched(wrong)


def test_declared_bounds_are_kept(tmp_path: Path) -> None:
    (tmp_path / "bounded.py").write_text(
        "from dataclasses import dataclass\nfrom typing import Annotated, Literal\n"
        "from annotated_types import Ge, Gt, Le, Lt\nfrom gradleak.attack import GradientMatching\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Bounded(GradientMatching):\n"
        "    reference = 'test'\n"
        "    share: Annotated[float, Gt(0), Lt(1)] = 0.5\n"
        "    factor: Annotated[float, Gt(1)] = 2.0\n"
        "    count: Annotated[int, Ge(2), Le(9)] = 4\n"
        "    way: Literal['up', 'down'] = 'up'\n"
        "    sure: bool = True\n"
        "    iterations: int = 10\n"
        "    nothing: float | None = None\n"
        "    zero: float = 0.0\n"
    )
    registry.add_file(tmp_path / "bounded.py")
    space = space_of("bounded", {}, {})
    assert set(space) == {"share", "factor", "count", "way", "sure"}, "no budget, nothing without a scale"
    share, factor = space["share"], space["factor"]
    assert isinstance(share, Range) and isinstance(factor, Range)
    assert 0 < share.low < 0.5 < share.high < 1 and 1 < factor.low < 2 < factor.high
    assert space["count"] == Range(2, 9, whole=True) and space["way"] == Choice(("up", "down"))
    assert set(space_of("bounded", {}, {"share": 0.2})) == {"factor", "count", "way", "sure"}
