"""Results: everything that stores hold, made ready for tables.

Failed trials get the floor's score, each attack against each defense becomes one number a victim, and the
worst case over attacks is taken, with everything an interval needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..errors import GradleakError, unknown
from ..scales import CAP, METRICS, THRESHOLDS
from ..suite import UTILITY
from . import newest
from .labels import distinct
from .provenance import Provenance
from .record import STATES
from .schema import HONEST, REFUSED
from .statistics import APART, Floats, Pairs, Resamples, mean_over_known
from .store import Store

CONTEXT = ("model", "dataset", "setting")
"""What must be equal for two defenses or attacks to be compared."""
ADAPTIVE = ("parameters", "public")
"""Knowledge of the defense that an adaptive attack has."""
UTILITY_CONTEXT = ("model", "dataset")
"""What must be equal for a training to belong to an attacked model; it has a setting of its own."""
KNOWLEDGE = ("oblivious", *ADAPTIVE)
"""Knowledge that counts for the worst case; `oracle` is a ceiling."""
CONTROL = "control"
"""The family of attacks that make the floor."""
UNDEFENDED = "none"
"""The family of defenses that do nothing."""
AXES = ("psnr", "ssim", "ms_ssim", "lpips", "lpips_64", "reidentified", "label_correct")
"""The measures of leakage. Each has its own worst case, rank and interval; they are never averaged."""
HEADLINE = "psnr"
"""The axis that boards are sorted by."""
SUCCESSES = {f"success_{line.metric}_{line.value:g}": line for line in THRESHOLDS if line.metric != "reidentified"}
"""Columns of success rates, each with its stated threshold."""

UNSUITED = (*CONTEXT, "defense", "attack", "knowledge", "reason")
"""Columns of `Results.unsuited`."""

_ENTRY = (*CONTEXT, "defense", "attack", "knowledge")
_OF_ROWS = ("status", "seconds")
_CLEARLY = 2.0
"""Standard errors below the largest mean, twice over, at which an attack is not the strongest (Chernozhukov, Lee and
Rosen 2013, arXiv:0907.3503)."""


@dataclass(frozen=True)
class Results:
    """Everything measured, ready for tables: one line a cell, one line a true image with failures at the floor."""

    cells: pd.DataFrame
    """The attacks."""
    rows: pd.DataFrame
    """As `Store.rows`, with `adaptive`, `stochastic`, `failed`, `refused` (by a client that looked at the model),
    `stratum` (the victim list) and `SUCCESSES`."""
    utility: pd.DataFrame
    """Cells of models trained under a defense; their `setting` is that training's."""
    unsuited: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(UNSUITED), dtype=str))
    """Attacks that do not apply to a defense in a context, each with its reason (`UNSUITED`)."""
    checked: Mapping[str, str] = field(default_factory=dict)
    """How far cells that came in bundles were checked (`record.STATES`), by key; of others nothing is said."""

    def where(self, **labels: str | Iterable[str]) -> Results:
        """Return the part with the given labels, e.g. `where(dataset="digits", model=["mlp", "lenet"])`.

        Raises:
            GradleakError: a label is not in the results.
        """
        cells, rows, utility, unsuited = self.cells, self.rows, self.utility, self.unsuited
        for name, wanted in labels.items():
            wanted = [wanted] if isinstance(wanted, str) else list(wanted)
            for label in wanted:
                if label not in set(self.cells[name]):
                    raise unknown(name, label, set(self.cells[name]), "results")
            cells, rows = cells[cells[name].isin(wanted)], rows[rows[name].isin(wanted)]
            if name in ("defense", *UTILITY_CONTEXT):
                utility = utility[utility[name].isin(wanted)]
            if name in unsuited:
                unsuited = unsuited[unsuited[name].isin(wanted)]
        cells, rows, utility, unsuited = (part.reset_index(drop=True) for part in (cells, rows, utility, unsuited))
        return Results(cells, rows, utility, unsuited, self.checked)

    @cached_property
    def honest(self) -> Results:
        """The part in which the server sends the model as training left it."""
        return self._of_servers(False)

    @cached_property
    def malicious(self) -> Results:
        """The part in which the server changes the model. No worst case is ever taken over both parts."""
        return self._of_servers(True)

    def _of_servers(self, malicious: bool) -> Results:
        chosen = self.cells["server"].ne(HONEST) == malicious
        if chosen.all():
            return self
        cells, rows = self.cells[chosen], self.rows[self.rows["server"].ne(HONEST) == malicious]
        unsuited = self.unsuited[self.unsuited["setting"].isin(cells["setting"])]
        cells, rows, unsuited = (part.reset_index(drop=True) for part in (cells, rows, unsuited))
        return Results(cells, rows, self.utility, unsuited, self.checked)

    @cached_property
    def contexts(self) -> list[tuple[str, ...]]:
        """The (model, dataset, setting) combinations, sorted."""
        return sorted(self.cells[list(CONTEXT)].drop_duplicates().itertuples(index=False, name=None))

    @cached_property
    def panel(self) -> Panel:
        """The rows averaged to one number for each attack on each victim."""
        return Panel(self)


def read(*stores: Store, all_code: bool = False, asked: Collection[str] | None = None) -> Results:
    """Read stores into one set of results; a cell that is in several counts once, one's own before a bundle's.

    Equal labels with different options are told apart by the options that differ.

    Args:
        stores: what to read.
        all_code: also cells of code that a label no longer stands for.
        asked: only cells of these questions (`gradleak.suite.question_of`).

    Raises:
        GradleakError: there is no cell at all.
    """
    stores = tuple(sorted(stores, key=lambda store: bool(store.checked)))
    parts = [store.cells() for store in stores]
    cells = pd.concat(parts, ignore_index=True)
    if len(cells):
        cells = newest.chosen(cells, all_code, asked)
    rows = pd.concat([store.rows(part) for store, part in zip(stores, parts, strict=True)], ignore_index=True)
    if not (cells["attack_name"] != UTILITY).any():
        raise GradleakError(
            f"store {', '.join(str(store.path) for store in stores)}: holds no cell yet; fill it with `gradleak run`"
        )
    # A finished copy of a cell wins over a failed one.
    cells = cells.sort_values(["key", "status"], ascending=[True, False], kind="stable")
    cells = cells.drop_duplicates("key", ignore_index=True)
    keys = cells["key"].tolist()
    rows = rows[rows["key"].isin(set(keys))]
    rows = rows.drop_duplicates(["key", "victim", "image"], ignore_index=True)
    for group in ("attack", "defense", *CONTEXT):
        cells[group] = distinct(cells, group)
        rows[group] = rows["key"].map(dict(zip(keys, cells[group].tolist(), strict=True))).astype(str)
    for group in ("attack", "defense"):
        cells[f"{group}_family"] = _families(cells, group)
    trained = cells["attack_name"] == UTILITY
    cells, utility = cells[~trained].reset_index(drop=True), cells[trained].reset_index(drop=True)
    rows = _with_failed_cells(cells, rows)
    facts = {key: Provenance.of(fact) for key, fact in zip(cells["key"], cells["provenance"], strict=True)}
    adaptive = {key: bool(fact.adaptive) for key, fact in facts.items()}
    rows["adaptive"] = rows["key"].map(adaptive).astype(bool) & rows["knowledge"].isin(ADAPTIVE)
    rows["stochastic"] = rows["key"].map({key: bool(fact.stochastic) for key, fact in facts.items()}).astype(bool)
    rows["refused"] = rows["status"] == REFUSED
    rows["failed"] = (rows["status"] != "ok") & ~rows["refused"]
    rows["stratum"] = rows["dataset"] + "/" + rows["batch_size"].astype(str)
    rows = _score_failures(rows)
    for name, line in SUCCESSES.items():
        values = rows[line.metric]
        reached = values >= line.value if METRICS[line.metric].higher_is_better else values <= line.value
        rows[name] = reached.astype(float).where(values.notna())
    return Results(cells, rows, utility, _unsuited(stores), _checked(stores))


def _checked(stores: Sequence[Store]) -> dict[str, str]:
    """Return how far cells that only bundles hold were checked; of one that is in several, the furthest."""
    found: dict[str, str] = {}
    own: set[str] = set()
    for store in stores:
        own |= set() if store.checked else set(store.statuses())
        for key, state in store.checked.items():
            found[key] = max(state, found.get(key, state), key=STATES.index)
    return {key: state for key, state in found.items() if key not in own}


def _unsuited(stores: Sequence[Store]) -> pd.DataFrame:
    """Return what the stores say of attacks that do not apply; stores that keep no such record say nothing."""
    found = [source() for source in (getattr(store, "unsuited", None) for store in stores) if source is not None]
    table = pd.concat([pd.DataFrame(columns=list(UNSUITED), dtype=str), *found], ignore_index=True)
    known: pd.DataFrame = table[list(UNSUITED)].drop_duplicates(ignore_index=True)
    return known


def _families(cells: pd.DataFrame, group: str) -> pd.Series[str]:
    """Return each cell's family; a failed cell, which may not know it, has that of its namesakes."""
    names, families = cells[f"{group}_name"], cells[f"{group}_family"]
    known = dict(zip(names[families != ""].tolist(), families[families != ""].tolist(), strict=True))
    return families.where(families != "", names.map(known)).fillna("")


def _with_failed_cells(cells: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Give each victim of a failed cell its rows, so that it counts."""
    failed = cells[cells["status"] == "failed"]
    lost = []
    for cell in failed.to_dict("records"):
        there = set(rows.loc[rows["key"] == cell["key"], "victim"])
        labels = {name: cell[name] for name in rows.columns if name in cell and name not in _OF_ROWS}
        lost += [
            {**labels, "victim": victim, "image": image, "status": "error"}
            for victim, image in itertools.product(range(cell["victims"]), range(cell["batch_size"]))
            if victim not in there
        ]
    if not lost:
        return rows
    extra = pd.DataFrame(lost).reindex(columns=rows.columns)
    numbers = [name for name in rows.columns if rows[name].dtype == float]
    extra = extra.astype(dict.fromkeys(numbers, float))
    return pd.concat([rows, extra], ignore_index=True) if len(rows) else extra


def _score_failures(rows: pd.DataFrame) -> pd.DataFrame:
    """Give failed and refused trials the score of the best control on the same image, else the nearest to it."""
    failed = rows["failed"] | rows["refused"]
    if not failed.any():
        return rows
    measured = [name for name in METRICS if rows[name].notna().any()]
    rows.loc[failed, list(METRICS)] = np.nan
    controls = rows[~failed & (rows["attack_family"] == CONTROL)]
    best = controls.groupby([*CONTEXT, "defense", "attack"])[HEADLINE].mean().reset_index()
    best = best.sort_values(HEADLINE, ascending=False).drop_duplicates([*CONTEXT, "defense"])
    floor = controls.merge(best[[*CONTEXT, "defense", "attack"]])
    image = ["victim", "image"]
    for keys in (
        [*CONTEXT, "defense", "seed", *image],
        [*CONTEXT, "defense", *image],
        [*CONTEXT, *image],
        [*CONTEXT, "defense"],
        [*CONTEXT],
    ):
        scores = floor.groupby(keys)[measured].mean().reset_index()
        found = rows.loc[failed, keys].merge(scores, on=keys, how="left")
        found.index = rows.index[failed]
        rows.loc[failed, measured] = rows.loc[failed, measured].fillna(found[measured])
    # Without any control the scale's worst end is the only floor there is.
    worst = {name: METRICS[name].worst for name in measured}
    rows.loc[failed, measured] = rows.loc[failed, measured].fillna(worst)
    return rows


class Panel:
    """Entries (one attack with one knowledge against one defense in one context) by victims.

    `entries` has one line an entry, with the headline's `victims`, `mean` and distance `above` the best control,
    in dB, and whether it is `complete`: as many trials as any in its context. PSNR is capped at `CAP` before it is
    averaged. `values[name]` is [entries, victims], the mean over a victim's images and seeds, NaN where the
    victim was not attacked. `overlaps` are the victims of lists of one dataset that share images, by their
    columns in `profiles`.
    """

    def __init__(self, results: Results):
        """Average the rows."""
        rows = results.rows
        self.clusters = {
            str(stratum): len(victims) for stratum, victims in rows.groupby("stratum")["victim"].unique().items()
        }
        grouped = rows.groupby(list(_ENTRY), sort=True)
        self.entries = grouped.agg(
            family=("attack_family", "first"),
            defense_family=("defense_family", "first"),
            stratum=("stratum", "first"),
            adaptive=("adaptive", "any"),
            stochastic=("stochastic", "any"),
            images=("image", "size"),
            failed=("failed", "sum"),
            refused=("refused", "sum"),
            seeds=("seed", "nunique"),
            seconds=("seconds", "mean"),
            gradient_evaluations=("gradient_evaluations", "mean"),
            oracle_pick=("oracle_psnr", "mean"),
        ).reset_index()
        self.entries["control"] = self.entries["family"] == CONTROL
        self._context_of = self.entries.groupby(list(CONTEXT), sort=True).ngroup().to_numpy()
        self._strata: list[str] = self.entries["stratum"].tolist()
        self.entry_of_row = grouped.ngroup().to_numpy()
        names = [name for name in (*AXES, *SUCCESSES) if rows[name].notna().any()]
        ranks = rows.groupby("stratum")["victim"].rank(method="dense").astype(int) - 1
        self.overlaps = _overlaps(rows, self._starts(), ranks)
        means = rows[names].assign(**_capped(rows)).groupby([self.entry_of_row, ranks.to_numpy()]).mean()
        entry, victim = (means.index.get_level_values(level).to_numpy() for level in (0, 1))
        self.values: dict[str, Floats] = {}
        width = max(self.clusters.values(), default=0)
        for name in names:
            table = np.full((len(self.entries), width), np.nan)
            table[entry, victim] = means[name].to_numpy()
            self.values[name] = table
        headline = self.values.get(HEADLINE, np.full((len(self.entries), width), np.nan))
        self.entries["victims"] = np.isfinite(headline).sum(axis=1)
        self.entries["mean"] = mean_over_known(self.values[HEADLINE].T) if HEADLINE in names else np.nan
        most = self.entries.groupby(list(CONTEXT))["images"].transform("max")
        self.entries["complete"] = self.entries["images"] == most
        self._controls = _controls(self.entries)
        self._means: list[float] = self.entries["mean"].tolist()
        floors = [self.floor_of(*place) for place in self.entries[[*CONTEXT, "defense"]].itertuples(index=False)]
        self.entries["above"] = self.entries["mean"] - np.array(floors, dtype=float)

    def controls(self, defenses: Iterable[tuple[str, ...]]) -> pd.DataFrame:
        """Return the entries that make the floor of defenses, each given as (model, dataset, setting, defense).

        Every control of the context counts, whichever defense it was run on: it reads nothing of the message, so a
        defense that it was not run on, or failed on, takes the entry of another. One that failed is no floor.
        """
        found = {entry for place in defenses for entry in self._controls.get(place, ())}
        return self.entries.loc[sorted(found)]

    def floor_of(self, *place: str) -> float:
        """Return the best control's mean of a defense in a context, NaN where there is no control."""
        return max((self._means[entry] for entry in self._controls.get(place, ())), default=math.nan)

    def best_control(self, *place: str) -> int:
        """Return the entry of the best control of a defense in a context that has one; of equal ones the first."""
        return max(sorted(self._controls[place]), key=self._means.__getitem__)

    def by_context(self, entries: npt.NDArray[np.int_]) -> list[npt.NDArray[np.int_]]:
        """Split entries by context, the contexts in order."""
        contexts = self._context_of[entries]
        return [entries[contexts == context] for context in np.unique(contexts)]

    def of(self, name: str, entries: Sequence[int] | npt.NDArray[np.int_]) -> Floats:
        """Return the values [entries, victims] of entries of one stratum."""
        return self.values[name][np.asarray(entries), : self.clusters[self.stratum(entries[0])]]

    def stratum(self, entry: int) -> str:
        """Return the victim list of an entry."""
        return self._strata[entry]

    def profiles(self, entries: Sequence[int], name: str = HEADLINE) -> Floats:
        """Return the values of entries of any strata, all strata's victims side by side, [entries, victims]."""
        start = self._starts()
        wide = np.full((len(entries), sum(self.clusters.values())), np.nan)
        for line, entry in enumerate(entries):
            values = self.of(name, [entry])[0]
            first = start[self.stratum(entry)]
            wide[line, first : first + len(values)] = values
        return wide

    def _starts(self) -> dict[str, int]:
        """Return the first column of each list of victims, all lists side by side."""
        return dict(zip(self.clusters, itertools.accumulate(self.clusters.values(), initial=0), strict=False))


def _capped(rows: pd.DataFrame) -> dict[str, pd.Series[float]]:
    """Return PSNR with everything that is exact to 8 bits counted as just that."""
    return {HEADLINE: rows[HEADLINE].clip(upper=CAP)} if rows[HEADLINE].notna().any() else {}


def _controls(entries: pd.DataFrame) -> dict[tuple[str, ...], list[int]]:
    """Return the entries of the controls for every (model, dataset, setting, defense)."""
    usable = entries[entries["control"] & (entries["failed"] == 0) & entries["complete"] & entries["mean"].notna()]
    usable = usable.sort_values(["mean", "defense"], ascending=[False, True], kind="stable")
    own: dict[tuple[str, ...], dict[str, int]] = {}
    anyones: dict[tuple[str, ...], dict[str, int]] = {}
    names = [*CONTEXT, "defense", "attack"]
    for entry, (*context, defense, attack) in zip(
        usable.index, usable[names].itertuples(index=False, name=None), strict=True
    ):
        own.setdefault((*context, defense), {}).setdefault(attack, int(entry))
        anyones.setdefault(tuple(context), {}).setdefault(attack, int(entry))
    places = entries[[*CONTEXT, "defense"]].drop_duplicates().itertuples(index=False, name=None)
    return {place: list((anyones.get(place[:-1], {}) | own.get(place, {})).values()) for place in places}


def _overlaps(rows: pd.DataFrame, starts: Mapping[str, int], ranks: pd.Series[int]) -> Pairs:
    """Return the pairs of victims that share images: lists of all batch sizes are cut from one order of images."""
    if rows["stratum"].nunique() == rows["dataset"].nunique():
        return APART
    columns = rows["stratum"].map(starts) + ranks
    places = rows["victim"] * rows["batch_size"] + rows["image"]
    seen = pd.DataFrame({"dataset": rows["dataset"], "place": places, "column": columns}).drop_duplicates()
    pairs = seen.merge(seen, on=["dataset", "place"])[["column_x", "column_y"]]
    found: Pairs = pairs[pairs["column_x"] < pairs["column_y"]].drop_duplicates().to_numpy()
    return found


@dataclass(frozen=True)
class Worst:
    """The worst case over entries, averaged over contexts."""

    samples: Floats
    """Sample array, see `Resamples`; all NaN where nothing was measured."""
    winners: tuple[int, ...]
    """The entry that attained it in each context."""
    luck: Floats
    """Sample array of the largest deviation, towards more leakage, of the entries that may be the strongest."""

    @property
    def estimate(self) -> float:
        """The number itself."""
        return float(self.samples[0])


def worst_case(panel: Panel, resamples: Resamples, entries: pd.DataFrame, name: str) -> Worst:
    """Return the strongest of some entries in each context, on one axis; the maximum is taken in every resample."""
    unknown_yet = np.full(resamples.size, np.nan)
    if name not in panel.values:
        return Worst(unknown_yet, (), unknown_yet)
    sign = 1.0 if higher_leaks(name) else -1.0
    contexts, winners, luck = [], [], []
    for index in panel.by_context(entries.index.to_numpy()):
        values = sign * panel.of(name, index)
        with_values = np.isfinite(values).any(axis=1)
        if not with_values.any():
            continue
        index, values = index[with_values], values[with_values]
        leader = int(np.argmax(mean_over_known(values.T)))
        # An entry that is no better on any victim can win in no resample.
        rivals = ~(values <= values[leader]).all(axis=1)
        rivals[leader] = True
        means = resamples.means(panel.stratum(index[0]), values[rivals])
        contexts.append(sign * np.fmax.reduce(means, axis=0))
        winners.append(int(index[leader]))
        luck.append(luck_of(means, resamples))
    if not contexts:
        return Worst(unknown_yet, (), unknown_yet)
    return Worst(np.mean(contexts, axis=0), tuple(winners), np.mean(luck, axis=0))


def luck_of(means: Floats, resamples: Resamples) -> Floats:
    """Return what the largest of several means owes to luck: the largest deviation [S] among means [K, S].

    Means that are clearly below the largest do not count.
    """
    deviations = means - means[:, :1]
    errors = resamples.errors(deviations)
    contenders = means[:, 0] + 2 * _CLEARLY * errors >= np.nanmax(means[:, 0])
    largest: Floats = np.fmax.reduce(deviations[contenders], axis=0)
    return largest


def higher_leaks(name: str) -> bool:
    """Return whether a higher value of an axis or success rate means more leakage."""
    return name not in METRICS or METRICS[name].higher_is_better
