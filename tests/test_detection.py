"""Statistics of detection: worked by hand, against slow twins, and intervals that cover."""

import itertools

import numpy as np
import pytest
from scipy import stats

from jaxdpo.analysis import detection

EXACT = 1e-12  # float64 sums of a few numbers


def orders(scores):
    """Every ranking of the tokens, lowest first, that breaks ties in some way."""
    for order in itertools.permutations(range(len(scores))):
        ranked = np.asarray(scores)[list(order)]
        if (np.diff(ranked) >= 0).all():
            yield list(order)


def slow_auroc(ranked):
    pairs = [(i, j) for i, one in enumerate(ranked) for j, two in enumerate(ranked) if one > two]
    return np.mean([i < j for i, j in pairs])


def slow_average_precision(ranked):
    hits = np.flatnonzero(ranked) + 1
    return np.mean([n / place for n, place in enumerate(hits, 1)])


SLOW = {
    detection.auroc: slow_auroc,
    detection.average_precision: slow_average_precision,
    detection.top_1: lambda ranked: float(ranked[0]),
}


@pytest.mark.parametrize("statistic", SLOW, ids=lambda statistic: statistic.__name__)
def test_ties_are_worth_their_mean_over_all_orders(statistic):
    rng = np.random.default_rng(0)
    for _ in range(12):
        scores = rng.integers(0, 4, 6) / 2
        wrong = np.arange(6) < rng.integers(1, 6)
        slow = np.mean([SLOW[statistic](wrong[order]) for order in orders(scores)])
        assert statistic(scores, wrong) == pytest.approx(slow, abs=EXACT)


def test_by_hand():
    # lowest first: wrong 1, right 2 and wrong 2 tied, right 3
    scores, wrong = np.array([2.0, 1.0, 2.0, 3.0]), np.array([True, True, False, False])
    assert detection.auroc(scores, wrong) == (1 + 1 + 0.5 + 1) / 4
    # second wrong one: at place 2 or 3 with the same chance, precision 2/2 or 2/3
    assert detection.average_precision(scores, wrong) == pytest.approx((1 + (1 + 2 / 3) / 2) / 2)
    assert detection.top_1(scores, wrong) == 1.0
    assert detection.top_1(-scores, wrong) == 0.0


def test_planted_scores():
    wrong = np.array([False, True, False, True, False, False])
    perfect = -wrong.astype(float)
    for scores, auroc, top_1 in ((perfect, 1, 1), (-perfect, 0, 0), (0 * perfect, 0.5, 2 / 6)):
        assert detection.auroc(scores, wrong) == auroc
        assert detection.top_1(scores, wrong) == pytest.approx(top_1, abs=EXACT)
    assert detection.average_precision(perfect, wrong) == 1.0
    none = np.zeros(6, bool)
    assert np.isnan(detection.auroc(perfect, none)) and np.isnan(detection.auroc(perfect, ~none))


def ragged(seed=0, responses=40):
    rng = np.random.default_rng(seed)
    unit = np.repeat(np.arange(responses), rng.integers(3, 9, responses))
    wrong = rng.random(len(unit)) < 0.3
    scores = rng.normal(size=(1, len(unit))) - 1.5 * wrong + rng.normal(size=responses)[unit]
    return scores, wrong, unit


def test_pooled_auroc_is_that_of_all_tokens_and_of_every_resample():
    scores, wrong, unit = ragged()
    scores[0, ::7] = 0.25  # ties
    samples = detection.resamples(40, seed=1, draws=3)
    for counts in samples.units:
        again = np.repeat(np.arange(len(unit)), counts[unit])
        low, high = scores[0, again][wrong[again]], scores[0, again][~wrong[again]]
        known = stats.mannwhitneyu(high, low).statistic / (len(low) * len(high))
        one = detection.Resamples(counts[None].repeat(2, 0), samples.runs[:2])
        assert detection.pooled_auroc(one, scores, wrong, unit).value == pytest.approx(known)


def test_gap_is_cohens_d_of_all_tokens():
    scores, wrong, unit = ragged()
    right, low = scores[0, ~wrong], scores[0, wrong]
    squares = (len(right) - 1) * right.var(ddof=1) + (len(low) - 1) * low.var(ddof=1)
    known = (right.mean() - low.mean()) / np.sqrt(squares / (len(right) + len(low) - 2))
    samples = detection.resamples(40, seed=0, draws=2)
    assert detection.gap(samples, scores, wrong, unit).value == pytest.approx(known, abs=1e-10)
    far = detection.gap(samples, scores + 1e6, wrong, unit).value  # squares do not cancel
    assert far == pytest.approx(known, rel=1e-6)
    assert np.isnan(detection.gap(samples, 0 * scores, wrong, unit).value)


def test_a_mean_over_runs_is_the_mean_of_their_means():
    values, unit = np.array([[0.0, 1.0, 1.0], [0.5, 0.5, 0.0]]), np.array([0, 1, 1])
    samples = detection.resamples(2, 2, seed=0, draws=50)
    assert detection.mean(samples, values, unit).value == pytest.approx((2 / 3 + 1 / 3) / 2)
    for units, runs in list(zip(*samples, strict=True))[:4]:
        chosen = np.repeat(np.arange(3), units[unit])
        known = np.mean([values[run, chosen].mean() for run in np.repeat([0, 1], runs)])
        one = detection.Resamples(units[None].repeat(2, 0), runs[None].repeat(2, 0))
        assert detection.mean(one, values, unit).value == pytest.approx(known)


def test_ratio_weighs_by_its_denominator():
    samples = detection.resamples(2, seed=0, draws=5)
    found = detection.ratio(samples, np.array([[1.0, 3.0]]), np.array([[1.0, 9.0]]), np.arange(2))
    assert found.value == 0.4


def covered(units_of, *, truth=0.5, trials=300):
    """How often the interval of a mean of clustered values holds the truth."""
    rng, hits = np.random.default_rng(0), 0
    for trial in range(trials):
        unit = np.repeat(np.arange(60), 4)
        values = truth + rng.normal(size=60)[unit] + 0.1 * rng.normal(size=240)
        known = units_of(unit)
        samples = detection.resamples(len(set(known)), seed=trial, draws=200)
        _, low, high = detection.mean(samples, values[None], known)
        hits += low <= truth <= high
    return hits / trials


def test_intervals_cover_where_units_are_resampled_and_not_where_values_are():
    # 95% +- 2.5 standard errors of 300 trials, less what a bootstrap of 60 units misses
    assert 0.90 <= covered(lambda unit: unit) <= 0.99
    assert covered(lambda unit: np.arange(len(unit))) < 0.8  # as if all were independent


def test_runs_widen_the_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 50)) + np.array([[-2.0], [0.0], [2.0]])
    unit = np.arange(50)
    both = detection.mean(detection.resamples(50, 3, seed=0), values, unit)
    alone = detection.mean(detection.resamples(50, seed=0), values.mean(0)[None], unit)
    assert both.value == pytest.approx(alone.value)
    assert both.high - both.low > 3 * (alone.high - alone.low)


def test_draws_are_a_function_of_the_seed():
    one, two, three = (detection.resamples(9, 2, seed=seed, draws=4) for seed in (5, 5, 6))
    assert np.array_equal(one.units, two.units) and np.array_equal(one.runs, two.runs)
    assert not np.array_equal(one.units, three.units)
    assert (one.units[0] == 1).all() and (one.units.sum(1) == 9).all()
