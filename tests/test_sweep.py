"""A sweep over beams: every cell is what decoding and judging it alone gives; numbers by hand."""

from pathlib import Path

import numpy as np
import pytest
from speakers import TEXTS, checkpoint

from jaxdpo import InputError, prompts, synthetic
from jaxdpo.analysis import sweep, sweep_tables
from jaxdpo.analysis.sweep import Cell, cells, swept
from jaxdpo.analysis.trials import Trial
from jaxdpo.completions import completions, decoder, scoring
from jaxdpo.judge import FIRST, SECOND, TIE, Judge, Verdict
from jaxdpo.records import read_json
from jaxdpo.sides import Asked

pytestmark = pytest.mark.usefixtures("quick_compile")

PROMPTS = prompts.typed([first + last for first in TEXTS for last in TEXTS[:2]])
OPPONENT = " I feel sad."
ASKED = [Asked(prompt, OPPONENT, None, "") for prompt in PROMPTS]
OPTIONS = dict(max_new_tokens=8, temperature=1.0, seed=0, dtype=None, batch_size=8)


def longer(asked):
    """Prefers the longer text."""
    for place, one in enumerate(asked):
        more = len(one.first) - len(one.second)
        yield place, Verdict(TIE if more == 0 else FIRST if more > 0 else SECOND)


JUDGE = Judge("longer", {"kind": "longer"}, longer, fair=True)
NORMS = ["generated", "sum"]
WAYS = cells(["beam"], NORMS, [1, 3]) + cells(["beam_sample"], ["sum"], [1, 3])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [checkpoint(folder / f"model{seed}", seed=seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def policies(models):
    one, two, reference = models
    both = (("seed0", one), ("seed1", two))
    return [Trial(name, reference, None, 0.1, label) for label, name in both]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def found(policies, folder):
    return swept(policies, WAYS, ASKED, JUDGE, into=folder, **OPTIONS)


def of(found, *cell):
    (row,) = [r for r in found if (r["method"], r["norm"], r["beam_size"]) == cell]
    return row


def test_every_cell_is_what_decoding_it_alone_gives(found, policies):
    """Its numbers are means over both runs' prompts, decoded and judged by themselves."""
    rule = Cell("beam", "generated", 3).rule(1.0)
    lengths, wins, rewards = [], [], []
    for policy in policies:
        models = scoring(model=policy.policy, reference=policy.reference, beta=policy.beta)
        for _, (best, *_) in completions(decoder(models, rule, max_new_tokens=8), PROMPTS):
            more = len(best["text"]) - len(OPPONENT)
            wins.append(0.5 if more == 0 else float(more > 0))
            lengths.append(best["length"] - best["ended"])
            rewards.append(best["implicit_reward"])
    row = of(found, "beam", "generated", 3)
    assert row["runs"] == 2 and row["unread"] == 0
    for name, values in (("win_rate", wins), ("length", lengths), ("implicit_reward", rewards)):
        value, low, high = row[name]
        # Sums of 16 numbers in another order.
        assert value == pytest.approx(np.mean(values), abs=1e-6) and low <= value <= high
    assert len(set(lengths)) > 2 and 0 < np.mean(wins) < 1


def test_what_is_decoded_alike_is_decoded_once(found, folder):
    """One beam has no rival: its file is the same under every norm, and so are its numbers."""
    files = {file.name for file in (folder / "seed0").glob("*.jsonl")}
    drawn = {"beam_sample_1.jsonl", "beam_sample_3_sum.jsonl"}
    assert files == {"beam_1.jsonl", "beam_3_generated.jsonl", "beam_3_sum.jsonl"} | drawn
    one, other = (of(found, "beam", norm, 1) for norm in NORMS)
    assert one | {"norm": ""} == other | {"norm": ""}
    assert len(found) == len(WAYS) == 6


def test_no_question_is_put_to_the_judge_twice(found, policies, folder):
    put = []

    def ask(questions):
        put.extend(questions)
        return longer(questions)

    again = swept(policies, WAYS, ASKED, JUDGE._replace(ask=ask), into=folder, **OPTIONS)
    assert again == found and len(put) == len(set(put))
    assert len(ASKED) < len(put) < len(policies) * len(WAYS) * len(ASKED)


def test_norms_and_methods_are_not_the_same(found):
    logps = {(r["method"], r["norm"]): r["logps"][0] for r in found if r["beam_size"] == 3}
    # Of all that three beams find, no other rule returns what is more likely; drawn beams are less.
    assert logps["beam", "sum"] > max(logps["beam", "generated"], logps["beam_sample", "sum"])


def test_the_next_sweep_decodes_nothing_again(found, policies, folder, monkeypatch):
    monkeypatch.setattr("jaxdpo.transcript.completions", lambda *_, **__: iter(()))
    assert swept(policies, WAYS, ASKED, JUDGE, into=folder, **OPTIONS) == found


def test_gains_are_paired_and_steps_are_from_the_next_fewer_beams():
    """Two prompts and one run, by hand: 1, 2 and 5 beams win 0, 1; 1/2, 1; 1, 0."""
    ways = cells(["beam"], ["sum"], [1, 2, 5])
    wins = dict(zip(ways, ([0.0, 1.0], [0.5, 1.0], [1.0, 0.0]), strict=True))
    measures = {name: np.zeros(2) for name in sweep.MEASURES}
    found = {(0.1, way): [measures | {"win_rate": np.array(wins[way])}] for way in ways}
    one, two, five = sweep._rows(found, 2, seed=0)
    assert [row["win_rate"][0] for row in (one, two, five)] == [0.5, 0.75, 0.5]
    assert one["gain"] is one["step"] is None
    assert two["gain"] == two["step"] == [0.25, 0.0, 0.5]
    assert five["gain"] == [0.0, -1.0, 1.0] and five["step"] == [-0.25, -1.0, 0.5]


def test_a_judge_who_is_asked_in_both_orders_takes_nobodys_side():
    first = Judge(
        "first", {}, lambda asked: ((n, Verdict(FIRST)) for n, _ in enumerate(asked)), False
    )
    said = [{"completions": [{"text": " I feel bad."}]} for _ in ASKED]
    once = sweep._wins(first, ASKED, said, seed=0, both_orders=False)
    assert set(once) == {0.0, 1.0}
    assert set(sweep._wins(first, ASKED, said, seed=0, both_orders=True)) == {0.5}


def test_an_answer_that_nobody_could_read_is_left_out_and_counted():
    (way,) = cells(["beam"], ["sum"], [2])
    measures = {name: np.zeros(3) for name in sweep.MEASURES}
    measures["win_rate"] = np.array([1.0, np.nan, 0.0])
    (row,) = sweep._rows({(0.1, way): [measures]}, 3, seed=0)
    assert row["win_rate"][0] == 0.5 and row["unread"] == 1


@pytest.mark.parametrize(
    "given, said",
    [
        ((["beams"], ["sum"], [1]), "methods: 'beams' is unknown; choose from beam, beam_sample"),
        ((["beam"], [], [1]), "norms: none is given; choose from generated, total, sum"),
        ((["beam"], ["sum"], [0, 1]), r"beam_sizes: \[0, 1\] must be numbers of beams, from 1"),
        ((["beam"], ["sum"], ["2", "x"]), r"beam_sizes: \['2', 'x'\] must be numbers of beams"),
        ((["beam"], ["sum"], []), r"beam_sizes: \[\] must be numbers of beams, from 1"),
    ],
)
def test_ways_that_are_none_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        cells(*given)


def record(cells):
    return {"cells": cells, "prompts": 8, "opponent": "chosen", "judge": "longer"}


def cell(size, win_rate, step, logps):
    estimate = lambda value: [value, value - 0.1, value + 0.1]
    names = ("length", "implicit_reward")
    return {
        "beta": 0.1, "method": "beam", "norm": "total", "beam_size": size, "runs": 1,
        "win_rate": estimate(win_rate), "logps": estimate(logps), "ended": estimate(1.0),
        "gain": step, "step": step, **{name: estimate(1.0) for name in names},
    }  # fmt: skip


def test_over_optimisation_is_a_fall_of_what_is_judged_and_not_of_what_is_searched():
    rise, fall, unsure = [0.1, 0.05, 0.2], [-0.2, -0.3, -0.1], [-0.2, -0.3, 0.1]
    unknown = [None, None, None]
    begins = cell(1, 0.5, None, -3.0), cell(2, 0.6, rise, -2.0)
    (said,) = sweep_tables.readings(record([*begins, cell(5, 0.4, fall, -1.5)]))
    assert "over-optimised from 5 beams on (a step of -0.200 [-0.300, -0.100])" in said
    for step, logps in ((unsure, -1.5), (fall, -2.5), (unknown, -1.5)):
        other = cell(5, 0.4, step, logps)
        (said,) = sweep_tables.readings(record([*begins, other]))
        assert "over-optimisation is not seen" in said


def test_tables_and_figure_show_every_cell(found):
    shown = record(found)
    whole, brief = sweep_tables.table(shown).rows, sweep_tables.brief(shown).rows
    assert [row[:5] for row in whole] == [row[:5] for row in brief] and len(whole) == 6
    assert sweep_tables.markdown(shown).count("\n| 0.1 |") == 6
    fig = sweep_tables.draw(shown)
    assert len(fig.axes) == 6 and {ax.get_title() for ax in fig.axes[:2]} == {
        f"score: {norm}" for norm in NORMS
    }


@pytest.fixture(scope="module")
def given(models, tmp_path_factory):
    task = synthetic.Task(facts=1, stated=1, distractors=1, fillers=0, errors=(1, 1))
    folder = tmp_path_factory.mktemp("data")
    synthetic.write(folder, task, seed=0, sft_train=1, sft_test=1, pairs_train=1, pairs_test=6)
    ways = dict(methods=["beam"], norms=["sum"], beam_sizes=[1], max_new_tokens=8)
    asked = dict(data=str(folder / "pairs_test.jsonl"), limit=4)
    return dict(run=None, model=models[0], reference=models[2], beta=0.1) | ways | asked


def test_runs_that_hold_out_different_files_are_refused(tmp_path):
    same = (str(tmp_path / "a/../test.jsonl"), "pairs"), (str(tmp_path / "test.jsonl"), "pairs")
    assert sweep._held_out(same) == same[1]
    with pytest.raises(InputError, match="the runs hold out different files"):
        sweep._held_out([*same, (str(tmp_path / "other.jsonl"), "pairs")])


@pytest.mark.parametrize("change", [{"max_new_tokens": 0}, {"temperature": 0.0}])
def test_zero_is_refused_and_no_default(given, tmp_path, change):
    methods = {"methods": ["beam_sample"]}
    with pytest.raises(InputError, match=f"{min(change)}=0"):
        sweep.write(**given | methods | change, out=str(tmp_path))


def test_a_sweep_is_written_and_goes_on(given, tmp_path, monkeypatch):
    *_, wrote = sweep.write(**given, out=str(tmp_path))
    assert [Path(name).name for name in wrote.removeprefix("wrote ").split(", ")] == [*sweep.FILES]
    record = read_json(tmp_path / "sweep.json")
    assert [cell["beam_size"] for cell in record["cells"]] == [1]
    assert record["prompts"] == 4 and record["judge"] == "oracle"
    # Random models state no fact: the right summary wins every time.
    assert all(cell["win_rate"] == [0, 0, 0] for cell in record["cells"])
    with monkeypatch.context() as patch:
        patch.setattr("jaxdpo.transcript.completions", lambda *_, **__: iter(()))
        sweep.write(**given, out=str(tmp_path))
    assert read_json(tmp_path / "sweep.json") == record
    with pytest.raises(InputError, match="made with other settings.*max_new_tokens"):
        sweep.write(**given | {"max_new_tokens": 9}, out=str(tmp_path))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"temperature": 0.7}, "temperature: has no effect without beam_sample"),
        ({"data": None}, "data: give held-out prompts"),
        ({"methods": []}, "methods: none is given"),
        ({"judge": "nobody"}, "judge='nobody': is unknown"),
        ({"timeout": 3.0}, "timeout: has no effect on the oracle judge"),
        ({"both_orders": True}, "both_orders: has no effect on the oracle judge"),
        ({"model": None}, "--model: give it, or --run"),
        ({"limit": 0}, "limit=0: give a positive number"),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(given, tmp_path, monkeypatch, change, said):
    monkeypatch.setattr(sweep, "decoder", None)
    with pytest.raises(InputError, match=said):
        sweep.write(**given | change, out=str(tmp_path))
