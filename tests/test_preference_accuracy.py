"""Accuracy, intervals and shares of length are what slow twins and hands find; nothing is lost."""

import functools
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from speakers import MODEL, TEXTS, checkpoint, spoken
from test_token_scores import all_logps, bytes_tokenizer

from jaxdpo import InputError, runs, synthetic
from jaxdpo.analysis import preference_accuracy, preference_tables, tables
from jaxdpo.analysis.detection import resamples
from jaxdpo.analysis.preference_accuracy import (
    FILES,
    LIKELIHOOD,
    LONGER,
    PER_TOKEN,
    REWARD,
    SHORTER,
    accuracy,
    length_share,
    mean_of_groups,
    measured,
    r_squared,
    scores,
    wins,
    write,
)
from jaxdpo.analysis.win_rates import wilson
from jaxdpo.judge import Comparison, judged
from jaxdpo.records import read_json
from jaxdpo.scored_judges import reward_judge

BETA = 0.3
REWARD_PER_TOKEN, LIKELIHOOD_PER_TOKEN = PER_TOKEN.format(REWARD), PER_TOKEN.format(LIKELIHOOD)
MODELS = (REWARD, REWARD_PER_TOKEN, LIKELIHOOD, LIKELIHOOD_PER_TOKEN)
SAD, I, CAIRO = TEXTS[1:]  # 10, 1 and 5 tokens, and an end token each
# 2 prompts; a duplicate (lines 1, 4), a contradiction (2, 3); confidences as numbers.
ROWS = [
    {"prompt": TEXTS[0], "chosen": SAD, "rejected": CAIRO, "extra": {"confidence": 9}},
    {"prompt": TEXTS[0], "chosen": CAIRO, "rejected": I, "extra": {"confidence": 10}},
    {"prompt": TEXTS[0], "chosen": I, "rejected": CAIRO, "extra": {"confidence": 9}},
    {"prompt": TEXTS[0], "chosen": SAD, "rejected": CAIRO, "extra": {"confidence": 10}},
    {"prompt": SAD, "chosen": I, "rejected": CAIRO + SAD, "extra": {"confidence": 9}},
    {"prompt": SAD, "chosen": CAIRO, "rejected": TEXTS[0], "extra": {"confidence": 10}},
]


def sample(n=40, prompts=12, seed=0):
    """Margins with ties, differences in length with ties, and the pairs' prompts."""
    rng = np.random.default_rng(seed)
    margins = rng.integers(-2, 4, n).astype(float)
    return margins, rng.integers(-2, 3, n), rng.integers(0, prompts, n)


def as_scores(margins):
    return np.stack([margins, np.zeros_like(margins)], axis=1)


def percentiles(values):
    return [
        np.percentile([one for one in values if not math.isnan(one)], end) for end in (2.5, 97.5)
    ]


def slow(samples, statistic, unit):
    """A statistic of the pairs of each draw, written out; then the ends of the interval."""
    found = []
    for drawn in samples.units:
        again = [
            pair
            for number, times in enumerate(drawn)
            for _ in range(times)
            for pair in np.flatnonzero(unit == number)
        ]
        found.append(statistic(again))
    return [found[0], *percentiles(found[1:])]


def share(won, pairs):
    total = 0.0
    for pair in pairs:
        total += won[pair]
    return total / len(pairs) if len(pairs) else math.nan


def test_wins_count_a_tie_as_half():
    margins, _, _ = sample()
    expected = [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins]
    assert wins(as_scores(margins)).tolist() == expected and 0.5 in expected
    assert (wins(as_scores(margins)) + wins(as_scores(margins)[:, ::-1]) == 1).all()


def test_accuracy_and_its_bootstrap_are_the_slow_twins():
    margins, _, unit = sample()
    unit = np.unique(unit, return_inverse=True)[1]
    won, samples = wins(as_scores(margins)), resamples(int(unit.max()) + 1, seed=3, draws=200)
    found = accuracy(samples, won, unit)
    expected = slow(samples, lambda pairs: share(won, pairs), unit)
    np.testing.assert_allclose(found.bootstrap, expected)
    assert found.wilson == wilson(float(won.sum()), len(won))
    assert found.wilson.value == pytest.approx(found.bootstrap.value)
    assert (found.pairs, found.ties) == (len(won), int((margins == 0).sum()))


def test_pairs_of_one_prompt_are_drawn_together():
    """Ten prompts of ten equal pairs each know no more than ten pairs."""
    won = np.repeat([1.0, 0.0] * 5, 10)
    unit = np.repeat(np.arange(10), 10)
    few = accuracy(resamples(10, seed=0), won[::10], unit[::10]).bootstrap
    assert accuracy(resamples(10, seed=0), won, unit).bootstrap == pytest.approx(few)
    apart = accuracy(resamples(100, seed=0), won, np.arange(100)).bootstrap
    assert apart.high - apart.low < 0.5 * (few.high - few.low)


def test_a_mean_of_groups_weighs_them_equally():
    margins, _, unit = sample()
    won, samples = wins(as_scores(margins)), resamples(12, seed=1, draws=200)
    groups = np.array([np.arange(40) < 5, (5 <= np.arange(40)) & (np.arange(40) < 30)])

    def statistic(pairs):
        of = [[pair for pair in pairs if group[pair]] for group in groups]
        return sum(share(won, each) for each in of) / 2

    found = mean_of_groups(samples, won, groups, unit)
    np.testing.assert_allclose(found, slow(samples, statistic, unit))
    assert found.value != pytest.approx(share(won, range(30)))  # which weighs pairs
    empty = np.array([groups[0], np.zeros(40, bool)])
    assert all(map(math.isnan, mean_of_groups(samples, won, empty, unit)))


def test_shares_of_length_by_hand():
    """Chosen longer: won, won, lost. Shorter: lost, tie. Equal: won.

    accuracies 2/3 and 1/4, their mean 11/24; the longer one is picked in the first two and the
    fourth, and half in the tie: 3.5 of 5.
    """
    margins, longer = np.array([1.0, 2.0, -1.0, -2.0, 0.0, 3.0]), np.array([3, 1, 2, -1, -2, 0])
    found = length_share(resamples(6, seed=0), margins, longer, np.arange(6))
    assert found.chosen_longer.wilson.value == pytest.approx(2 / 3)
    assert found.chosen_shorter.wilson.value == pytest.approx(1 / 4)
    assert (found.chosen_longer.pairs, found.chosen_shorter.pairs) == (3, 2)
    assert found.balanced.value == pytest.approx(11 / 24)
    assert found.picks_longer.value == pytest.approx(3.5 / 5)
    # Means 1/2 each: sums of products 3 + 2 - 2 + 2 - 6/4 = 3.5, of squares 19 - 1.5, 19 - 1.5.
    assert found.r_squared == pytest.approx((3.5 / 17.5) ** 2)


@pytest.mark.parametrize(("sign", "picks"), [(1, 1.0), (-1, 0.0)])
def test_a_score_that_is_length_is_explained_by_it(sign, picks):
    _, longer, unit = sample()
    found = length_share(resamples(12, seed=0), sign * longer.astype(float), longer, unit)
    assert found.balanced.value == 0.5 and found.picks_longer.value == picks
    assert found.r_squared == pytest.approx(1.0)


def test_what_is_not_defined_is_not_a_number():
    margins, same = np.array([1.0, -1.0]), np.array([0, 0])
    found = length_share(resamples(2, seed=0), margins, same, np.arange(2))
    for estimate in (found.balanced, found.picks_longer, found.chosen_longer.bootstrap):
        assert all(map(math.isnan, estimate))
    assert math.isnan(found.r_squared) and found.chosen_longer.pairs == 0
    assert math.isnan(r_squared(np.ones(3), np.arange(3)))


def test_scores_by_hand():
    lengths = np.array([[2, 4], [5, 1]])
    policy, reference = (
        np.array([[-2.0, -8.0], [-5.0, -3.0]]),
        np.array([[-3.0, -6.0], [-5.0, -4.0]]),
    )
    found = {
        name: each.tolist() for name, each in scores(lengths, policy, reference, beta=0.5).items()
    }
    assert found == {
        REWARD: [[0.5, -1.0], [0.0, 0.5]],
        REWARD_PER_TOKEN: [[0.25, -0.25], [0.0, 0.5]],
        LIKELIHOOD: [[-2.0, -8.0], [-5.0, -3.0]],
        LIKELIHOOD_PER_TOKEN: [[-1.0, -2.0], [-1.0, -3.0]],
        LONGER: [[2.0, 4.0], [5.0, 1.0]],
        SHORTER: [[-2.0, -4.0], [-5.0, -1.0]],
    }
    assert set(scores(lengths, policy)) == set(found) - {REWARD, REWARD_PER_TOKEN}


def drawn_record(order=None, swap=False, beta=BETA, subsets=True):
    rng = np.random.default_rng(5)
    lengths, prompts = rng.integers(1, 9, (50, 2)), [f"prompt {n}" for n in rng.integers(0, 20, 50)]
    policy, reference = rng.normal(size=(2, 50, 2)) - lengths
    policy[:3] = reference[:3] = -1.0  # ties
    order = np.arange(50) if order is None else order
    of = lambda values: values[order][:, ::-1] if swap else values[order]
    found = scores(of(lengths), of(policy), of(reference), beta=beta)
    names = [int(n) for n in order % 3] if subsets else None
    return measured(found, of(lengths), [prompts[n] for n in order], names)


def same(one, two) -> bool:
    """Whether two records are the same but for rounding."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == (pytest.approx(two) if isinstance(one, float) else two)


def test_the_order_of_pairs_and_the_size_of_beta_change_nothing():
    order = np.random.default_rng(6).permutation(50)
    assert same(drawn_record(order), drawn_record())
    assert same(drawn_record(beta=7.0), drawn_record())
    assert not same(drawn_record(swap=True), drawn_record())


def test_swapped_labels_swap_wins_and_losses():
    ours, theirs = drawn_record(), drawn_record(swap=True)
    for name in MODELS + (LONGER, SHORTER):
        one, two = ours["scores"][name], theirs["scores"][name]
        assert one["accuracy"] == pytest.approx(1 - two["accuracy"]) and one["ties"] == two["ties"]
        assert one["wilson"] == pytest.approx([1 - end for end in two["wilson"][::-1]])
    for name in MODELS:
        one, two = ours["length"][name], theirs["length"][name]
        assert one["picks_longer"] == pytest.approx(two["picks_longer"])
        assert one["r_squared"] == pytest.approx(two["r_squared"])
        lost = 1 - two["chosen_shorter"]["accuracy"]
        assert one["chosen_longer"]["accuracy"] == pytest.approx(lost)


def test_length_alone_wins_what_the_other_length_loses_and_ties_count():
    record = drawn_record()
    longer, shorter = (record["scores"][name] for name in (LONGER, SHORTER))
    assert longer["ties"] == shorter["ties"] == record["equally_long"] > 0
    assert longer["accuracy"] + shorter["accuracy"] == pytest.approx(1)
    assert record["scores"][REWARD]["ties"] == 3


def test_subsets_add_up():
    record = drawn_record()
    assert [row["subset"] for row in record["subsets"]] == ["0", "1", "2"]
    assert sum(row["pairs"] for row in record["subsets"]) == record["pairs"] == 50
    for name, whole in record["scores"].items():
        of = [(row["pairs"], row["scores"][name]) for row in record["subsets"]]
        won = sum(pairs * found["accuracy"] for pairs, found in of)
        assert won / 50 == pytest.approx(whole["accuracy"])
        equally = sum(found["accuracy"] for _, found in of) / 3
        assert record["mean_over_subsets"][name][0] == pytest.approx(equally)
    assert "subsets" not in drawn_record(subsets=False)


def test_subsets_stand_in_the_order_of_numbers_then_of_words():
    lengths = np.array([[1, 2]] * 6)
    values = ["b", 10, 9, "a", 2.5, True]
    record = measured(scores(lengths, -lengths * 1.0), lengths, list("uvwxyz"), values)
    assert [row["subset"] for row in record["subsets"]] == ["true", "2.5", "9", "10", "a", "b"]


# With models.


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return checkpoint(folder / "policy", seed=1), checkpoint(folder / "reference", seed=2)


def rows_file(folder, rows, name="pairs.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return rows_file(tmp_path_factory.mktemp("data"), ROWS)


@pytest.fixture
def ask(names, data, tmp_path):
    given = dict(model=names[0], reference=names[1], beta=BETA, data=data)
    return functools.partial(write, **given, out=str(tmp_path / "out"))


def read(tmp_path):
    return read_json(tmp_path / "out" / FILES[0])


def slow_scores(row, side):
    """(implicit reward, log-likelihood, tokens) of a response, by plain passes over one row."""
    before, ids = (synthetic.tokenizer().encode(text).ids for text in (row["prompt"], row[side]))
    tokens = np.zeros((1, MODEL.max_positions), np.int32)
    tokens[0, : len(before) + len(ids)] = before + ids
    logps = []
    for seed in (1, 2):
        logs = np.asarray(all_logps(spoken(seed), tokens), np.float64)
        logps.append(sum(logs[len(before) + at - 1, one] for at, one in enumerate([*ids, 0])))
    return BETA * (logps[0] - logps[1]), logps[0], len(ids) + 1


@pytest.fixture(scope="module")
def expected():
    """By score, how often the chosen response of the rows wins."""
    found = [[slow_scores(row, side) for side in ("chosen", "rejected")] for row in ROWS]
    of = {
        REWARD: lambda reward, _, size: reward,
        REWARD_PER_TOKEN: lambda reward, _, size: reward / size,
        LIKELIHOOD: lambda _, logps, size: logps,
        LIKELIHOOD_PER_TOKEN: lambda _, logps, size: logps / size,
        LONGER: lambda _, __, size: size,
        SHORTER: lambda _, __, size: -size,
    }
    return {
        name: [float(score(*chosen) > score(*rejected)) for chosen, rejected in found]
        for name, score in of.items()
    }


def agrees(record, expected) -> bool:
    found = {name: one["accuracy"] for name, one in record["scores"].items()}
    return found == {name: pytest.approx(np.mean(won)) for name, won in expected.items()}


def test_accuracies_are_those_of_plain_passes_over_each_response(ask, expected, tmp_path):
    shown = ask(subset="extra.confidence")
    record = read(tmp_path)
    assert agrees(record, expected)
    assert len({tuple(won) for won in expected.values()}) > 3  # so that a mix-up would show
    assert (record["pairs"], record["prompts"], record["subset"]) == (6, 2, "extra.confidence")
    assert record["models"].keys() == {"policy", "reference"} and record["beta"] == BETA
    for row, lines in zip(record["subsets"], ([0, 2, 4], [1, 3, 5]), strict=True):
        assert row["pairs"] == 3 and row["prompts"] == 2
        for name, won in expected.items():
            assert row["scores"][name]["accuracy"] == pytest.approx(
                np.mean([won[n] for n in lines])
            )
    assert [row["subset"] for row in record["subsets"]] == ["9", "10"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == set(FILES)
    said, *tables, files = shown
    assert "6 rows, 6 kept, 1 duplicates, 1 contradictions" in said and len(tables) == 3
    assert all(name in files for name in FILES)


MUTATIONS = {
    "sides are swapped": lambda found, store: np.concatenate(
        [
            np.roll(part, -int(chosen))
            for part, chosen in zip(
                np.split(found, store.scored_offsets[1:-1]), store.lengths[:, 1], strict=True
            )
        ]
    ),
    "a token slips to the next response": lambda found, store: np.roll(found, 1),
    "nothing is scored": lambda found, store: 0 * found,
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_score_is_noticed(name, ask, expected, tmp_path, monkeypatch):
    whole = preference_accuracy.token_logps

    def wrong(model, store, **more):
        return MUTATIONS[name](whole(model, store, **more), store).astype(np.float32)

    monkeypatch.setattr(preference_accuracy, "token_logps", wrong)
    ask()
    assert not agrees(read(tmp_path), expected)


def test_the_judge_by_implicit_reward_says_the_same_of_every_pair(names, expected):
    asked = [Comparison(row["prompt"], row["chosen"], row["rejected"], "") for row in ROWS]
    found = [one.winner == "left" for one in judged(reward_judge(*names, BETA), asked, seed=0)]
    assert found == [bool(won) for won in expected[REWARD]] and len(set(found)) == 2


def test_without_a_reference_there_are_likelihoods_alone(names, data, expected, tmp_path):
    write(model=names[0], data=data, out=str(tmp_path / "out"))
    without = {name: won for name, won in expected.items() if "reward" not in name}
    assert agrees(read(tmp_path), without)
    assert read(tmp_path)["models"].keys() == {"policy"} and read(tmp_path)["beta"] is None


def test_bad_rows_are_counted_by_reason_and_the_others_measured(ask, expected, tmp_path):
    bad = [{"prompt": TEXTS[0], "chosen": I, "rejected": I}, {"prompt": TEXTS[0], "chosen": I}]
    shown = ask(data=rows_file(tmp_path, bad + ROWS))
    record = read(tmp_path)
    assert agrees(record, expected)
    assert record["data"]["skipped"] == {
        "chosen equals rejected": {"count": 1, "lines": [1]},
        "missing field 'rejected'": {"count": 1, "lines": [2]},
    }
    assert "missing field 'rejected' (line 2)" in shown[0]


def test_a_limit_reads_so_many_rows(ask, tmp_path):
    ask(limit=2, subset="extra.confidence")
    assert read(tmp_path)["pairs"] == 2 and read(tmp_path)["data"]["limit"] == 2


def test_a_run_gives_what_is_not_given(names, data, tmp_path, monkeypatch):
    roles = runs.Roles(*names, base=names[1], beta=BETA, data=data, format="pairs")
    monkeypatch.setattr(runs, "roles", lambda workdir: roles)
    run = str(tmp_path / "out")
    write(run=run)
    first = read(tmp_path)
    assert [first["models"][role]["name"] for role in ("policy", "reference")] == list(names)
    assert first["source"] == data and first["beta"] == BETA
    write(run=run, beta=2 * BETA, model=names[1])
    again = read(tmp_path)
    assert again["beta"] == 2 * BETA and again["scores"][REWARD]["ties"] == 6
    given = dict(model=names[0], reference=names[1], beta=BETA, data=data, out=run)
    with pytest.raises(InputError, match="run: has no effect"):
        write(run=run, **given)
    monkeypatch.setattr(runs, "roles", lambda workdir: roles._replace(data=None))
    with pytest.raises(InputError, match="data: is missing"):
        write(run=run)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(model=None), "model: is missing"),
        (dict(data=None), "data: is missing"),
        (dict(out=None), "out: is missing"),
        (dict(beta=None), "beta=None: must be above 0"),
        (dict(beta=-1.0), "beta=-1.0: must be above 0"),
        (dict(reference=None), "beta: has no effect without reference"),
        (dict(split="test"), "split='test' has no effect on a file"),
        (dict(format="hh"), "no row is left"),
        (dict(limit=0), "limit=0"),
        (dict(subset="batch"), r"pairs.jsonl line 1: missing field 'batch'; name a field"),
        (dict(subset="extra"), "line 1: field 'extra' is not a string or an integer"),
        (dict(subset="extra.confidence.more"), "line 1: missing field"),
        (dict(model="no/such-model:dpo"), "no run there"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_leaves_nothing(changes, said, ask, tmp_path):
    with pytest.raises(InputError, match=said) as error:
        ask(**changes)
    assert "\n" not in str(error.value) or "no row is left" in said
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": SAD * 6, "chosen": SAD, "rejected": I}, "line 2: .* 71 tokens, more than 64"),
        ({"prompt": I, "chosen": " Atlantis", "rejected": I}, "line 2: .* cannot encode"),
    ],
)
def test_a_row_that_cannot_be_scored_whole_is_named(row, said, ask, tmp_path):
    with pytest.raises(InputError, match=rf"pairs.jsonl {said}"):
        ask(data=rows_file(tmp_path, [ROWS[0], row]))


def test_examples_without_a_rejected_response_are_named(ask, tmp_path):
    data = rows_file(tmp_path, [{"prompt": I, "completion": SAD}])
    with pytest.raises(InputError, match="line 1: has no rejected response"):
        ask(data=data, format="completions")


def test_models_of_other_words_do_not_go_together(ask, tmp_path):
    other = checkpoint(tmp_path / "bytes", seed=1, tokenizer=bytes_tokenizer())
    with pytest.raises(InputError, match="their tokenizers differ"):
        ask(reference=other)


def test_nothing_is_cut_at_80_columns_and_undefined_numbers_are_dashes():
    lengths = np.array([[5, 3], [6, 4]])  # never shorter, and always by two tokens
    found = scores(lengths, np.array([[-1.0, -2.0], [-3.0, -1.0]]))
    record = measured(found, lengths, ["u", "v"], ["a|b", "\u202ehidden"])
    record |= {"subset": "batch", "data": {"duplicates": 0, "contradictions": 0}}
    shown = preference_tables.shown(record)
    for table in map(tables.rich_table, shown):
        console = Console(width=80, file=io.StringIO())
        console.print(table)
        text = console.file.getvalue()
        assert "…" not in text and max(map(len, text.splitlines())) <= 80
    text = tables.markdown(shown)
    assert "a\\|b" in text and "\u202e" not in text and "nan" not in text.lower()
    _, longer, shorter, balanced, picks, r_squared = shown[1].rows[0]
    assert (shorter, balanced, r_squared) == ("-",) * 3
    assert longer == picks and longer.startswith("0.500 [")
    preference_tables.draw(record).savefig(io.BytesIO(), dpi=50)


def test_pairs_that_are_all_equally_long_say_nothing_of_length():
    lengths = np.array([[3, 3], [4, 4]])
    record = measured(scores(lengths, np.array([[-1.0, -2.0], [-3.0, -1.0]])), lengths, ["u", "v"])
    record |= {"subset": None, "data": {"duplicates": 0, "contradictions": 0}}
    (shown,) = preference_tables.shown(record)
    assert "2 pairs are equally long" in shown.note
    assert dict(row[::3] for row in shown.rows)[LONGER] == "2"  # ties
    preference_tables.draw(record).savefig(io.BytesIO(), dpi=50)


def test_a_written_record_is_drawn_again(ask, tmp_path):
    ask(subset="extra.confidence")
    record = read(tmp_path)
    text = (tmp_path / "out" / FILES[1]).read_text()
    assert tables.markdown(preference_tables.shown(record)) == text
    figure = preference_tables.draw(record)
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert labels == ["mean over subsets", "10 (3)", "9 (3)"]
