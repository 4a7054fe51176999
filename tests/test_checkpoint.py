"""What is restored is what was saved, on any mesh; what cannot be read is named."""

import gc
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import TINY

from jaxdpo import InputError, checkpoint, pythia, sharding
from jaxdpo.checkpoint import Checkpoints, abstract
from jaxdpo.fingerprint import fingerprints
from jaxdpo.step import initial_state, rmsprop, state_shardings, warmup

TX = rmsprop(warmup(1e-3, 2))


def state_on(mesh, seed=0):
    params = pythia.init_params(TINY, jax.random.key(seed))
    place = state_shardings(params, TX, mesh)
    init = lambda params: initial_state(params, TX)._replace(step=jnp.int32(7))
    return jax.jit(init, out_shardings=place)(params), place


def test_restored_on_another_mesh_every_leaf_is_equal(tmp_path):
    state, _ = state_on(sharding.make_mesh(devices=jax.devices()[:1]))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    other, place = state_on(mesh, seed=1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, loss=1.0)
        checkpoints.wait()
        found = checkpoints.restore(7, abstract(other, place))
        params = checkpoints.restore_params(7, abstract(other, place).params)
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(state))
    chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(state.params))
    assert jax.tree.map(lambda x: x.sharding, found) == place
    assert type(found.opt_state) is type(state.opt_state)


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state, place = state_on(mesh)
    before = jax.device_get(state.params)
    overwrite = jax.jit(partial(jax.tree.map, jnp.zeros_like), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, loss=None)
        overwrite(state)
        checkpoints.wait()
        found = checkpoints.restore(7, abstract(jax.eval_shape(lambda: state), place))
    chex.assert_trees_all_equal(jax.device_get(found.params), before)


def test_latest_and_lowest_loss_are_kept_over_a_restart(tmp_path):
    state, _ = state_on(sharding.make_mesh(devices=jax.devices()[:1]))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step is None and checkpoints.best_step is None
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.7), (4, None)):
            checkpoints.save(step, state, loss=loss)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (4, 2)


# Orbax leaves a coroutine behind when a load fails; it is collected here, not in another test.
@pytest.mark.filterwarnings("ignore:.*_background_load")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", ["no such step", "data gone"])
def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path, fault):
    state, place = state_on(sharding.make_mesh(devices=jax.devices()[:1]))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, loss=None)
        checkpoints.wait()
        if fault == "data gone":
            for file in (tmp_path / "3/params").rglob("*"):
                if file.is_file():
                    file.unlink()
        step = 4 if fault == "no such step" else 3
        with pytest.raises(InputError, match=rf"/{step}: this checkpoint cannot be read"):
            checkpoints.restore(step, abstract(state, place))
    gc.collect()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with steps 3 and 7, the state that both hold but for its step, and its abstract."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = pythia.init_params(TINY, jax.random.key(0))
    params = {name: params[name] for name in ("embedding", "unembedding")}  # opened a hundred times
    place = state_shardings(params, TX, mesh)
    state = jax.jit(partial(initial_state, tx=TX), out_shardings=place)(params)
    folder = tmp_path_factory.mktemp("two_steps")
    with Checkpoints(folder) as checkpoints:
        for step in (3, 7):
            checkpoints.save(step, state._replace(step=jnp.int32(step)), loss=1.0)
    return folder, state, abstract(state, place)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file, at=0.5):
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0x10
    file.write_bytes(content)


FAULTS = {
    "truncated": truncate,
    "deleted": Path.unlink,
    "flipped": flip,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*_background_load")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_file_in_turn_spoilt_nothing_wrong_is_ever_restored(tmp_path, two_steps):
    """Either the step is set aside, named, and the one before it taken, or nothing was lost."""
    folder, state, wanted = two_steps
    files = [file.relative_to(folder) for file in folder.glob("7/**/*") if file.is_file()]
    found = Counter()
    for at, (file, fault) in enumerate((file, fault) for file in files for fault in FAULTS):
        copy = tmp_path / str(at)
        shutil.copytree(folder, copy)
        FAULTS[fault](copy / file)
        said = []
        with Checkpoints(copy, clean=True, say=said.append) as checkpoints:
            step, restored = checkpoints.restore_latest(wanted)
        assert int(restored.step) == step, (file, fault)
        chex.assert_trees_all_equal(restored._replace(step=state.step), state)
        if step == 3:
            assert "7: this checkpoint" in said[0] and (copy / "7.spoilt").is_dir()
        assert bool(said) == (step == 3), (file, fault)
        if file.parts[-2] == "d" and len(file.parts) == 4:  # the data itself
            assert step == 3, (file, fault)
        found[step] += 1
        shutil.rmtree(copy)
        gc.collect()
    assert found[3] > len(files)  # most of them matter


@pytest.mark.parametrize("spoil", ["params/d/*", "metrics/metrics"])
@pytest.mark.filterwarnings("ignore:.*_background_load")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_step_that_was_set_aside_is_saved_again(tmp_path, two_steps, spoil):
    """As the run that goes on from the one before it does."""
    folder, state, wanted = two_steps
    shutil.copytree(folder, tmp_path / "checkpoints")
    truncate(next(file for file in tmp_path.glob(f"checkpoints/7/{spoil}") if file.is_file()))
    with Checkpoints(tmp_path / "checkpoints", clean=True, say=str) as checkpoints:
        assert checkpoints.restore_latest(wanted)[0] == 3
        checkpoints.save(7, state, loss=0.5)
    with Checkpoints(tmp_path / "checkpoints") as reader:
        assert (reader.latest_step, reader.best_step) == (7, 7)
        chex.assert_trees_all_equal(reader.restore(7, wanted), state)
    gc.collect()


@pytest.mark.filterwarnings("ignore:.*_background_load")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_where_no_step_can_be_trusted_nothing_is_begun_anew_unasked(tmp_path, two_steps):
    folder, _, wanted = two_steps
    shutil.copytree(folder, tmp_path / "checkpoints")
    for step in (3, 7):
        (tmp_path / f"checkpoints/{step}/_CHECKPOINT_METADATA").unlink()
    with Checkpoints(tmp_path / "checkpoints") as reader:
        with pytest.raises(InputError, match="7: this checkpoint cannot be read"):
            reader.restore_latest(wanted)
    for _ in range(2):  # nor by running the same command again
        with Checkpoints(tmp_path / "checkpoints", clean=True) as checkpoints:
            with pytest.raises(InputError, match="none of its checkpoints can be trusted"):
                checkpoints.restore_latest(wanted)
    gc.collect()


def test_an_empty_folder_has_nothing_to_go_on_from(tmp_path, two_steps):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(two_steps[2]) is None


def test_another_model_is_no_fault_of_the_checkpoint(tmp_path, two_steps):
    """Orbax would cast it; and nothing is set aside."""
    folder, _, wanted = two_steps
    halves = lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=x.sharding)
    other = wanted._replace(params=jax.tree.map(halves, wanted.params))
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(
            InputError, match=r"another model: params/\S+ is float32\[.*\], not bfloat16"
        ):
            checkpoints.restore_latest(other)
        assert checkpoints.restore_latest(wanted)[0] == 7


def test_a_full_disk_is_told_before_and_after(tmp_path, two_steps, monkeypatch):
    folder, state, wanted = two_steps
    shutil.copytree(folder, tmp_path / "checkpoints")
    full = lambda *_: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint.shutil, "disk_usage", full)
            with pytest.raises(InputError, match=r"0 are free; make room.* goes on from step 7"):
                checkpoints.save(8, state, loss=None)

        def fails(*_):
            raise ValueError("RESOURCE_EXHAUSTED: writing: No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(checkpoints._checkpointer, "wait", fails)
            with pytest.raises(InputError, match="did not fit on the disk; make room"):
                checkpoints.wait()
        assert checkpoints.restore_latest(wanted)[0] == 7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_one_bit_of_any_element_changes_the_fingerprint(dtype):
    """And no two changes look the same; nor does a matrix when it is turned in any way."""
    x = np.random.default_rng(0).normal(size=(4, 4))
    x = jnp.asarray(x > 0 if dtype == "bool" else 9 * x).astype(dtype)
    seen = {fingerprints({"x": x})["x"]}
    for place in np.ndindex(x.shape):
        raw = np.array(x)
        bits = raw.view(f"uint{8 * raw.dtype.itemsize}")
        for bit in range(1 if dtype == "bool" else 8 * raw.dtype.itemsize):
            bits[place] ^= 1 << bit
            seen.add(fingerprints({"x": jnp.asarray(raw)})["x"])
            bits[place] ^= 1 << bit
    assert len(seen) == 1 + x.size * (1 if dtype == "bool" else 8 * x.dtype.itemsize)
    if dtype != "bool":
        turned = {fingerprints({"x": y})["x"] for y in (x[::-1], x[:, ::-1], x.T, x[::-1].T)}
        assert len(turned) == 4 and not seen & turned


def test_the_fingerprint_is_the_same_on_any_mesh():
    alone, _ = state_on(sharding.make_mesh(devices=jax.devices()[:1]))
    spread, _ = state_on(sharding.make_mesh(data=2, fsdp=2, tensor=2))
    spread = jax.device_put(alone, jax.tree.map(lambda x: x.sharding, spread))
    assert fingerprints(alone) == fingerprints(spread)
