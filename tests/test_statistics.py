from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradleak.board.results import luck_of
from gradleak.board.statistics import (
    APART,
    Floats,
    Resamples,
    bradley_terry,
    detectable_difference,
    effective_trials,
    holm,
    mean_over_known,
    paired_p_values,
    pareto_front,
    ranks_from_draws,
    ranks_from_wins,
    separable,
    widening,
    wilson,
)

TRIALS = 1500
finite = st.floats(-100, 100).map(lambda value: round(value, 3))


def samples_of(resamples: Resamples, values: Floats) -> Floats:
    return resamples.means("all", values)


def draw(kind: str, random: np.random.Generator, *shape: int) -> Floats:
    """Values of mean zero: normal, right-skewed, or of two humps as a DLG-like success or failure gives."""
    if kind == "normal":
        return random.normal(scale=4, size=shape)
    if kind == "skewed":
        return random.gamma(4, 1.5, size=shape) - 6
    return np.where(random.random(shape) < 0.4, 30.0, 10.0) - 18 + random.normal(size=shape)


def coverage_of_a_mean(kind: str, clusters: int) -> float:
    random = np.random.default_rng(1)
    resamples = Resamples({"all": clusters}, count=1000)
    samples = samples_of(resamples, draw(kind, random, TRIALS, clusters))
    intervals = [resamples.interval(sample, scale=None) for sample in samples]
    return float(np.mean([interval.low <= 0 <= interval.high for interval in intervals]))


@pytest.mark.parametrize("kind", ["normal", "skewed", "two humps"])
def test_intervals_of_a_mean_cover_the_truth_95_times_in_100(kind: str) -> None:
    assert 0.93 <= coverage_of_a_mean(kind, clusters=32) <= 0.97


@pytest.mark.parametrize("kind", ["normal", "skewed", "two humps"])
def test_intervals_of_few_clusters_are_rather_too_wide_than_too_narrow(kind: str) -> None:
    # Sixteen outcomes of two humps are nearly a count, whose coverage moves in steps: 97.5 % here.
    assert 0.93 <= coverage_of_a_mean(kind, clusters=16) <= 0.98


@pytest.mark.parametrize("means", [(0.0, -1.0, -2.0), (0.0, -3.0, -3.0, -5.0)])
def test_intervals_of_a_maximum_cover_the_truth_95_times_in_100(means: tuple[float, ...]) -> None:
    # Attacks share their victims, whose difficulty makes half of the variance.
    random = np.random.default_rng(2)
    resamples = Resamples({"all": 32}, count=1000)
    covered = 0
    for _ in range(TRIALS):
        noise = draw("normal", random, 1, 32) + draw("normal", random, len(means), 32)
        worst = samples_of(resamples, noise / math.sqrt(2) + np.array(means)[:, None]).max(axis=0)
        interval = resamples.interval(worst, maximum=True, scale=None)
        covered += interval.low <= 0 <= interval.high
    assert 0.93 <= covered / TRIALS <= 0.97


def humps(chance: float, random: np.random.Generator, attacks: int, seeds: int = 1) -> Floats:
    """Sixteen victims whose images are recovered (54 dB) or not (15 dB), by luck of their own for every attack."""
    hit = random.binomial(seeds, chance, size=(attacks, 16)) / seeds
    return hit * 54 + (1 - hit) * (15 + 2 * random.normal(size=(attacks, 16)))


@pytest.mark.parametrize(
    ("chance", "attacks", "seeds"),
    [(0.03, 1, 1), (0.06, 1, 1), (0.94, 1, 1), (0.06, 1, 3), (0.94, 6, 1), (0.38, 6, 1), (0.38, 20, 1)],
)
def test_intervals_cover_where_victims_are_recovered_or_not(chance: float, attacks: int, seeds: int) -> None:
    # Without the width for what stayed unseen and for luck, 0 to 75 in 100.
    random = np.random.default_rng(4)
    resamples = Resamples({"all": 16}, count=500)
    truth, covered = chance * 54 + (1 - chance) * 15, 0
    for _ in range(300):
        means = samples_of(resamples, humps(chance, random, attacks, seeds))
        interval = resamples.interval(
            means.max(axis=0), maximum=True, scale=(11.0, 54.0), luck=luck_of(means, resamples)
        )
        covered += interval.low <= truth + 1e-9 and truth <= interval.high + 1e-9
    assert covered / 300 >= 0.93


@pytest.mark.parametrize(("attacks", "shared"), [(1, 0.0), (5, 0.8), (20, 0.8), (20, 0.3), (20, 0.0)])
def test_intervals_of_the_best_of_equal_attacks_cover(attacks: int, shared: float) -> None:
    random = np.random.default_rng(5)
    resamples = Resamples({"all": 16}, count=500)
    covered, widths = np.zeros(2), []
    for _ in range(300):
        own, common = random.normal(size=(attacks, 16)), random.normal(size=16)
        means = samples_of(resamples, 20 + 4 * (math.sqrt(shared) * common + math.sqrt(1 - shared) * own))
        worst, luck = means.max(axis=0), luck_of(means, resamples)
        for place, each in enumerate((luck, None)):
            interval = resamples.interval(worst, maximum=True, scale=None, luck=each)
            covered[place] += interval.low <= 20 <= interval.high
        widths.append(interval.high - interval.low)
    assert (covered / 300 >= 0.92).all()
    # One attack alone has Student's interval of 4.3 dB.
    assert np.mean(widths) < 8


def test_an_outcome_never_seen_is_not_ruled_out() -> None:
    resamples = Resamples({"all": 16}, count=200)
    none, all_of_them = (resamples.interval(samples_of(resamples, np.full(16, level))) for level in (0.0, 54.0))
    assert (none.low, none.estimate) == (0, 0) and none.high == pytest.approx(54 * (1 - 0.05 ** (1 / 16)))
    assert all_of_them.high == 54 and all_of_them.low == pytest.approx(54 * 0.05 ** (1 / 16))


def test_intervals_over_strata_cover_the_mean_of_their_means() -> None:
    random = np.random.default_rng(3)
    resamples = Resamples({"digits": 16, "photos": 24}, count=1000)
    covered = 0
    for _ in range(TRIALS):
        digits = resamples.means("digits", draw("normal", random, 16) + 5)
        photos = resamples.means("photos", draw("two humps", random, 24) - 5)
        interval = resamples.interval((digits + photos) / 2, scale=None)
        covered += interval.low <= 0 <= interval.high
    assert 0.93 <= covered / TRIALS <= 0.97


@pytest.mark.parametrize("sizes", [(1, 2), (1, 4), (1, 2, 4)])
def test_lists_that_share_images_cover_only_if_that_counts(sizes: tuple[int, ...]) -> None:
    # A victim's outcome is the mean difficulty of its images; the lists of all batch sizes start at one image.
    random = np.random.default_rng(5)
    clusters = {str(size): 32 for size in sizes}
    starts = {size: 32 * place for place, size in enumerate(sizes)}
    pairs = {
        (starts[small] + image // small, starts[large] + image // large)
        for small, large in itertools.combinations(sizes, 2)
        for image in range(32 * small)
    }
    naive = Resamples(clusters, count=1000)
    aware = Resamples(clusters, count=1000, overlaps=np.array(sorted(pairs)))
    covered = np.zeros(2)
    for _ in range(600):
        images = draw("normal", random, 32 * max(sizes))
        lists = [images[: 32 * size].reshape(32, size).mean(axis=1) for size in sizes]
        for place, resamples in enumerate((naive, aware)):
            samples = [resamples.means(str(size), values) for size, values in zip(sizes, lists, strict=True)]
            interval = resamples.interval(np.mean(samples, axis=0), scale=None)
            covered[place] += interval.low <= 0 <= interval.high
    assert covered[0] / 600 < 0.925
    assert 0.93 <= covered[1] / 600 <= 0.98


def test_widening_is_the_covariance_of_what_is_shared() -> None:
    random = np.random.default_rng(6)
    first, second = random.normal(size=(2, 200_000))
    shared = np.concatenate([first, (first + second) / math.sqrt(2)])
    pairs = np.stack([np.arange(200_000), np.arange(200_000) + 200_000], axis=1)
    # Variances 1 and 1, covariance sqrt(1/2): of the sum 2 + sqrt(2) instead of 2.
    assert widening(shared, pairs) == pytest.approx(math.sqrt(1 + math.sqrt(0.5)), abs=0.01)
    assert widening(shared, APART) == 1
    assert widening(np.concatenate([first, -first]), pairs) == 1
    assert widening(np.array([np.nan, 1.0]), np.array([[0, 1]])) == 1


def test_paired_tests_of_lists_that_share_images_keep_their_level() -> None:
    random = np.random.default_rng(7)
    images = draw("normal", random, 4000, 20)
    pairs = np.stack([np.arange(20), np.arange(20) + 20], axis=1)
    twice = np.concatenate([images, images + 0.1 * random.normal(size=images.shape)], axis=1)
    assert np.mean(paired_p_values(twice) < 0.05) > 0.1
    assert 0.03 <= np.mean(paired_p_values(twice, pairs) < 0.05) <= 0.07
    once, copied = images[0] / 5 + 1, np.concatenate([images[0], images[0]]) / 5 + 1
    assert detectable_difference(copied, overlaps=pairs) == pytest.approx(detectable_difference(once), rel=0.06)
    rates = random.random(20)
    assert effective_trials(np.tile(rates, 2), 400, pairs) == pytest.approx(effective_trials(rates, 400), rel=0.06)
    games = np.stack([images[:1] + 1, images[1:2]])
    apart, joined = (bradley_terry(np.tile(games, 2), overlaps=each) for each in (APART, pairs))
    assert joined[0].high - joined[0].low > 1.1 * (apart[0].high - apart[0].low)


def test_ignoring_clusters_would_not_cover() -> None:
    # The reason for clusters: four images of a victim that share its difficulty are not four victims.
    random = np.random.default_rng(4)
    naive, clustered = Resamples({"all": 64}, count=1000), Resamples({"all": 16}, count=1000)
    covered = np.zeros(2)
    for _ in range(500):
        images = draw("normal", random, 16, 1) + random.normal(size=(16, 4))
        for place, (resamples, values) in enumerate(((naive, images.ravel()), (clustered, images.mean(axis=1)))):
            interval = resamples.interval(samples_of(resamples, values), scale=None)
            covered[place] += interval.low <= 0 <= interval.high
    assert covered[0] / 500 < 0.75
    assert covered[1] / 500 > 0.92


def test_interval_agrees_with_scipy_where_the_widening_vanishes() -> None:
    values = np.random.default_rng(5).gamma(2, 3, size=400)
    ours = Resamples({"all": 400}, count=10_000)
    interval = ours.interval(samples_of(ours, values), scale=None)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(6)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert interval.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert interval.high == pytest.approx(theirs.high, abs=0.03 * width)


@given(st.lists(finite, min_size=2, max_size=12), st.booleans())
@settings(deadline=None)
def test_interval_holds_its_estimate_and_stays_in_the_data(values: list[float], maximum: bool) -> None:
    resamples = Resamples({"all": len(values)}, count=200)
    interval = resamples.interval(samples_of(resamples, np.array(values)), maximum, scale=None)
    assert interval.estimate == pytest.approx(np.mean(values))
    assert interval.low <= interval.estimate <= interval.high
    assert interval.high <= max(values) + 1e-9
    if not maximum:
        assert interval.low >= min(values) - 1e-9


def test_no_interval_without_a_second_cluster_or_a_value() -> None:
    single = Resamples({"all": 1}, count=10)
    interval = single.interval(samples_of(single, np.array([3.0])))
    assert interval.estimate == 3 and math.isnan(interval.low) and math.isnan(interval.high)
    pair = Resamples({"all": 2}, count=10)
    assert math.isnan(pair.interval(samples_of(pair, np.full(2, np.nan))).low)


def test_means_leave_missing_clusters_out() -> None:
    resamples = Resamples({"all": 4}, count=10)
    samples = samples_of(resamples, np.array([[1.0, np.nan, 3.0, np.nan], [1.0, 2.0, 3.0, 4.0]]))
    assert samples[0, 0] == 2 and samples[1, 0] == 2.5
    assert samples[1, 1:5] == pytest.approx([3, 8 / 3, 7 / 3, 2])  # one cluster left out each


@given(st.integers(0, 40), st.integers(1, 40))
def test_wilson_is_scipys(successes: int, more: int) -> None:
    trials = successes + more
    interval = wilson(successes / trials, trials)
    reference = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_effective_trials_count_what_is_independent() -> None:
    assert effective_trials(np.array([0.0, 1.0] * 8), trials=64) == pytest.approx(15)
    assert effective_trials(np.ones(16), trials=64) == 16
    assert effective_trials(np.full(16, 0.5), trials=64) == 64
    random = np.random.default_rng(7)
    independent = random.binomial(4, 0.5, size=2000) / 4
    assert effective_trials(independent, trials=8000) == pytest.approx(8000, rel=0.1)


def test_paired_p_values_are_scipys_paired_t_test() -> None:
    random = np.random.default_rng(8)
    first, second = random.normal(0.3, 1, size=(2, 5, 30))
    second[:, :3] = np.nan
    reference = stats.ttest_rel(first, second, axis=1, nan_policy="omit").pvalue
    assert paired_p_values(first - second) == pytest.approx(np.asarray(reference))


@pytest.mark.parametrize("kind", ["normal", "skewed", "two humps"])
def test_paired_tests_keep_their_level(kind: str) -> None:
    null = paired_p_values(draw(kind, np.random.default_rng(9), 4000, 20))
    assert 0.03 <= np.mean(null < 0.05) <= 0.07


def test_paired_tests_need_many_clusters_that_differ() -> None:
    assert paired_p_values(np.zeros((1, 30)))[0] == 1
    assert paired_p_values(np.array([[1.0, np.nan, np.nan]]))[0] == 1
    assert paired_p_values(np.array([[1.0, 1.0, 1.0]]))[0] == 0.25
    few = np.zeros((1, 1000))
    few[0, :5] = 20
    assert paired_p_values(few)[0] == 2**-4
    assert paired_p_values(np.ones((1, 40)))[0] < 1e-10


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_dominates_bonferroni_and_keeps_the_order(values: list[float]) -> None:
    adjusted = holm(values)
    bonferroni = np.minimum(1, np.array(values) * len(values))
    assert (adjusted <= bonferroni + 1e-12).all() and (adjusted >= np.array(values) - 1e-12).all()
    order = np.argsort(values, kind="stable")
    assert (np.diff(adjusted[order]) >= -1e-12).all()


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_detectable_difference_is_detected_as_often_as_it_says() -> None:
    random = np.random.default_rng(10)
    spread = random.normal(0, 2, size=(2000, 24))
    smallest = np.array([detectable_difference(row) for row in spread]).mean()
    found = np.asarray(stats.ttest_1samp(spread + smallest, 0, axis=1).pvalue) < 0.05
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)
    assert math.isnan(detectable_difference(np.array([1.0, np.nan])))


@given(st.integers(2, 5), st.integers(0, 2**16))
@settings(deadline=None)
def test_equal_items_share_their_ranks(items: int, seed: int) -> None:
    row = np.random.default_rng(seed).normal(size=50)
    assert ranks_from_draws(np.tile(row, (items, 1))) == [(1, items)] * items
    values = np.tile(row, (items, 1))[:, None]
    assert ranks_from_wins(separable(values)) == [(1, items)] * items


def test_ranks_separate_what_is_separate() -> None:
    random = np.random.default_rng(11)
    draws = random.normal(size=(4, 500)) * 0.1 + np.array([3.0, 5.0, 5.0, 1.0])[:, None]
    assert ranks_from_draws(draws) == [(3, 3), (1, 2), (1, 2), (4, 4)]
    values = random.normal(size=(4, 1, 20)) * 0.1 + np.array([3.0, 5.0, 5.0, 1.0])[:, None, None]
    assert ranks_from_wins(separable(values)) == [(3, 3), (1, 2), (1, 2), (4, 4)]


def test_ranks_hold_the_true_rank_of_every_item_95_times_in_100() -> None:
    random = np.random.default_rng(12)
    means = np.array([0.0, 0.5, 1.0, 3.0])
    held = 0
    for _ in range(300):
        values = random.normal(size=(4, 1, 20)) + means[:, None, None]
        ranks = ranks_from_wins(separable(values))
        held += all(low <= true <= high for (low, high), true in zip(ranks, (4, 3, 2, 1), strict=True))
    assert held / 300 >= 0.95


def test_items_are_compared_where_both_were_run() -> None:
    # The second item looks better only because it skipped the hard condition.
    random = np.random.default_rng(13)
    values = random.normal(size=(2, 2, 20)) * 0.1 + np.array([[30.0, 10.0], [29.0, 0.0]])[:, :, None]
    values[1, 1] = np.nan
    assert mean_over_known(values[1].ravel()) > mean_over_known(values[0].ravel())
    assert ranks_from_wins(separable(values)) == [(1, 1), (2, 2)]


def test_bradley_terry_recovers_known_strengths() -> None:
    # Gumbel noise makes the chance of winning exactly logistic in the gap of the means (Luce 1959).
    random = np.random.default_rng(14)
    strength = np.array([0.0, 1.0, 2.0])
    values = random.gumbel(size=(3, 1, 4000)) + strength[:, None, None]
    ratings = bradley_terry(values, resamples=100)
    expected = 1000 + (strength - 1) * 400 / math.log(10)
    for rating, truth in zip(ratings, expected, strict=True):
        assert rating.estimate == pytest.approx(truth, abs=15)
        assert rating.low <= rating.estimate <= rating.high and rating.high - rating.low < 40


def test_bradley_terry_keeps_the_unbeaten_finite_and_the_equal_equal() -> None:
    values = np.stack([np.full((1, 12), 2.0), np.ones((1, 12)), np.ones((1, 12))])
    first, second, third = bradley_terry(values, resamples=20)
    assert math.isfinite(first.estimate) and first.estimate > second.estimate
    assert second.estimate == pytest.approx(third.estimate, abs=0.1)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=10))
def test_pareto_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    front = pareto_front(np.array(points))
    assert front.any()
    for point, on_front in zip(points, front, strict=True):
        beaten = any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points)
        assert on_front == (not beaten)


def test_points_with_unknown_costs_are_not_on_the_front() -> None:
    assert pareto_front(np.array([[1.0, 2.0], [0.0, np.nan]])).tolist() == [True, False]


def test_success_that_is_certain_counts_shared_images_once() -> None:
    twice = np.array([[i, i + 16] for i in range(16)])
    assert effective_trials(np.zeros(32), 32, twice) == effective_trials(np.ones(16), 16) == 16
    some = np.where(np.arange(32) < 4, np.nan, 0.0)  # of these, four are known through their doubles
    assert effective_trials(some, 32, twice) == 16


def test_ratings_have_no_interval_where_all_clusters_hang_together() -> None:
    values = np.random.default_rng(0).random((2, 1, 12))
    chain = np.array([[i, i + 1] for i in range(11)])
    assert all(np.isfinite(found.low) for found in bradley_terry(values))
    assert all(np.isnan(found.low) and np.isfinite(found.estimate) for found in bradley_terry(values, overlaps=chain))
