"""What a program sends: counted in written-out text, and in programs whose partition is known."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdpo import losses, pythia, runs, sharding
from jaxdpo.batching import Batch
from jaxdpo.checkpoint import abstract
from jaxdpo.collectives import sent
from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.step import (
    initial_state,
    make_train_step,
    preference_objective,
    rmsprop,
    state_shardings,
    warmup,
)

LOOP = """HloModule jit_f, entry_computation_layout={(f32[4]{0})->f32[8]{0}}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[1024]{0} all-gather(%h), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[8]) tuple(%i, %g)
}

%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%fused (p: f32[8]) -> f32[8] {
  ROOT %r = f32[512]{0} reduce-scatter(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main.2 (p: f32[4]) -> f32[8] {
  %w = (s32[], f32[8]) while(%s), condition=%condition.1, body=%body.1
  %f = f32[512]{0} fusion(%w), kind=kCustom, calls=%fused
  %c = (f32[64], f32[64], u32[], u32[]) collective-permute-start(%f), source_target_pairs={{0,1}}
  %d = f32[64]{0} collective-permute-done(%c)
  ROOT %a = f32[8]{0} all-reduce(%d), replica_groups=mesh['x'=2,'y'=4] {'x','y'}, to_apply=%add
}
"""


def test_a_text_by_hand():
    """bf16[1024] gathered by 4, six times; a half of f32[1024] sent once; a ring of eight twice."""
    assert sent(LOOP) == {
        "all-gather": (6, 6 * 2048 * 3 // 4),
        "reduce-scatter": (1, 4096 // 2),
        "collective-permute": (1, 256),
        "all-reduce": (1, 2 * 32 * 7 // 8),
    }


def test_a_known_trip_count_is_believed():
    trips = ', backend_config={"known_trip_count":{"n":"9"}}'
    text = LOOP.replace("body=%body.1", "body=%body.1" + trips)
    assert sent(text)["all-gather"][0] == 9


def test_a_mesh_of_devices_in_another_order_is_read_too():
    named = "mesh['x'=2,'y'=4], device_ids=([2,4]T(1,0)) {'y'}"
    text = LOOP.replace("mesh['x'=2,'y'=4] {'x','y'}", named)
    assert sent(text)["all-reduce"] == (1, 2 * 32 * 3 // 4)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=4, tensor=1)


def shape_of(mesh, spec):
    return jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, spec))


@pytest.mark.parametrize(
    "spec, expected",
    [
        (P("fsdp"), {"all-gather": (1, 64 * 64 * 4 * 3 // 4)}),
        (P(("data", "fsdp")), {"all-gather": (1, 64 * 64 * 4 * 7 // 8)}),
        (P(), {}),
    ],
)
def test_gathering_a_matrix(mesh, spec, expected):
    whole = NamedSharding(mesh, P())
    gather = jax.jit(lambda x: x + 1, out_shardings=whole)
    assert sent(gather.lower(shape_of(mesh, spec)).compile().as_text()) == expected


def test_summing_over_rows(mesh):
    """Each device has a part of the sum of 64 numbers: one all-reduce, whatever the mesh."""
    add = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, P()))
    found = sent(add.lower(shape_of(mesh, P(("data", "fsdp")))).compile().as_text())
    assert found == {"all-reduce": (1, 2 * 64 * 4 * 7 // 8)}


# --- a training step against what its partition needs -------------------------------------

ROWS, LENGTH, LAYERS = 8, 48, 2
MODEL = PythiaConfig(vocab_size=64, num_layers=LAYERS, num_heads=4, width=32, mlp_width=64)
MATRICES = 4 * LAYERS  # of a layer: queries, keys and values; attention's output; up; down
OF_MATRICES = LAYERS * (4 * 32**2 + 2 * 32 * 64)  # numbers in them
OF_TABLE = 64 * 32  # and in each embedding


def step_on(**sizes):
    """What a device sends in a step of DPO on this mesh."""
    mesh = sharding.make_mesh(**sizes)
    pair_loss = partial(losses.dpo_loss, beta=0.1, label_smoothing=0.0)
    objective, tx = preference_objective(MODEL, pair_loss, beta=0.1), rmsprop(warmup(1e-3, 0))
    shapes = runs.param_shapes(MODEL)
    places = state_shardings(shapes, tx, mesh)
    state = abstract(jax.eval_shape(partial(initial_state, tx=tx), shapes), places)
    rows = NamedSharding(mesh, sharding.batch_spec)
    of = lambda *size, dtype="int32": jax.ShapeDtypeStruct(size, dtype, sharding=rows)
    positions, scored = [of(ROWS, LENGTH) for _ in range(4)], [of(ROWS, 16) for _ in range(3)]
    batch = Batch(*positions, *scored, of(ROWS, 1), of(ROWS, 16, dtype="float32"))
    step = make_train_step(objective, tx, max_grad_norm=1.0, shardings=places)
    with jax.set_mesh(mesh):
        return sent(step.lower(state, batch).compile().as_text())


def test_a_step_over_data_sums_gradients_and_nothing_else():
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(runs.param_shapes(MODEL)))
    found = step_on(data=8)
    assert found.keys() == {"all-reduce"}
    gradients = 2 * 7 * 4 * numbers // 8
    assert gradients <= found["all-reduce"][1] < gradients + 2 * 4 * 40  # and the metrics


def needed_over_fsdp(found):
    """Each matrix is gathered once, as are the unembedding and the batch's tokens.

    The embedding's rows go to whose tokens they are of, and their gradients back; the
    unembedding's gradient is summed into its parts.
    """
    numbers = OF_MATRICES + OF_TABLE + ROWS * LENGTH
    assert found["all-gather"] == (MATRICES + 2, 7 * 4 * numbers // 8)
    assert found["all-to-all"] == (2, 2 * 7 * 4 * LENGTH * 32 // 8)
    assert found["reduce-scatter"] == (1, 7 * 4 * OF_TABLE // 8)
    assert "collective-permute" not in found
    # On a CPU XLA sums whole gradients of matrices, and keeps a part; the embeddings' not.
    assert 2 * 7 * 4 * OF_MATRICES // 8 <= found["all-reduce"][1] < 2 * 7 * 4 * OF_MATRICES


def test_a_step_over_fsdp_gathers_each_matrix_once():
    needed_over_fsdp(step_on(data=1, fsdp=8))


def test_a_table_that_is_gathered_for_its_rows_is_noticed(monkeypatch):
    whole = lambda table: pythia._constrain(table, P("tensor"))
    plain = lambda table, tokens: jnp.take(whole(table), tokens, axis=0, mode="fill")
    monkeypatch.setattr(pythia, "_looked_up", plain)
    with pytest.raises((AssertionError, KeyError)):
        needed_over_fsdp(step_on(data=1, fsdp=8))


def test_a_step_over_tensor_sums_activations_four_times_a_layer():
    """Attention's and the MLP's results forward, the gradients of their inputs backward."""
    four = dict(data=1, tensor=4, devices=jax.devices()[:4])
    activations = 2 * 3 * 4 * ROWS * LENGTH * 32 // 4
    found = step_on(**four)
    assert found.keys() <= {"all-reduce", "all-gather"}
    of_layers = 4 * LAYERS * activations
    assert of_layers <= found["all-reduce"][1] < of_layers + 2 * activations
    assert found["all-gather"][1] < 1024  # biases of a few heads
