"""Published numbers beside ours: what a suite reports, what the results say, and whether they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import yaml
from annotated_types import Ge, MinLen
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ..board.leaderboard import Board
from ..board.results import CONTEXT, Results
from ..board.statistics import LEVEL
from ..errors import GradleakError
from ..scales import METRICS

LABELS = ("attack", "knowledge", "defense", *CONTEXT)
"""What a reported number may be restricted to."""

RESAMPLES = 1000
"""Bootstrap draws of an interval."""


class Reported(BaseModel):
    """One published number and where to look for ours: an item of a suite's `reported` list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    claim: str
    """What the number is of, in words."""
    source: str
    """Where it was published: authors, year, table or figure."""
    value: float
    """The published number, in the units of `metric`; rates in [0, 1]."""
    metric: str = "psnr"
    """A column of the rows: a name of `gradleak.scales.METRICS`, or one of the attack's own numbers."""
    statistic: Literal["mean", "median", "best", "worst"] = "mean"
    """Over the images."""
    relation: Literal["about", "at least", "at most"] = "about"
    """What agreement means."""
    tolerance: Annotated[float, Ge(0)] = 0.0
    """How far ours may be off, in the units of `metric`."""
    where: Annotated[dict[str, str], MinLen(1)]
    """Labels of the cells meant, e.g. `{attack: dlg, defense: none}`."""
    minus: dict[str, str] = {}
    """If given, the number is the difference to these cells; labels not given are those of `where`."""


def read_reported(path: Path) -> list[Reported]:
    """Return the `reported` list of a suite, empty where it has none.

    Raises:
        GradleakError: the file is not YAML, or an item is not as it should be.
    """
    items = _content(path).get("reported") or []
    try:
        found = TypeAdapter(list[Reported]).validate_python(items)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise GradleakError(f"suite {path}: reported.{place}: {first['msg']}") from error
    for item in found:
        for name in (*item.where, *item.minus):
            if name not in LABELS:
                raise GradleakError(f"suite {path}: reported: {name!r} is not a label (allowed: {', '.join(LABELS)})")
    return found


def read_description(path: Path) -> str:
    """Return the `description` of a suite on one line, empty where it has none.

    Raises:
        GradleakError: the file is not YAML.
    """
    return " ".join(str(_content(path).get("description") or "").split())


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise GradleakError(f"suite {path}: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def reproduction_board(results: Results, reported: Sequence[Reported]) -> Board:
    """Return the board of published numbers: claim, ours, reported, source and verdict.

    A number agrees if it is within its tolerance of the published one, or on the right side of it, and is never
    called so where nothing was measured.
    """
    lines = []
    for item in reported:
        values = [_values(results, item, item.where)]
        if item.minus:
            values.append(_values(results, item, {**item.where, **item.minus}))
        ours = _estimate(item, values)
        low, high = _interval(item, values)
        lines.append(
            {
                "claim": item.claim,
                "ours": ours,
                "ours_low": low,
                "ours_high": high,
                "relation": item.relation,
                "reported": item.value,
                "tolerance": item.tolerance,
                "metric": f"{item.statistic} {item.metric}",
                "images": len(values[0]),
                "verdict": _verdict(item, ours),
                "source": item.source,
            }
        )
    names = ["claim", "ours", "ours_low", "ours_high", "relation", "reported", "tolerance", "metric", "images"]
    agree = sum(line["verdict"] == "agrees" for line in lines)
    notes = (
        f"{agree} of {len(lines)} published numbers agree within their stated tolerance",
        "[low, high]: 95 % interval, bootstrap over victim batches; of a difference, over the batches both were run on",
    )
    return Board("reproduction", "Published numbers", pd.DataFrame(lines, columns=[*names, "verdict", "source"]), notes)


def _values(results: Results, item: Reported, where: dict[str, str]) -> pd.Series[float]:
    """Return the metric of the images with these labels, indexed by the victim batch; empty if there are none."""
    rows = results.rows
    if item.metric not in rows or (item.metric not in METRICS and rows[item.metric].dtype == object):
        return pd.Series(dtype=float)
    chosen = rows[np.logical_and.reduce([rows[name] == label for name, label in where.items()])]
    batches = [f"{stratum}/{victim}" for stratum, victim in zip(chosen["stratum"], chosen["victim"], strict=True)]
    return pd.Series(chosen[item.metric].to_numpy(dtype=float), index=batches).dropna()


def _estimate(item: Reported, values: Sequence[pd.Series[float]]) -> float:
    """Return the statistic over the images, or its difference."""
    if any(part.empty for part in values):
        return math.nan
    found = [float(getattr(part, _statistic(item))()) for part in values]
    return found[0] - found[1] if len(found) == 2 else found[0]


def _statistic(item: Reported) -> str:
    """Return the name of a method of pandas."""
    lower = item.metric in METRICS and not METRICS[item.metric].higher_is_better
    extremes = {"best": "min" if lower else "max", "worst": "max" if lower else "min"}
    return extremes.get(item.statistic, item.statistic)


def _interval(item: Reported, values: Sequence[pd.Series[float]]) -> tuple[float, float]:
    """Return a percentile bootstrap interval over the victim batches that all parts share; NaN below two."""
    batches = sorted(set.intersection(*(set(part.index) for part in values)))
    if len(batches) < 2:
        return math.nan, math.nan
    grouped = [part.groupby(level=0).agg(list) for part in values]
    random = np.random.default_rng(0)
    draws = []
    for chosen in random.integers(len(batches), size=(RESAMPLES, len(batches))):
        parts = [pd.Series(np.concatenate([part[batches[index]] for index in chosen])) for part in grouped]
        draws.append(_estimate(item, parts))
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _verdict(item: Reported, ours: float) -> str:
    if not math.isfinite(ours):
        return "not measured"
    above, below = ours > item.value + item.tolerance, ours < item.value - item.tolerance
    if below and item.relation != "at most":
        return "lower"
    return "higher" if above and item.relation != "at least" else "agrees"
