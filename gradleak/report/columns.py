"""What people see of a board: which columns, under which headings, with how many digits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..board.leaderboard import Board
from ..board.results import HEADLINE, SUCCESSES
from ..paths import printable
from ..scales import CAP, METRICS, Threshold
from .help import HELP

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
    most: int | None = None
    """Characters above which its text is broken into lines, none for numbers."""

    @property
    def tip(self) -> str:
        """What the column holds: its meaning, unit and direction."""
        return HELP.get(self.heading, "")

    @property
    def key(self) -> str:
        """The heading as a word, for command lines: `psnr-db`."""
        return "-".join(re.findall(r"[a-z0-9]+", self.heading.lower()))


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
    def heading(self) -> str:
        """The heading, in two lines where one would be wider than every cell."""
        return in_two_lines(self.column.heading, max(map(len, self.cells), default=0))

    @property
    def width(self) -> int:
        """Characters of the widest cell, broken where it may be, or line of the heading."""
        widest = max((*map(len, self.cells), 0))
        return max(min(widest, self.column.most or widest), *map(len, self.heading.splitlines()))


def in_two_lines(heading: str, width: int) -> str:
    """Return a heading, broken at the space that makes its longer line shortest if it is wider than `width`."""
    places = [place for place, mark in enumerate(heading) if mark == " "]
    if len(heading) <= width or not places:
        return heading
    place = min(places, key=lambda each: max(each, len(heading) - each - 1))
    return f"{heading[:place]}\n{heading[place + 1 :]}"


def shown(board: Board, chosen: Sequence[str] = ()) -> list[Shown]:
    """Return the columns of a board that hold anything, as text; of these the `chosen` ones by key, if any."""
    lines: list[Line] = board.table.to_dict("records")  # type: ignore[assignment]
    columns = [
        Shown(
            column,
            tuple(printable(column.text(line)) for line in lines),
            column.brief and tuple(printable(text) for text in map(column.brief, lines)),
        )
        for column in _COLUMNS[board.name]
    ]
    known = [each for each in columns if any(cell not in ("", MISSING) for cell in each.cells)]
    if not chosen:
        return known
    return sorted((each for each in known if each.column.key in chosen), key=lambda each: chosen.index(each.column.key))


def of(board: str) -> tuple[Column, ...]:
    """Return the columns of a kind of board."""
    return _COLUMNS[board]


def keys(board: str) -> list[str]:
    """Return the words by which the columns of a kind of board are chosen."""
    return [column.key for column in _COLUMNS[board]]


GAP = 2
"""Characters between two columns of text."""
_LEAST = 5
"""Columns of this rank or above are left out before others are shortened."""


def fit(columns: list[Shown], width: int | None, gap: int = GAP) -> tuple[list[Shown], list[Column]]:
    """Split columns into those that fit and those left out; equal ranks go from the right.

    The least important columns go first; then the others are shortened, those of highest rank first; then they go.
    """

    def is_fitting() -> bool:
        return not width or sum(each.width + gap for each in columns) - gap <= width

    def leave_out(least: int) -> list[Column]:
        left: list[Column] = []
        while not is_fitting():
            worst = max(columns, key=lambda each: (each.column.rank, columns.index(each)))
            if worst.column.rank < least:
                break
            columns.remove(worst)
            left.append(worst.column)
        return left

    columns = list(columns)
    left_out = leave_out(_LEAST)
    for each in sorted(columns, key=lambda each: -each.column.rank):
        if not is_fitting():
            columns[columns.index(each)] = each.shortened()
    return columns, left_out + leave_out(1)


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


def _label(
    heading: str,
    name: str,
    rank: int = 0,
    strong: bool = False,
    brief: Callable[[str], str] | None = None,
    most: int | None = None,
) -> Column:
    def text(line: Line) -> str:
        return str(line.get(name) or "")

    def shorter(line: Line) -> str:
        return brief(text(line)) if brief else text(line)

    return Column(heading, text, right=False, rank=rank, strong=strong, brief=shorter if brief else None, most=most)


def _capped(text: str, most: int = 22) -> str:
    """Cut a text, where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _size(value: Any) -> str:
    """Return bytes in a few characters: 401, 1.9k, 19k."""
    text = number(value, 0)
    size = 0.0 if text == MISSING else float(value)
    for unit in ("", "k", "M", "G"):
        if round(size) < 1000 or unit == "G":
            return text if not unit else f"{size:.{1 if size < 9.95 else 0}f}{unit}"
        size /= 1000
    return text


def _standing(text: str) -> str:
    """Shorten `at the floor` and `3 of 4 attacks`."""
    return text.replace("at the floor", "at floor").replace(" of ", "/").replace("not evaluated", "not eval.")


def _first(text: str) -> str:
    """Shorten several doubts to the first and how many more there are."""
    first, *others = text.split() or [""]
    return f"{first} +{len(others)}" if others else first


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


def _brief_guarantee(line: Line) -> str:
    return number(line.get("epsilon"), 1 if (line.get("epsilon") or 0) < 100 else 0)


def _mark(name: str, text: str) -> Callable[[Line], str]:
    return lambda line: text if line.get(name) else ""


def _failed(line: Line) -> str:
    return f"{line['failed']}/{line['trials']}" if line["failed"] else ""


def _share(line: Threshold, name: str, rank: int, intervals: bool) -> Column:
    """Return the column of the share of images that reach a threshold."""
    if (line.metric, line.value) == (HEADLINE, CAP):
        heading = "images exact, %"
    else:
        direction, unit = "≥" if METRICS[line.metric].higher_is_better else "≤", METRICS[line.metric].unit
        measure = f"{direction} {line.value:g} {unit}" if unit else f"{line.metric.upper()} {direction} {line.value:g}"
        heading = f"images {measure}, %"
    make = _interval if intervals else _plain
    return make(heading, name, digits=0, rank=rank, percent=True)


_RECOGNISABLE, _EXACT = "success_psnr_20", f"success_psnr_{CAP:g}"


def _recovered(name: str, rank: int, intervals: bool = True) -> Column:
    return _share(SUCCESSES[name], name, rank, intervals)


def _successes(first: int, intervals: bool) -> list[Column]:
    """Return the columns of the other shares; the later, the less important."""
    others = [name for name in SUCCESSES if name not in (_RECOGNISABLE, _EXACT)]
    return [_share(SUCCESSES[name], name, first + place, intervals) for place, name in enumerate(others)]


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
        _label("defense", "defense", strong=True, most=26),
        _label("standing", "standing", brief=_standing),
        _recovered(_RECOGNISABLE, rank=0),
        _interval("accuracy lost, points", "accuracy_lost", rank=1, percent=True),
        _plain("false alarms, %", "false_alarms", rank=1, percent=True),
        Column("bytes", lambda line: number(line.get("bytes"), 0), rank=1, brief=lambda line: _size(line.get("bytes"))),
        Column("epsilon", _guarantee, rank=1, brief=_brief_guarantee),
        _label("doubt", "doubt", brief=_first),
        _label("checked", "checked", rank=4),
        _recovered(_EXACT, rank=2),
        _interval("PSNR, dB", "psnr", rank=2),
        _plain("floor, dB", "psnr_floor", rank=2),
        Column("worst attack", _attained, right=False, rank=3, brief=lambda line: _capped(_attained(line)), most=34),
        _plain("most exposed, dB", "psnr_q95", rank=4),
        _interval("accuracy, %", "test_accuracy", rank=5, percent=True),
        Column("attacks", _faced, rank=5),
        Column("quartiles, dB", _quartiles, rank=8),
        _interval("above floor, dB", "above", rank=6),
        _plain("training epsilon", "training_epsilon", digits=2, rank=9),
        _plain("noise multiplier", "noise", digits=3, rank=12),
        _plain("oblivious, dB", "psnr_oblivious", rank=7),
        _plain("adaptive, dB", "psnr_adaptive", rank=7),
        _plain("oracle, dB", "psnr_ceiling", rank=9),
        _interval("SSIM", "ssim", digits=2, rank=7),
        _interval("MS-SSIM", "ms_ssim", digits=2, rank=12),
        _interval("LPIPS", "lpips", digits=2, rank=7),
        _interval("LPIPS at 64", "lpips_64", digits=2, rank=7),
        _interval("re-identified, %", "reidentified", digits=0, rank=6, percent=True),
        _interval("labels, %", "label_correct", digits=0, rank=8, percent=True),
        *_successes(13, intervals=True),
        _plain("fit, %", "fit", digits=0, rank=9, percent=True),
        _plain("contrast", "contrast", digits=2, rank=10),
        _plain("client, s", "client_seconds", digits=3, rank=11),
        Column("failed", _failed, rank=6),
    ),
    "attacks": (
        Column("rank", rank, strong=True),
        _label("attack", "attack", strong=True, most=26),
        _label("knowledge", "knowledge", rank=1),
        _interval("above floor, dB", "above", rank=0),
        Column("sets worst of", lambda line: str(line.get("sets") or ""), rank=1),
        _recovered(_RECOGNISABLE, rank=1, intervals=False),
        _recovered(_EXACT, rank=2, intervals=False),
        _plain("PSNR, dB", "psnr", rank=2),
        _plain("gradients", "gradient_evaluations", digits=0, rank=3),
        Column("cells", lambda line: f"{line['cells']}/{line['of_cells']}", rank=3),
        Column("unfit", lambda line: str(line.get("unfit") or ""), rank=3),
        _label("family", "family", rank=5),
        _plain("SSIM", "ssim", digits=2, rank=6),
        _plain("MS-SSIM", "ms_ssim", digits=2, rank=9),
        _plain("LPIPS", "lpips", digits=2, rank=6),
        _plain("LPIPS at 64", "lpips_64", digits=2, rank=6),
        _plain("re-identified, %", "reidentified", digits=0, rank=5, percent=True),
        _plain("labels, %", "label_correct", digits=0, rank=7, percent=True),
        *_successes(8, intervals=False),
        _interval("rating", "rating", digits=0, rank=2),
        _plain("seconds", "seconds", digits=2, rank=7),
        Column("failed", _failed, rank=4),
        Column("specialist against", _specialty, right=False, rank=3, most=34),
    ),
    "malicious": (
        _label("setting", "setting", most=28),
        _label("defense", "defense", most=26),
        _interval("exact images", "recovered", rank=0),
        _plain("of", "images", digits=0, rank=0),
        _plain("expected", "expected", rank=1),
        _plain("honest", "honest", rank=1),
        _plain("refused, %", "refused", digits=0, rank=1, percent=True),
        _plain("false alarms, %", "false_alarms", rank=2, percent=True),
        _plain("best image, dB", "best_image", rank=3),
        _label("attack", "attack", rank=4),
        _label("server", "server", rank=5),
        _label("class", "threat_class", rank=6),
        _label("surface", "surface", rank=6),
        _plain("queries", "queries", rank=6),
        _plain("tampered accuracy, %", "tampered_accuracy", rank=7, percent=True),
        _plain("model accuracy, %", "model_accuracy", rank=8, percent=True),
        _plain("added parameters", "added_parameters", digits=0, rank=7),
        _plain("added bytes", "added_bytes", digits=0, rank=8),
        _plain("PSNR, dB", "psnr", rank=7),
        _plain("floor, dB", "psnr_floor", rank=8),
        _label("model", "model", rank=9),
        _label("dataset", "dataset", rank=9),
    ),
    "detection": (
        _label("defense", "defense", most=34),
        _label("server", "server"),
        _label("setting", "setting", rank=1),
        _plain("of", "batch_size", digits=0),
        _plain("refused, %", "refused", digits=0, percent=True),
        _interval("false alarms, %", "false_alarms", percent=True),
        _plain("honest rounds", "honest_rounds", digits=0, rank=2),
        _label("model", "model", rank=3),
        _label("dataset", "dataset", rank=3),
    ),
    "pareto": (
        Column("front", _mark("front", "*"), right=False),
        _label("defense", "defense", most=26),
        _interval("above floor, dB", "above"),
        _interval("accuracy, %", "test_accuracy", percent=True),
        _plain("accuracy lost, points", "accuracy_lost", percent=True),
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
        _interval("above floor, dB", "above"),
    ),
    "reproduction": (
        _label("claim", "claim", most=40),
        _interval("ours", "ours", digits=2),
        _label("relation", "relation", rank=2),
        _plain("reported", "reported", digits=2),
        _plain("tolerance", "tolerance", digits=2, rank=2),
        _label("metric", "metric", rank=1),
        _plain("images", "images", digits=0, rank=3),
        _label("verdict", "verdict"),
        _label("source", "source", rank=1, most=40),
    ),
    "changes": (
        _label("attack", "attack"),
        _label("knowledge", "knowledge", rank=1),
        _label("defense", "defense"),
        _label("model", "model", rank=2),
        _label("dataset", "dataset", rank=2),
        _label("setting", "setting", rank=2),
        _plain("before, dB", "before"),
        _plain("after, dB", "after"),
        _interval("change, dB", "change", digits=2, rank=0),
        _plain("victims", "victims", digits=0, rank=3),
        _label("note", "note", rank=1),
    ),
    "flags": (
        _label("flag", "flag", most=20),
        _label("where", "where", most=28),
        _label("why", "why", most=48),
    ),
}
