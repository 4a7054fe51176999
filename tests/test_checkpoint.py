"""What is restored is what was saved, on any mesh; what cannot be read is named."""

import gc
from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest
from examples import TINY

from jaxdpo import InputError, pythia, sharding
from jaxdpo.checkpoint import Checkpoints, abstract
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
