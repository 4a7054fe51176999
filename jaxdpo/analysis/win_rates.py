"""What many verdicts come to: win rates with intervals, with length and position taken out.

A comparison is won, lost, a tie, or unread where the judge gave no answer that could be read.
Unread ones are left out of every rate, and counted. Units of the bootstrap are prompts. Left
out: how a judge is asked (`judge`), and how it is shown (`verdicts`).
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Real
from scipy.special import expit, ndtri

from jaxdpo import InputError
from jaxdpo.analysis.detection import Estimate, Resamples, mean, resamples
from jaxdpo.judge import FIRST, NONE, SECOND, Comparison, Judged, side

POINTS = {"left": 1.0, "tie": 0.5, "right": 0.0}
RIDGE = 1e-3  # of the logistic regression, beside a sum over comparisons
HEAVY = 0.75  # a share of answers for what came first (or last): half of them by order alone
STEPS = 200  # Newton's, at most; where nothing separates the data, a dozen do
ELEMENTS = 2_000_000  # numbers held at once while draws are fitted


class Tally(NamedTuple):
    """How comparisons ended, and the win rate (wins + ties / 2) / (wins + ties + losses)."""

    wins: int
    ties: int
    losses: int
    unread: int
    wilson: Estimate
    bootstrap: Estimate

    def as_json(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("wins", "ties", "losses", "unread")}
        low_high = {name: _numbers(getattr(self, name))[1:] for name in ("wilson", "bootstrap")}
        return counts | {"win_rate": _numbers(self.wilson)[0]} | low_high


class LengthControlled(NamedTuple):
    """See `length_controlled`; the effects are coefficients, in logits."""

    win_rate: Estimate
    length_effect: Estimate
    first_effect: Estimate
    spread: float  # the standard deviation of the differences in length


class PositionBias(NamedTuple):
    """How a judge takes to what it is shown first; see `position_bias`."""

    answers: int  # that could be read
    decided: int  # of them, for one side
    first: Estimate  # share of the decided ones for what was shown first
    asked_twice: int  # comparisons of which both orders were read
    consistent: Estimate  # share of these with the same winner both times
    first_twice: int
    second_twice: int


class WinRates(NamedTuple):
    """All numbers of an evaluation; pairs are (left, right)."""

    all: Tally
    subsets: dict[str, Tally]
    length_controlled: LengthControlled
    position_bias: PositionBias
    lengths: tuple[Estimate, Estimate]
    difference: Estimate  # left minus right, in length
    empty: tuple[int, int]
    identical: int  # comparisons of a text with itself

    def as_json(self) -> dict[str, Any]:
        """The numbers as a JSON object; an estimate is [value, low, high], null where undefined."""
        controlled, bias = self.length_controlled._asdict(), self.position_bias._asdict()
        return self.all.as_json() | {
            "length_controlled": {name: _numbers(one) for name, one in controlled.items()},
            "position_bias": {name: _numbers(one) for name, one in bias.items()}
            | {"in_words": in_words(self.position_bias)},
            "lengths": dict(zip(("left", "right"), map(_numbers, self.lengths), strict=True))
            | {"difference": _numbers(self.difference)},
            "empty": dict(zip(("left", "right"), self.empty, strict=True)),
            "identical": self.identical,
            "subsets": {name: one.as_json() for name, one in self.subsets.items()},
        }


class _Answers(NamedTuple):
    """The answers that could be read, one a row."""

    of: Integer[np.ndarray, " M"]  # number of the comparison
    left_first: Bool[np.ndarray, " M"]
    points: Float[np.ndarray, " M"]
    weight: Float[np.ndarray, " M"]  # those of a comparison count as one


def win_rates(
    judged: Sequence[Judged],
    comparisons: Sequence[Comparison],
    lengths: Real[np.ndarray, "N 2"],
    *,
    seed: int,
) -> WinRates:
    """The numbers of the judged comparisons, whose left and right responses are so long.

    The seed is that of the bootstrap. Raises `InputError` where there is nothing to count.

    >>> from jaxdpo.judge import Verdict
    >>> asked = [Comparison("p", "aa", "b", "line 1"), Comparison("q", "a", "b", "line 2")]
    >>> won = Judged("left", ((True, Verdict(FIRST)),))
    >>> found = win_rates([won, Judged("tie", ())], asked, np.array([[2, 1], [1, 1]]), seed=0)
    >>> found.all.wins, found.all.ties, found.all.wilson.value
    (1, 1, 0.75)
    """
    if not comparisons:
        raise InputError("comparisons: there are none; give at least one prompt")
    if not len(judged) == len(comparisons) == len(lengths):
        raise ValueError(f"{len(judged)} judged, {len(comparisons)} asked, {len(lengths)} lengths")
    prompts = {prompt: n for n, prompt in enumerate(dict.fromkeys(c.prompt for c in comparisons))}
    unit = np.array([prompts[one.prompt] for one in comparisons])
    samples = resamples(len(prompts), seed=seed)
    winners = np.array([one.winner for one in judged])
    of_subset = np.array([one.subset for one in comparisons])
    tally = lambda of: _tally(samples, winners[of], unit[of])
    average = lambda values: mean(samples, values[None].astype(float), unit)
    sides = [[getattr(one, name) for one in comparisons] for name in ("left", "right")]
    return WinRates(
        all=tally(np.full(len(unit), True)),
        subsets={name: tally(of_subset == name) for name in sorted(set(of_subset.tolist()))},
        length_controlled=length_controlled(samples, judged, lengths, unit),
        position_bias=position_bias(judged),
        lengths=(average(lengths[:, 0]), average(lengths[:, 1])),
        difference=average(lengths[:, 0] - lengths[:, 1]),
        empty=tuple(sum(not text.strip() for text in texts) for texts in sides),
        identical=sum(left == right for left, right in zip(*sides, strict=True)),
    )


def wilson(successes: float | int, n: int) -> Estimate:
    """A share with its 95% score interval (Wilson, 1927), which is never empty nor leaves [0, 1].

    (p + z²/2n ± z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n) with p = successes/n and z = 1.96.
    Halves may count as successes: an interval with ties is then wider than it need be. NaN of 0.

    >>> [round(number, 3) for number in wilson(8.0, 10)]
    [0.8, 0.49, 0.943]
    """
    if not n:
        return Estimate(math.nan, math.nan, math.nan)
    p, z = successes / n, float(ndtri(0.975))
    centre, scale = p + z**2 / (2 * n), 1 + z**2 / n
    reach = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Estimate(p, max((centre - reach) / scale, 0.0), min((centre + reach) / scale, 1.0))


def length_controlled(
    samples: Resamples,
    judged: Sequence[Judged],
    lengths: Real[np.ndarray, "N 2"],
    unit: Integer[np.ndarray, " N"],
) -> LengthControlled:
    """The win rate that is left where both sides are equally long and neither is shown first.

    As AlpacaEval 2 (arXiv 2404.04475, Eq. 2), an answer is modelled by

        P(left preferred) = sigmoid(a + b tanh((l_left - l_right) / s) + c x),

    s the standard deviation of the differences in length, x = 1/2 where left was shown first
    and -1/2 otherwise; the rate is sigmoid(a). It has no term for how hard a prompt is, which
    takes other models' answers to it, and one for the order. The fit minimises the cross
    entropy of the answers (1; 0; a tie 1/2), summed over comparisons, two answers to one of
    them weighing a half each, plus `RIDGE`/2 (a² + b² + c²): finite where the data can be
    separated, and elsewhere without effect on the third digit. The interval is the percentile
    bootstrap with s held fixed. Where one side is always the longer one, the rate is what the
    curve says outside of the data, and the interval says nothing of that. NaN where no answer
    could be read.
    """
    answers = _answers(judged)
    differences = (lengths[:, 0] - lengths[:, 1]).astype(float)
    spread = float(differences.std())
    scaled = np.tanh(differences / spread) if spread else np.zeros_like(differences)
    order = np.where(answers.left_first, 0.5, -0.5)
    inputs = np.stack([np.ones_like(order), scaled[answers.of], order], axis=1)
    weights = lambda units: units[:, unit[answers.of]] * answers.weight
    chunks = np.array_split(samples.units, -(-samples.units.shape[0] * len(order) // ELEMENTS) or 1)
    fits = [logistic_fits(inputs, answers.points, weights(units)) for units in chunks]
    a, b, c = np.concatenate(fits).T
    return LengthControlled(_estimate(expit(a)), _estimate(b), _estimate(c), spread)


def logistic_fits(
    inputs: Float[np.ndarray, "M P"],
    points: Float[np.ndarray, " M"],
    weights: Float[np.ndarray, "D M"],
) -> Float[np.ndarray, "D P"]:
    """Logistic regression with a ridge, once for each row of weights; inputs lie in [-1, 1].

    Newton's method. No step moves a logit by more than 1, within which the curvature changes
    by less than e: so every step goes down, and the last ones are whole. NaN without weight.

    >>> won = np.array([1.0, 1.0, 1.0, 0.0])
    >>> [[chance]] = expit(logistic_fits(np.ones((4, 1)), won, np.ones((1, 4))))
    >>> round(float(chance), 3)
    0.75
    """
    rows, size = inputs.shape
    outer = (inputs[:, :, None] * inputs[:, None, :]).reshape(rows, size**2)
    fits = np.zeros((len(weights), size))
    for _ in range(STEPS):
        chances = expit(fits @ inputs.T)
        gradient = (weights * (points - chances)) @ inputs - RIDGE * fits
        curvature = ((weights * chances * (1 - chances)) @ outer).reshape(-1, size, size)
        curvature += RIDGE * np.eye(size)
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        reach = np.abs(step).sum(axis=1, keepdims=True)
        fits += step / np.maximum(reach, 1.0)
        if reach.max() < 1e-6:  # and what is left is the square of that
            break
    return np.where(weights.sum(axis=1, keepdims=True) > 0, fits, np.nan)


def position_bias(judged: Sequence[Judged]) -> PositionBias:
    """How often a judge is for what it was shown first, and how often it stands by its word.

    Of a judge that answers by order alone with probability b, and otherwise by what is said,
    (1 + b)/2 of the decided answers are for the first. Intervals are Wilson's, over answers,
    held to be independent.

    >>> from jaxdpo.judge import Verdict
    >>> same_place_twice = Judged("tie", ((True, Verdict(FIRST)), (False, Verdict(FIRST))))
    >>> bias = position_bias([same_place_twice])
    >>> bias.first.value, bias.first_twice, bias.consistent.value
    (1.0, 1, 0.0)
    """
    read = [_read(one) for one in judged]
    preferred = Counter(verdict.preferred for one in read for _, verdict in one)
    decided = preferred[FIRST] + preferred[SECOND]
    twice = [one for one in read if len({left_first for left_first, _ in one}) == 2]
    consistent = sum(len({side(*answer) for answer in one}) == 1 for one in twice)
    places = Counter((one.preferred, other.preferred) for (_, one), (_, other) in twice)
    return PositionBias(
        preferred.total(),
        decided,
        wilson(preferred[FIRST], decided),
        len(twice),
        wilson(consistent, len(twice)),
        places[FIRST, FIRST],
        places[SECOND, SECOND],
    )


def in_words(bias: PositionBias) -> str:
    """What a position bias means for the win rates, in a sentence.

    >>> in_words(position_bias([]))
    'the judge decided for no side: nothing is known of its position bias'
    """
    share, low, high = bias.first
    if math.isnan(share):
        return "the judge decided for no side: nothing is known of its position bias"
    said = f"{share:.0%} [{low:.0%}, {high:.0%}]"
    if low <= 0.5 <= high:
        return f"no position bias was found: the judge preferred what it was shown first in {said}"
    where = "first" if share > 0.5 else "last"
    if where == "last":
        said = f"{1 - share:.0%} [{1 - high:.0%}, {1 - low:.0%}]"
    heavy = max(share, 1 - share) >= HEAVY
    means = "its win rates say little" if heavy else "its win rates are pulled towards 50%"
    twice = ""
    if bias.asked_twice:
        same = bias.first_twice + bias.second_twice
        twice = f"; asked in both orders, it named the same place twice in {same} of "
        twice += f"{bias.asked_twice} comparisons, which count as ties"
    return f"the judge preferred what it was shown {where} in {said}: {means}{twice}"


def _tally(samples: Resamples, winners: np.ndarray, unit: np.ndarray) -> Tally:
    count = Counter(winners.tolist())
    read = winners != NONE
    points = np.array([POINTS[one] for one in winners[read].tolist()], float)
    return Tally(
        count["left"],
        count["tie"],
        count["right"],
        count[NONE],
        wilson(float(points.sum()), len(points)),
        mean(samples, points[None], unit[read]),
    )


def _read(one: Judged) -> list:
    return [answer for answer in one.verdicts if answer[1].preferred != NONE]


def _answers(judged: Sequence[Judged]) -> _Answers:
    rows = [
        (number, left_first, POINTS[side(left_first, verdict)], 1 / len(read))
        for number, read in enumerate(map(_read, judged))
        for left_first, verdict in read
    ]
    of, left_first, points, weight = zip(*rows, strict=True) if rows else ((),) * 4
    return _Answers(
        np.array(of, int), np.array(left_first, bool), np.array(points, float), np.array(weight)
    )


def _estimate(drawn: np.ndarray) -> Estimate:
    """The value of the sample itself, which stands first, with the percentiles of the others."""
    again = drawn[1:][np.isfinite(drawn[1:])]
    low, high = np.percentile(again, [2.5, 97.5]) if len(again) else (math.nan, math.nan)
    return Estimate(float(drawn[0]), float(low), float(high))


def _numbers(value: Any) -> Any:
    """An estimate as a list; whatever else as it is."""
    return value.as_json() if isinstance(value, Estimate) else value
