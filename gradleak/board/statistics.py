"""Statistics of leaderboards: intervals, ranks and tests that respect which images belong together.

A cluster is one victim batch with all its images and all its seeds: images of a batch share an update, and
the seeds of a suite attack the same frozen victims, so neither adds an independent case. Intervals
therefore speak of new victims, and of the seeds that were run. Clusters of several lists (batch sizes of one
dataset) may share images: `overlaps` names such pairs, and their covariance is added.

From 32 clusters on, 95 % intervals cover 93 to 97 % in simulations of normal, skewed and two-humped outcomes;
with 16 they cover 93 to 98 %, the excess where outcomes have two humps; below that they are too narrow. Where rare
outcomes may not have been seen at all, and for the largest of several means, an interval is widened: see
`Resamples.interval`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from ..scales import CAP

LEVEL = 0.95
"""Confidence of every interval."""
RESAMPLES = 2000
"""Bootstrap resamples behind an interval: enough for 50 draws in each of its tails."""
ENOUGH = 16
"""Clusters below which intervals are too narrow."""

_FEW = 8
"""Groups of clusters below which resampling them says nothing."""

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Pairs = npt.NDArray[np.int_]
"""Pairs [P, 2] of clusters that share images, by their places among all clusters side by side."""

APART: Pairs = np.empty((0, 2), dtype=int)
"""No two clusters share an image."""


@dataclass(frozen=True)
class Interval:
    """A point estimate with its confidence interval; both ends NaN where there is too little data."""

    estimate: float
    low: float
    high: float


def ends(name: str, interval: Interval) -> dict[str, float]:
    """Return an interval as columns of a table."""
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


class Resamples:
    """A clustered bootstrap whose draws are shared by all that is compared, so that comparisons are paired.

    Strata (datasets, say) hold their clusters and are resampled on their own. A sample array [S] has
    one entry for the data themselves, one for each cluster left out (jackknife), then one for each
    bootstrap draw. Any function of sample arrays, a maximum for instance, is again a sample array and has
    an `interval`. Clusters that share images (`overlaps`) are never left out together, so their covariance
    comes from the jackknife: bootstrap draws are stretched about the estimate by `widening`.
    """

    def __init__(self, clusters: Mapping[str, int], count: int = RESAMPLES, seed: int = 0, overlaps: Pairs = APART):
        """Draw `count` resamples of each stratum's clusters."""
        self.clusters = dict(clusters)
        self._overlaps = overlaps
        random = np.random.default_rng(seed)
        total = sum(self.clusters.values())
        self._weights: dict[str, Floats] = {}
        start = 1
        for stratum, size in self.clusters.items():
            weights = np.full((1 + total + count, size), 1 / size)
            weights[1 + total :] = random.multinomial(size, weights[0], size=count) / size
            if size > 1:
                weights[start : start + size] = (1 - np.eye(size)) / (size - 1)
            self._weights[stratum] = weights
            start += size
        self._first_draw, self._count = start, count

    @property
    def size(self) -> int:
        """Length S of a sample array."""
        return self._first_draw + self._count

    def means(self, stratum: str, values: Floats) -> Floats:
        """Mean over clusters [..., K] in every sample, [..., S]; NaN is left out, all NaN gives NaN."""
        there = np.isfinite(values)
        weights = self._weights[stratum].T
        if there.all():
            return np.asarray(values @ weights)
        totals, shares = np.where(there, values, 0.0) @ weights, there @ weights
        means: Floats = np.divide(totals, shares, out=np.full(totals.shape, np.nan), where=shares > 1e-12)
        return means

    def draws(self, samples: Floats) -> Floats:
        """Return the bootstrap part of sample arrays [..., S], [..., R]."""
        drawn = samples[..., self._first_draw :]
        if not len(self._overlaps):
            return drawn
        estimate = samples[..., :1]
        factor = widening(np.concatenate(list(self._influences(samples)), axis=-1), self._overlaps)
        stretched: Floats = estimate + factor[..., None] * (drawn - estimate)
        return stretched

    def errors(self, samples: Floats) -> Floats:
        """Return the standard errors [...] of sample arrays [..., S], by the jackknife."""
        squares = [(part**2).sum(axis=-1) for part in self._influences(samples)]
        return np.asarray(np.sqrt(np.sum(squares, axis=0)))

    def interval(
        self,
        samples: Floats,
        maximum: bool = False,
        scale: tuple[float, float] | None = (0.0, CAP),
        luck: Floats | None = None,
    ) -> Interval:
        """Bias-corrected accelerated interval of a sample array [S] (Efron 1987), widened for few clusters.

        The nominal level is stretched from normal to Student quantiles (Hesterberg 2015, arXiv:1411.5279),
        which matters below 50 clusters.

        Args:
            samples: the sample array.
            maximum: the samples are maxima over attacks: the largest of several noisy means errs upwards. The
                low end allows for `luck`, or for what the resamples show of it: they double the noise, so their
                own upward error is sqrt(2) - 1 of that of the estimate where attacks are alike.
            scale: the ends of what one cluster can score. As large a share of clusters may lie at either end as
                can stay unseen 1 time in 20: 17 % of 16. None for differences, which have no scale.
            luck: sample array [S] of the largest deviation among the attacks that may be the strongest.
        """
        estimate, draws = float(samples[0]), self.draws(samples)
        freedom = sum(size - 1 for size in self.clusters.values())
        draws = draws[np.isfinite(draws)]
        if not math.isfinite(estimate) or freedom < 1 or not len(draws):
            return Interval(estimate, math.nan, math.nan)
        below = (np.mean(draws < estimate) + np.mean(draws <= estimate)) / 2
        edge = 1 / (len(draws) + 1)
        bias = special.ndtri(np.clip(below, edge, 1 - edge))
        acceleration = self._acceleration(samples)
        reach = math.sqrt((freedom + 1) / freedom) * float(special.stdtrit(freedom, (1 + LEVEL) / 2))

        def quantile(z: float) -> float:
            shifted = bias + z
            # The bound only matters for a handful of wild clusters, where the formula would change sign.
            shifted /= max(1 - acceleration * shifted, 0.1)
            return float(np.quantile(draws, special.ndtr(bias + shifted)))

        low, high = quantile(-reach), quantile(reach)
        if maximum:
            low = min(low, estimate - self._luck(draws - estimate, reach, luck))
            high = max(high, float(np.quantile(draws, special.ndtr(reach))))
        if scale is not None:
            unseen = 1 - (1 - LEVEL) ** (1 / sum(self.clusters.values()))
            low = min(low, estimate - unseen * max(0.0, estimate - scale[0]))
            high = max(high, estimate + unseen * max(0.0, scale[1] - estimate))
        return Interval(estimate, min(low, estimate), max(high, estimate))

    def _luck(self, deviations: Floats, reach: float, luck: Floats | None) -> float:
        """Return by how much the largest of several means may exceed the largest of their true values."""
        if luck is not None:
            return float(np.quantile(self.draws(luck), special.ndtr(reach)))
        upwards = max(0.0, float(deviations.mean())) / (math.sqrt(2) - 1)
        # Twice, as the resamples see least of it where luck has put one attack far ahead.
        return 2 * upwards + reach * float(deviations.std())

    def _acceleration(self, samples: Floats) -> float:
        cubes = squares = 0.0
        for influence in self._influences(samples):
            cubes += float((influence**3).sum())
            squares += float((influence**2).sum())
        return cubes / (6 * squares**1.5) if squares > 0 else 0.0

    def _influences(self, samples: Floats) -> Iterator[Floats]:
        """Yield what each cluster adds to sample arrays [..., S], stratum by stratum, [..., K]; zeros if unknown."""
        start = 1
        for size in self.clusters.values():
            left_out = samples[..., start : start + size]
            start += size
            known = np.isfinite(left_out).all(axis=-1, keepdims=True)
            left_out = np.where(known, left_out, 0.0)
            yield (left_out.mean(axis=-1, keepdims=True) - left_out) * (size - 1) / size


def widening(added: Floats, overlaps: Pairs) -> Floats:
    """Return the factor, 1 or more, by which shared images raise the standard error of a sum over clusters.

    `added` [..., K] is what each cluster adds to the sum's deviation. Clusters that share no image are
    independent; for two that share one, the product of what they add estimates their covariance (Cameron,
    Gelbach and Miller 2011). A negative sum of products counts as none.
    """
    added = np.where(np.isfinite(added), added, 0.0)
    own = (added**2).sum(axis=-1)
    shared = 2 * (added[..., overlaps[:, 0]] * added[..., overlaps[:, 1]]).sum(axis=-1)
    share = np.divide(shared, own, out=np.zeros_like(own), where=own > 0)
    return np.asarray(np.sqrt(1 + np.maximum(share, 0.0)))


def wilson(rate: float, trials: float) -> Interval:
    """Wilson's interval of a success rate in [0, 1] over `trials`, which may be an effective, broken number.

    Wilson (1927). `effective_trials` gives the number where trials come in clusters.

    >>> found = wilson(0.0, 16)
    >>> round(found.low, 2), round(found.high, 2)
    (0.0, 0.19)
    """
    if not math.isfinite(rate) or trials <= 0:
        return Interval(rate, math.nan, math.nan)
    z = float(special.ndtri((1 + LEVEL) / 2))
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    reach = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2)) / (1 + z**2 / trials)
    return Interval(rate, min(rate, max(0.0, centre - reach)), max(rate, min(1.0, centre + reach)))


def over_seeds(values: Floats) -> Interval:
    """Return the mean of one number a seed, with Student's interval; a single seed has no interval.

    >>> found = over_seeds(np.array([1.0, 2.0, 3.0]))
    >>> round(found.low, 2), found.estimate, round(found.high, 2)
    (-0.48, 2.0, 4.48)
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(math.nan, math.nan, math.nan)
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    reach = float(special.stdtrit(len(values) - 1, (1 + LEVEL) / 2) * values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - reach, mean + reach)


def effective_trials(rates: Floats, trials: int, overlaps: Pairs = APART) -> float:
    """Number of independent trials that tell as much as `trials` trials in clusters with success `rates` [K].

    Never more than `trials`; the number of clusters where all rates are 0 or all are 1, those that share images
    counted as one. Korn and Graubard (1998).
    """
    factor = float(widening(rates - mean_over_known(rates), overlaps))
    known = np.isfinite(rates)
    rates = rates[known]
    if len(rates) < 2:
        return float(len(rates))
    rate, variance = float(rates.mean()), factor**2 * float(rates.var(ddof=1)) / len(rates)
    if rate in (0.0, 1.0):
        return float(_joined(overlaps, known)[0])
    return min(float(trials), rate * (1 - rate) / variance) if variance > 0 else float(trials)


def paired_p_values(differences: Floats, overlaps: Pairs = APART) -> Floats:
    """Two-sided p-values that paired differences [M, K] have mean zero, [M].

    Student's paired test over clusters, but never less than flipping the signs of the clusters that differ
    could give, 2^(1 - clusters): so a few large differences, as bimodal attacks make them, prove little.
    NaN clusters are left out; no difference anywhere gives 1.
    """
    differences = np.atleast_2d(differences)
    there = np.isfinite(differences)
    count, differing = there.sum(axis=1), (there & (differences != 0)).sum(axis=1)
    known = np.where(there, differences, 0.0)
    mean = known.sum(axis=1) / np.maximum(count, 1)
    squares = np.where(there, (known - mean[:, None]) ** 2, 0.0).sum(axis=1)
    error = np.sqrt(squares / np.maximum(count * (count - 1), 1))
    error = error * widening(differences - mean[:, None], overlaps)
    # Equal differences leave an error of rounding only.
    statistic = np.abs(mean) / np.maximum(error, 1e-12 * np.abs(mean) + 1e-300)
    tail = 2 * special.stdtr(np.maximum(count - 1, 1), -statistic)
    p_values: Floats = np.where(differing > 0, np.maximum(tail, 2.0 ** (1 - differing)), 1.0)
    return p_values


def holm(p_values: Sequence[float] | Floats) -> Floats:
    """Adjust p-values [M] so that any of them below 0.05 is wrong at most 1 time in 20 (Holm 1979).

    >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values)
    factors = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return adjusted


def detectable_difference(differences: Floats, power: float = 0.8, overlaps: Pairs = APART) -> float:
    """Smallest true mean difference that paired clusters [K] like these reveal with the given power.

    Two-sided test at 1 - `LEVEL`, normal theory. NaN below two clusters.
    """
    factor = float(widening(differences - mean_over_known(differences), overlaps))
    differences = differences[np.isfinite(differences)]
    count = len(differences)
    if count < 2:
        return math.nan
    quantiles = special.stdtrit(count - 1, (1 + LEVEL) / 2) + special.stdtrit(count - 1, power)
    return float(quantiles * factor * differences.std(ddof=1) / math.sqrt(count))


def ranks_from_draws(draws: Floats) -> list[tuple[int, int]]:
    """Rank interval of each item, 1 the highest, from paired bootstrap draws [M, R] of their scores.

    Equal items share the ranks they cover, so two equal leaders both have (1, 2). NaN ranks last.
    """
    scores = np.where(np.isnan(draws), -np.inf, draws)
    above = np.stack([(scores > row).sum(axis=0) for row in scores])
    level = np.stack([(scores == row).sum(axis=0) for row in scores])
    tail = (1 - LEVEL) / 2
    low = np.quantile(above + 1, tail, axis=1, method="inverted_cdf")
    high = np.quantile(above + level, 1 - tail, axis=1, method="inverted_cdf")
    return [(int(first), int(last)) for first, last in zip(low, high, strict=True)]


def ranks_from_wins(better: Bools) -> list[tuple[int, int]]:
    """Rank interval of each item from `better` [M, M]: whether the row's item separably beats the column's.

    An item's rank lies after all that beat it and before all that it beats (Mogstad et al. 2024).

    >>> ranks_from_wins(np.array([[False, False, True], [False, False, True], [False, False, False]]))
    [(1, 2), (1, 2), (3, 3)]
    """
    items = len(better)
    return [(1 + int(better[:, item].sum()), items - int(better[item].sum())) for item in range(items)]


def separable(values: Floats, overlaps: Pairs = APART) -> Bools:
    """Whether one item's mean beats another's, [M, M], by Holm-corrected paired tests over clusters.

    `values` [M, C, K] holds each item's value in each of C conditions and K clusters. Two items are compared
    where both have a value (not NaN): the mean over those conditions in each cluster, tested over clusters.
    """
    items = len(values)
    better = np.zeros((items, items), dtype=bool)
    pairs = list(itertools.combinations(range(items), 2))
    if not pairs:
        return better
    differences = np.array([mean_over_known(values[first] - values[second]) for first, second in pairs])
    settled = holm(paired_p_values(differences, overlaps)) < 1 - LEVEL
    ahead = np.nansum(differences, axis=1) > 0
    for (first, second), sure, wins in zip(pairs, settled, ahead, strict=True):
        if sure:
            better[(first, second) if wins else (second, first)] = True
    return better


def mean_over_known(values: Floats) -> Floats:
    """Mean over the first axis without its NaN entries; NaN where there is no other.

    >>> mean_over_known(np.array([[1.0, np.nan], [3.0, np.nan]])).tolist()
    [2.0, nan]
    """
    there = np.isfinite(values)
    count = there.sum(axis=0)
    total = np.where(there, values, 0.0).sum(axis=0)
    means: Floats = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return means


def bradley_terry(values: Floats, resamples: int = 200, seed: int = 0, overlaps: Pairs = APART) -> list[Interval]:
    """Ratings of M players from values [M, C, K], on the scale of chess ratings with mean 1000.

    Every condition in every cluster is a game that the higher value wins and equal values draw; NaN does
    not play. 400 points are ten to one. Half a won and half a lost game between every two players keeps an
    unbeaten player finite. Bradley and Terry (1952); percentile interval over resampled clusters, those that
    share images together. Where that leaves fewer than 8 there is no interval.
    """
    items, _, clusters = values.shape
    points = np.zeros((items, items, clusters))
    for first, second in itertools.permutations(range(items), 2):
        gap = values[first] - values[second]
        points[first, second] = ((gap > 0) + 0.5 * (gap == 0)).sum(axis=0)
    random = np.random.default_rng(seed)
    joined, member = _joined(overlaps, np.ones(clusters, dtype=bool))
    weights = random.multinomial(joined, np.full(joined, 1 / joined), size=resamples)[:, member]
    fitted = np.array([_ratings(points @ weight) for weight in (np.ones(clusters), *weights)])
    low, high = np.quantile(fitted, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    low, high = np.minimum(low, fitted[0]), np.maximum(high, fitted[0])
    if joined < min(clusters, _FEW):
        low, high = np.full_like(low, np.nan), np.full_like(high, np.nan)
    return [Interval(*map(float, ends)) for ends in zip(fitted[0], low, high, strict=True)]


def _joined(overlaps: Pairs, known: Bools) -> tuple[int, npt.NDArray[np.int_]]:
    """Number of groups of known clusters that share images, and the group of each."""
    if not len(overlaps):
        return int(known.sum()), np.arange(int(known.sum()))
    from scipy import sparse

    clusters = len(known)

    linked = sparse.coo_array((np.ones(len(overlaps)), overlaps.T), shape=(clusters, clusters)).tocsr()
    count, member = sparse.csgraph.connected_components(linked[known][:, known], directed=False)
    return int(count), np.asarray(member, dtype=int)


def _ratings(wins: Floats) -> Floats:
    items = len(wins)
    wins = wins + 0.5 * (1 - np.eye(items))

    def loss(strength: Floats) -> tuple[float, Floats]:
        gap = strength[:, None] - strength[None, :]
        chance = 1 / (1 + np.exp(-gap))
        value = (wins * np.logaddexp(0, -gap)).sum()
        slope = wins * (1 - chance)
        return float(value), slope.sum(axis=0) - slope.sum(axis=1)

    from scipy import optimize

    found: Any = optimize.minimize(loss, np.zeros(items), jac=True, method="L-BFGS-B")
    strength: Floats = found.x - found.x.mean()
    return 1000 + strength * 400 / math.log(10)


def pareto_front(costs: Floats) -> Bools:
    """Which points [M, axes], all axes the lower the better, none beats; equal points stay, NaN goes.

    >>> pareto_front(np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 3.0]])).tolist()
    [True, True, False]
    """
    known = np.atleast_1d(np.isfinite(costs).all(axis=1))
    front = known.copy()
    for item in np.flatnonzero(known):
        others = costs[known]
        beaten = (others <= costs[item]).all(axis=1) & (others < costs[item]).any(axis=1)
        front[item] = not beaten.any()
    return front
