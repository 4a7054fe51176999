"""Win rates against hand counts, slow twins, and judges whose accuracy and bias are known."""

import json

import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import expit

from jaxdpo import InputError
from jaxdpo.analysis import win_rates as module
from jaxdpo.analysis.detection import resamples
from jaxdpo.analysis.win_rates import (
    RIDGE,
    in_words,
    length_controlled,
    logistic_fits,
    position_bias,
    wilson,
    win_rates,
)
from jaxdpo.judge import FIRST, NONE, SECOND, TIE, Comparison, Judge, Judged, Verdict, judged

SEED = 0


def asked(count, subset=lambda n: ""):
    """Comparisons whose texts say which side they are of, and which prompt."""
    return [Comparison(f"p{n}", f"L{n}", f"R{n}", f"line {n}", subset(n)) for n in range(count)]


def judge(answer, fair=False):
    """A judge that answers by `answer(number of the prompt, whether the left one is first)`."""

    def ask(questions):
        for place, one in enumerate(questions):
            yield place, Verdict(answer(int(one.prompt[1:]), one.first.startswith("L")))

    return Judge("known", {"kind": "known"}, ask, fair)


def simulated(seed, *, bias, accuracy, better):
    """With probability `bias` it says the first one, otherwise the truth with its accuracy."""
    rng = np.random.default_rng(seed)

    def answer(number, left_first):
        if rng.random() < bias:
            return FIRST
        says_left = better[number] == (rng.random() < accuracy)
        return FIRST if says_left == left_first else SECOND

    return judge(answer)


def of(winners):
    return [Judged(winner, ((True, Verdict(WORD[winner])),)) for winner in winners]


WORD = {"left": FIRST, "right": SECOND, "tie": TIE, "none": NONE}
SAME = lambda count: np.ones((count, 2), int)


def test_counts_and_rates_by_hand():
    said = of(["left", "left", "tie", "right", "none"])
    comparisons = asked(5, subset=lambda n: "ab"[n % 2])
    found = win_rates(said, comparisons, np.array([[3, 1]] * 5), seed=SEED)
    everything = found.all
    assert (everything.wins, everything.ties, everything.losses, everything.unread) == (2, 1, 1, 1)
    assert everything.wilson.value == everything.bootstrap.value == 2.5 / 4
    a, b = found.subsets["a"], found.subsets["b"]
    assert (a.wins, a.ties, a.losses, a.unread) == (1, 1, 0, 1) and a.wilson.value == 0.75
    assert (b.wins, b.ties, b.losses, b.unread) == (1, 0, 1, 0) and b.wilson.value == 0.5
    assert [one.value for one in found.lengths] == [3, 1] and found.difference.value == 2
    assert found.empty == (0, 0) and found.identical == 0


def test_empty_and_identical_responses_are_counted():
    comparisons = [
        Comparison("p", "", "\n ", "line 1"),
        Comparison("q", "a", "a", "line 2"),
        Comparison("r", " ", "a", "line 3"),
    ]
    found = win_rates(of(["tie"] * 3), comparisons, SAME(3), seed=SEED)
    assert found.empty == (2, 1) and found.identical == 1


@pytest.mark.parametrize("wins, n", [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (499, 1000)])
def test_wilson_is_that_of_scipy(wins, n):
    theirs = stats.binomtest(wins, n).proportion_ci(0.95, method="wilson")
    assert wilson(float(wins), n) == pytest.approx((wins / n, theirs.low, theirs.high), abs=1e-12)


def test_wilson_of_nothing_is_not_defined():
    assert all(np.isnan(wilson(0.0, 0)))


def test_intervals_of_ties_are_no_narrower_than_they_are_worth():
    """Ties vary less than wins and losses do: Wilson's stays wide, the bootstrap's does not."""
    ties = win_rates(of(["tie"] * 40), asked(40), SAME(40), seed=SEED).all
    assert ties.bootstrap == (0.5, 0.5, 0.5) and ties.wilson.high - ties.wilson.low > 0.25


def test_the_bootstrap_draws_prompts_not_comparisons():
    """Ten times the same comparisons say no more than once."""
    winners, once = ["left", "right", "left"] * 10, asked(30)
    alone = win_rates(of(winners), once, SAME(30), seed=SEED).all.bootstrap
    repeated = win_rates(of(winners * 10), once * 10, SAME(300), seed=SEED).all.bootstrap
    assert repeated == pytest.approx(alone)
    apart = win_rates(of(winners * 10), asked(300), SAME(300), seed=SEED).all.bootstrap
    assert apart.high - apart.low < 0.5 * (repeated.high - repeated.low)


def loss(theta, inputs, points, weights):
    chances = expit(inputs @ theta)
    entropy = -(points * np.log(chances) + (1 - points) * np.log1p(-chances))
    return weights @ entropy + RIDGE / 2 * theta @ theta


def test_the_fit_is_what_a_slow_minimiser_finds():
    rng = np.random.default_rng(1)
    ones, scaled = np.ones(60), np.tanh(rng.normal(size=60))
    inputs = np.stack([ones, scaled, rng.choice([-0.5, 0.5], 60)], axis=1)
    points = rng.choice([0.0, 0.5, 1.0], 60)
    weights = rng.multinomial(60, np.full(60, 1 / 60), size=5) * rng.choice([0.5, 1.0], 60)
    fits = logistic_fits(inputs, points, weights.astype(float))
    for fit, each in zip(fits, weights, strict=True):
        slow = optimize.minimize(loss, np.zeros(3), (inputs, points, each), tol=1e-12).x
        assert fit == pytest.approx(slow, abs=1e-4)


def test_separable_data_has_a_finite_fit_and_data_without_weight_none():
    inputs = np.stack([np.ones(50), np.linspace(-1, 1, 50), np.tile([0.5, -0.5], 25)], axis=1)
    for points in (np.ones(50), (inputs[:, 1] > 0).astype(float), np.zeros(50)):
        (fit,) = logistic_fits(inputs, points, np.ones((1, 50)))
        assert np.isfinite(fit).all()
        slope = inputs.T @ (points - expit(inputs @ fit)) - RIDGE * fit
        assert np.abs(slope).max() < 1e-9  # it is the minimum
    assert np.isnan(logistic_fits(inputs, np.ones(50), np.zeros((1, 50)))).all()


def drawn(differences, *, a, b, c, seed):
    """Answers drawn from the model that the regression has, with lengths of these differences."""
    rng = np.random.default_rng([seed, 1])
    first = rng.random(len(differences)) < 0.5
    logits = a + b * np.tanh(differences / differences.std()) + c * np.where(first, 0.5, -0.5)
    left = rng.random(len(differences)) < expit(logits)
    said = lambda won, shown: ((shown, Verdict(FIRST if won == shown else SECOND)),)
    return [
        Judged("left" if won else "right", said(won, shown))
        for won, shown in zip(left.tolist(), first.tolist(), strict=True)
    ]


def test_the_length_controlled_rate_recovers_what_length_and_position_hide():
    """Left is longer, the judge likes length and what comes first: the raw rate is far off."""
    truth, inside, raw, effects = expit(-0.3), 0, 0, []
    unit = np.arange(400)
    for seed in range(40):
        differences = np.random.default_rng(seed).normal(5, 6, 400).round()
        answers = drawn(differences, a=-0.3, b=2.0, c=1.0, seed=seed)
        lengths = np.stack([20 + differences, np.full(400, 20.0)], axis=1)
        found = length_controlled(resamples(400, seed=0, draws=200), answers, lengths, unit)
        inside += found.win_rate.low <= truth <= found.win_rate.high
        raw += abs(np.mean([one.winner == "left" for one in answers]) - truth) > 0.1
        effects += [found.length_effect.low <= 2 <= found.length_effect.high]
        effects += [found.first_effect.low <= 1 <= found.first_effect.high]
    assert inside >= 36 and sum(effects) >= 72 and raw == 40


def test_two_answers_to_a_comparison_count_as_one():
    """And say all that there is of the order: it then takes nothing from the win rate."""
    better = np.random.default_rng(2).random(80) < 0.7
    consistent = judge(lambda n, left_first: FIRST if better[n] == left_first else SECOND)
    both = judged(consistent, asked(80), seed=0, both_orders=True)
    once = judged(consistent, asked(80), seed=0)
    for answers in (both, once):
        found = win_rates(answers, asked(80), SAME(80), seed=SEED)
        assert found.length_controlled.win_rate.value == pytest.approx(better.mean(), abs=0.01)
    found = win_rates(both, asked(80), SAME(80), seed=SEED)
    assert found.length_controlled.win_rate.value == pytest.approx(better.mean(), abs=1e-4)
    assert found.length_controlled.first_effect.value == pytest.approx(0, abs=1e-9)
    assert found.length_controlled.spread == 0


def test_a_comparison_of_which_one_answer_was_read_weighs_no_less():
    """Won: read in both orders. Lost: once in either order. So a third is won."""
    left, right, mute = Verdict(FIRST), Verdict(SECOND), Verdict(NONE)
    said = [
        Judged("left", ((True, left), (False, right))),
        Judged("right", ((True, right), (False, mute))),
        Judged("right", ((True, mute), (False, left))),
    ] * 20
    found = win_rates(said, asked(60), SAME(60), seed=SEED)
    assert found.all.wilson.value == pytest.approx(1 / 3)
    assert found.length_controlled.win_rate.value == pytest.approx(1 / 3, abs=1e-3)


def noisy(both_orders=True, count=60, seed=3):
    better = np.random.default_rng(seed).random(count) < 0.6
    answers = simulated(seed, bias=0.3, accuracy=0.8, better=better)
    comparisons = asked(count, subset=lambda n: "xyz"[n % 3])
    return judged(answers, comparisons, seed=seed, both_orders=both_orders), comparisons


def lengths_of(count, seed=4):
    return np.random.default_rng(seed).integers(0, 30, (count, 2))


def test_the_order_of_comparisons_is_nothing():
    said, comparisons = noisy()
    lengths, order = lengths_of(60), np.random.default_rng(5).permutation(60)
    one = win_rates(said, comparisons, lengths, seed=SEED)
    other = win_rates(
        [said[n] for n in order], [comparisons[n] for n in order], lengths[order], seed=SEED
    )
    assert one.all[:5] == other.all[:5] and one.position_bias == other.position_bias
    for name in "xyz":
        assert one.subsets[name][:5] == other.subsets[name][:5]
    for ours, theirs in zip(one.length_controlled, other.length_controlled, strict=True):
        value = lambda of: of[0] if isinstance(of, tuple) else of
        assert value(ours) == pytest.approx(value(theirs), abs=1e-9)


@pytest.mark.parametrize("both_orders", [False, True])
def test_swapped_sides_turn_wins_into_losses(both_orders):
    said, comparisons = noisy(both_orders)
    lengths, turn = lengths_of(60), {"left": "right", "right": "left"}
    swapped = [
        Judged(turn.get(one.winner, one.winner), tuple((not at, v) for at, v in one.verdicts))
        for one in said
    ]
    turned = [one._replace(left=one.right, right=one.left) for one in comparisons]
    one = win_rates(said, comparisons, lengths, seed=SEED)
    other = win_rates(swapped, turned, lengths[:, ::-1], seed=SEED)
    assert (one.all.wins, one.all.ties, one.all.losses) == (
        *(other.all.losses, other.all.ties, other.all.wins),
    )
    assert one.position_bias == other.position_bias and one.lengths == other.lengths[::-1]
    controlled = lambda found: found.length_controlled
    for ours, theirs in (
        *((getattr(one.all, kind), getattr(other.all, kind)) for kind in ("wilson", "bootstrap")),
        (controlled(one).win_rate, controlled(other).win_rate),
    ):
        mirrored = (1 - theirs.value, 1 - theirs.high, 1 - theirs.low)
        assert ours == pytest.approx(mirrored, abs=1e-9)


UNKNOWN = module.Estimate(*[float("nan")] * 3)


def recovered(monkeypatch, both_orders) -> tuple[int, int]:
    """In how many of 100 repetitions the rate, and the bias, lies within its interval."""
    monkeypatch.setattr(
        module,
        "length_controlled",
        lambda *_: module.LengthControlled(UNKNOWN, UNKNOWN, UNKNOWN, 0.0),
    )
    few = lambda units, *, seed: resamples(units, seed=seed, draws=10)
    monkeypatch.setattr(module, "resamples", few)
    bias, accuracy, share = 0.3, 0.95, 0.95
    truthful = share * accuracy + (1 - share) * (1 - accuracy)
    rates = biases = 0
    for seed in range(100):
        better = np.random.default_rng([seed, 1]).random(250) < share
        answers = simulated(seed, bias=bias, accuracy=accuracy, better=better)
        said = judged(answers, asked(250), seed=seed, both_orders=both_orders)
        found = win_rates(said, asked(250), SAME(250), seed=seed)
        expected = bias / 2 + (1 - bias) * truthful
        rates += found.all.wilson.low <= expected <= found.all.wilson.high
        low, high = found.position_bias.first[1:]
        biases += 0.5 < low <= (1 + bias) / 2 <= high
    return rates, biases


@pytest.mark.parametrize("both_orders", [False, True])
def test_a_judge_of_known_accuracy_and_bias_is_recovered(monkeypatch, both_orders):
    rates, biases = recovered(monkeypatch, both_orders)
    assert rates >= 93 and biases >= 93


def test_an_order_that_is_not_mapped_back_shows(monkeypatch):
    """Who takes the first for the left side, however they were shown, recovers nothing."""
    from jaxdpo import judge as judges

    whose = judges.side
    monkeypatch.setattr(judges, "side", lambda _, verdict: whose(True, verdict))
    rates, _ = recovered(monkeypatch, False)
    assert rates < 20


def test_a_judge_that_always_says_the_first_is_called_biased():
    always = judge(lambda *_: FIRST)
    once = win_rates(judged(always, asked(60), seed=0), asked(60), SAME(60), seed=SEED)
    bias = once.position_bias
    assert bias.first.value == 1 and bias.first.low > 0.9 and bias.asked_twice == 0
    assert "first in 100% [94%, 100%]: its win rates say little" in in_words(bias)
    both = judged(always, asked(60), seed=0, both_orders=True)
    found = win_rates(both, asked(60), SAME(60), seed=SEED)
    assert found.all.ties == 60 and found.position_bias.first_twice == 60
    assert found.position_bias.consistent.value == 0
    assert "named the same place twice in 60 of 60" in in_words(found.position_bias)


@pytest.mark.parametrize(
    "answer, said",
    [
        (lambda n, left: SECOND, "preferred what it was shown last in 100% [94%, 100%]: its"),
        (lambda n, left: FIRST if n % 2 else SECOND, "no position bias was found: the judge"),
        (
            lambda n, left: FIRST if n % 3 else SECOND,
            "shown first in 67% [54%, 77%]: its win rates are pulled",
        ),
        (lambda n, left: TIE, "the judge decided for no side"),
        (lambda n, left: NONE, "the judge decided for no side"),
    ],
)
def test_a_bias_in_words(answer, said):
    assert said in in_words(position_bias(judged(judge(answer), asked(60), seed=0)))


def test_consistency_by_hand():
    answers = [
        (FIRST, SECOND),  # left both times: shown first, then second
        (FIRST, FIRST),
        (SECOND, SECOND),
        (TIE, TIE),
        (TIE, FIRST),
        (NONE, FIRST),  # of one order only
    ]
    said = [Judged("", ((True, Verdict(one)), (False, Verdict(other)))) for one, other in answers]
    bias = position_bias(said)
    assert (bias.answers, bias.decided, bias.asked_twice) == (11, 8, 5)
    assert bias.first.value == 5 / 8 and bias.consistent.value == 2 / 5
    assert (bias.first_twice, bias.second_twice) == (1, 1)


def test_what_nobody_could_read_is_counted_and_says_nothing():
    found = win_rates(of(["none"] * 3), asked(3), lengths_of(3), seed=SEED)
    assert found.all.unread == 3 and np.isnan(found.all.wilson.value)
    assert np.isnan(found.length_controlled.win_rate.value)
    record = found.as_json()
    assert record["win_rate"] is None and record["wilson"] == [None, None]
    json.dumps(record, allow_nan=False)


def test_the_record_holds_all_numbers():
    said, comparisons = noisy()
    found = win_rates(said, comparisons, lengths_of(60), seed=SEED)
    record = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert record["win_rate"] == found.all.wilson.value
    assert record["bootstrap"] == list(found.all.bootstrap[1:])
    assert record["length_controlled"]["win_rate"] == list(found.length_controlled.win_rate)
    assert record["position_bias"]["first"] == list(found.position_bias.first)
    assert record["position_bias"]["in_words"] == in_words(found.position_bias)
    assert sum(one["wins"] for one in record["subsets"].values()) == record["wins"]


def test_nothing_and_too_little_are_refused():
    with pytest.raises(InputError, match="comparisons: there are none; give at least one prompt"):
        win_rates([], [], np.zeros((0, 2)), seed=SEED)
    with pytest.raises(ValueError, match="1 judged, 2 asked, 2 lengths"):
        win_rates(of(["left"]), asked(2), SAME(2), seed=SEED)
