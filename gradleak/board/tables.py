"""What every board is made of: the table with its notes, ranks, and the protocol in words."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .results import CONTEXT, HEADLINE, Results
from .statistics import ENOUGH, LEVEL, RESAMPLES, Floats, Pairs, Resamples, detectable_difference


@dataclass(frozen=True)
class Board:
    """One table of results; `table` is for machines, `report` writes it for people."""

    name: str
    """Kind of board: defenses, attacks, pareto, compute, flags, malicious or detection."""
    title: str
    table: pd.DataFrame
    notes: tuple[str, ...] = ()
    """The protocol and what a reader must know."""
    strong: frozenset[int] = frozenset()
    """Positions of the rows that are separably first."""


def tally(labels: pd.Series[str]) -> str:
    """Return the labels, the commonest first, with their counts where there are several."""
    counts = sorted(Counter(labels.tolist()).items(), key=lambda pair: (-pair[1], str(pair[0])))
    return ", ".join(f"{label} {count}" if len(counts) > 1 else str(label) for label, count in counts)


def add_ranks(table: pd.DataFrame, axis: str, ranks: list[tuple[int, int]], lines: list[int]) -> None:
    """Add an axis' rank interval to some lines; the others have none."""
    prefix = "rank" if axis == HEADLINE else f"{axis}_rank"
    for end, name in enumerate(("low", "high")):
        table[f"{prefix}_{name}"] = pd.Series([rank[end] for rank in ranks], index=lines, dtype="Int64")


def separably_first(table: pd.DataFrame) -> frozenset[int]:
    """Return the lines that are separably first and carry no doubt."""
    if len(table) < 2 or "rank_high" not in table:
        return frozenset()
    first = (table["rank_high"] == 1).fillna(False)
    return frozenset(int(line) for line in np.flatnonzero(first & (table.get("doubt", "") == "")))


def where_label(results: Results) -> str:
    """Return the context of results, or how many there are, for a title."""
    if len(results.contexts) == 1:
        return " · ".join(results.contexts[0])
    counts = (len({context[place] for context in results.contexts}) for place in range(len(CONTEXT)))
    parts = ", ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in zip(counts, CONTEXT, strict=True))
    return f"mean over {len(results.contexts)} contexts ({parts})"


def protocol(results: Results, resamples: Resamples) -> list[str]:
    """Say what was run, on whom, and how intervals were made."""
    cells, rows = results.cells, results.rows
    named = cells[["suite", "suite_version"]].drop_duplicates().itertuples(index=False, name=None)
    suites = ", ".join(sorted(" ".join(filter(None, names)) for names in named)) or "unnamed"
    seeds = ", ".join(map(str, sorted(cells["seed"].unique())))
    victims = ", ".join(f"{count} of {stratum}" for stratum, count in sorted(resamples.clusters.items()))
    shared = ["lists of one dataset share images; intervals and tests count what that makes them share"]
    few = min(resamples.clusters.values(), default=0) < ENOUGH
    warning = [f"fewer than {ENOUGH} victims in a list: intervals are too narrow"] if few else []
    return [
        *warning,
        f"suite {suites}; {len(cells)} cells, {len(rows)} images, {int(rows['failed'].sum())} failed; "
        f"victims (dataset/images a batch): {victims}; seeds: {seeds}",
        f"[low, high]: {100 * LEVEL:.0f} % interval, bootstrap over victim batches with all their images and "
        f"seeds, {RESAMPLES} resamples, widened for the luck of the best of several attacks and for outcomes not seen "
        "among so few victims; shares: Wilson's interval",
        *(shared if len(results.panel.overlaps) else []),
    ]


def detectable(profiles: list[Floats], overlaps: Pairs) -> list[str]:
    """Say how large a difference between two profiles over victims has to be to be seen."""
    pairs = itertools.combinations(profiles, 2)
    differences = [detectable_difference(first - second, overlaps=overlaps) for first, second in pairs]
    known = [difference for difference in differences if math.isfinite(difference)]
    if not known:
        return []
    return [f"minimum detectable difference, median over pairs: {np.median(known):.1f} dB (power 80 %)"]
