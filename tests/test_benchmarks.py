"""The contenders of the benchmarks do the same update; what is drawn and shown is as it says."""

import importlib
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from jaxdpo import attention, step, train
from jaxdpo.pythia_config import PythiaConfig

torch = pytest.importorskip("torch")
ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
names = ("alone", "contenders", "dpo_step", "lengths", "memory", "results", "scaling")
alone, contenders, dpo_step, lengths, memory, results, scaling = map(importlib.import_module, names)

pytestmark = pytest.mark.usefixtures("quick_compile")
CONFIG = PythiaConfig(vocab_size=64, num_layers=1, num_heads=2, width=32, mlp_width=48)
CHECKED = ("official", "official+onednn", "best-torch", "best-torch+onednn", "jaxdpo")
PAIRS = 3  # of a batch


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    drawn = np.random.default_rng(0).integers((4, 2, 2), (20, 9, 9), (8, 3))
    pairs, folder = (
        lengths.random_pairs(drawn, CONFIG.vocab_size, 0),
        tmp_path_factory.mktemp("task"),
    )
    threads = torch.get_num_threads()
    yield alone.write_task(folder, CONFIG, pairs, PAIRS, 2, 1)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checks(task):
    """Two updates of each, and the gradients of the first."""
    return {name: alone.answer(alone.Job("check", name, task)) for name in CHECKED}


def test_contenders_do_the_same_updates(task, checks):
    errors = dpo_step.agreement(task.folder, checks)
    assert set(errors["official"].values()) == {0.0}
    assert max(error["all"] for error in errors.values()) < 1e-5
    first, _, again = checks["official"]["metrics"]
    assert abs(first["rewards/chosen"] - first["rewards/rejected"]) > 1e-4
    assert again["loss"] < first["loss"] - 1e-4  # far above rounding: the updates are compared too
    cached = [name for name in CHECKED if checks[name]["reference_seconds"] is not None]
    assert cached == ["best-torch", "best-torch+onednn", "jaxdpo"]


@pytest.fixture
def ran(monkeypatch):
    """Which functions are traced, which batches are placed and which states come of them."""
    traced, placed, states = {}, [], []
    for where, name in (
        (attention, "attend"),
        (step, "token_logps"),
        (contenders, "whole_attention"),
        (contenders, "logps_from_everywhere"),
    ):
        traced[name] = mock.Mock(wraps=getattr(where, name))
        monkeypatch.setattr(where, name, traced[name])
    put, ready = train.put_batch, jax.block_until_ready
    monkeypatch.setattr(train, "put_batch", lambda x, mesh: placed.append(x) or put(x, mesh))
    monkeypatch.setattr(jax, "block_until_ready", lambda x: states.append(x) or ready(x))
    return traced, placed, states


@pytest.fixture(scope="module")
def official(task):
    """Two updates on one batch: each row shape would be compiled."""
    return alone.answer(alone.Job("time", "official", task._replace(num_batches=1)))


@pytest.mark.parametrize("rung", [rung for rung in contenders.RUNGS if rung != "jaxdpo"])
def test_a_rung_leaves_out_its_lever_alone(rung, task, official, ran):
    """By what ran, not by what the rung says of itself; and the updates are the same."""
    report = alone.answer(alone.Job("time", rung, task._replace(num_batches=1)))
    assert dpo_step.disagreements({"official": official, rung: report}) == []
    on = contenders.Levers(**contenders.RUNGS[rung].keywords)
    traced, placed, states = ran
    assert {name: function.called for name, function in traced.items()} == {
        "attend": on.blocks,
        "token_logps": on.scored,
        "whole_attention": not on.blocks,
        "logps_from_everywhere": not on.scored,
    }
    rows, length = placed[0].tokens.shape
    assert rows == (1 if on.packed and on.shared else PAIRS if on.shared else 2 * PAIRS)
    # A batch without a reference is one of a reference pass: two before both steps, or one in each.
    passes = [batch.reference_token_logps is None for batch in placed]
    assert passes == ([True, True, False, False] if on.cached else [True, False] * 2)
    assert (report["reference_seconds"] is None) == (not on.cached)
    first = jax.tree.leaves(states[0].params)
    assert len(states) == 2 and {leaf.is_deleted() for leaf in first} == {on.donated}
    _, _, scored, keys = report["shapes"][0]
    assert (scored < length) == on.scored and (on.blocks or keys == length)


def test_a_contender_that_is_off_is_named(checks):
    official, (first, second, again) = checks["official"], checks["jaxdpo"]["metrics"]

    def said_of(*metrics):
        return dpo_step.disagreements({"official": official, "jaxdpo": {"metrics": metrics}})

    (line,) = said_of(first | {"rewards/chosen": 0.5}, second, again)
    assert line.startswith("jaxdpo: rewards/chosen of step 0 is 0.5, not ")
    assert said_of(first | {"grad_norm": float("nan")}, second, again)
    twice = again | {"loss": 2 * again["loss"] - first["loss"]}  # as with twice the learning rate
    (line,) = said_of(first, second, twice)
    assert line.startswith("jaxdpo: a loss changed by ")


def test_a_small_tensor_cannot_hide(task, checks, tmp_path):
    """Of all gradients together it is too little to be seen."""
    official = dict(np.load(alone.gradients_file(task.folder, "official")))
    bias = min(official, key=lambda tensor: np.linalg.norm(official[tensor]))
    for name, factor in (("official", 1.0), ("jaxdpo", 1 + 1e-4)):
        wrong = official | {bias: factor * official[bias]}
        np.savez(alone.gradients_file(tmp_path, name), **wrong)
    assert alone.gradient_errors(tmp_path, "jaxdpo", "official")["all"] < 1e-5
    with pytest.raises(SystemExit, match=f"jaxdpo: the gradient of {bias} is 1.0e-04 of its norm"):
        dpo_step.agreement(tmp_path, {name: checks[name] for name in ("official", "jaxdpo")})


def test_turns_are_taken_and_what_is_timed_is_checked(task):
    timed = alone.answer(alone.Job("time", "official", task))
    first, second, *_ = timed["metrics"]
    assert len(timed["metrics"]) == 4 and len(timed["seconds"]) == 1  # both rounds; the second
    order, wrong = [], [first, second | {"loss": 9.0}, *timed["metrics"][2:]]

    def run(name):
        order.append(name)
        report = timed | {"seconds": [[len(order), 1.0]], "peak": 10.0 - len(order)}
        late = name == "wrong" and len(order) > 2
        return report | {"metrics": wrong if late else timed["metrics"]}

    reports = dpo_step.turns(["official", "jaxdpo"], 2, run)
    assert order == ["official", "jaxdpo"] * 2
    assert reports["jaxdpo"]["rounds"] == [3.0, 5.0] and reports["jaxdpo"]["peak"] == 8.0
    order.clear()
    dpo_step.turns(["official", "wrong"], 1, run)
    with pytest.raises(SystemExit, match="wrong: loss of step 1 is 9.0"):
        dpo_step.turns(["official", "wrong"], 2, run)


def test_trl_is_skipped_where_it_is_not(task, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    answer = alone.answer(alone.Job("time", "trl", task))
    assert answer == {"skipped": "trl is not installed"}


def test_flops_by_hand():
    """One row of 4 positions, 2 of them with logits, each with 3 keys."""
    report = {"shapes": [[1, 4, 2, 3]], "reference_seconds": 0.1}
    forward = 4 * (2 * (4 * 32**2 + 2 * 32 * 48) + 4 * 32 * 3) + 2 * 2 * 32 * 64
    assert dpo_step.work(CONFIG, report) == 3 * forward
    assert dpo_step.work(CONFIG, report | {"reference_seconds": None}) == 4 * forward


def test_lengths_are_those_that_are_written_down():
    tldr, hh = lengths.tldr(4000, 0), lengths.hh(4000, 0)
    np.testing.assert_allclose(tldr.mean(0), [308, 36, 33], rtol=0.02)
    np.testing.assert_allclose(hh.mean(0), lengths.HH_MEANS, rtol=0.05)
    for drawn in (tldr, hh):
        assert drawn.min() >= 2
        assert (drawn[:, 0] + drawn[:, 1:].max(1)).max() <= lengths.MAX_LENGTH
    assert np.corrcoef(tldr.T)[0, 2] == pytest.approx(0.23, abs=0.05)


def test_what_is_measured_runs_as_a_run_does():
    assert f'"{alone.XLA_FLAGS}"' in (ROOT / "launch" / "xla.py").read_text()
    assert f"KEEP := {alone.KEEP}\n" in (ROOT / "Makefile").read_text()


REPORT = {"rounds": [2.0], "reference_seconds": None, "flops": 4e9, "peak": 100.0, "pairs": 8}
REPORT |= {"gradient_errors": {"a.bias": 3e-6, "all": 1e-6}, "loaded": 50.0}


def test_what_is_shown(tmp_path, capsys):
    found = [{"seconds": 3.0 * n, "temporary": 5.0} for n in (1, 2, 4)]
    assert scaling.exponents([1, 2, 4], found) == {"seconds": 1.0, "temporary": 0.0}
    assert results.median_and_spread([1.0, 3.0, 2.0]) == "2.00 (1.00-3.00)"
    ours, slow = REPORT | {"reference_seconds": 0.5}, REPORT | {"rounds": [4.0], "flops": 6e9}
    row = dpo_step.row("slow", {"jaxdpo": ours, "slow": slow}, "jaxdpo")
    assert row[2:7] == ["2.00", "2.00", "1.60", "1.50", "6.0"]
    assert row[7:] == ["2", "100", "each step", "3e-06"]
    reports = {"jaxdpo": ours, "slow": slow, "trl": {"skipped": "trl is not installed"}}
    dpo_step.show(tmp_path / "a.png", "a title", dpo_step.COLUMNS, reports)
    said = capsys.readouterr().out
    assert "each step" in said and "trl: skipped, trl is not installed" in said
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_jaxdpo_may_be_left_out(tmp_path):
    """Then nothing is held against it, and no bar has its colour."""
    assert dpo_step.row("official", {"official": REPORT}, "jaxdpo")[3:6] == ["", "", ""]
    memory.show("a cell", {"official": {"default": REPORT, "kept": REPORT}}, tmp_path)
    reports = {"best-torch": REPORT, "compiled-torch": REPORT | {"rounds": [1.0]}}
    assert dpo_step.best_torch(reports) == "compiled-torch"
    assert dpo_step.best_torch({"compiled-torch": {"skipped": "..."}, "official": REPORT}) is None
