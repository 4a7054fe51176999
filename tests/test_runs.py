"""What a run's folder holds is what was put there; what it does not hold is named."""

import json

import chex
import jax
import pytest
from speakers import MODEL, run, spoken

from jaxdpo import InputError, runs, sharding


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
