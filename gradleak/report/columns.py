"""What people see of a board: which columns, under which headings, with how many digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..board.leaderboard import Board
from ..board.results import HEADLINE, SUCCESSES
from ..paths import printable
from ..scales import CAP, METRICS, Threshold

Line = Mapping[str, Any]

MISSING = "-"
"""Shown for what was not measured."""


@dataclass(frozen=True)
class Column:
    """A shown column: its heading, how a line of the table becomes text, how it lies and what it is worth."""

    heading: str
    text: Callable[[Line], str]
    right: bool = True
    rank: int = 0
    """Where a terminal is too narrow, columns of higher rank go first; those of rank 0 never."""
    strong: bool = False
    """Whether it stands out on lines that are separably first."""
    brief: Callable[[Line], str] | None = None
    """A shorter text, for where the column would not fit."""


@dataclass(frozen=True)
class Shown:
    """A column with its text for every line."""

    column: Column
    cells: tuple[str, ...]
    brief: tuple[str, ...] | None = None
    """The shorter texts, if there are any."""

    def shortened(self) -> Shown:
        """Return the column with its shorter texts."""
        return Shown(self.column, self.brief or self.cells)

    @property
    def width(self) -> int:
        """Characters of the widest cell or heading."""
        return max(map(len, (self.column.heading, *self.cells)))


def shown(board: Board) -> list[Shown]:
    """Return the columns of a board that hold anything, as text."""
    lines: list[Line] = board.table.to_dict("records")  # type: ignore[assignment]
    columns = [
        Shown(
            column,
            tuple(printable(column.text(line)) for line in lines),
            column.brief and tuple(printable(text) for text in map(column.brief, lines)),
        )
        for column in _COLUMNS[board.name]
    ]
    return [each for each in columns if any(cell not in ("", MISSING) for cell in each.cells)]


def number(value: Any, digits: int = 1, percent: bool = False) -> str:
    """Return a number as text, `MISSING` for none; whole numbers from 1000 on in groups of three digits."""
    if value is None or pd.isna(value):
        return MISSING
    value = float(value) * (100 if percent else 1)
    if math.isinf(value):
        return "inf"
    text = f"{value:,.{digits}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def interval(line: Line, name: str, digits: int = 1, percent: bool = False) -> str:
    """Return `estimate [low, high]`, or the estimate alone where it has no interval."""
    estimate, low, high = (number(line.get(key), digits, percent) for key in (name, f"{name}_low", f"{name}_high"))
    return estimate if MISSING in (low, high) else f"{estimate} [{low}, {high}]"


def rank(line: Line) -> str:
    """Return a rank, ties as `1-2`, empty for the unranked."""
    low, high = line["rank_low"], line["rank_high"]
    if pd.isna(low):
        return ""
    return str(low) if low == high else f"{low}-{high}"


def _plain(heading: str, name: str, digits: int = 1, rank: int = 1, percent: bool = False) -> Column:
    return Column(heading, lambda line: number(line.get(name), digits, percent), rank=rank)


def _label(heading: str, name: str, rank: int = 0, strong: bool = False) -> Column:
    return Column(heading, lambda line: str(line.get(name) or ""), right=False, rank=rank, strong=strong)


def _interval(heading: str, name: str, digits: int = 1, rank: int = 1, percent: bool = False) -> Column:
    return Column(
        heading,
        lambda line: interval(line, name, digits, percent),
        rank=rank,
        brief=lambda line: number(line.get(name), digits, percent),
    )


def _attained(line: Line) -> str:
    attack, knowledge = line["psnr_attack"], line["psnr_knowledge"]
    return attack if knowledge in ("", "oblivious") else f"{attack} ({knowledge})"


def _guarantee(line: Line) -> str:
    return number(line.get("epsilon"), 2)


def _mark(name: str, text: str) -> Callable[[Line], str]:
    return lambda line: text if line.get(name) else ""


def _failed(line: Line) -> str:
    return f"{line['failed']}/{line['trials']}" if line["failed"] else ""


def _share(line: Threshold, name: str, rank: int, intervals: bool) -> Column:
    """Return the column of the share of images that reach a threshold."""
    if (line.metric, line.value) == (HEADLINE, CAP):
        heading = "exact %"
    else:
        direction, unit = "≥" if METRICS[line.metric].higher_is_better else "≤", METRICS[line.metric].unit
        measure = f"{direction} {line.value:g} {unit}" if unit else f"{line.metric.upper()} {direction} {line.value:g}"
        heading = f"{measure} %"
    make = _interval if intervals else _plain
    return make(heading, name, digits=0, rank=rank, percent=True)


def _successes(first: int, intervals: bool, among: slice) -> list[Column]:
    chosen = list(SUCCESSES.items())[among]
    return [_share(line, name, first + place, intervals) for place, (name, line) in enumerate(chosen)]


def _specialty(line: Line) -> str:
    """Return what an attack without a rank breaks."""
    return str(line.get("breaks") or "") if pd.isna(line["rank_low"]) else ""


def _quartiles(line: Line) -> str:
    return " ".join(number(line.get(f"{HEADLINE}_{name}")) for name in ("q25", "median", "q75"))


def _faced(line: Line) -> str:
    return f"{line['attacks_faced']}/{line['attacks_expected']}" if "attacks_faced" in line else ""


_COLUMNS: dict[str, tuple[Column, ...]] = {
    "defenses": (
        Column("rank", rank, strong=True),
        _label("defense", "defense", strong=True),
        _label("standing", "standing", rank=1),
        *_successes(0, intervals=True, among=slice(0, 1)),
        *_successes(1, intervals=True, among=slice(1, 2)),
        _interval("PSNR dB", "psnr", rank=0),
        Column("quartiles", _quartiles, rank=8),
        _plain("most exposed", "psnr_q95", rank=5),
        _label("doubt", "doubt"),
        _plain("floor", "psnr_floor", rank=2),
        _interval("above floor dB", "above", rank=5),
        _interval("accuracy %", "test_accuracy", rank=3, percent=True),
        _interval("lost points", "accuracy_lost", rank=6, percent=True),
        _plain("bytes", "bytes", digits=0, rank=3),
        Column("epsilon", _guarantee, rank=3),
        _plain("training epsilon", "training_epsilon", digits=2, rank=9),
        Column("worst attack", _attained, right=False, rank=4),
        Column("attacks", _faced, rank=4),
        _plain("oblivious", "psnr_oblivious", rank=6),
        _plain("adaptive", "psnr_adaptive", rank=6),
        _plain("oracle", "psnr_ceiling", rank=9),
        _interval("SSIM", "ssim", digits=2, rank=7),
        _interval("MS-SSIM", "ms_ssim", digits=2, rank=12),
        _interval("LPIPS", "lpips", digits=2, rank=6),
        _interval("re-identified %", "reidentified", digits=0, rank=5, percent=True),
        _interval("labels %", "label_correct", digits=0, rank=8, percent=True),
        *_successes(13, intervals=True, among=slice(2, None)),
        _plain("client s", "client_seconds", digits=3, rank=11),
        Column("failed", _failed, rank=6),
    ),
    "attacks": (
        Column("rank", rank, strong=True),
        _label("attack", "attack", strong=True),
        _label("knowledge", "knowledge", rank=1),
        _label("family", "family", rank=4),
        _interval("above floor dB", "above", rank=0),
        Column("sets worst of", lambda line: str(line.get("sets") or ""), rank=2),
        _plain("PSNR dB", "psnr", rank=1),
        *_successes(2, intervals=False, among=slice(0, 2)),
        _plain("SSIM", "ssim", digits=2, rank=5),
        _plain("MS-SSIM", "ms_ssim", digits=2, rank=9),
        _plain("LPIPS", "lpips", digits=2, rank=5),
        _plain("re-identified %", "reidentified", digits=0, rank=3, percent=True),
        _plain("labels %", "label_correct", digits=0, rank=6, percent=True),
        *_successes(8, intervals=False, among=slice(2, None)),
        _interval("rating", "rating", digits=0, rank=2),
        _plain("gradients", "gradient_evaluations", digits=0, rank=4),
        _plain("seconds", "seconds", digits=2, rank=7),
        Column("cells", lambda line: f"{line['cells']}/{line['of_cells']}", rank=3),
        Column("unfit", lambda line: str(line.get("unfit") or ""), rank=4),
        Column("failed", _failed, rank=4),
        Column("specialist against", _specialty, right=False, rank=3),
    ),
    "pareto": (
        Column("front", _mark("front", "*"), right=False),
        _label("defense", "defense"),
        _interval("above floor dB", "above"),
        _interval("accuracy %", "test_accuracy", percent=True),
        _plain("lost points", "accuracy_lost", percent=True),
        _plain("bytes", "bytes", digits=0),
        Column("epsilon", _guarantee),
        _label("standing", "standing"),
        _label("doubt", "doubt"),
    ),
    "compute": (
        Column("front", _mark("front", "*"), right=False),
        _label("attack", "attack"),
        _label("knowledge", "knowledge"),
        _plain("gradients", "gradient_evaluations", digits=0),
        _plain("seconds", "seconds", digits=2),
        _interval("above floor dB", "above"),
    ),
    "reproduction": (
        _label("claim", "claim"),
        _interval("ours", "ours", digits=2),
        _label("relation", "relation", rank=2),
        _plain("reported", "reported", digits=2),
        _plain("tolerance", "tolerance", digits=2, rank=2),
        _label("metric", "metric", rank=1),
        _plain("images", "images", digits=0, rank=3),
        _label("verdict", "verdict"),
        _label("source", "source", rank=1),
    ),
    "changes": (
        _label("attack", "attack"),
        _label("knowledge", "knowledge", rank=1),
        _label("defense", "defense"),
        _label("model", "model", rank=2),
        _label("dataset", "dataset", rank=2),
        _label("setting", "setting", rank=2),
        _plain("before dB", "before"),
        _plain("after dB", "after"),
        _interval("change dB", "change", digits=2, rank=0),
        _plain("victims", "victims", digits=0, rank=3),
        _label("note", "note", rank=1),
    ),
    "flags": (
        _label("flag", "flag"),
        _label("where", "where"),
        _label("why", "why"),
    ),
}
