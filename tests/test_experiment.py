"""Several runs from one recipe: each with its own keys, once, in an order that works."""

import json
import shutil
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from test_stages import recipe as quickstart
from test_trajectories import FALLING, told

from jaxdpo import InputError, experiment, stages
from jaxdpo import runs as runs_on_disk
from jaxdpo.analysis import trajectories
from jaxdpo.fingerprint import identity
from jaxdpo.metrics import read_metrics
from jaxdpo.records import write_log
from jaxdpo.sharding import make_mesh

WORKDIR = Path("/runs/several")
BASE = {"stages": ("sft",)}
SYNTHETIC = dict(seed=0, sft_train=8, sft_test=8, pairs_train=8, pairs_test=8)


def several(runs, **changes):
    config = quickstart(**changes)
    with config.unlocked():
        config.runs = ConfigDict(runs)
    return config


def after(other, stage="sft"):
    model = {"weights": f"{{workdir}}/../{other}:{stage}", "name": "", "overrides": {}}
    return {"stages": ("dpo",), "model": model}


def shaped(changes):
    """A run that begins from the weights of another, with more said of the model."""
    return {"b": BASE, "a": after("b") | {"model": after("b")["model"] | changes}}


def test_a_run_is_the_recipe_with_its_own_keys():
    runs = {
        "b": {"dpo": {"beta": 0.5, "data": {"limit": 7}}},
        "a": {"synthetic": SYNTHETIC | {"seed": 3}},
    }
    runs["c"] = {"model": {"overrides": {}}}
    config = several(runs)
    found = experiment.configurations(config, WORKDIR)
    assert list(found) == ["a", "b", "c"]
    assert (found["b"].dpo.beta, found["b"].dpo.data.limit) == (0.5, 7)
    assert found["b"].dpo.data.train == config.dpo.data.train  # what stands beside it stays
    assert found["a"].synthetic.to_dict() == SYNTHETIC | {"seed": 3}  # what is free is replaced
    assert found["c"].model.overrides.to_dict() == {} and not found["a"].runs
    config.dpo.beta = 0.1
    assert found["b"].dpo.beta == 0.5 and config.dpo.data.limit is None  # nothing is shared


def test_a_run_comes_after_those_it_needs():
    runs = {"a": after("z"), "m": {"data": "{workdir}/../a/data"}, "z": BASE, "b": after("b2")}
    runs["b2"] = {"dpo": {"data": {"eval": "/runs/several/z/data/pairs_test.jsonl"}}}
    runs["out"] = {"data": "/runs/elsewhere/z/data"}
    config = several(runs)
    order = list(experiment.configurations(config, WORKDIR))
    for one, other in (("a", "z"), ("m", "a"), ("b", "b2"), ("b2", "z")):
        assert order.index(one) > order.index(other)


MISTAKES = {
    "no such key": ({"a": {"dpo": {"betta": 1.0}}}, "runs.a: no such keys: dpo.betta"),
    "no such part": ({"a": {"rlhf": {"x": 1}}}, "runs.a: no such keys: rlhf"),
    "type": ({"a": {"dpo": {"beta": "big"}}}, "runs.a: .*beta"),
    "range": ({"a": BASE, "b": {"dpo": {"beta": -1.0}}}, "runs.b: dpo.beta: -1.0 is not"),
    "no mapping": ({"a": 5}, "runs.a: must hold the keys"),
    "name": ({"a b": BASE}, "'a b' is no name for a folder"),
    "circle": ({"a": after("b", "dpo"), "b": after("a", "dpo")}, "a -> b -> a|b -> a -> b"),
    "a part that is no mapping": ({"a": {"model": 5}}, "runs.a: model: must hold keys, not 5"),
    "a stage that is none": ({"a": {"dpo": 5}}, "runs.a: dpo: must hold keys, not 5"),
    "free that is none": ({"a": {"synthetic": 5}}, "runs.a: synthetic: must hold keys, not 5"),
    "overrides that are none": (
        {"a": {"model": {"overrides": 5}}},
        "runs.a: model.overrides: must hold keys, not 5",
    ),
    "a mapping that should be none": ({"a": {"seed": {"x": 1}}}, "runs.a: .*'seed'"),
    "knob": ({"b": BASE, "c": {"synthetic": SYNTHETIC | {"sead": 3}}}, "runs.c: synthetic: .*sead"),
    "no size": ({"b": BASE, "c": {"synthetic": {"seed": 3}}}, "runs.c: synthetic: 'sft_train' is"),
    "size": (
        {"b": BASE, "c": {"synthetic": SYNTHETIC | {"pairs_test": -1}}},
        "runs.c: pairs_test: -1",
    ),
    "field": ({"b": BASE, "c": {"model": {"overrides": {"widht": 3}}}}, "runs.c: model: widht: no"),
    "type of a field": (
        {"a": {"model": {"overrides": {"width": "wide"}}}},
        "runs.a: .*'width'",
    ),
    "overrides of another run's": (
        shaped({"overrides": {"width": 8}}),
        "runs.a.model.overrides: have no effect on the model of another run",
    ),
    "checkpoint": (
        {"b": BASE, "a": after("b", "sft:foo")},
        "runs.a.model.weights: 'foo' is unknown; last or best",
    ),
    "no stage": (
        shaped({"weights": "{workdir}/../b"}),
        "runs.a.model.weights: .* has no stage; name it as OTHER:STAGE",
    ),
    "no such data": (
        {"b": BASE, "a": {"data": "{workdir}/../typo/data"}},
        "runs.a.data: no run 'typo'; the runs are a, b",
    ),
    "no such file": (
        {"a": {"dpo": {"data": {"eval": "{workdir}/../typo/pairs.jsonl"}}}},
        "runs.a.dpo.data.eval: no run 'typo'",
    ),
    "no such run": ({"a": after("b")}, "runs.a.model.weights: no run 'b' with a stage 'sft'"),
    "no such stage": ({"a": BASE, "b": after("a", "dpo")}, "no run 'a' with a stage 'dpo'"),
    "runs of runs": ({"a": {"runs": {"b": {}}}}, "runs.a: no such keys: runs.b"),
    "itself": ({"a": after("a", "dpo")}, "runs: each of a -> a needs"),
    "prediction of nothing": ({"a": {"prediction": "chosen falls"}}, "runs.a: prediction: has no"),
    "prediction": ({"a": {"prediction": "all rise"}}, "runs.a: prediction: must be one of chosen"),
}


@pytest.mark.parametrize("runs, named", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_any_run_stops_all_before_the_first(tmp_path, monkeypatch, runs, named):
    monkeypatch.setattr(stages, "run", lambda *_: pytest.fail("a run has started"))
    with pytest.raises(InputError, match=named) as caught:
        experiment.run(several(runs), tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_without_runs_it_is_a_single_run(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(stages, "run", lambda *arguments: calls.append(arguments))
    config = quickstart()
    experiment.run(config, tmp_path)
    assert calls == [(config, tmp_path)]
    with pytest.raises(InputError, match="prediction: is judged among runs"):
        experiment.run(quickstart(prediction="chosen falls"), tmp_path)


def test_a_folder_of_a_single_run_is_not_filled_with_others(tmp_path):
    for name in ("config.json", "versions.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="holds a single run"):
        experiment.run(several({"a": BASE}), tmp_path)
    with pytest.raises(InputError, match="holds several runs; choose another one"):
        experiment.run(quickstart(), tmp_path.parent)


def test_names_of_hubs_are_no_paths_from_where_one_stands(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    for where in ("a/b", "a", "."):
        monkeypatch.chdir(tmp_path / where)
        runs = {"a": {"dpo": {"data": {"train": "owner/name", "split": "x"}}}, "b": {}}
        assert list(experiment.configurations(several(runs), tmp_path)) == ["a", "b"]


def test_runs_side_by_side_and_what_was_predicted_of_them(tmp_path):
    records = {"sft_on_chosen": FALLING, "without_sft": FALLING | dict(rewards__chosen=0.2)}
    for name, changes in records.items():
        (tmp_path / name / "dpo").mkdir(parents=True)
        log = tmp_path / name / "dpo" / trajectories.FILE
        changes = changes | dict(expected_rewards__chosen=-0.05)
        write_log(log, [told(step=0), told(**changes | {"step": 4}), told(**changes)])
    runs = {name: {"prediction": "chosen above zero"} for name in records} | {"base": BASE}
    configs = experiment.configurations(several(runs, dpo__trajectories=8), tmp_path)
    *said, figure = experiment.write(tmp_path, configs)
    assert [("NOT seen" in text, "seen" in text) for text in said] == [(True, True), (False, True)]
    assert said[1].startswith(
        "without sft: at step 5, chosen +0.200 ± 0.000 where the reference's own would earn "
        "-0.050; rejected -0.400 ± 0.000 where"
    )
    assert "above zero at 2 of 2 measurements" in said[1]
    assert "NOT seen (but of: without sft)" in said[0] and "seen (of no other run)" in said[1]
    assert (tmp_path / "comparison.md").read_text() == "".join(f"- {text}\n" for text in said)
    assert figure == f"figure: {tmp_path / 'comparison.png'}"
    panels = experiment.draw({name: trajectories.read(tmp_path / name / "dpo") for name in records})
    assert [ax.get_title() for ax in panels.axes][:2] == ["sft on chosen", "without sft"]
    for ax in panels.axes[:2]:
        assert [line.get_label() for line in ax.lines if line.get_label()[0] != "_"] == [
            *("chosen", "rejected", "their average"),
        ]


@pytest.mark.parametrize("prediction, holds", [
    ("chosen falls", dict(rewards__chosen=-0.1)),
    ("average falls", dict(rewards__averages=-0.1)),
    ("rejected falls", dict(rewards__rejected=-0.1)),
    ("chosen above zero", dict(rewards__chosen=0.1)),
])  # fmt: skip
def test_a_prediction_holds_where_the_number_is_beyond_its_error(prediction, holds):
    _, judged = experiment.PREDICTIONS[prediction][0]
    [name] = holds
    start = told(step=0)
    assert judged([start, told(**holds)])
    assert not judged([start, told(**{name: -holds[name]})])
    assert not judged([start, told(**holds, **{name.replace("rewards", "errors"): 0.06})])


def test_to_end_above_zero_is_not_to_stay_there():
    ends, stays = (judged for _, judged in experiment.PREDICTIONS["chosen above zero"])
    below, above = told(rewards__chosen=-0.1), told(rewards__chosen=0.1)
    crossed = [told(step=0), below, above, above, above]
    assert ends(crossed) and not stays(crossed)
    assert stays([told(step=0), above, above])
    lost = told(rewards__chosen=None)
    for few in ([lost, lost], [above, lost, above], [above], []):
        assert not stays([told(step=0), *few])


def test_a_verdict_names_the_other_runs_that_it_holds_of():
    """Where the chosen fall with or without SFT, that they do is no sign of it."""
    found = {name: [told(step=0), told(**FALLING)] for name in ("after_sft", "control")}
    found["other"] = [told(step=0), told(rewards__chosen=0.1)]
    said = experiment.captions(found, {"after_sft": "chosen falls", "control": "", "other": ""})
    assert said[0].endswith("should fall: seen (also of: control).")
    assert not any("5.4" in text for text in said[1:])


@pytest.mark.slow
def test_each_run_is_run_once_and_begins_where_the_other_ended(tmp_path, monkeypatch):
    runs = {"base": BASE, "after": after("base")}
    runs["after"]["model"]["overrides"] = runs["after"]["synthetic"] = {}
    runs["after"] |= {"data": "{workdir}/../base/data", "prediction": "chosen falls"}
    epochs = {f"{stage}__epochs": 1 for stage in ("sft", "dpo")}
    config = several(runs, **epochs, dpo__trajectories=12, dpo__sample_tokens=6)
    run, started = stages.run, []
    monkeypatch.setattr(stages, "run", lambda *x: (started.append(x[1].name), run(*x)))
    experiment.run(config, tmp_path)
    assert started == ["base", "after"]
    manifest = json.loads((tmp_path / "after/dpo/reference/train.json").read_text())
    began = runs_on_disk.trained(tmp_path / "base", "sft", mesh=make_mesh())
    assert manifest["manifest"]["weights"] == identity(began.load())
    [*_, evaluated] = read_metrics(tmp_path / "after/dpo")
    [first, last] = trajectories.read(tmp_path / "after/dpo")
    assert (first["step"], last["step"]) == (0, evaluated["step"])
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen"):
        # The evaluation has the reference as data, the measurement asked it again.
        assert last[name] == pytest.approx(evaluated[f"eval/{name}"], rel=1e-5, abs=1e-5)
    assert max(first["residual"], last["residual"]) <= 1e-5
    assert "Section 5.4: the chosen" in (tmp_path / "comparison.md").read_text()
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*/*.jsonl")}
    experiment.run(config, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    # With the base trained again, what the policy began from and is measured against is gone.
    (tmp_path / "after/dpo/done.json").unlink()
    shutil.rmtree(tmp_path / "base/sft")
    with pytest.raises(InputError, match="no checkpoints of a stage 'sft'"):
        stages.run(experiment.configurations(config, tmp_path)["after"], tmp_path / "after")
    more = dict(dpo__trajectories=12, dpo__sample_tokens=6, sft__learning_rate=1e-4)
    again = several(runs, **epochs, **more)
    with pytest.raises(InputError, match="made from another weights"):
        experiment.run(again, tmp_path)
