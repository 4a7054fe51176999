"""How well per-token scores find the wrong tokens of responses, with intervals.

A token is held to be the more wrong the lower its score. Tokens of equal score are worth what
they would be on average in a random order, in every measure: a score that is the same for all
tokens of a response is worth exactly as much as chance.

Intervals are percentile bootstraps that draw whole units again, a unit being what is
independent (all responses to a prompt), and with several runs the runs too: the same units
for all of them, since they were measured on the same ones. Left out: where scores come from
(`credit_benchmark`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

DRAWS = 2000


class Estimate(NamedTuple):
    """A value with the ends of its 95% interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    def as_json(self) -> list[float | None]:
        """[value, low, high], null for what is not defined.

        >>> Estimate(0.5, 0.25, float("nan")).as_json()
        [0.5, 0.25, None]
        """
        return [value if math.isfinite(value) else None for value in self]


class Resamples(NamedTuple):
    """How often each unit and each run was drawn; the first row is the sample itself."""

    units: Integer[np.ndarray, "D N"]
    runs: Integer[np.ndarray, "D R"]


def auroc(scores: Float[np.ndarray, " T"], wrong: Bool[np.ndarray, " T"]) -> float:
    """The chance that a wrong token scores lower than a right one; a tie is half a chance.

    NaN without a wrong or without a right token.

    >>> auroc(np.array([0.1, 0.3, 0.1, 0.7]), np.array([True, False, False, False]))
    0.8333333333333334
    """
    below, count = _wins(scores[wrong], scores[~wrong])
    return below / count if count else float("nan")


def average_precision(scores: Float[np.ndarray, " T"], wrong: Bool[np.ndarray, " T"]) -> float:
    """The mean, over the wrong tokens, of the share of wrong ones among all down to it.

    AP = 1/W sum_k [k-th lowest is wrong] (wrong among the k lowest) / k, on average over the
    orders of tied tokens (thresholds, which take a whole tie at once, would set a constant
    score below chance). NaN without a wrong token.

    >>> average_precision(np.array([0.1, 0.2, 0.3]), np.array([False, True, True]))
    0.5833333333333333
    """
    total = above = above_wrong = 0
    for value in np.unique(scores):
        tied = scores == value
        size, hits = int(tied.sum()), int((tied & wrong).sum())
        places = np.arange(1, size + 1)
        others = (places - 1) * (hits - 1) / max(size - 1, 1)  # wrong before it, within the tie
        total += (hits / size * (above_wrong + 1 + others) / (above + places)).sum()
        above, above_wrong = above + size, above_wrong + hits
    return float(total / above_wrong) if above_wrong else float("nan")


def top_1(scores: Float[np.ndarray, " T"], wrong: Bool[np.ndarray, " T"]) -> float:
    """The chance that the token with the lowest score is a wrong one.

    >>> top_1(np.array([0.1, 0.1, 0.3]), np.array([True, False, False]))
    0.5
    """
    return float(wrong[scores == scores.min()].mean())


def resamples(units: int, runs: int = 1, *, seed: int, draws: int = DRAWS) -> Resamples:
    """The sample itself and `draws` samples drawn from it with replacement.

    >>> resamples(3, seed=0, draws=2).units.sum(axis=1)
    array([3, 3, 3])
    """
    rng = np.random.default_rng(seed)

    def drawn(size):
        again = rng.multinomial(size, np.full(size, 1 / size), size=draws)
        return np.concatenate([np.ones((1, size), again.dtype), again])

    return Resamples(drawn(units), drawn(runs))


def mean(
    samples: Resamples, values: Float[np.ndarray, "R n"], unit: Integer[np.ndarray, " n"]
) -> Estimate:
    """The mean of values, each of which belongs to a unit; of all runs, the mean of means."""
    return ratio(samples, values, np.ones_like(values), unit)


def ratio(
    samples: Resamples,
    numerators: Float[np.ndarray, "R n"],
    denominators: Float[np.ndarray, "R n"],
    unit: Integer[np.ndarray, " n"],
) -> Estimate:
    """Sum over sum, so that a large denominator weighs more; of all runs, the mean of ratios."""
    totals = [
        samples.units @ _unit_sums(samples, each, unit).T for each in (numerators, denominators)
    ]
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw may hold none of a rare kind
        return _over_runs(samples, totals[0] / totals[1])


def gap(
    samples: Resamples,
    scores: Float[np.ndarray, "R T"],
    wrong: Bool[np.ndarray, " T"],
    unit: Integer[np.ndarray, " T"],
) -> Estimate:
    """How far the mean right token lies above the mean wrong one, in units of their spread.

    (mean_right - mean_wrong) / s, where s^2 is the sum of the tokens' squared distances from
    the mean of their own class over (right tokens + wrong tokens - 2): Cohen's d with all
    tokens of all responses pooled. NaN where the spread is zero.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        means, squares, sizes = zip(
            *(_moments(samples, scores, of, unit) for of in (~wrong, wrong)), strict=True
        )
        spread = np.sqrt(sum(squares) / (sum(sizes) - 2))
        return _over_runs(samples, np.where(spread > 0, (means[0] - means[1]) / spread, np.nan))


def pooled_auroc(
    samples: Resamples,
    scores: Float[np.ndarray, "R T"],
    wrong: Bool[np.ndarray, " T"],
    unit: Integer[np.ndarray, " T"],
) -> Estimate:
    """The chance that a wrong token of any response scores lower than a right one of any."""
    sizes = [
        samples.units @ np.bincount(unit[of], minlength=samples.units.shape[1])
        for of in (wrong, ~wrong)
    ]
    drawn = []
    for run in scores:
        lower = _wins_between_units(run, wrong, unit, samples.units.shape[1])
        drawn.append(((samples.units @ lower) * samples.units).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return _over_runs(samples, np.stack(drawn, axis=1) / np.prod(sizes, axis=0)[:, None])


def _wins(wrong: np.ndarray, right: np.ndarray) -> tuple[float, int]:
    lower = (wrong[:, None] < right).sum() + 0.5 * (wrong[:, None] == right).sum()
    return float(lower), wrong.size * right.size


def _wins_between_units(scores, wrong, unit, units: int) -> np.ndarray:
    """[N, N]: how often a wrong token of unit i scores lower than a right one of unit j."""
    order = np.argsort(unit[~wrong], kind="stable")
    edges = np.searchsorted(unit[~wrong][order], np.arange(units + 1))
    right, lower = scores[~wrong][order], np.zeros((units, units))
    for j in range(units):
        ranked = np.sort(right[edges[j] : edges[j + 1]])
        sides = [np.searchsorted(ranked, scores[wrong], side) for side in ("left", "right")]
        wins = len(ranked) - (sides[0] + sides[1]) / 2
        lower[:, j] = np.bincount(unit[wrong], wins, minlength=units)
    return lower


def _moments(samples: Resamples, scores, of, unit):
    """Of one class of tokens: means and squared distances from them [D, R], sizes [D, 1]."""
    centre = scores[:, of].mean(axis=1, keepdims=True)  # so that squares do not cancel
    away = scores[:, of].astype(np.float64) - centre
    ones = np.ones((1, away.shape[1]))
    sums, squares, sizes = (
        samples.units @ _unit_sums(samples, each, unit[of]).T for each in (away, away**2, ones)
    )
    return sums / sizes + centre[:, 0], squares - sums**2 / sizes, sizes


def _unit_sums(samples: Resamples, values: np.ndarray, unit: np.ndarray) -> np.ndarray:
    units = samples.units.shape[1]
    return np.stack([np.bincount(unit, each, minlength=units) for each in values])


def _over_runs(samples: Resamples, drawn: np.ndarray) -> Estimate:
    """The estimate from each draw's value for each run, [D, R]."""
    values = (drawn * samples.runs).sum(axis=1) / samples.runs.sum(axis=1)
    return Estimate(float(values[0]), *_interval(values[1:]))


def _interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    defined = np.asarray(values)[np.isfinite(values)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)
