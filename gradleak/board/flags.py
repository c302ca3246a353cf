"""Flags: what makes a number unreliable, computed from the results, one line of explanation each.

After the flags of AutoAttack (Croce et al. 2021, RobustBench), for gradient inversion. A flag accuses the
evidence, not the defense: a flagged cell does not show what it seems to show.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from .evidence import CLEAR, FACTOR, LATE, RECOVERED, losses
from .leaderboard import Board
from .results import CONTEXT, KNOWLEDGE, UNDEFENDED, Results
from .statistics import LEVEL, Floats, holm, mean_over_known, paired_p_values

NEAR_FLOOR = 3.0
"""dB above the floor below which an attack has learnt next to nothing: half the best guess's squared error is left."""
MARGIN = 0.5
"""dB below which a difference is of no interest, however significant: an eighth in squared error."""
BUDGET = ("iterations", "restarts")
"""Options of attacks that only buy more computation."""
LADDER = (*KNOWLEDGE, "oracle")

FLAT = 0.01
"""Cosine distance below which an update hardly depends on its image: .0007 on an untrained convnet, .1 on lenet with
tanh, 1 on an mlp (CIFAR-10)."""

Entry = Mapping[Any, Any]


@dataclass(frozen=True)
class Flag:
    """One doubt."""

    flag: str
    """Its short name."""
    where: str
    """The cell or cells it is about."""
    why: str
    """What was seen, in one line."""


def flag_unanswered_randomness(results: Results) -> list[Flag]:
    """Flag stochastic defenses that no adaptive attack has faced: their noise fools oblivious attacks first."""
    found = []
    entries = results.panel.entries
    for labels, group in entries[~entries["control"]].groupby([*CONTEXT, "defense"]):
        undefended = (group["defense_family"] == UNDEFENDED).all()
        if group["stochastic"].any() and not group["adaptive"].any() and not undefended:
            why = "two messages of one client differ, and no attack that knows the defense has been run"
            found.append(Flag("randomness unanswered", _where(labels), why))
    return found


def flag_misfit(results: Results) -> list[Flag]:
    """Flag attacks near the floor whose loss stayed far above the loss at the truth: the optimiser is stuck."""
    attacks = losses(results)
    stuck = (attacks["misfit"] > FACTOR - 1) & (attacks["above"] < NEAR_FLOOR)
    return [
        Flag(
            "attack did not fit",
            _where(entry),
            f"median loss {entry['loss']:.3g} at its answer, {entry['loss_at_truth']:.3g} at the truth: it did "
            "not fit the message, which counts against the attack and says nothing for the defense",
        )
        for entry in attacks[stuck].to_dict("records")
    ]


def flag_wrong_model(results: Results) -> list[Flag]:
    """Flag attacks whose loss is far higher at the truth than at their answer: they model the wrong update.

    Not so where the attack knows a stochastic defense: there the noise itself hides the truth.
    """
    attacks = losses(results)
    explained = attacks["stochastic"] & attacks["adaptive"]
    wrong = (attacks["overfit"] > FACTOR - 1) & (attacks["mean"] < RECOVERED) & ~explained
    return [
        Flag(
            "truth is no minimum",
            _where(entry),
            f"median loss {entry['loss_at_truth']:.3g} at the truth, {entry['loss']:.3g} at its answer: the attack "
            "models another update than the one sent",
        )
        for entry in attacks[wrong].to_dict("records")
    ]


def flag_knowledge_inversion(results: Results) -> list[Flag]:
    """Flag attacks that do separably better with less knowledge of the defense."""
    panel = results.panel
    pairs, differences = [], []
    attacks = panel.entries[~panel.entries["control"]]
    for _, group in attacks.groupby([*CONTEXT, "defense", "attack"]):
        steps = sorted(group.index, key=lambda entry: LADDER.index(group.at[entry, "knowledge"]))
        for place, weaker in enumerate(steps):
            for stronger in steps[place + 1 :]:
                values = panel.profiles([weaker, stronger])
                pairs.append((weaker, stronger))
                differences.append(values[0] - values[1])
    found = []
    for (weaker, stronger), gain in zip(pairs, _certain_gains(differences), strict=True):
        if gain > MARGIN:
            less, more = (panel.entries.at[entry, "knowledge"] for entry in (weaker, stronger))
            why = f"{gain:.1f} dB better with knowledge {less!r} than with {more!r}: the stronger attack is broken"
            found.append(Flag("weaker knowledge wins", _where(panel.entries.loc[weaker].to_dict()), why))
    return found


def flag_failed_optimisation(results: Results) -> list[Flag]:
    """Flag defenses under which a closed form works and every optimisation fails: gradients, not data, are masked."""
    found = []
    entries = results.panel.entries
    counted = entries[~entries["control"] & entries["knowledge"].isin(KNOWLEDGE)]
    for labels, group in counted.groupby([*CONTEXT, "defense"]):
        best = group.groupby("family")["above"].max()
        closed, optimised = best.get("analytic", math.nan), best.get("optimisation", math.nan)
        if closed > CLEAR and optimised < NEAR_FLOOR:
            why = (
                f"a closed form is {closed:.1f} dB above the floor, the best optimisation {optimised:.1f} dB: "
                "the data are there, the optimisation misses them"
            )
            found.append(Flag("optimisation fails", _where(labels), why))
    return found


def flag_degenerate_message(results: Results) -> list[Flag]:
    """Flag defenses and settings whose messages are zero: nothing was sent that could leak or teach."""
    found = []
    rows = results.rows[results.rows["message_norm"].notna()]
    for labels, group in rows.groupby([*CONTEXT, "defense"]):
        empty = float((group["message_norm"] <= 1e-12).mean())
        if empty > 0:
            why = f"{100 * empty:.0f} % of the messages are zero: there is nothing to attack, and nothing learnt"
            found.append(Flag("degenerate message", _where(labels), why))
    return found


def flag_flat_landscape(results: Results) -> list[Flag]:
    """Flag contexts where another image gives nearly the same update: matching gradients tells little there."""
    found = []
    rows = results.rows[results.rows["contrast"].notna()]
    for labels, group in rows.groupby(list(CONTEXT)):
        contrast = float(group["contrast"].median())
        if contrast < FLAT:
            why = f"the updates of a victim and of the mean image differ by {contrast:.1g} in cosine distance (median)"
            found.append(Flag("flat landscape", f"all cells on {' · '.join(map(str, labels))}", why))
    return found


def flag_budget(results: Results) -> list[Flag]:
    """Flag attacks that more computation still helps: their leakage is a lower bound.

    Either a cell with a larger budget (`BUDGET`) leaks separably more than the next smaller one, or the
    loss was still falling at the end.
    """
    found = []
    panel = results.panel
    ladders = list(_budgets(results))
    gains = _certain_gains([np.subtract(*panel.profiles([larger, smaller])) for larger, smaller in ladders])
    for (larger, _), gain in zip(ladders, gains, strict=True):
        if gain > MARGIN:
            why = f"{gain:.1f} dB more than with the next smaller budget: leakage still rises with computation"
            found.append(Flag("budget-limited", _where(panel.entries.loc[larger].to_dict()), why))
    named = {flag.where for flag in found}
    attacks = losses(results)
    moving = (attacks["late_progress"] > LATE) & (attacks["mean"] < RECOVERED)
    for entry in attacks[moving].to_dict("records"):
        if _where(entry) not in named:
            share = 100 * entry["late_progress"]
            why = f"{share:.0f} % of the loss's fall came in the last tenth of the iterations: it had not settled"
            found.append(Flag("budget-limited", _where(entry), why))
    return found


FLAGS: tuple[Callable[[Results], list[Flag]], ...] = (
    flag_unanswered_randomness,
    flag_misfit,
    flag_wrong_model,
    flag_knowledge_inversion,
    flag_failed_optimisation,
    flag_degenerate_message,
    flag_flat_landscape,
    flag_budget,
)


def flags(results: Results) -> list[Flag]:
    """Return every flag that the results raise."""
    return [flag for raise_flags in FLAGS for flag in raise_flags(results)]


def flag_board(results: Results) -> Board:
    """Return the flags as a board."""
    table = pd.DataFrame([asdict(flag) for flag in flags(results)], columns=["flag", "where", "why"])
    notes = () if len(table) else ("no flag raised",)
    return Board("flags", "Doubts", table, notes)


def _certain_gains(differences: list[Floats]) -> Floats:
    """Return mean paired differences, zero where they are not separable (Holm over all)."""
    if not differences:
        return np.zeros(0)
    stacked = np.array(differences)
    settled = holm(paired_p_values(stacked)) < 1 - LEVEL
    means: Floats = np.where(settled, mean_over_known(stacked.T), 0.0)
    return means


def _budgets(results: Results) -> Iterator[tuple[int, int]]:
    """Yield pairs (larger, next smaller budget) of entries that differ in nothing else; the largest of each."""
    labels = [*CONTEXT, "defense", "attack", "knowledge"]
    configs: dict[tuple[str, ...], Mapping[str, Any]] = {
        tuple(cell[name] for name in labels): cell["config"]["attack"] for cell in results.cells.to_dict("records")
    }
    entries = results.panel.entries
    families: dict[str, list[tuple[float, int]]] = {}
    for number, entry in zip(entries.index, entries[labels].itertuples(index=False, name=None), strict=True):
        attack = configs[entry]
        options = attack.get("options") or {}
        rest = {name: value for name, value in options.items() if name not in BUDGET}
        budget = math.prod(float(options[name]) for name in BUDGET if options.get(name) is not None)
        place = [*(label for name, label in zip(labels, entry, strict=True) if name != "attack"), attack["name"], rest]
        families.setdefault(json.dumps(place, sort_keys=True), []).append((budget, int(number)))
    for members in families.values():
        ordered = sorted(members)
        if len(ordered) > 1 and ordered[-1][0] > ordered[-2][0]:
            yield ordered[-1][1], ordered[-2][1]


def _where(labels: Any) -> str:
    """Name a cell (an entry) or all cells of a defense in a context (its labels)."""
    if isinstance(labels, tuple):
        *context, defense = labels
        return f"{defense} on {' · '.join(context)}"
    knowledge = "" if labels["knowledge"] == KNOWLEDGE[0] else f" ({labels['knowledge']})"
    context = [labels[name] for name in CONTEXT]
    return f"{labels['attack']}{knowledge} against {labels['defense']} on {' · '.join(context)}"
