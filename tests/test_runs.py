"""What a run's folder holds is what was put there; what it does not hold is named."""

import dataclasses
import json

import chex
import jax
import pytest
from speakers import MODEL, run, spoken

from jaxdpo import InputError, recipe, runs, sharding
from jaxdpo.pythia import init_params


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "r"
    run(folder, losses={3: 0.5, 5: 0.4, 8: 0.6})
    return folder


@pytest.mark.parametrize("which, step", [("last", 8), ("best", 5)])
def test_a_stage_gives_its_last_or_best_model(workdir, which, step):
    found = runs.trained(workdir, "dpo", mesh=sharding.make_mesh(), which=which)
    assert (found.step, found.eos_ids) == (step, (0,))
    assert found.model == MODEL and found.tokenizer == workdir / "tokenizer.json"
    chex.assert_trees_all_equal(jax.device_get(found.load()), jax.device_get(spoken(step)))


def test_a_checkpoint_folder_is_no_run(workdir, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert runs.is_run(workdir) and not runs.is_run(tmp_path)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(workdir="nowhere"), "nowhere: no run there"),
        (dict(stage="sft"), "no checkpoints of a stage 'sft'; .* with checkpoints: dpo"),
        (dict(stage="rlhf"), "no checkpoints of a stage 'rlhf'"),
        (dict(which="first"), "which='first' is unknown; last or best"),
    ],
)
def test_what_is_not_there_is_named(workdir, changes, said):
    asked = dict(workdir=workdir, stage="dpo", mesh=sharding.make_mesh()) | changes
    with pytest.raises(InputError, match=said):
        runs.trained(asked.pop("workdir"), asked.pop("stage"), **asked)


def test_a_stage_without_a_complete_checkpoint_is_named(workdir):
    (workdir / "sft/checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="sft/checkpoints: holds no best checkpoint"):
        runs.trained(workdir, "sft", mesh=sharding.make_mesh(), which="best")
    (workdir / "sft/checkpoints").rmdir()


def test_the_folder_may_move(workdir, tmp_path):
    """The tokenizer stands under {workdir}, wherever that is now."""
    there = tmp_path / "moved"
    there.symlink_to(workdir)
    found = runs.trained(there, "dpo", mesh=sharding.make_mesh())
    assert found.tokenizer == there / "tokenizer.json"
    assert json.loads(found.tokenizer.read_text())["model"]["type"] == "WordLevel"


def test_what_a_run_began_from_is_its_model_too(workdir):
    began = runs.trained(workdir, "start", mesh=sharding.make_mesh())
    assert began.step is None and began.model == MODEL
    drawn = jax.device_get(init_params(MODEL, jax.random.key(0)))  # unjitted: to rounding
    chex.assert_trees_all_close(jax.device_get(began.load()), drawn, rtol=1e-6, atol=1e-7)


def test_the_roles_of_a_runs_models(workdir):
    found = runs.roles(workdir)
    assert found[:3] == (f"{workdir}:dpo", f"{workdir}:sft:last", f"{workdir}:start")
    assert (found.beta, found.format) == (0.1, "pairs")


def continuing(workdir, **model):
    """The configuration of a run that begins from another one's model."""
    config = recipe.blank()
    with config.unlocked():
        config.model.update(model)
    config.model.weights = f"{workdir}:dpo:best"
    return config


@pytest.fixture
def done(workdir):
    """The file that says that the other run's stage is finished."""
    file = workdir / "dpo/done.json"
    file.write_text('{"eval/loss": 0.6}')
    yield file
    file.unlink()


@pytest.mark.usefixtures("done")
def test_a_run_may_begin_from_another_one(workdir, tmp_path):
    mesh = sharding.make_mesh()
    began = runs.initial(continuing(workdir, remat="full"), tmp_path, mesh)
    assert began.model == dataclasses.replace(MODEL, remat="full")
    assert began.tokenizer == workdir / "tokenizer.json"
    chex.assert_trees_all_equal(jax.device_get(began.load()), jax.device_get(spoken(5)))


@pytest.mark.usefixtures("done")
def test_what_a_run_begins_from_has_a_name_for_people(workdir, tmp_path):
    config, mesh = continuing(workdir), sharding.make_mesh()
    source = runs.initial(config, tmp_path, mesh).source
    assert source == f"{workdir}:dpo:best: dpo step 5"
    config.model.weights = f"{workdir}:start"
    source = runs.initial(config, tmp_path, mesh).source
    assert source == f"{workdir}:start: random weights, seed 0"


def test_a_run_begins_from_no_stage_that_is_not_finished(workdir, tmp_path):
    with pytest.raises(InputError, match=f"stage dpo of {workdir} is not finished"):
        runs.initial(continuing(workdir), tmp_path, sharding.make_mesh())


@pytest.mark.parametrize(
    "model, said",
    [
        (dict(overrides=dict(num_layers=3)), "model.overrides: num_layers are those of "),
        (dict(param_dtype="bfloat16"), "model.param_dtype: is float32 in "),
        (dict(scan_layers=True), "model.scan_layers: is False in "),
    ],
)
def test_a_run_that_begins_from_another_one_takes_its_shape(workdir, tmp_path, model, said):
    with pytest.raises(InputError, match=said):
        runs.initial(continuing(workdir, **model), tmp_path, sharding.make_mesh())


def test_a_run_cannot_begin_from_itself(workdir):
    with pytest.raises(InputError, match="is of this run itself"):
        runs.initial(continuing(workdir), workdir, sharding.make_mesh())
