"""Published numbers beside ours: what a suite reports, what the results say, and whether they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import yaml
from annotated_types import Ge, MinLen
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ..errors import GradleakError
from ..leaderboard import Board
from ..results import CONTEXT, Results
from ..scales import METRICS

LABELS = ("attack", "knowledge", "defense", *CONTEXT)
"""What a reported number may be restricted to."""


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
    statistic: Literal["mean", "median", "best"] = "mean"
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
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        items = content.get("reported") or [] if isinstance(content, dict) else []
        found = TypeAdapter(list[Reported]).validate_python(items)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise GradleakError(f"suite {path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise GradleakError(f"suite {path}: reported.{place}: {first['msg']}") from error
    for item in found:
        for name in (*item.where, *item.minus):
            if name not in LABELS:
                raise GradleakError(f"suite {path}: reported: {name!r} is no label (allowed: {', '.join(LABELS)})")
    return found


def reproduction_board(results: Results, reported: Sequence[Reported]) -> Board:
    """Return the board of published numbers: claim, ours, reported, source and verdict.

    A number agrees if it is within its tolerance of the published one, or on the right side of it, and is never
    called so where nothing was measured.
    """
    lines = []
    for item in reported:
        ours, images = _measure(results, item, item.where)
        if item.minus:
            other, _ = _measure(results, item, {**item.where, **item.minus})
            ours -= other
        lines.append(
            {
                "claim": item.claim,
                "ours": ours,
                "relation": item.relation,
                "reported": item.value,
                "tolerance": item.tolerance,
                "metric": f"{item.statistic} {item.metric}",
                "images": images,
                "verdict": _verdict(item, ours),
                "source": item.source,
            }
        )
    columns = ["claim", "ours", "relation", "reported", "tolerance", "metric", "images", "verdict", "source"]
    agree = sum(line["verdict"] == "agrees" for line in lines)
    note = f"{agree} of {len(lines)} published numbers agree within their stated tolerance"
    return Board("reproduction", "Published numbers", pd.DataFrame(lines, columns=columns), (note,))


def _measure(results: Results, item: Reported, where: dict[str, str]) -> tuple[float, int]:
    """Return the statistic over the images with these labels, and how many images there are."""
    rows = results.rows
    if item.metric not in rows or (item.metric not in METRICS and rows[item.metric].dtype == object):
        return math.nan, 0
    chosen = np.logical_and.reduce([rows[name] == label for name, label in where.items()])
    values = rows.loc[chosen, item.metric].dropna().astype(float)
    if not len(values):
        return math.nan, 0
    lower = item.metric in METRICS and not METRICS[item.metric].higher_is_better
    best = values.min if lower else values.max
    return float({"mean": values.mean, "median": values.median, "best": best}[item.statistic]()), len(values)


def _verdict(item: Reported, ours: float) -> str:
    if not math.isfinite(ours):
        return "not measured"
    above, below = ours > item.value + item.tolerance, ours < item.value - item.tolerance
    if below and item.relation != "at most":
        return "lower"
    return "higher" if above and item.relation != "at least" else "agrees"
