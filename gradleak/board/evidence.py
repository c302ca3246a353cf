"""Evidence: which attacks a defense has faced, how well they worked, and what makes a row doubtful.

A defense looks safe for two reasons: it holds, or it was attacked badly. The second must never pay, so a row
carries what is missing: attacks it did not face, trials that failed, losses that had not settled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from .results import CONTEXT, KNOWLEDGE, UNDEFENDED, Results

CLEAR = 10.0
"""dB above the floor from which an attack has clearly worked: a tenth of the best guess's squared error."""
RECOVERED = 30.0
"""dB from which images count as recovered, whatever the losses say: a mean squared error of .001."""
FACTOR = 2.0
"""How many times one loss must exceed the other to be far above it."""
LATE = 0.1
"""Share of a loss's fall in the last tenth of its iterations above which it had not settled."""
LOST = 0.1
"""Share of failed trials of a strong attack above which a defense counts as not evaluated."""

DOUBTS: Mapping[str, str] = {
    "fit": f"a strong attack ended, or the strongest left over {100 * LOST:.0f} % of the images, with a loss over "
    f"{FACTOR:g} times that at the truth: give it more restarts, another rate or initialisation",
    "budget": f"a strong attack's loss still fell by over {100 * LATE:.0f} % at the end: give it more iterations",
    "failed": "trials failed and score the floor: run them again with more time or memory",
    "adaptive": "no attack that knows the defense was run: add one, or grant its knowledge",
    "victims": "attacks faced unequal victims or seeds: run the suites with equal `victims` and `seeds`",
}
"""Every doubt a row can carry: what it means and what to do."""

Place = tuple[str, ...]
"""A model, dataset, setting and defense."""


def losses(results: Results) -> pd.DataFrame:
    """Return the attacks that are no controls, with medians over their finished images.

    `misfit` is how far the loss at the answer exceeds the loss at the truth, relative to the latter;
    `overfit` the reverse.
    """
    rows = results.rows[["loss", "loss_at_truth", "late_progress"]].copy()
    rows["misfit"] = _misfit(results)
    rows["overfit"] = (rows["loss_at_truth"] - rows["loss"]) / rows["loss"].abs().clip(lower=1e-12)
    finished = ~results.rows["failed"]
    medians = rows[finished].groupby(results.panel.entry_of_row[finished]).median()
    entries = results.panel.entries
    return entries[~entries["control"]].join(medians, how="inner")


def _misfit(results: Results) -> pd.Series[float]:
    """Return by how much each image's loss exceeds its loss at the truth, relative to the latter."""
    truth = results.rows["loss_at_truth"]
    return (results.rows["loss"] - truth) / truth.abs().clip(lower=1e-12)


@dataclass(frozen=True)
class Extent:
    """How much of what applies to a defense in a context it has faced."""

    faced: int
    """Attacks that were run to the end, with all victims and seeds and all they may know."""
    expected: int
    """Attacks that any defense of the context faced, less those unsuited for a stored reason."""


class Evidence:
    """What is known of every attack on every defense of some results."""

    def __init__(self, results: Results):
        """Look at the attacks; controls and oracles are none."""
        entries = results.panel.entries
        self._results = results
        self._counted = entries[~entries["control"] & entries["knowledge"].isin(KNOWLEDGE)]

    @cached_property
    def extents(self) -> dict[Place, Extent]:
        """How many of the attacks that apply each defense has faced."""
        unsuited: dict[tuple[str, ...], set[str]] = {}
        noted = self._results.unsuited[[*CONTEXT, "defense", "attack", "knowledge"]]
        for *where, level in noted.itertuples(index=False, name=None):
            unsuited.setdefault(tuple(map(str, where)), set()).add(level)
        found = {}
        for names, group in self._counted.groupby(list(CONTEXT)):
            context = tuple(map(str, names))
            levels = group.groupby("attack")["knowledge"].agg(set).to_dict()
            for defense, part in group.groupby("defense"):
                place = (*context, str(defense))
                there = set(part["knowledge"])
                wanted = {attack: known & there or known for attack, known in levels.items()}
                for attack in levels:
                    less = unsuited.get((*place, str(attack)), set())
                    wanted[attack] = set() if "" in less else wanted[attack] - less
                expected = {attack for attack, known in wanted.items() if known}
                own = part.groupby("attack").agg({"knowledge": set, "complete": "all"})
                faced = {
                    attack
                    for attack, known, complete in own.itertuples(name=None)
                    if complete and wanted[attack] <= known
                }
                found[place] = Extent(len(faced & expected), len(expected))
        return found

    @cached_property
    def misfits(self) -> set[int]:
        """Entries whose loss is far above the loss at the truth and that recovered nothing."""
        table = self._losses
        return set(table.index[(table["misfit"] > FACTOR - 1) & ~(table["mean"] >= RECOVERED)])

    @cached_property
    def unread(self) -> pd.Series[float]:
        """Share of an entry's images that it neither recovered nor fitted: with another start it might."""
        rows = self._results.rows
        missed = (_misfit(self._results) > FACTOR - 1) & ~rows["failed"] & ~(rows["psnr"] >= RECOVERED)
        return missed.astype(float).groupby(self._results.panel.entry_of_row).mean()

    @cached_property
    def unsettled(self) -> set[int]:
        """Entries whose loss was still falling and that recovered nothing."""
        table = self._losses
        return set(table.index[(table["late_progress"] > LATE) & ~(table["mean"] >= RECOVERED)])

    @cached_property
    def _losses(self) -> pd.DataFrame:
        return losses(self._results)

    @cached_property
    def strong(self) -> pd.DataFrame:
        """The entries of attacks that are strong in their context.

        Those that clearly worked against a defense or set a worst case. One that lost half of its trials against
        every defense counts too: it had no chance to show what it can do.
        """
        counted = self._counted.assign(lost=self._counted["failed"] / self._counted["images"])
        key = [*CONTEXT, "attack"]
        known = counted.groupby(key).agg(above=("above", "max"), lost=("lost", "min"))
        winners = counted.sort_values("mean", ascending=False, kind="stable").drop_duplicates([*CONTEXT, "defense"])
        winning = pd.MultiIndex.from_frame(winners[key])
        strong = known.index[(known["above"] >= CLEAR) | (known["lost"] > 0.5) | known.index.isin(winning)]
        return counted[pd.MultiIndex.from_frame(counted[key]).isin(strong)]

    def is_evaluated(self, defense: str) -> bool:
        """Whether every strong attack finished its trials, but for `LOST` of them, in every context."""
        return bool((self.strong.loc[self.strong["defense"] == defense, "lost"] <= LOST).all())

    def doubts(self, defense: str, leakage: float) -> tuple[str, ...]:
        """Return the keys of `DOUBTS` for a defense whose worst case is `leakage` dB."""
        entries = self._results.panel.entries
        faced = self._counted[self._counted["defense"] == defense]
        strong = set(self.strong.index[self.strong["defense"] == defense])
        own = entries[(entries["defense"] == defense) & (entries["knowledge"] != "oracle")]
        setter = faced["mean"].idxmax() if faced["mean"].notna().any() else None
        left = setter is not None and self.unread.get(setter, 0.0) > LOST
        # Where images are recovered no better attack could change the verdict, if only how much is left.
        held = not leakage >= RECOVERED
        raised = {
            "fit": bool(left or (held and strong & self.misfits)),
            "budget": held and bool(strong & self.unsettled),
            "failed": bool(own["failed"].sum()),
            "adaptive": is_untested(faced),
            "victims": not bool(own["complete"].all()),
        }
        return tuple(doubt for doubt, given in raised.items() if given)


def is_untested(faced: pd.DataFrame) -> bool:
    """Whether no attack that uses what it knows has faced a defense, in any of its contexts."""
    # One that only looks at the model sends what it would send anyway.
    if not len(faced) or faced["defense_family"].isin((UNDEFENDED, "detection")).all():
        return False
    return not bool(faced.groupby(list(CONTEXT))["adaptive"].any().all())


def legend(doubts: set[str]) -> list[str]:
    """Return what the given doubts mean."""
    return [f"doubt {doubt}: {text}" for doubt, text in DOUBTS.items() if doubt in doubts]


def at_floor(above_low: float, recovered: float) -> bool:
    """Whether a defense stays at the floor: no attack separably above the controls, and no image recovered exactly."""
    return math.isfinite(above_low) and above_low <= 0 and not recovered > 0
