"""The leaderboard: results become tables that say which defense holds, and how sure that is.

A defense is as good as its worst case over attacks and over what the attacker may know of it, short of its
private randomness (the oracle, a ceiling). The floor is the best control, an attack that reads nothing from
the victim's message; a trial that failed scores the floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from ..scales import CAP, METRICS
from .attack_board import attack_board, compute_board
from .cost import accuracies, guarantees, price, trainings, utility
from .evidence import Evidence, at_floor, legend
from .record import STATES
from .results import (
    AXES,
    CONTEXT,
    HEADLINE,
    KNOWLEDGE,
    SUCCESSES,
    UNDEFENDED,
    Panel,
    Results,
    Worst,
    higher_leaks,
    worst_case,
)
from .statistics import (
    Interval,
    Resamples,
    effective_trials,
    ends,
    mean_over_known,
    pareto_front,
    ranks_from_draws,
    wilson,
)
from .tables import Board, add_ranks, detectable, protocol, separably_first, tally, where_label

__all__ = [
    "Board",
    "attack_board",
    "boards",
    "compute_board",
    "context_boards",
    "defense_board",
    "landing_board",
    "pareto_board",
]

FLOOR = "at the floor"
"""The standing of defenses that no attack separably leads above the best control."""
HEADLINE_NOTES = (
    f"PSNR: mean over victims under the worst of all attacks and controls, each image capped at {CAP:g} dB, where 8 "
    "bits are exact; sorted by it because means separate defenses where shares do not",
    f"exact: PSNR of {CAP:g} dB or more, every pixel right to 8 bits; recognisable: 20 dB or more; failed trials "
    "score the floor",
    f"{FLOOR}: no attack is separably better than the best guess that reads nothing of the message; one rank, no order",
)
"""The measure of the headline, its thresholds and why."""

_UNKNOWN = Interval(math.nan, math.nan, math.nan)


def defense_board(results: Results) -> Board:
    """Rank defenses by their worst case over attacks and controls, the safest first.

    Each axis of `AXES` has its worst case with its interval, attack, knowledge, floor and rank interval.
    `above` is the headline's distance to the floor in dB; quartiles are of the images under the headline's
    worst attack. Over several contexts worst cases are averaged context by context.

    Ranked is what faced every attack that applies, in every context, to the end. Defenses that no attack separably
    leads above the floor share one rank, in the order of the alphabet; `standing` says so, or why a row has no rank.
    A row with a doubt may lie anywhere behind its rank.
    """
    panel = results.panel
    resamples = Resamples(panel.clusters, overlaps=panel.overlaps)
    evidence = Evidence(results)
    attacks = panel.entries[~panel.entries["control"] & panel.entries["knowledge"].isin(KNOWLEDGE)]
    trained = accuracies(results)
    found = [
        _defense(results, resamples, evidence, trained, str(name), part) for name, part in attacks.groupby("defense")
    ]
    table = pd.DataFrame([line for line, _ in found])
    ranked = [number for number, (line, _) in enumerate(found) if line["standing"] in ("", FLOOR)]
    for axis in AXES:
        leaks = np.array([worst[axis].samples for _, worst in found]) * (1 if higher_leaks(axis) else -1)
        measured = [number for number in ranked if np.isfinite(leaks[number][0])]
        ranks = ranks_from_draws(-resamples.draws(leaks[measured])) if measured else []
        if axis == HEADLINE and measured:
            ranks = _honest(table.loc[measured], ranks)
        add_ranks(table, axis, ranks, measured)
    table = _ordered(table)
    notes = [
        *HEADLINE_NOTES,
        *protocol(results, resamples),
        *detectable([mean_over_known(panel.profiles(worst[HEADLINE].winners)) for _, worst in found], panel.overlaps),
        *trainings(results),
        *guarantees(results),
        *_warnings(results, table),
    ]
    return Board("defenses", f"Defenses: {where_label(results)}", table, tuple(notes), separably_first(table))


def _defense(
    results: Results,
    resamples: Resamples,
    evidence: Evidence,
    trained: pd.DataFrame,
    defense: str,
    faced: pd.DataFrame,
) -> tuple[dict[str, Any], dict[str, Worst]]:
    """Return a defense's line and its worst case on every axis."""
    panel = results.panel
    places = [(*context, defense) for context in faced[list(CONTEXT)].drop_duplicates().itertuples(index=False)]
    controls = panel.controls(places)
    guesses = pd.concat([faced, controls])
    worst = {axis: worst_case(panel, resamples, guesses, axis) for axis in AXES}
    floor = {axis: worst_case(panel, resamples, controls, axis) for axis in AXES}
    line: dict[str, Any] = {"defense": defense, "family": faced["defense_family"].iloc[0]}
    for axis in AXES:
        line |= ends(axis, _interval(panel, resamples, worst[axis], axis, floor[axis].estimate))
        line[f"{axis}_attack"] = tally(panel.entries.loc[list(worst[axis].winners), "attack"])
        line[f"{axis}_knowledge"] = tally(panel.entries.loc[list(worst[axis].winners), "knowledge"])
        line[f"{axis}_floor"] = floor[axis].estimate
    for name in SUCCESSES:
        line |= ends(name, _rate(panel, resamples, worst_case(panel, resamples, guesses, name), name))
    gain = _gain(resamples, worst_case(panel, resamples, faced, HEADLINE), floor[HEADLINE])
    line |= ends("above", Interval(*(max(0.0, end) for end in (gain.estimate, gain.low, gain.high))))
    line |= _quantiles(results, worst[HEADLINE].winners)
    line |= _landscape(results, worst[HEADLINE].winners)
    line |= _ladder(panel, resamples, faced, defense)
    line |= price(results.cells.loc[results.cells["defense"] == defense, "provenance"])
    line |= utility(trained, defense)
    line |= _extent(results, faced, len(controls.groupby(list(CONTEXT))))
    extents = [evidence.extents[place] for place in places]
    line["attacks_faced"] = sum(extent.faced for extent in extents)
    line["attacks_expected"] = sum(extent.expected for extent in extents)
    line["doubt"] = " ".join(evidence.doubts(defense, line[HEADLINE]))
    line["checked"] = _checked(results, defense)
    line["standing"] = _standing(line, len(results.contexts), evidence.is_evaluated(defense), gain)
    return line, worst


def _standing(line: Mapping[str, Any], contexts: int, evaluated: bool, gain: Interval) -> str:
    """Say why a defense has no rank, or that it stays at the floor; nothing where neither holds."""
    if line["floors"] < line["contexts"]:
        return "no floor"
    if not evaluated:
        return "not evaluated"
    if line["attacks_faced"] < line["attacks_expected"]:
        return f"{line['attacks_faced']} of {line['attacks_expected']} attacks"
    if line["contexts"] < contexts:
        return f"{line['contexts']} of {contexts} contexts"
    recovered = any(line[name] > 0 for name, success in SUCCESSES.items() if success.value == CAP)
    return FLOOR if at_floor(gain.low, recovered) else ""


def _checked(results: Results, defense: str) -> str:
    """Return how far the least checked cell of a defense was checked; nothing if none came in a bundle."""
    if not results.checked:
        return ""
    keys = results.cells.loc[results.cells["defense"] == defense, "key"].tolist()
    states = [results.checked[key] for key in keys if key in results.checked]
    return min(states, key=STATES.index, default="")


def _honest(lines: pd.DataFrame, ranks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Tie what stays at the floor, put the rest behind it, and let doubtful lines lie anywhere behind their rank."""
    held = int((lines["standing"] == FLOOR).sum())
    found = []
    for (low, high), standing, doubt in zip(ranks, lines["standing"], lines["doubt"], strict=True):
        low, high = (1, held) if standing == FLOOR else (max(low, held + 1), max(high, held + 1))
        found.append((low, len(lines) if doubt else high))
    return found


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Sort: at the floor by name, doubtful ones last; then the other ranked ones, then those without a rank."""
    if not len(table):
        return table
    held, unranked = table["standing"] == FLOOR, table["rank_low"].isna()
    keys = {
        "group": np.select([held & (table["doubt"] == ""), held, ~unranked], [0, 1, 2], 3),
        "leakage": table[HEADLINE].where(~held, 0.0),
        "name": table["defense"],
    }
    order = pd.DataFrame(keys).sort_values(list(keys), kind="stable").index
    return table.loc[order].reset_index(drop=True)


def pareto_board(defenses: Board) -> Board:
    """Weigh leakage (dB above the floor) against test accuracy and bytes; axes that nobody measured are left out."""
    accuracy = ["test_accuracy", "test_accuracy_low", "test_accuracy_high", "accuracy_lost"]
    names = ["defense", "above", "above_low", "above_high", *accuracy, "bytes", "epsilon", "training_epsilon"]
    names += ["standing", "doubt"]
    table = defenses.table.reindex(columns=names)
    measured = [name for name in ("above", "test_accuracy", "bytes") if table[name].notna().any()]
    costs = table[measured].astype(float).to_numpy(copy=True)
    if "test_accuracy" in measured:
        costs[:, measured.index("test_accuracy")] *= -1
    table["front"] = pareto_front(costs) if measured else False
    words = {"above": "leakage", "test_accuracy": "accuracy", "bytes": "bytes"}
    axes = ", ".join(words[name] for name in measured)
    note = f"on the front: no other defense is at least as good in {axes} and better in one"
    return Board("pareto", defenses.title.replace("Defenses", "Trade-off"), table, (note,))


def landing(results: Results) -> Results:
    """Return what a first table shows: all contexts where every defense is in each, else the one with the most.

    Ties go to the context with more attacks, then to the first by name.
    """
    entries = results.panel.entries
    faced = entries[~entries["control"]].groupby(list(CONTEXT))
    extents = faced.agg(defenses=("defense", "nunique"), attacks=("attack", "nunique")).reset_index()
    if len(extents) < 2 or (extents["defenses"] == entries.loc[~entries["control"], "defense"].nunique()).all():
        return results
    extents = extents.sort_values(["defenses", "attacks", *CONTEXT], ascending=[False, False, True, True, True])
    return results.where(**{name: str(extents[name].iloc[0]) for name in CONTEXT})


def boards(results: Results, by_context: bool = False, ratings: bool = False) -> list[Board]:
    """Return the landing defense board and the attack board, then, if wanted, the defense board of every context.

    A context with a single defense has nothing to compare and no board.
    """
    found = [landing_board(results), attack_board(results, ratings)]
    return [*found, *context_boards(results)] if by_context else found


def landing_board(results: Results) -> Board:
    """Return the defense board of `landing`; where that is one of several contexts, a note says so."""
    part = landing(results)
    board = defense_board(part)
    if len(part.contexts) == len(results.contexts):
        return board
    note = f"1 of {len(results.contexts)} contexts, that with the most defenses; the others have boards of their own"
    return replace(board, notes=(note, *board.notes))


def context_boards(results: Results) -> list[Board]:
    """Return the defense board of every context with several defenses, if there are several contexts."""
    if len(results.contexts) < 2:
        return []
    entries = results.panel.entries
    counts = entries[~entries["control"]].groupby(list(CONTEXT))["defense"].nunique()
    contexts = [context for context in results.contexts if counts.get(context, 0) > 1]
    return [defense_board(results.where(**dict(zip(CONTEXT, context, strict=True)))) for context in contexts]


def _interval(panel: Panel, resamples: Resamples, worst: Worst, axis: str, floor: float) -> Interval:
    """Return a worst case with its interval: at worst a victim tells what the floor tells, at best everything."""
    if METRICS[axis].is_rate:
        return _rate(panel, resamples, worst, axis)
    sign = 1.0 if higher_leaks(axis) else -1.0
    low, high = METRICS[axis].worst, METRICS[axis].best
    ends_of_scale = (sign * (floor if math.isfinite(floor) else low), sign * (CAP if axis == HEADLINE else high))
    found = resamples.interval(sign * worst.samples, maximum=True, scale=ends_of_scale, luck=worst.luck)
    return found if sign > 0 else Interval(-found.estimate, -found.high, -found.low)


def _rate(panel: Panel, resamples: Resamples, worst: Worst, name: str) -> Interval:
    """Return a share with Wilson's interval over effective trials; its low end allows for the luck of the best."""
    if not worst.winners:
        return _UNKNOWN
    rates = mean_over_known(panel.profiles(worst.winners, name))
    images = int(panel.entries.loc[list(worst.winners), "images"].sum())
    trials = effective_trials(rates, images, panel.overlaps)
    found = wilson(worst.estimate, trials)
    upwards = max(0.0, float(np.nanmean(resamples.draws(worst.luck))))
    return Interval(found.estimate, wilson(max(0.0, worst.estimate - upwards), trials).low, found.high)


def _gain(resamples: Resamples, attacks: Worst, floor: Worst) -> Interval:
    """Return by how much the best attack exceeds the best control, paired."""
    control = floor.samples - floor.samples[0]
    difference = attacks.samples - floor.samples
    return resamples.interval(difference, maximum=True, scale=None, luck=attacks.luck - control)


def _quantiles(results: Results, winners: tuple[int, ...]) -> dict[str, float]:
    """Return quantiles of the images under the worst attacks, up to the most exposed ones."""
    images = results.rows[HEADLINE][np.isin(results.panel.entry_of_row, winners)].clip(upper=CAP).dropna()
    shares = {"q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "best": 1.0}
    found = images.quantile(list(shares.values())).tolist() if len(images) else [math.nan] * len(shares)
    return {f"{HEADLINE}_{name}": float(value) for name, value in zip(shares, found, strict=True)}


def _landscape(results: Results, winners: tuple[int, ...]) -> dict[str, float]:
    """Return how far the worst attacks' losses fell from the mean image's towards the truth's, and the contrast."""
    names = ["loss", "loss_at_mean", "loss_at_truth", "contrast"]
    rows = results.rows.loc[np.isin(results.panel.entry_of_row, winners), names]
    whole = rows["loss_at_mean"] - rows["loss_at_truth"]
    fit = ((rows["loss_at_mean"] - rows["loss"]) / whole).where(whole > 0)
    return {"fit": float(fit.median()), "contrast": float(rows["contrast"].median())}


def _extent(results: Results, faced: pd.DataFrame, floors: int) -> dict[str, int]:
    rows = results.rows[["stratum", "victim", "seed", "failed"]]
    rows = rows[np.isin(results.panel.entry_of_row, faced.index)]
    return {
        "victims": len(rows[["stratum", "victim"]].drop_duplicates()),
        "seeds": rows["seed"].nunique(),
        "attacks": faced["attack"].nunique(),
        "contexts": len(faced[list(CONTEXT)].drop_duplicates()),
        "floors": floors,
        "trials": len(rows),
        "failed": int(rows["failed"].sum()),
    }


def _ladder(panel: Panel, resamples: Resamples, faced: pd.DataFrame, defense: str) -> dict[str, Any]:
    """Return the headline by what the attacker knows: oblivious, adaptive, and an oracle as the ceiling."""
    entries = panel.entries
    oracle = ~entries["control"] & (entries["knowledge"] == "oracle") & (entries["defense"] == defense)
    steps = {
        "oblivious": faced[faced["knowledge"] == "oblivious"],
        "adaptive": faced[faced["adaptive"]],
        "ceiling": entries[oracle],
    }
    line: dict[str, Any] = {}
    for name, chosen in steps.items():
        worst = worst_case(panel, resamples, chosen, HEADLINE)
        line[f"{HEADLINE}_{name}"] = worst.estimate
        line[f"{HEADLINE}_{name}_attack"] = tally(entries.loc[list(worst.winners), "attack"])
        line[f"{name}_contexts"] = len(worst.winners)
    return line


def _warnings(results: Results, table: pd.DataFrame) -> list[str]:
    """Return what rows lack, and what makes a whole board inconclusive."""
    if not len(table):
        return ["no attack has faced any defense yet"]
    notes = legend(set(" ".join(table["doubt"]).split()))
    if table["psnr_floor"].isna().all():
        notes.append("no control was run: there is no floor, and failed trials score the scale's worst value")
    missing = table["standing"].str.endswith(" attacks")
    if missing.any():
        notes.append(
            f"{int(missing.sum())} of {len(table)} defenses faced fewer attacks than apply and have no rank; what "
            "does not apply needs a stored reason"
        )
    if table["standing"].str.endswith(" contexts").any():
        notes.append("not every defense was run in every context: those that were not have no rank")
    bare = table[table["family"] == UNDEFENDED]
    if (bare["above_low"] <= 0).any():
        notes.append("inconclusive: without a defense no attack is separably above the floor")
    return notes
