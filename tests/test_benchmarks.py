"""The contenders of the benchmarks do the same update; what is drawn and shown is as it says."""

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdpo.pythia_config import PythiaConfig

pytest.importorskip("torch")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
names = ("alone", "contenders", "dpo_step", "lengths", "results", "scaling")
alone, contenders, dpo_step, lengths, results, scaling = map(importlib.import_module, names)

CONFIG = PythiaConfig(vocab_size=64, num_layers=1, num_heads=2, width=32, mlp_width=48)
PLAIN = dict.fromkeys(contenders.Levers._fields, False)


@pytest.fixture(scope="module", autouse=True)
def quick_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    drawn = np.random.default_rng(0).integers((4, 2, 2), (20, 9, 9), (8, 3))
    pairs, folder = (
        lengths.random_pairs(drawn, CONFIG.vocab_size, 0),
        tmp_path_factory.mktemp("task"),
    )
    return alone.write_task(folder, CONFIG, pairs, 3, 2, 2)


@pytest.fixture(scope="module")
def checks(task):
    """Two updates of each, and the gradients of the first."""
    asked = {
        name: alone.Job("check", name, task)
        for name in ("official", "official+onednn", "best-torch", "jaxdpo")
    }
    found = {name: alone.answer(job) for name, job in asked.items()}
    found["errors"] = alone.gradient_errors(task.folder, list(asked), "official")
    return found


def test_contenders_do_the_same_updates(checks):
    errors = checks["errors"]
    reports = {name: report for name, report in checks.items() if name != "errors"}
    assert alone.disagreements(reports, "official") == []
    assert max(errors.values()) < 1e-5 and errors["official"] == 0
    first, _, again = checks["official"]["metrics"]
    assert abs(first["rewards/chosen"] - first["rewards/rejected"]) > 1e-4
    assert again["loss"] < first["loss"] - 1e-4  # far above rounding: the updates are compared too


def test_every_lever_leaves_the_update_alone(task, checks):
    """Each way to compute is another program: rows apart, whole attention, logits everywhere."""
    plain = alone.answer(alone.Job("check", "jaxdpo", task, levers=PLAIN))
    reports = {"jaxdpo": checks["jaxdpo"], "plain": plain}
    assert alone.disagreements(reports, "jaxdpo") == []
    assert alone.gradient_errors(task.folder, ["jaxdpo"], "official")["jaxdpo"] < 1e-5
    (rows, length, scored, keys), (packed, *_) = plain["shapes"][0], checks["jaxdpo"]["shapes"][0]
    assert (rows, packed) == (6, 1) and scored == keys == length
    assert checks["jaxdpo"]["reference_seconds"] > 0 and plain["reference_seconds"] is None


def test_a_contender_that_is_off_is_named(checks):
    official, (first, second, again) = checks["official"], checks["jaxdpo"]["metrics"]

    def said_of(*metrics):
        reports = {"official": official, "jaxdpo": {"metrics": metrics}}
        return alone.disagreements(reports, "official")

    (line,) = said_of(first | {"rewards/chosen": 0.5}, second, again)
    assert line.startswith("jaxdpo: rewards/chosen of step 0 is 0.5, not ")
    assert said_of(first | {"grad_norm": float("nan")}, second, again)
    twice = again | {"loss": 2 * again["loss"] - first["loss"]}  # as with twice the learning rate
    (line,) = said_of(first, second, twice)
    assert line.startswith("jaxdpo: a loss changed by ")


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


def test_what_is_shown(tmp_path, capsys):
    found = [{"seconds": 3.0 * n, "temporary": 5.0} for n in (1, 2, 4)]
    assert scaling.exponents([1, 2, 4], found) == {"seconds": 1.0, "temporary": 0.0}
    assert results.median_and_spread([1.0, 3.0, 2.0]) == "2.00 (1.00-3.00)"
    report = {"rounds": [2.0], "reference_seconds": None, "flops": 4e9, "peak": 100.0}
    times = {"jaxdpo": report, "slow": report | {"rounds": [4.0], "flops": 6e9}}
    row = dpo_step.row("slow", times, "jaxdpo", pairs=8)
    assert row[2:7] == ["2.00", "2.00", "1.50", "6.0", "2"]
    results.console.file = sys.stdout
    results.table("a title", dpo_step.COLUMNS, [row])
    results.bars(tmp_path / "a.png", "a title", "seconds", {"jaxdpo": [1.0], "slow": [2.0, 3.0]})
    assert "each step" in capsys.readouterr().out and (tmp_path / "a.png").stat().st_size > 1000
