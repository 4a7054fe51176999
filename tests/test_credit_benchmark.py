"""Measured credit: planted scores get what they deserve, and mistakes are one line."""

import io
import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from jaxdpo import InputError, convert, pythia, synthetic
from jaxdpo.analysis import credit_benchmark, credit_measures, credit_tables, known_errors
from jaxdpo.analysis.credit_measures import EVENLY, OVER_BASE, RANDOM, REWARD, SFT
from jaxdpo.analysis.known_errors import Case
from jaxdpo.analysis.token_scores import whole_store
from jaxdpo.analysis.trials import Trial, by_setting, trials_of
from jaxdpo.pairs import Pair
from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.records import read_json, write_json
from jaxdpo.synthetic import Error

TASK = synthetic.Task(from_post=0.5, errors=(1, 3))
NOTHING = dict.fromkeys(
    "run model reference base beta dtype data format split limit corrupt seed out".split()
)
NOISE = {"noise_floor": 0.0}


def cases_of(examples):
    mended = lambda one: known_errors.put_right(one.rejected, one.errors)[0]
    return [
        Case(Pair(one.prompt, mended(one), one.rejected, n + 1), one.errors, n)
        for n, one in enumerate(examples)
    ]


def looked_at(cases):
    """Responses, those with the first error put right, and the number of scored tokens."""
    several = [case for case in cases if len(case.errors) > 1]
    every = [*cases, *map(known_errors.first_put_right, several)]
    tokenizer = synthetic.tokenizer()
    store = whole_store([case.pair for case in every], tokenizer, 0, 10_000)
    found = known_errors.responses(every, store, tokenizer)
    return found[: len(cases)], found[len(cases) :], int(store.scored_offsets[-1])


@pytest.fixture(scope="module")
def looked():
    draw = lambda n: synthetic.example(TASK, seed=0, split="test", index=n)
    return looked_at(cases_of(map(draw, range(40))))


def perfect_score(looked):
    """-1 on every wrong token of a wrong response, 0 elsewhere."""
    responses, mended, size = looked
    score = np.zeros(size)
    for one in (*responses, *mended):
        score[one.places] = -(one.error >= 0).astype(float)
    return score


def record_of(looked, policy, *, reference=None, beta=0.5, base=None):
    responses, mended, size = looked
    reference = np.zeros(size) if reference is None else reference
    scores = credit_measures.scores(
        [*responses, *mended], policy, reference, base, beta=beta, seed=0
    )
    return credit_measures.measured({(beta, None): [0]}, [scores], responses, mended, seed=0)


def values(record, score, *names):
    return [record["scores"][score][name][0] for name in names]


WITHIN = ("auroc", "average_precision", "top_1", "right_value")


def test_a_perfect_score_is_perfect_in_everything(looked):
    record = record_of(looked, perfect_score(looked))
    assert values(record, REWARD, *WITHIN, "pooled_auroc") == [1, 1, 1, 1, 1]
    assert values(record, REWARD, "gap") == [None]  # no spread to measure it in
    assert {row["auroc"][REWARD][0] for row in record["breakdown"]} == {1}
    *found, lost = [row["auroc"][REWARD] for row in record["stitching"]]
    assert [one[0] for one in found] == [1, 1, 1, 1] and lost == [0, 0, 0]
    rows = record["spill"]["rows"]
    assert [row["share"][REWARD][0] for row in rows] == [0, 1, 0, 0, 0]
    assert not any(SFT in row["share"] for row in rows)  # of no difference nothing is a share
    assert record["scores"][SFT]["reward_above"] == [0.5, 0.5, 0.5]
    bars = record["histogram"]
    assert (bars["wrong"][0], bars["right"][-1]) == (1, 1) and bars["edges"][0] == -0.5  # beta


def test_an_inverted_score_is_all_wrong_and_a_constant_one_worth_chance(looked):
    inverted = record_of(looked, -perfect_score(looked))
    assert values(inverted, REWARD, "auroc", "top_1", "right_value") == [0, 0, 0]
    chance = values(inverted, SFT, "auroc", "right_value", "pooled_auroc")  # SFT is 0 throughout
    assert chance == [0.5, 0.5, 0.5]
    low, high = inverted["scores"][RANDOM]["auroc"][1:]
    assert low < 0.5 < high
    evenly = inverted["scores"][EVENLY]["auroc"]
    assert evenly == [0.5, 0.5, 0.5]  # whatever the response's reward is
    assert "right_value" not in inverted["scores"][EVENLY]
    low, high = inverted["scores"][RANDOM]["right_value"][1:]
    assert low < 0.5 < high


def test_a_reward_spread_evenly_is_half_within_a_response_and_more_pooled(looked):
    responses, _, _ = looked
    several = np.zeros(looked[2])
    for one in responses:
        several[one.places] = -float((one.error >= 0).mean())
    found = values(record_of(looked, several), REWARD, "auroc", "pooled_auroc")
    assert found[0] == 0.5 and found[1] > 0.55


def test_labels_a_token_off_are_noticed(looked):
    responses, mended, size = looked
    shifted = [one._replace(error=np.roll(one.error, 1)) for one in responses]
    moved = (shifted, mended, size)
    assert values(record_of(moved, perfect_score(looked)), REWARD, "auroc")[0] < 0.5


def test_every_error_is_marked_by_its_own_token(looked):
    tokenizer = synthetic.tokenizer()
    for one in looked[0]:
        pieces = [*tokenizer.encode(one.case.pair.rejected).tokens, "<eos>"]
        wrong = [pieces[n].strip() for n in np.flatnonzero(one.error >= 0)]
        assert wrong == [error.wrong for error in one.case.errors]
        beside = [*tokenizer.encode(one.case.pair.chosen).tokens, "<eos>"]
        right = [beside[n].strip() for n in np.flatnonzero(one.chosen_error >= 0)]
        assert right == [error.right for error in one.case.errors]


def test_the_breakdown_counts_every_error_once_by_each_of_its_ways(looked):
    record = record_of(looked, perfect_score(looked))
    total = sum(len(one.case.errors) for one in looked[0])
    counts = {}
    for row in record["breakdown"]:
        counts[row["by"]] = counts.get(row["by"], 0) + row["errors"]
    assert len(counts) == 4 and set(counts.values()) == {total} == {record["errors"]}
    copied = [error.wrong in one.case.pair.prompt for one in looked[0] for error in one.case.errors]
    groups = {row["group"]: row["errors"] for row in record["breakdown"]}
    assert groups["stands in the post"] == sum(copied)


def test_errors_are_counted_by_the_third_of_the_response_that_they_begin_in(looked):
    counts = dict.fromkeys(credit_measures.THIRDS, 0)
    for one in looked[0]:
        tokens = len(one.error) - 1  # without EOS
        for number in range(len(one.case.errors)):
            place = np.flatnonzero(one.error == number)[0] / tokens
            counts[credit_measures.THIRDS[int(place >= 1 / 3) + int(place >= 2 / 3)]] += 1
    rows = record_of(looked, perfect_score(looked))["breakdown"]
    assert {row["group"]: row["errors"] for row in rows if "place" in row["by"]} == counts
    assert min(counts.values()) > 0


def test_the_second_error_is_looked_for_after_the_first_alone(looked):
    responses, mended, _ = looked
    score = perfect_score(looked)
    for one in (*responses, *mended):
        assert one.error[0] < 0
        score[one.places[0]] = -5  # a right token that looks worse than any error
    rows = {row["error"]: row["auroc"][REWARD] for row in record_of(looked, score)["stitching"]}
    assert rows["the second, after the first"] == [1, 1, 1]
    assert rows["the second, the first put right"] == [1, 1, 1]
    assert rows["the first of several"][0] < 1


def test_blame_on_the_end_token_is_its_own_part(looked):
    score = np.zeros(looked[2])
    for one in looked[0]:
        score[one.places[-1]] = -1
    rows = record_of(looked, score)["spill"]["rows"]
    assert [row["difference"][REWARD][0] for row in rows] == [0, 0, 0, 0, -0.5]
    assert rows[-1]["tokens"] == 1


def test_no_share_of_a_difference_that_may_be_none(looked):
    score = perfect_score(looked)
    for one in looked[0][::2]:
        score[one.places] *= -1  # every other response is blamed, every other praised
    rows = record_of(looked, score)["spill"]["rows"]
    assert not any(REWARD in row["share"] for row in rows)


def test_an_error_that_hides_the_next_one_is_seen(looked):
    """A score blind to whatever follows an error loses the second one, and only there."""
    responses, mended, _ = looked
    score = perfect_score(looked)
    for one in responses:
        score[one.places[one.error > 0]] = 0
    rows = {row["error"]: row["auroc"][REWARD] for row in record_of(looked, score)["stitching"]}
    assert rows["the second, after the first"][0] == 0.5
    assert rows["the second, the first put right"][0] == rows["the first of several"][0] == 1
    assert rows[credit_measures.LOST] == [-0.5, -0.5, -0.5]


def test_blame_on_later_tokens_is_seen_and_the_parts_add_up(looked):
    responses, _, size = looked
    score = perfect_score(looked)
    for one in responses:
        first = np.flatnonzero(one.error == 0)[-1]
        score[one.places[first + 1]] -= 1  # the next token, right or wrong
    score += 0.01 * np.random.default_rng(0).normal(size=size)
    rows = record_of(looked, score)["spill"]["rows"]
    assert rows[2]["difference"][REWARD][0] < -0.2
    total = sum(row["difference"][REWARD][0] for row in rows)
    whole = [0.5 * (score[one.places].sum() - score[one.chosen_places].sum()) for one in responses]
    assert total == pytest.approx(np.mean(whole), abs=1e-9)  # beta is 0.5
    assert sum(row["share"][REWARD][0] for row in rows) == pytest.approx(1, abs=1e-9)


def test_what_the_tokenizer_splits_otherwise_is_compared_with_nothing(looked):
    responses, mended, size = looked
    apart = [one._replace(chosen_error=None) if n % 2 else one for n, one in enumerate(responses)]
    record = record_of((apart, mended, size), perfect_score(looked))
    assert record["spill"]["responses"] == len(responses) / 2
    assert record["responses"] == len(responses)
    compared = sum(len(one.case.errors) for one in responses[::2])
    assert record["compared"] == compared < record["errors"]
    record |= {"counts": {"left_out": {}, "rows": 1}} | NOISE
    text = credit_tables.markdown(record)
    assert f"{record['errors']} ({compared} beside right values) errors" in text
    assert sum(row["compared"] for row in record["breakdown"] if row["by"] == "kind") == compared
    none = [one._replace(chosen_error=None) for one in responses]
    record = record_of((none, mended, size), perfect_score(looked))
    assert values(record, REWARD, "right_value") == [None] and not record["spill"]["rows"]
    assert credit_tables.rich_tables(record | {"counts": {"left_out": {}, "rows": 1}} | NOISE)
    credit_tables.draw(record)


def test_a_response_is_compared_with_itself_put_right_however_the_chosen_is_worded(tmp_path):
    task = synthetic.Task(rephrase=1.0)
    sizes = dict(sft_train=1, sft_test=1, pairs_train=1, pairs_test=12)
    synthetic.write(tmp_path, task, seed=0, **sizes)
    cases, _ = known_errors.labelled(str(tmp_path / "pairs_test.jsonl"), limit=None)
    examples = [synthetic.example(task, seed=0, split="test", index=n) for n in range(1, 13)]
    assert [case.pair.rejected for case in cases] == [one.rejected for one in examples]
    assert [case.pair.chosen for case in cases] != [one.chosen for one in examples]
    for one in looked_at(cases)[0]:
        assert one.chosen_error is not None


def test_the_scores_are_what_they_are_called(looked):
    responses, mended, size = looked
    policy, reference, base = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
    found = credit_measures.scores(responses, policy, reference, base, beta=0.3, seed=0)
    reward = 0.3 * (policy.astype(float) - reference)
    assert np.array_equal(found[REWARD], reward) and np.array_equal(found[SFT], reference)
    assert np.allclose(found[OVER_BASE], reference.astype(float) - base, atol=1e-12)
    one = responses[3]
    assert np.allclose(found[EVENLY][one.places].sum(), reward[one.places].sum(), atol=1e-12)
    assert len(set(found[EVENLY][one.places])) == 1
    chance = found[RANDOM]
    assert -0.5 <= chance.min() and chance.max() < 0.5 and abs(chance.mean()) < 0.03
    assert OVER_BASE not in credit_measures.scores(responses, policy, base, None, beta=1.0, seed=0)


def test_groups_of_runs_are_averaged_and_swept(looked):
    responses, mended, _ = looked
    score = perfect_score(looked)
    trials = [
        credit_measures.scores(
            [*responses, *mended], sign * score, 0 * score, None, beta=1.0, seed=n
        )
        for n, sign in enumerate([1, -1, 1, 1, 0])
    ]
    settings = [(0.1, 10), (0.1, 10), (0.1, 20), (0.3, 20), (1.0, 20)]
    groups = by_setting(settings)
    record = credit_measures.measured(groups, trials, responses, mended, seed=0)
    assert record["main"] == {"beta": 0.1, "pairs": 20, "runs": 1}
    aurocs = {(row["beta"], row["pairs"]): row["auroc"][REWARD] for row in record["sweep"]}
    assert aurocs[0.1, 10] == [0.5, 0, 1]  # one run at 1, one at 0: seeds make the interval
    assert [aurocs[one][0] for one in ((0.1, 20), (0.3, 20), (1.0, 20))] == [1, 1, 0.5]


@pytest.mark.parametrize(
    "runs, main",
    [
        ({(0.1, 10): 1, (0.1, 20): 1, (0.3, 20): 9}, (0.1, 20)),  # most numbers of pairs
        ({(0.3, 20): 1, (0.1, 20): 2, (1.0, 20): 1}, (0.1, 20)),  # then most runs
        ({(0.1, None): 1}, (0.1, None)),
    ],
)
def test_the_main_group_is_where_the_sweeps_cross(runs, main):
    assert credit_measures._crossing({of: range(count) for of, count in runs.items()}) == main


def test_labels_of_errors_are_drawn_as_they_stand(looked):
    kinds = itertools.cycle([r"$\frac$", "a\x1b[31mb", "<b>|"])
    named = lambda one: one._replace(errors=tuple(e._replace(kind=next(kinds)) for e in one.errors))
    responses = [one._replace(case=named(one.case)) for one in looked[0]]
    record = record_of((responses, *looked[1:]), perfect_score(looked))
    record |= {"counts": {"left_out": {}, "rows": 1}} | NOISE
    figure = credit_tables.draw(record)
    figure.savefig(io.BytesIO())
    drawn = {text.get_text() for text in figure.axes[2].get_yticklabels()}
    assert {r"$\frac$", "a⟨U+001B⟩[31mb", "<b>|"} <= drawn
    assert "\x1b" not in credit_tables.markdown(record) + credit_tables.section(record)


def test_a_curve_of_equal_values_has_room_and_no_ends_of_negative_length():
    row = {"beta": 0.1, "pairs": 5, "runs": 1}
    value = [0.9, 0.9 + 1e-16, 0.9 - 2e-16]  # as a mean of resamples may come out
    rows = [row | {"beta": beta} for beta in (0.1, 0.3)]
    rows = [one | {"auroc": {REWARD: value}, "right_value": {REWARD: value}} for one in rows]
    ax = Figure().subplots()
    record = {"sweep": rows, "main": row, "scores": {REWARD: {}}}
    credit_tables._draw_sweep(ax, record, "beta")
    low, high = ax.get_ylim()
    assert low <= 0.9 - 0.009 and high >= 0.9 + 0.009


def test_no_number_is_less_than_nothing_by_rounding_alone():
    assert credit_tables._interval([-1e-9, -0.02, 1e-9]) == "0.000 [-0.020, 0.000]"


def test_nothing_is_cut_at_80_columns(looked):
    record = record_of(looked, perfect_score(looked), base=np.ones(looked[2]))
    record |= {"counts": {"left_out": {}, "rows": 1}} | NOISE
    for table in credit_tables.rich_tables(record):
        console = Console(width=80, file=io.StringIO())
        console.print(table)
        shown = console.file.getvalue()
        assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
        for column in table.columns:
            for cell in [column.header, *column.cells]:
                assert set(str(cell)) - {" "} <= set(shown)


def test_mending_the_first_error_moves_the_others():
    text, errors = (
        " a cat, a dog",
        (Error("pet", 3, 6, "mouse", "cat"), Error("pet", 10, 13, "ox", "dog")),
    )
    case = Case(Pair("p", " a mouse, a ox", text, 1), errors, 0)
    mended = known_errors.first_put_right(case)
    assert mended.pair.rejected == " a mouse, a dog"
    assert [mended.pair.rejected[e.start : e.end] for e in mended.errors] == ["dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of the task, and two tiny random models that speak it."""
    folder = tmp_path_factory.mktemp("credit")
    synthetic.write(folder, TASK, seed=0, sft_train=1, sft_test=1, pairs_train=1, pairs_test=12)
    size = synthetic.tokenizer().get_vocab_size()
    config = PythiaConfig(vocab_size=size, num_layers=1, num_heads=2, width=16, mlp_width=16)
    for number, name in enumerate(("policy", "sft")):
        params = pythia.init_params(config, jax.random.key(number))
        tokenizer = folder / "tokenizer.json"
        convert.save_hf(folder / name, config, params, tokenizer_from=tokenizer, eos_id=0)
    return folder


def given(folder, **changes):
    asked = dict(model=str(folder / "policy"), reference=str(folder / "sft"), beta=0.1)
    asked |= dict(data=str(folder / "pairs_test.jsonl"), out=str(folder / "out"))
    return NOTHING | asked | changes


def test_models_are_measured_written_and_drawn(folder):
    shown = credit_benchmark.write(**given(folder, base=str(folder / "policy"), limit=10))
    record = read_json(folder / "out/credit_benchmark.json")
    assert record["responses"] == record["counts"]["rows"] == 10
    assert set(record["scores"]) == {REWARD, SFT, OVER_BASE, "DPO logp", EVENLY, RANDOM}
    # The base is the policy itself: SFT over it is the reward turned round.
    auroc = {name: found["auroc"][0] for name, found in record["scores"].items()}
    assert auroc[REWARD] == pytest.approx(1 - auroc[OVER_BASE], abs=1e-6)
    before, *_ = record["spill"]["rows"]
    assert abs(before["difference"][REWARD][0]) < 1e-5  # the same tokens after the same tokens
    assert record["noise_floor"] < 1e-5  # float32, another batch shape
    text = (folder / "out/credit_benchmark.md").read_text()
    assert REWARD in text and f"{record['scores'][REWARD]['auroc'][0]:.3f} [" in text
    assert (folder / "out/credit_benchmark.png").stat().st_size > 10_000
    assert str(folder / "out/credit_benchmark.png") in shown[-1]
    section = credit_benchmark.section(record)
    assert section.count("<table") == len(shown) - 1 and "<svg" in section


def test_the_noise_floor_is_beta_times_that_of_both_models_of_the_main_group(folder, monkeypatch):
    noise = {"policy": 0.25, "sft": 0.5}
    planted = lambda model, *_: noise[Path(model.name).name]
    monkeypatch.setattr(credit_benchmark, "noise_floor", planted)
    trial = Trial(str(folder / "policy"), str(folder / "sft"), None, 0.1)
    trials = [trial, trial._replace(beta=0.4, seed=0), trial._replace(beta=0.4, seed=1)]
    file = str(folder / "pairs_test.jsonl")
    monkeypatch.setattr(credit_benchmark, "trials_of", lambda *_: (trials, [(file, "pairs")]))
    credit_benchmark.write(**given(folder, data=None, limit=4, out=str(folder / "noise")))
    record = read_json(folder / "noise/credit_benchmark.json")
    assert record["main"]["beta"] == 0.4 and record["noise_floor"] == 0.4 * (0.25 + 0.5)


def test_models_must_speak_the_same(folder, tmp_path):
    shutil.copytree(folder / "sft", tmp_path / "other")
    file = tmp_path / "other/tokenizer.json"
    held = json.loads(file.read_text())
    words = held["model"]["vocab"]
    words[" Oslo"], words[" Paris"] = words[" Paris"], words[" Oslo"]
    file.write_text(json.dumps(held))
    with pytest.raises(InputError, match="their tokenizers differ in 4 entries"):
        credit_benchmark.write(**given(folder, reference=str(tmp_path / "other"), limit=4))


def test_cases_of_one_prompt_are_one_unit_and_bad_rows_are_counted(folder):
    lines = (folder / "pairs_test.jsonl").read_text().splitlines()
    file = folder / "again.jsonl"
    file.write_text("\n".join([lines[0], "", lines[1], "{", lines[0], "{"]) + "\n")
    cases, counts = known_errors.labelled(str(file), limit=5)
    assert [case.pair.line for case in cases] == [1, 3, 5]
    assert [case.unit for case in cases] == [0, 1, 0]
    bad = {"bad row: blank line": 1, "bad row: not JSON": 1}
    assert counts == {"rows": 5, "responses": 3, "left_out": bad | {"no error in it": 0}}


WRONG_ERRORS = {
    "no list": ({}, "field 'errors' must be a list"),
    "null": (None, "field 'errors' must be a list"),
    "no object": (["cat"], "error 1 must be an object with kind, start, end, right, wrong"),
    "unknown": ([{"more": 1}], "error 1 must be an object"),
    "a fraction": ([{"start": 3.0}], "error 1: 'start' must be a whole number"),
    "true": ([{"start": True}], "error 1: 'start' must be a whole number"),
    "a number": ([{"right": 5}], "error 1: 'right' must be a string"),
    "backwards": ([{"start": 6, "end": 3}], r"error 1 \(6:3\) is empty or outside"),
    "negative": ([{"start": -4, "end": -1}], "is empty or outside 'rejected', which has 13"),
    "empty": ([{"end": 3, "wrong": ""}], "is empty or outside"),
    "too far": ([{"end": 99}], "is empty or outside"),
    "elsewhere": ([{"start": 4}], "error 1 is not where it says in 'rejected'"),
    "nothing right": ([{"right": " "}], "error 1: 'right' is empty or the same"),
    "right already": ([{"right": "cat"}], "error 1: 'right' is empty or the same"),
    "surrogate": ([{"kind": "\ud800"}], "error 1: holds a lone surrogate"),
    "end of text": ([{"right": "<|endoftext|>"}], "error 1: holds a lone surrogate or <|end"),
    "twice": ([{}, {}], "errors 3:6 and 3:6 overlap"),
    "overlap": ([{}, {"start": 5, "end": 8, "wrong": "t, "}], "errors 3:6 and 5:8 overlap"),
}


@pytest.mark.parametrize("name", WRONG_ERRORS)
def test_errors_that_mean_nothing_are_refused(name):
    changes, message = WRONG_ERRORS[name]
    good = {"kind": "pet", "start": 3, "end": 6, "right": "dog", "wrong": "cat"}
    if isinstance(changes, list):
        changes = [good | one if isinstance(one, dict) else one for one in changes]
    with pytest.raises(InputError, match=f"^f line 1: .*{message}"):
        known_errors.errors_of({"errors": changes}, " a cat, a dog", "f line 1")


def test_errors_are_read_from_left_to_right():
    two = [Error("pet", 10, 13, "ox", "dog"), Error("pet", 3, 6, "mouse", "cat")]
    row = {"errors": [error._asdict() for error in two]}
    assert known_errors.errors_of(row, " a cat, a dog", "here") == tuple(two[::-1])


def test_real_pairs_are_corrupted_by_rule(folder):
    post = "Sara paid in Rome"
    texts = [" 4 weeks ago I paid 20 dollars in Rome", " I paid", " after 3 weeks in Lima I paid"]
    rows = [
        {"prompt": f"{post} {n}", "chosen": text, "rejected": " x"} for n, text in enumerate(texts)
    ]
    file = folder / "plain.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    cases, counts = known_errors.corrupted(
        str(file), format="pairs", split=None, limit=None, seed=0
    )
    assert counts["rows"] == 4 and counts["left_out"]["prompt met again"] == 1
    assert counts["left_out"]["too little to swap: number"] == 1
    by_unit = {}
    for case in cases:
        by_unit.setdefault(case.unit, []).append([error.kind for error in case.errors])
    sizes = {unit: [len(kinds) for kinds in of] for unit, of in by_unit.items()}
    assert sizes.keys() == {0, 2} and set(by_unit[0][0] + by_unit[0][1]) == {"number", "unit"}
    for of in sizes.values():  # one error by each rule that finds a value, then two by any
        assert set(of[:-1]) == {1} and of[-1] == known_errors.SEVERAL
    little = sum(count for why, count in counts["left_out"].items() if "too little" in why)
    assert counts["responses"] == len(cases) == 3 * 4 - little


MISTAKES = {
    "no errors to find": (dict(data="{}/perfect.jsonl"), "perfect.jsonl: no row has an error"),
    "no marks": (dict(data="{}/unmarked.jsonl"), "unmarked.jsonl line 1: has no field 'errors'"),
    "marks elsewhere": (dict(data="{}/moved.jsonl"), "moved.jsonl line 1: error 1 is not where"),
    "odd marks": (dict(data="{}/odd.jsonl"), "odd.jsonl line 1: error 1 must be an object"),
    "typed marks": (dict(data="{}/typed.jsonl"), "typed.jsonl line 1: error 1: 'right' must"),
    "another file": (dict(data="{}/pairs.parquet"), "pairs.parquet: errors are read from .jsonl"),
    "nothing to swap": (dict(data="{}/unmarked.jsonl", corrupt=True), "unmarked.jsonl: no chosen"),
    "split": (dict(split="test"), "--split: has no effect"),
    "format": (dict(format="hh"), "--format hh: has no marked errors; use --corrupt"),
    "no beta": (dict(beta=None), "--beta: give it, or --run"),
    "beta": (dict(beta=-1.0), "--beta: -1.0 must be above 0"),
    "no model": (dict(model=None), "--model: give it, or --run"),
    "no data": (dict(data=None), "--data: give held-out pairs"),
    "no out": (dict(out=None), "--out: give a folder"),
    "no run": (dict(run="{}/sft", model=None, reference=None, beta=None), "neither a run nor"),
    "no dpo": (dict(run="{}/several", model=None, reference=None, beta=None), "none of its runs"),
    "model of several": (dict(run="{}/twins", reference=None, beta=None), "--model: every run in"),
    "twins": (dict(run="{}/twins", model=None, reference=None, beta=None), "a and b have the same"),
    "unlike": (
        dict(run="{}/unlike", model=None, reference=None, beta=None),
        "/unlike: a and b differ in dpo.lr, sft.lr, not in their seed alone",
    ),
    "half": (dict(run="{}/half/a", model=None, reference=None, beta=None), "half/a: its dpo stage"),
    "half of it": (dict(run="{}/half/a", model=None), "half/a: its dpo stage has not finished"),
    "one half": (dict(run="{}/half", model=None, reference=None, beta=None), "half/a: its dpo"),
    "idle run": (dict(run="{}/twins/a"), "--run: has no effect where all else is given"),
    "seed": (dict(seed=-1), "--seed: -1 must be 0 or more"),
    "out a file": (dict(out="{}/perfect.jsonl"), "perfect.jsonl: cannot be written into"),
    "cut": (dict(data="{}/cut.jsonl"), "cut.jsonl line 1: span 1 .* cuts the token"),
    "long": (dict(data="{}/long.jsonl"), "long.jsonl line 1: prompt and response are"),
}


@pytest.fixture(scope="module")
def mistakes(folder):
    row = json.loads((folder / "pairs_test.jsonl").read_text().splitlines()[0])
    moved = [error | {"start": error["start"] - 1} for error in row["errors"]]
    rows = {"perfect": row | {"errors": []}, "moved": row | {"errors": moved}}
    rows |= {"odd": row | {"errors": [{"kind": "pet"}]}}
    rows |= {"typed": row | {"errors": [error | {"right": 5} for error in row["errors"]]}}
    rows |= {"unmarked": {"prompt": "p", "chosen": " I paid", "rejected": " I"}}
    first = row["errors"][0]
    words = [word.strip() for word in synthetic.tokenizer().get_vocab()]
    value = first["wrong"]
    like = next(word for word in words if word[:1] == value[0] and word != value)
    cut = {"start": first["start"] + 1, "wrong": value[1:], "right": like[1:]}
    rows["cut"] = row | {"errors": [first | cut]}
    rows["long"] = row | {"prompt": row["prompt"] * 200}
    for name, one in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(one) + "\n")
    run_folder(folder / "several/a", stages=["sft"])
    for name in "ab":
        run_folder(folder / "twins" / name)
        run_folder(folder / "unlike" / name, seed=ord(name), lr=float(name == "b"))
    run_folder(folder / "half/a", done=False)
    return folder


def run_folder(
    folder, *, stages=("dpo",), weights="", seed=0, beta=0.1, pairs=7, lr=0.1, done=True
):
    """What is read of a run before its models are."""
    data = {"train": "t.jsonl", "eval": "e.jsonl", "format": "pairs"}
    stage = {"data": data, "beta": beta, "hand_on": "last", "lr": lr}
    config = {"stages": list(stages), "seed": seed, "data": "", "model": {"weights": weights}}
    (folder / "dpo").mkdir(parents=True)
    write_json(folder / "config.json", config | {"sft": stage, "dpo": stage})
    write_json(folder / "versions.json", {})
    report = {"truncation": {"train": {"examples": pairs}}}
    write_json(folder / "dpo/data_report.json", report)
    if done:
        write_json(folder / "dpo/done.json", {})


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(mistakes, name):
    changes, message = MISTAKES[name]
    filled = {
        key: value.format(mistakes) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    with pytest.raises(InputError, match=message) as caught:
        credit_benchmark.write(**given(mistakes, **filled))
    assert "\n" not in str(caught.value)


def test_runs_of_a_folder_know_their_seed_pairs_and_what_their_reference_was_made_from(tmp_path):
    run_folder(tmp_path / "seed0", stages=["sft"])
    run_folder(tmp_path / "one", weights="{workdir}/../seed0:sft", seed=3, pairs=9)
    run_folder(tmp_path / "two", weights="owner/name", beta=0.3)
    run_folder(tmp_path / "whole", stages=["sft", "dpo"], beta=0.5)
    trials, _ = trials_of(str(tmp_path), {})
    one, two, whole = trials
    assert (one.seed, one.pairs, two.beta, whole.name) == (3, 9, 0.3, "whole")
    assert one.base == f"{tmp_path}/one/../seed0:start" and two.base is None
    assert (whole.reference, whole.base) == (
        f"{tmp_path}/whole:sft:last",
        f"{tmp_path}/whole:start",
    )


def test_runs_that_differ_in_seed_start_and_limit_alone_are_one_group(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        run_folder(tmp_path / name, weights=f"owner/{name}", seed=seed)
    trials, _ = trials_of(str(tmp_path), {})
    assert [(one.seed, one.pairs, one.beta) for one in trials] == [(1, 7, 0.1), (2, 7, 0.1)]


def test_a_run_with_other_models_is_no_longer_that_run(tmp_path):
    run_folder(tmp_path / "run", stages=["sft", "dpo"])
    run_folder(tmp_path / "half", stages=["sft", "dpo"], done=False)
    trial = lambda run, **models: trials_of(str(tmp_path / run), models)[0][0]
    own = trial("run")
    assert (own.name, own.seed, own.pairs) == ("run", 0, 7)
    assert trial("run", beta=0.5, base="b") == own._replace(beta=0.5, base="b")
    other = own._replace(name=None, seed=None, pairs=None)
    assert trial("run", model="m") == other._replace(policy="m")
    assert trial("run", reference="r") == other._replace(reference="r", base=None)
    assert trial("run", reference="r", base="b") == other._replace(reference="r", base="b")
    half = str(tmp_path / "half")
    assert trial("half", model="m").reference == f"{half}:sft:last"  # that stage may be done


def test_runs_must_be_measured_on_the_same_pairs(folder, tmp_path):
    file = shutil.copy(folder / "pairs_test.jsonl", tmp_path / "same.jsonl")
    asked = dict(format="pairs", split=None, limit=None, corrupt=False, seed=0)
    sources = [
        credit_benchmark.Source(str(one), **asked) for one in (folder / "pairs_test.jsonl", file)
    ]
    cases, _, name = credit_benchmark._cases(sources)
    assert len(cases) == 12 and name == sources[0].data
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(InputError, match="shorter.jsonl: holds other pairs than"):
        credit_benchmark._cases([*sources, credit_benchmark.Source(str(shorter), **asked)])
