"""What changed between two sets of results: the same victims, paired, with intervals. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from ..errors import GradleakError
from .leaderboard import Board
from .results import CONTEXT, HEADLINE, KNOWLEDGE, Panel, Results, worst_case
from .statistics import LEVEL, Floats, Interval, Resamples
from .store import victim_list

WORST = "(worst case)"
"""Stands for an attack on lines about the worst case over attacks."""

_ENTRY = ("attack", "knowledge", "defense", *CONTEXT)


def compare(before: Results, after: Results) -> Board:
    """Return the changes in mean PSNR from one set of results to another, the largest first.

    For each defense the worst case over attacks that both have, averaged over contexts; then every attack with its
    knowledge on every defense in every context. Pairs are the victims that both attacked; a positive change is more
    leakage. Lines that only one of the two has are listed without a change.

    Raises:
        GradleakError: a context's victims are not the same images, or nothing is in both.
    """
    _check_victims(before, after)
    shared = before.rows.merge(after.rows[[*_ENTRY, "victim"]].drop_duplicates(), how="inner")[[*_ENTRY, "victim"]]
    shared = shared.drop_duplicates()
    if not len(shared):
        raise GradleakError("nothing to compare: no attack on a defense and victim is in both")
    first, second = (Panel(_only(results, shared)) for results in (before, after))
    resamples = Resamples(first.clusters, overlaps=first.overlaps)
    lines = [*_worst_cases(first, second, resamples), *_attacks(first, second, resamples)]
    lines.sort(key=lambda line: (line["attack"] != WORST, -abs(line["change"])))
    lines += [*_alone(before, after, "only before"), *_alone(after, before, "only after")]
    victims = ", ".join(f"{count} of {stratum}" for stratum, count in sorted(first.clusters.items()))
    notes = (
        "change in mean PSNR on the same victims, after less before; positive leaks more",
        f"[low, high]: {100 * LEVEL:.0f} % interval, bootstrap over victim batches; victims: {victims}",
    )
    return Board("changes", "Changes", pd.DataFrame(lines), notes)


def past(board: Board, threshold: float) -> pd.DataFrame:
    """Return the lines whose change is above `threshold` dB either way and not explained by chance.

    A change counts as chance where its interval has zero inside; one without an interval (a single victim) counts.
    """
    table = board.table
    inside = (table["change_low"] <= 0) & (table["change_high"] >= 0)
    return table[(table["change"].abs() > threshold) & ~inside]


def _check_victims(before: Results, after: Results) -> None:
    lists = []
    for results in (before, after):
        last = results.cells.drop_duplicates(list(CONTEXT), keep="last")
        places = last[list(CONTEXT)].itertuples(index=False, name=None)
        lists.append(dict(zip(places, map(victim_list, last["config"]), strict=True)))
    for context in sorted(lists[0].keys() & lists[1].keys()):
        if lists[0][context] != lists[1][context]:
            raise GradleakError(
                f"cannot compare {' · '.join(context)}: victims are {lists[0][context]!r} before "
                f"and {lists[1][context]!r} after"
            )


def _only(results: Results, shared: pd.DataFrame) -> Results:
    return replace(results, rows=results.rows.merge(shared, how="inner"))


def _worst_cases(first: Panel, second: Panel, resamples: Resamples) -> list[dict[str, Any]]:
    lines = []
    for defense in sorted(set(first.entries["defense"])):
        worst = []
        for panel in (first, second):
            entries = panel.entries
            counted = (entries["defense"] == defense) & ~entries["control"] & entries["knowledge"].isin(KNOWLEDGE)
            worst.append(worst_case(panel, resamples, entries[counted], HEADLINE).samples)
        if math.isfinite(worst[0][0]) and math.isfinite(worst[1][0]):
            labels = {"attack": WORST, "defense": defense, "knowledge": "", **dict.fromkeys(CONTEXT, "")}
            lines.append({**labels, **_change(resamples, *worst), "victims": sum(first.clusters.values())})
    return lines


def _attacks(first: Panel, second: Panel, resamples: Resamples) -> list[dict[str, Any]]:
    lines = []
    places = second.entries.reset_index().set_index(list(_ENTRY))["index"]
    for entry in first.entries.to_dict("index").items():
        number, facts = entry
        stratum = first.stratum(int(str(number)))
        values = first.of(HEADLINE, [int(str(number))])[0]
        others = second.of(HEADLINE, [int(places[tuple(facts[name] for name in _ENTRY)])])[0]
        labels = {name: facts[name] for name in _ENTRY}
        samples = [resamples.means(stratum, each) for each in (values, others)]
        lines.append({**labels, **_change(resamples, *samples), "victims": int(np.isfinite(values).sum())})
    return lines


def _change(resamples: Resamples, first: Floats, second: Floats) -> dict[str, Any]:
    difference = second - first
    # Equal results differ by nothing in every resample.
    same = not np.any(difference)
    interval = Interval(0.0, 0.0, 0.0) if same else resamples.interval(difference, scale=None)
    return {
        "before": float(first[0]),
        "after": float(second[0]),
        "change": interval.estimate,
        "change_low": interval.low,
        "change_high": interval.high,
        "note": "",
    }


def _alone(results: Results, other: Results, note: str) -> list[dict[str, Any]]:
    """Return lines without a change for the entries that the other results lack."""
    entries, known = results.panel.entries, set(other.panel.entries[list(_ENTRY)].itertuples(index=False, name=None))
    found = entries[[*_ENTRY]].itertuples(index=False, name=None)
    nothing = dict.fromkeys(("before", "after", "change", "change_low", "change_high", "victims"), math.nan)
    return [{**dict(zip(_ENTRY, names, strict=True)), **nothing, "note": note} for names in found if names not in known]
