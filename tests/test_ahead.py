"""Programs compiled ahead: rows as a run has them, memory by hand, and a TPU slice's."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from examples import TINY, token_store

from jaxdpo import InputError, ahead, pythia, recipe, sharding
from jaxdpo.batching import Batches

ROOT = Path(__file__).parents[1]
LENGTHS = ahead.Lengths(prompt=20, response=5, longest=30)


def config(**stage):
    found = recipe.blank()
    found.model.name = "pythia-14m"
    names = ("vocab_size", "num_layers", "num_heads", "width", "mlp_width")
    found.model.overrides = {name: getattr(TINY, name) for name in names}
    with found.unlocked():
        found.dpo.update(dict(batch_size=64, row_length=128) | stage)
    return found


@pytest.mark.parametrize(
    "row_length, batch_size, divisor", [(128, 64, 8), (0, 16, 8), (256, 63, 1)]
)
def test_rows_are_what_batches_of_such_examples_have(row_length, batch_size, divisor):
    """All examples of the mean lengths: the same number of rows, and as much room for them."""
    settings = config(batch_size=batch_size, row_length=row_length).dpo
    found = ahead.row_shape(settings, LENGTHS, divisor)
    store = token_store([[20, 5, 5]] * batch_size)
    options = dict(row_length=row_length, length_multiple=128, divisor=divisor)
    (real,) = Batches(store, batch_size=batch_size, **options).shapes
    assert (found.rows, found.pairs, found.scored) == (real.rows, real.pairs, real.scored)
    assert found.length == real.length


def test_rows_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="batch_size: 4 pairs cannot fill rows .* of 8"):
        ahead.row_shape(config(batch_size=4).dpo, LENGTHS, 8)


@pytest.fixture(scope="module")
def reports():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    found = ahead.reports(config(), "dpo", mesh, LENGTHS, prompts=8, new_tokens=4)
    return {report.program: report for report in found}


def test_every_program_is_compiled_and_fits(reports):
    assert list(reports) == ["dpo step", "reference pass", "decoding"]
    assert not any(report.fault for report in reports.values())
    assert all(report.peak >= report.arguments > 0 for report in reports.values())


def test_a_device_holds_its_share_of_parameters_and_moments(reports):
    """Matrices and their moments in four parts (fsdp x tensor), the rest whole; then the batch."""
    shapes = jax.eval_shape(lambda: pythia.init_params(TINY, jax.random.key(0)))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    places = sharding.param_shardings(shapes, mesh)
    share = sum(
        4 * math.prod(place.shard_shape(leaf.shape))
        for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True)
    )
    shape = ahead.row_shape(config().dpo, LENGTHS, 4)
    rows = shape.rows // 4
    batch = 4 * rows * (4 * shape.length + 2 * shape.scored)
    assert reports["reference pass"].arguments == share + batch
    # Which response a position is of, which examples there are, the reference's numbers.
    batch += 4 * rows * (2 * shape.scored + shape.pairs)
    assert reports["dpo step"].arguments == pytest.approx(2 * share + batch, rel=0.02)


def test_the_work_is_counted_with_and_without_padding(reports):
    step = reports["dpo step"]
    assert 0 < step.model_flops < step.flops


def test_the_largest_micro_batch_is_between_what_fits_and_what_does_not(monkeypatch):
    tried = []

    def fake(config, stage, mesh, lengths, **sizes):
        tried.append(config.dpo.batch_size)
        yield ahead.Report("dpo step", 0.0, fault="" if tried[-1] <= 44 else "needs more")

    monkeypatch.setattr(ahead, "reports", fake)
    mesh = sharding.make_mesh(data=4, fsdp=2)
    assert list(ahead.largest_batch(config(), "dpo", mesh, LENGTHS)) == [8, 16, 32, 40]
    assert tried == [8, 16, 32, 64, 48, 40]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_without_a_compiler_the_user_is_told_where_it_is():
    with pytest.raises(InputError, match=r"pip install -e '.\[aot\]'"):
        ahead.tpu_mesh("v5e:4x4")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install -e '.[aot]'")
@pytest.mark.parametrize("topology, devices", [("v5e:2x4", 8), ("v5p:2x2x1", 4)])
def test_a_recipe_for_a_slice(tmp_path, topology, devices):
    command = [sys.executable, "launch/compile.py", "--config", "configs/tldr_pythia_2_8b.py"]
    command += ["--config.model.weights=EleutherAI/pythia-14m", f"--topology={topology}"]
    command += [f"--out={tmp_path / 'report.json'}", "--config.dpo.batch_size=64"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["mesh"]["fsdp"] == devices
    step, reference, decoding = report["programs"]
    if topology.startswith("v5e"):
        assert step["collectives"]["all-gather"]["count"] and decoding["collectives"] == {}
    assert step["peak"] > reference["peak"] > 0
