"""The leaderboard: results become tables that say which defense holds, and how sure that is.

A defense is as good as its worst case over attacks and over what the attacker may know of it, short of its
private randomness (the oracle, a ceiling). The floor is the best control, an attack that reads nothing from
the victim's message; a trial that failed scores the floor.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

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
    ENOUGH,
    LEVEL,
    RESAMPLES,
    Floats,
    Interval,
    Pairs,
    Resamples,
    bradley_terry,
    detectable_difference,
    effective_trials,
    mean_over_known,
    over_seeds,
    pareto_front,
    ranks_from_draws,
    ranks_from_wins,
    separable,
    wilson,
)

_UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Board:
    """One table of results; `table` is for machines, `report` writes it for people."""

    name: str
    """Kind of board: defenses, attacks, pareto, compute or flags."""
    title: str
    table: pd.DataFrame
    notes: tuple[str, ...] = ()
    """The protocol and what a reader must know."""
    strong: frozenset[int] = frozenset()
    """Positions of the rows that are separably first."""


def defense_board(results: Results) -> Board:
    """Rank defenses by their worst case over attacks, the safest first.

    Each axis of `AXES` has its worst case with its interval, attack, knowledge, floor and rank interval.
    `above` is the headline's distance to the floor in dB; quartiles are of the images under the headline's
    worst attack. Over several contexts worst cases are averaged context by context.
    """
    panel = results.panel
    resamples = Resamples(panel.clusters, overlaps=panel.overlaps)
    attacks = panel.entries[~panel.entries["control"] & panel.entries["knowledge"].isin(KNOWLEDGE)]
    lines, samples, profiles = [], dict[str, list[Floats]]((axis, []) for axis in AXES), []
    for defense, faced in attacks.groupby("defense"):
        controls = panel.entries[panel.entries["control"] & (panel.entries["defense"] == defense)]
        worst = {axis: worst_case(panel, resamples, faced, axis) for axis in AXES}
        floor = {axis: worst_case(panel, resamples, controls, axis) for axis in AXES}
        line: dict[str, Any] = {"defense": defense, "family": faced["defense_family"].iloc[0]}
        for axis in AXES:
            samples[axis].append(worst[axis].samples)
            line |= _ends(axis, resamples.interval(worst[axis].samples, maximum=True))
            line[f"{axis}_attack"] = _tally(panel.entries.loc[list(worst[axis].winners), "attack"])
            line[f"{axis}_knowledge"] = _tally(panel.entries.loc[list(worst[axis].winners), "knowledge"])
            line[f"{axis}_floor"] = floor[axis].estimate
        headline = worst[HEADLINE]
        above = headline.samples - floor[HEADLINE].samples
        line |= _ends("above", resamples.interval(above, maximum=True))
        line |= _quartiles(results, headline.winners)
        line |= _ladder(panel, resamples, faced, str(defense))
        for name in SUCCESSES:
            line |= _ends(name, _success(panel, worst_case(panel, resamples, faced, name), name))
        line |= _price(results.cells[results.cells["defense"] == defense])
        line |= _utility(results, str(defense))
        line |= _extent(results, faced)
        untested = line["family"] != UNDEFENDED and line["adaptive_contexts"] < line["contexts"]
        badges = {"not adaptively tested": untested, "unequal victims": _is_unequal(panel, str(defense))}
        line["badges"] = ", ".join(badge for badge, given in badges.items() if given)
        lines.append(line)
        profiles.append(mean_over_known(panel.profiles(headline.winners)))
    table = pd.DataFrame(lines)
    for axis in AXES:
        leaks = np.array(samples[axis]) * (1 if higher_leaks(axis) else -1)
        measured = [number for number, leak in enumerate(leaks) if np.isfinite(leak[0])]
        ranks = ranks_from_draws(-resamples.draws(leaks[measured])) if measured else []
        _add_ranks(table, axis, ranks, measured)
    table, strong = _sorted(table, HEADLINE, ascending=True)
    notes = [
        f"worst case over attacks and knowledge {', '.join(KNOWLEDGE)}; mean over victims; "
        "failed trials score the floor",
        *_protocol(results, resamples),
        *_detectable(profiles, panel.overlaps),
        *_trainings(results),
        *_doubts(table),
    ]
    return Board("defenses", f"Defenses: {_where(results)}", table, tuple(notes), strong)


def attack_board(results: Results, ratings: bool = False) -> Board:
    """Rank attacks, with the knowledge they had, by their mean distance to the floor over defenses and contexts.

    Ranks come from paired tests on the cells that both attacks ran on, Holm-corrected over all pairs.
    Controls stand below, unranked. With `ratings`, a Bradley-Terry rating is added, every victim a game.
    """
    panel = results.panel
    resamples = Resamples(panel.clusters, overlaps=panel.overlaps)
    counted = panel.entries[panel.entries["knowledge"].isin(KNOWLEDGE) | panel.entries["control"]]
    condition = counted.groupby([*CONTEXT, "defense"]).ngroup()
    floors = {
        number: worst_case(panel, resamples, group[group["control"]], HEADLINE)
        for number, group in counted.groupby(condition)
    }
    shape = (condition.nunique(), sum(panel.clusters.values()))
    lines, values = [], []
    for (attack, knowledge), entries in counted.groupby(["attack", "knowledge"]):
        above = [
            resamples.means(panel.stratum(entry), panel.of(HEADLINE, [entry])[0]) - floors[condition[entry]].samples
            for entry in entries.index
        ]
        line: dict[str, Any] = {
            "attack": attack,
            "knowledge": knowledge,
            "family": entries["family"].iloc[0],
            "control": bool(entries["control"].iloc[0]),
        }
        line |= _ends("above", resamples.interval(mean_over_known(np.array(above))))
        for name in (*AXES, *SUCCESSES):
            line[name] = _mean_of_means(panel, entries, name)
        line["cells"], line["of_cells"] = len(entries), shape[0]
        for name in ("seconds", "gradient_evaluations", "oracle_pick"):
            line[name] = entries[name].mean()
        line["trials"], line["failed"] = entries["images"].sum(), entries["failed"].sum()
        lines.append(line)
        filled = np.full(shape, np.nan)
        filled[condition[entries.index]] = panel.profiles(list(entries.index))
        values.append(filled)
    table = pd.DataFrame(lines)
    ranked = [number for number, line in enumerate(lines) if not line["control"]]
    games = np.array([values[number] for number in ranked]).reshape(len(ranked), *shape)
    _add_ranks(table, HEADLINE, ranks_from_wins(separable(games, panel.overlaps)), ranked)
    if ratings and ranked:
        rated = pd.DataFrame(
            [_ends("rating", rating) for rating in bradley_terry(games, overlaps=panel.overlaps)], index=ranked
        )
        table = table.join(rated)
    if lines:
        order = {"control": True, "above": False, "psnr": False}
        table = table.sort_values(list(order), ascending=list(order.values()), kind="stable", ignore_index=True)
    notes = [
        "dB above the floor, mean over the cells an attack ran on; ranks by paired tests on common cells "
        "(over victims, Holm)",
        *_protocol(results, resamples),
        *_detectable([mean_over_known(values[number]) for number in ranked], panel.overlaps),
    ]
    return Board("attacks", f"Attacks: {_where(results)}", table, tuple(notes), _strong(table))


def pareto_board(defenses: Board) -> Board:
    """Weigh leakage (dB above the floor) against test accuracy and bytes; axes that nobody measured are left out."""
    accuracy = ["test_accuracy", "test_accuracy_low", "test_accuracy_high", "accuracy_lost"]
    names = ["defense", "above", "above_low", "above_high", *accuracy, "bytes", "epsilon", "training_epsilon", "badges"]
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


def compute_board(attacks: Board) -> Board:
    """Weigh what an attack gains (dB above the floor) against what it computes (gradient evaluations)."""
    names = ["attack", "knowledge", "family", "gradient_evaluations", "seconds", *_ends("above", _UNKNOWN)]
    table = attacks.table[~attacks.table["control"].astype(bool)].reindex(columns=names)
    table = table.sort_values(["gradient_evaluations", "attack"], kind="stable", ignore_index=True)
    table["front"] = pareto_front(table[["gradient_evaluations", "above"]].astype(float).to_numpy() * [1, -1])
    note = "on the front: no other attack gains as much with as few gradient evaluations of the victim's model"
    return Board("compute", attacks.title.replace("Attacks", "Compute"), table, (note,))


def boards(results: Results, by_context: bool = False, ratings: bool = False) -> list[Board]:
    """Return the defense and attack boards over all contexts, then, if wanted, a defense board for each context."""
    found = [defense_board(results), attack_board(results, ratings)]
    if by_context and len(results.contexts) > 1:
        for context in results.contexts:
            found.append(defense_board(results.where(**dict(zip(CONTEXT, context, strict=True)))))
    return found


def _ends(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _tally(labels: pd.Series[str]) -> str:
    """Return the labels, the commonest first, with their counts where there are several."""
    counts = sorted(labels.value_counts().items(), key=lambda pair: (-pair[1], str(pair[0])))
    return ", ".join(f"{label} {count}" if len(counts) > 1 else str(label) for label, count in counts)


def _quartiles(results: Results, winners: tuple[int, ...]) -> dict[str, float]:
    images = results.rows.loc[np.isin(results.panel.entry_of_row, winners), HEADLINE].dropna()
    shares = {"q25": 0.25, "median": 0.5, "q75": 0.75, "best": 1.0}
    return {
        f"{HEADLINE}_{name}": float(images.quantile(share)) if len(images) else math.nan
        for name, share in shares.items()
    }


def _is_unequal(panel: Panel, defense: str) -> bool:
    """Whether the attacks and controls on a defense have not all faced the same victims, in any context."""
    faced = panel.entries[(panel.entries["defense"] == defense) & (panel.entries["knowledge"] != "oracle")]
    return bool((faced.groupby(list(CONTEXT))["victims"].nunique() > 1).any())


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
        line[f"{HEADLINE}_{name}_attack"] = _tally(entries.loc[list(worst.winners), "attack"])
        line[f"{name}_contexts"] = len(worst.winners)
    return line


def _success(panel: Panel, worst: Worst, name: str) -> Interval:
    if not worst.winners:
        return _UNKNOWN
    rates = mean_over_known(panel.profiles(worst.winners, name))
    images = int(panel.entries.loc[list(worst.winners), "images"].sum())
    return wilson(worst.estimate, effective_trials(rates, images, panel.overlaps))


def _mean_of_means(panel: Panel, entries: pd.DataFrame, name: str) -> float:
    if name not in panel.values:
        return math.nan
    means = mean_over_known(panel.values[name][entries.index].T)
    return float(mean_over_known(means))


def _price(cells: pd.DataFrame) -> dict[str, Any]:
    """Return what a defense costs and guarantees; the weakest guarantee where several settings differ."""
    facts = pd.DataFrame(list(cells["provenance"]))
    names = ("bytes", "dense_bytes", "client_seconds")
    line: dict[str, Any] = {
        name: float(pd.to_numeric(facts[name]).mean()) if name in facts else math.nan for name in names
    }
    weakest = _weakest(facts.get("epsilon", []))
    line["epsilon"] = float(weakest.get("epsilon", math.nan))
    line["delta"] = float(weakest.get("delta", math.nan))
    line["accountant"] = str(weakest.get("accountant", ""))
    return line


def _weakest(guarantees: Iterable[Any]) -> Mapping[str, Any]:
    known = [fact for fact in guarantees if isinstance(fact, Mapping)]
    return max(known, key=lambda fact: float(fact["epsilon"]), default={})


def _utility(results: Results, defense: str) -> dict[str, float]:
    """Return the accuracy that training under a defense leaves, what that is below no defense, and its guarantee.

    Intervals are over seeds, each with its mean over models and datasets; without a defense the same ones count.
    """
    cells = pd.concat([results.cells, results.utility], ignore_index=True)
    facts = pd.DataFrame(list(cells["provenance"]), index=cells.index)
    cells["accuracy"] = pd.to_numeric(facts["test_accuracy"]) if "test_accuracy" in facts else math.nan
    same = [*CONTEXT, "attack", "seed"]
    own = cells[cells["defense"] == defense].groupby(same)["accuracy"].mean()
    bare = cells[cells["defense_family"] == UNDEFENDED].groupby(same)["accuracy"].mean()
    line = _ends("test_accuracy", over_seeds(own.groupby("seed").mean().to_numpy()))
    line |= _ends("accuracy_lost", over_seeds((bare - own).dropna().groupby("seed").mean().to_numpy()))
    guarantees: Iterable[Any] = facts[cells["defense"] == defense].get("training_epsilon", [])
    line["training_epsilon"] = float(_weakest(guarantees).get("epsilon", math.nan))
    return line


def _extent(results: Results, faced: pd.DataFrame) -> dict[str, int]:
    rows = results.rows[np.isin(results.panel.entry_of_row, faced.index)]
    return {
        "victims": len(rows[["stratum", "victim"]].drop_duplicates()),
        "seeds": rows["seed"].nunique(),
        "attacks": faced["attack"].nunique(),
        "contexts": len(faced[list(CONTEXT)].drop_duplicates()),
        "trials": len(rows),
        "failed": int(rows["failed"].sum()),
    }


def _add_ranks(table: pd.DataFrame, axis: str, ranks: list[tuple[int, int]], lines: list[int]) -> None:
    """Add an axis' rank interval to some lines; the others have none."""
    prefix = "rank" if axis == HEADLINE else f"{axis}_rank"
    for end, name in enumerate(("low", "high")):
        table[f"{prefix}_{name}"] = pd.Series([rank[end] for rank in ranks], index=lines, dtype="Int64")


def _sorted(table: pd.DataFrame, by: str, ascending: bool) -> tuple[pd.DataFrame, frozenset[int]]:
    if len(table):
        table = table.sort_values([by, "defense"], ascending=[ascending, True], kind="stable", ignore_index=True)
    return table, _strong(table)


def _strong(table: pd.DataFrame) -> frozenset[int]:
    if len(table) < 2 or "rank_high" not in table:
        return frozenset()
    return frozenset(int(line) for line in np.flatnonzero((table["rank_high"] == 1).fillna(False)))


def _where(results: Results) -> str:
    if len(results.contexts) == 1:
        return " · ".join(results.contexts[0])
    counts = (len({context[place] for context in results.contexts}) for place in range(len(CONTEXT)))
    parts = ", ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in zip(counts, CONTEXT, strict=True))
    return f"mean over {len(results.contexts)} contexts ({parts})"


def _protocol(results: Results, resamples: Resamples) -> list[str]:
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
        f"seeds, {RESAMPLES} resamples",
        *(shared if len(results.panel.overlaps) else []),
    ]


def _detectable(profiles: list[Floats], overlaps: Pairs) -> list[str]:
    pairs = itertools.combinations(profiles, 2)
    differences = [detectable_difference(first - second, overlaps=overlaps) for first, second in pairs]
    known = [difference for difference in differences if math.isfinite(difference)]
    if not known:
        return []
    return [f"minimum detectable difference, median over pairs: {np.median(known):.1f} dB (power 80 %)"]


def _trainings(results: Results) -> list[str]:
    """Say how the models behind the accuracies were trained."""
    recipes = {json.dumps(config["attack"]["options"], sort_keys=True) for config in results.utility["config"]}
    seeds = results.utility["seed"].nunique()
    return [
        f"accuracy: {recipe['clients']} clients, {recipe['rounds']} rounds of {recipe['batch_size']} images a client, "
        f"{recipe['local_steps']} local step(s), server rate the best of {', '.join(map(str, recipe['lr']))} on "
        f"images held out; Student's {100 * LEVEL:.0f} % interval over {seeds} seeds"
        for recipe in map(json.loads, sorted(recipes))
    ]


def _doubts(table: pd.DataFrame) -> list[str]:
    """Return what makes a whole board inconclusive."""
    if not len(table):
        return ["no attack has faced any defense yet"]
    notes = []
    if table["psnr_floor"].isna().all():
        notes.append("no control was run: there is no floor, and failed trials score the scale's worst value")
    if table["contexts"].nunique() > 1:
        notes.append("not every defense was run in every context: their means are over different contexts")
    unequal = table.loc[table["badges"].str.contains("unequal victims"), "defense"]
    if len(unequal):
        notes.append(
            f"unequal victims: not all attacks on {', '.join(unequal)} faced the same victims, so a worst case or a "
            "floor may be that of a few; run the suites with equal `victims`"
        )
    bare = table[table["family"] == UNDEFENDED]
    if (bare["above_low"] <= 0).any():
        notes.append("inconclusive: without a defense no attack is separably above the floor")
    return notes
