"""The attack board: which attack gains most over guessing, on cells that attacks share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from .evidence import CLEAR, Evidence
from .results import AXES, CONTEXT, HEADLINE, KNOWLEDGE, SUCCESSES, Panel, Results, worst_case
from .statistics import (
    LEVEL,
    Interval,
    Resamples,
    bradley_terry,
    ends,
    holm,
    mean_over_known,
    paired_p_values,
    pareto_front,
    ranks_from_wins,
    separable,
)
from .tables import Board, add_ranks, detectable, protocol, separably_first, where_label

COMMON = 0.5
"""Share of the cells of the most widely run attack below which an attack is a specialist and has no rank."""

_UNKNOWN = Interval(math.nan, math.nan, math.nan)


def attack_board(results: Results, ratings: bool = False) -> Board:
    """Rank attacks, with the knowledge they had, by their mean distance to the floor over defenses and contexts.

    Ranks come from paired tests on the cells that both attacks ran on, Holm-corrected over all pairs. Specialists,
    which ran on less than `COMMON` of the cells, stand below without a rank, with the defenses that each `breaks`
    (separably above the floor, by `CLEAR` dB or more); controls last. `sets` counts the worst cases that an attack
    sets, `unfit` the cells where its loss stayed far above the loss at the truth. With `ratings`, a Bradley-Terry
    rating is added, every victim a game.
    """
    panel = results.panel
    resamples = Resamples(panel.clusters, overlaps=panel.overlaps)
    counted = panel.entries[panel.entries["knowledge"].isin(KNOWLEDGE) | panel.entries["control"]]
    place = [*CONTEXT, "defense"]
    condition = counted.groupby(place).ngroup()
    floors = {
        condition[group.index[0]]: worst_case(panel, resamples, panel.controls([tuple(map(str, names))]), HEADLINE)
        for names, group in counted.groupby(place)
    }
    misfits, broken, setters = Evidence(results).misfits, _broken(panel, counted), _setters(counted)
    shape = (condition.nunique(), sum(panel.clusters.values()))
    lines, values = [], []
    for (attack, knowledge), entries in counted.groupby(["attack", "knowledge"]):
        above = [
            resamples.means(panel.stratum(entry), panel.of(HEADLINE, [entry])[0]) - floors[condition[entry]].samples
            for entry in entries.index
        ]
        line: dict[str, Any] = {"attack": attack, "knowledge": knowledge, **_facts(panel, entries)}
        line |= ends("above", resamples.interval(mean_over_known(np.array(above)), scale=None))
        line |= {"cells": len(entries), "of_cells": shape[0], "unfit": len(misfits & set(entries.index))}
        line["sets"] = 0 if line["control"] else len(setters & set(entries.index))
        line["breaks"] = ", ".join(
            sorted(set(entries.loc[[each for each in entries.index if each in broken], "defense"]))
        )
        lines.append(line)
        filled = np.full(shape, np.nan)
        filled[condition[entries.index]] = panel.profiles(list(entries.index))
        values.append(filled)
    table = pd.DataFrame(lines)
    ranked = _ranked(lines)
    games = np.array([values[number] for number in ranked]).reshape(len(ranked), *shape)
    add_ranks(table, HEADLINE, ranks_from_wins(separable(games, panel.overlaps)), ranked)
    if ratings and ranked:
        rated = pd.DataFrame(
            [ends("rating", rating) for rating in bradley_terry(games, overlaps=panel.overlaps)], index=ranked
        )
        table = table.join(rated)
    if lines:
        order = {"control": True, "rank_low": True, "rank_high": True, "above": False, "psnr": False}
        table = table.sort_values(list(order), ascending=list(order.values()), kind="stable", ignore_index=True)
    notes = [
        "dB above the floor, mean over the cells an attack ran on; ranks by paired tests on common cells "
        f"(over victims, Holm); no rank: run on under {100 * COMMON:.0f} % as many cells as the most run attack",
        *protocol(results, resamples),
        *detectable([mean_over_known(values[number]) for number in ranked], panel.overlaps),
    ]
    return Board("attacks", f"Attacks: {where_label(results)}", table, tuple(notes), separably_first(table))


def _facts(panel: Panel, entries: pd.DataFrame) -> dict[str, Any]:
    """Return an attack's means over its cells."""
    line: dict[str, Any] = {"family": entries["family"].iloc[0], "control": bool(entries["control"].iloc[0])}
    line |= {name: _mean_of_means(panel, entries, name) for name in (*AXES, *SUCCESSES)}
    line |= {name: entries[name].mean() for name in ("seconds", "gradient_evaluations", "oracle_pick")}
    return {**line, "trials": entries["images"].sum(), "failed": entries["failed"].sum()}


def _ranked(lines: list[dict[str, Any]]) -> list[int]:
    """Return the places of the attacks that ran on enough cells to be compared."""
    most = max((line["cells"] for line in lines if not line["control"]), default=0)
    return [number for number, line in enumerate(lines) if not line["control"] and line["cells"] >= COMMON * most]


def _setters(counted: pd.DataFrame) -> set[int]:
    """Return the entries that lead against their defense, above every control."""
    attacks = counted[~counted["control"]].sort_values(["mean", "attack"], ascending=[False, True], kind="stable")
    leaders = attacks.drop_duplicates([*CONTEXT, "defense"])
    return set(leaders.index[leaders["above"] > 0])


def _broken(panel: Panel, counted: pd.DataFrame) -> set[int]:
    """Return the entries separably above the floor, by `CLEAR` dB or more (paired tests, Holm over all entries)."""
    chosen = counted[~counted["control"] & (counted["above"] >= CLEAR)]
    if not len(chosen):
        return set()
    differences = []
    places = chosen[[*CONTEXT, "defense"]].itertuples(index=False, name=None)
    for entry, place in zip(chosen.index.tolist(), places, strict=True):
        differences.append(np.subtract(*panel.profiles([entry, panel.best_control(*place)])))
    sure = holm(paired_p_values(np.array(differences), panel.overlaps)) < 1 - LEVEL
    return set(chosen.index[sure])


def _mean_of_means(panel: Panel, entries: pd.DataFrame, name: str) -> float:
    if name not in panel.values:
        return math.nan
    means = mean_over_known(panel.values[name][entries.index].T)
    return float(mean_over_known(means))


def compute_board(attacks: Board) -> Board:
    """Weigh what an attack gains (dB above the floor) against what it computes (gradient evaluations)."""
    names = ["attack", "knowledge", "family", "gradient_evaluations", "seconds", *ends("above", _UNKNOWN)]
    table = attacks.table[~attacks.table["control"].astype(bool)].reindex(columns=names)
    table = table.sort_values(["gradient_evaluations", "attack"], kind="stable", ignore_index=True)
    table["front"] = pareto_front(table[["gradient_evaluations", "above"]].astype(float).to_numpy() * [1, -1])
    note = "on the front: no other attack gains as much with as few gradient evaluations of the victim's model"
    return Board("compute", attacks.title.replace("Attacks", "Compute"), table, (note,))
