"""Measured credit: planted scores get what they deserve, and mistakes are one line."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxdpo import InputError, convert, pythia, synthetic
from jaxdpo.analysis import credit_benchmark, credit_measures, credit_tables, known_errors
from jaxdpo.analysis.credit_measures import EVENLY, OVER_BASE, RANDOM, REWARD, SFT
from jaxdpo.analysis.known_errors import Case
from jaxdpo.analysis.token_scores import whole_store
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
    assert [row["share"][REWARD][0] for row in record["spill"]["rows"]] == [0, 1, 0, 0, 0]


def test_an_inverted_score_is_all_wrong_and_a_constant_one_worth_chance(looked):
    inverted = record_of(looked, -perfect_score(looked))
    assert values(inverted, REWARD, "auroc", "top_1", "right_value") == [0, 0, 0]
    chance = values(inverted, SFT, "auroc", "right_value", "pooled_auroc")  # SFT is 0 throughout
    assert chance == [0.5, 0.5, 0.5]
    low, high = inverted["scores"][RANDOM]["auroc"][1:]
    assert low < 0.5 < high
    evenly = inverted["scores"][EVENLY]["auroc"]
    assert evenly == [0.5, 0.5, 0.5]  # whatever the response's reward is


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
    groups = credit_measures.groups(settings)
    record = credit_measures.measured(groups, trials, responses, mended, seed=0)
    assert record["main"] == {"beta": 0.1, "pairs": 20, "runs": 1}
    aurocs = {(row["beta"], row["pairs"]): row["auroc"][REWARD] for row in record["sweep"]}
    assert aurocs[0.1, 10] == [0.5, 0, 1]  # one run at 1, one at 0: seeds make the interval
    assert [aurocs[one][0] for one in ((0.1, 20), (0.3, 20), (1.0, 20))] == [1, 1, 0.5]


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
    assert sizes == {0: [1, 1, 1, 2], 2: [1, 1, 2]}  # the only other name stands in the post
    assert counts["responses"] == len(cases) == 7


MISTAKES = {
    "no errors to find": (dict(data="{}/perfect.jsonl"), "perfect.jsonl: no row has an error"),
    "no marks": (dict(data="{}/unmarked.jsonl"), "unmarked.jsonl line 1: has no field 'errors'"),
    "marks elsewhere": (dict(data="{}/moved.jsonl"), "moved.jsonl line 1: error 1 is not where"),
    "odd marks": (dict(data="{}/odd.jsonl"), "odd.jsonl line 1: an error must have kind"),
    "typed marks": (dict(data="{}/typed.jsonl"), "typed.jsonl line 1: an error must have kind"),
    "another file": (dict(data="{}/pairs.parquet"), "pairs.parquet: errors are read from .jsonl"),
    "nothing to swap": (dict(data="{}/unmarked.jsonl", corrupt=True), "unmarked.jsonl: no chosen"),
    "split": (dict(split="test"), "--split: has no effect"),
    "format": (dict(format="hh"), "--format hh: has no marked errors; use --corrupt"),
    "no beta": (dict(beta=None), "--beta: give it, or --run"),
    "beta": (dict(beta=-1.0), "--beta: -1.0 must be positive"),
    "no model": (dict(model=None), "--model: give it, or --run"),
    "no data": (dict(data=None), "--data: give held-out pairs"),
    "no out": (dict(out=None), "--out: give a folder"),
    "no run": (dict(run="{}/sft", model=None, reference=None, beta=None), "neither a run nor"),
    "no dpo": (dict(run="{}/several", model=None, reference=None, beta=None), "none of its runs"),
    "model of several": (dict(run="{}/twins", reference=None, beta=None), "--model: every run in"),
    "twins": (dict(run="{}/twins", model=None, reference=None, beta=None), "a and b have the same"),
}


@pytest.fixture(scope="module")
def mistakes(folder):
    row = json.loads((folder / "pairs_test.jsonl").read_text().splitlines()[0])
    moved = [error | {"start": error["start"] - 1} for error in row["errors"]]
    rows = {"perfect": row | {"errors": []}, "moved": row | {"errors": moved}}
    rows |= {"odd": row | {"errors": [{"kind": "pet"}]}}
    rows |= {"typed": row | {"errors": [error | {"right": 5} for error in row["errors"]]}}
    rows |= {"unmarked": {"prompt": "p", "chosen": " I paid", "rejected": " I"}}
    for name, one in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(one) + "\n")
    run_folder(folder / "several/a", stages=["sft"])
    for name in "ab":
        run_folder(folder / "twins" / name)
    return folder


def run_folder(folder, *, stages=("dpo",), weights="", seed=0, beta=0.1, pairs=7):
    """What is read of a run before its models are."""
    data = {"train": "t.jsonl", "eval": "e.jsonl", "format": "pairs"}
    stage = {"data": data, "beta": beta, "hand_on": "last"}
    config = {"stages": list(stages), "seed": seed, "data": "", "model": {"weights": weights}}
    (folder / "dpo").mkdir(parents=True)
    write_json(folder / "config.json", config | {"sft": stage, "dpo": stage})
    write_json(folder / "versions.json", {})
    report = {"truncation": {"train": {"examples": pairs}}}
    write_json(folder / "dpo/data_report.json", report)


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
    trials, _ = credit_benchmark._trials(str(tmp_path), {})
    one, two, whole = trials
    assert (one.seed, one.pairs, two.beta, whole.name) == (3, 9, 0.3, "whole")
    assert one.base == f"{tmp_path}/one/../seed0:start" and two.base is None
    assert (whole.reference, whole.base) == (
        f"{tmp_path}/whole:sft:last",
        f"{tmp_path}/whole:start",
    )


def test_runs_must_be_measured_on_the_same_pairs(folder, tmp_path):
    file = shutil.copy(folder / "pairs_test.jsonl", tmp_path / "same.jsonl")
    asked = dict(format="pairs", split=None, limit=None, corrupt=False, seed=0)
    sources = [
        credit_benchmark.Source(str(one), **asked) for one in (folder / "pairs_test.jsonl", file)
    ]
    cases, _ = credit_benchmark._cases(sources)
    assert len(cases) == 12
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(InputError, match="shorter.jsonl: holds other pairs than"):
        credit_benchmark._cases([*sources, credit_benchmark.Source(str(shorter), **asked)])
