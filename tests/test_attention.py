"""Every program of attention against a softmax written out; what is kept; a TPU's compiler."""

import dataclasses
import functools
import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import TINY, ragged_lengths, token_store

from jaxdpo import attention, pythia, sharding, stages
from jaxdpo.batching import Batches, RowShape, rows

LENGTH, SPAN = 72, 21  # no example of `row_ids` is longer than 20
HEADS = (2, 16)


def row_ids():
    """Segments and branches of two rows of three ragged pairs, with padding after them."""
    batch = rows(token_store(ragged_lengths(6)), [[0, 1, 2], [3, 4, 5]], RowShape(2, LENGTH, 48, 3))
    return jnp.asarray(batch.segment_ids), jnp.asarray(batch.branch_ids)


def heads_and_weights(ids, *, dtype="float32"):
    """Queries, keys and values, and what to weigh the output with: nothing where it pads."""
    shape = (*ids[0].shape, *HEADS)
    drawn = np.random.default_rng(0).normal(size=(4, *shape))
    *heads, weights = (jnp.asarray(x, dtype) for x in drawn)
    return heads, weights * (ids[0] > 0)[..., None, None]


def written_out(q, k, v, segment_ids, branch_ids):
    """Attention as the textbook has it, with a mask of three loops."""
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / np.sqrt(q.shape[-1])
    mask = np.zeros(scores.shape[0:1] + scores.shape[2:], bool)
    segments, branches = np.asarray(segment_ids), np.asarray(branch_ids)
    for b, query, key in np.argwhere(np.ones_like(mask)):
        same_branch = branches[b, key] in (0, branches[b, query])
        mask[b, query, key] = (
            key <= query and segments[b, key] == segments[b, query] and same_branch
        )
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
    return jnp.einsum("bnqk,bknh->bqnh", weights, v)


def value_and_grads(attended, heads, weights, ids):
    weighed = lambda *heads: jnp.sum(attended(*heads, *ids) * weights)
    return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2)))(*heads)


def assert_equal(found, expected, tolerance):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max())


@pytest.fixture(scope="module")
def ids():
    return row_ids()


@pytest.fixture(scope="module")
def expected(ids):
    return value_and_grads(written_out, *heads_and_weights(ids), ids)


@pytest.mark.parametrize("block, span", [(256, None), (16, None), (16, SPAN), (32, SPAN)])
def test_blocks_equal_attention_written_out(block, span, ids, expected, monkeypatch):
    """Also where the last block is ragged, and keys are left out because they are too far."""
    monkeypatch.setattr(attention, "_BLOCK", block)
    attended = functools.partial(attention.attend, span=span)
    assert_equal(value_and_grads(attended, *heads_and_weights(ids), ids), expected, 1e-6)


def test_too_few_keys_are_noticed(ids, expected, monkeypatch):
    """So the tests above would fail if keys were dropped that are still to be seen."""
    monkeypatch.setattr(attention, "_BLOCK", 16)
    monkeypatch.setattr(attention, "_narrowest", lambda ids, *_: jnp.zeros((len(ids), 5), int))
    found, _ = value_and_grads(attention.attend, *heads_and_weights(ids), ids)
    assert abs(found - expected[0]) > 1e-3 * abs(expected[0])


@pytest.mark.parametrize("span", [None, SPAN])
def test_a_block_is_given_the_fewest_keys_that_reach_its_segment(span, ids, monkeypatch):
    """What runs, by the keys of each block, against a search and against what is counted."""
    monkeypatch.setattr(attention, "_BLOCK", 16)
    padded = [jnp.pad(x, [(0, 0), (0, 8)]) for x in ids]  # to whole blocks
    rows, length = padded[0].shape
    block, widths = attention._tiling(length, span)
    segments, expected = np.asarray(padded[0]), np.zeros((rows, length // block), int)
    for row, start in np.ndindex(expected.shape):
        begin = list(segments[row]).index(segments[row, start * block])
        needed = (start + 1) * block - begin if segments[row, begin] else 0
        expected[row, start] = next(width for width in widths if width >= needed)
    assert 1 < len(set(expected.ravel().tolist()))
    queries, keys = jnp.zeros((rows, 1, length, 1)), jnp.zeros((rows, 1, length, 1))

    def tile(mask, query, key):
        return (jnp.full_like(query, key.shape[2]),), ()

    (found,), _ = attention._over_tiles(tile, *padded, (queries,), (keys,), span)
    assert np.array_equal(found[:, 0, ::block, 0], expected)
    assert attention.keys_per_row(segments, span).tolist() == (block * expected.sum(1)).tolist()


def test_bfloat16_is_near_and_its_softmax_is_not_bfloat16(ids, expected):
    heads, weights = heads_and_weights(ids, dtype="bfloat16")
    assert_equal(value_and_grads(attention.attend, heads, weights, ids), expected, 2e-2)
    scores = jax.make_jaxpr(lambda *heads: attention.attend(*heads, *ids))(*heads)
    assert "exp" in str(scores) and not [
        line for line in str(scores).splitlines() if "= exp " in line and "bf16" in line
    ]


@pytest.mark.slow
def test_the_tpu_kernel_equals_attention_written_out(monkeypatch):
    """The Pallas kernel, interpreted: three blocks of keys, one of which is out of sight, and a row
    that is no multiple of one."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    interpreted = functools.partial(splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash, "make_splash_mha", interpreted)
    store = token_store(ragged_lengths(8, longest=(80, 30, 30)))
    batch = rows(store, [[0, 1, 2, 3], [4, 5, 6, 7]], RowShape(2, 368, 240, 4))
    ids = jnp.asarray(batch.segment_ids), jnp.asarray(batch.branch_ids)
    inputs = heads_and_weights(ids)
    of = lambda how: functools.partial(attention.attend, span=140, implementation=how)
    found, expected = (value_and_grads(of(how), *inputs, ids) for how in ("splash", "blocks"))
    assert_equal(found, expected, 1e-5)  # other blocks, so other sums


@pytest.mark.parametrize("length", [300, 1040])
def test_the_tpu_kernel_is_given_what_is_counted(length, monkeypatch):
    """Long rows whole blocks of 512: a length of 1040 = 16 x 65 would else have blocks of 128."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    made = []

    def kernel(mask, *, block_sizes, **_):
        made.append((mask.shape, block_sizes.block_q, block_sizes.block_kv_dkv))
        return lambda q, k, v, segment_ids: v

    monkeypatch.setattr(splash, "make_splash_mha", kernel)
    row, ids = jnp.ones((1, length, 2, 8)), jnp.ones((1, length), int)
    found = attention.attend(row, row, row, ids, 0 * ids, span=200, implementation="splash")
    block, count = attention.splash_tiling(length)
    assert made == [((2, block * count, block * count), block, block)]
    assert found.shape == row.shape and (block, count) == {300: (128, 3), 1040: (512, 3)}[length]


def test_cudnn_is_told_that_its_mask_is_causal(ids, expected, monkeypatch):
    """Or it multiplies what is masked; that the mask still counts, by XLA's form of it."""
    asked, plain = [], jax.nn.dot_product_attention

    def recorded(*heads, implementation, **how):
        asked.append((implementation, how["is_causal"]))
        return plain(*heads, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    attended = functools.partial(attention.attend, span=SPAN, implementation="cudnn")
    assert_equal(value_and_grads(attended, *heads_and_weights(ids), ids), expected, 1e-5)
    assert asked == [("cudnn", True)]


def test_the_scale_is_no_number_of_bfloat16(ids):
    """1/sqrt(80) is none; rounded, forward and backward would differ by more than all else."""
    rng = np.random.default_rng(0)
    shape = (4, *ids[0].shape, 2, 80)
    *heads, weights = jnp.asarray(rng.normal(size=shape), "bfloat16")
    heads[0] = 6 * heads[0]  # scores far apart
    weights = weights * (ids[0] > 0)[..., None, None]
    wide = [x.astype("float32") for x in (*heads, weights)]
    expected = value_and_grads(written_out, wide[:3], wide[3], ids)
    _, (_, _, found) = value_and_grads(attention.attend, heads, weights, ids)
    assert_equal(found, expected[1][2], 6e-3)  # of values; it was 1.9e-2


def kept(function, *args):
    """The shapes of all that a function keeps for its backward pass."""
    pull_back = lambda *args: jax.vjp(function, *args)[1]
    return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(pull_back, *args))]


def test_nothing_square_is_kept_for_the_backward_pass(ids):
    """Where the attention of `jax.nn` keeps the weights of every query for every key."""
    heads, _ = heads_and_weights(ids)
    plain = lambda *heads: jax.nn.dot_product_attention(
        *heads, mask=attention.attention_mask(*ids)[:, None]
    )
    ours = lambda *heads: attention.attend(*heads, *ids)
    square = lambda shapes: [shape for shape in shapes if shape[-2:] == (LENGTH, LENGTH)]
    assert square(kept(plain, *heads)) and not square(kept(ours, *heads))


def test_rematerialisation_can_save_attention(ids):
    """Under a policy that keeps it, no softmax is computed a second time before its gradient."""
    heads, _ = heads_and_weights(ids)

    def exponentials(policy):
        ours = jax.checkpoint(lambda *heads: attention.attend(*heads, *ids).sum(), policy=policy)
        compiled = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2))).lower(*heads)
        return compiled.as_text().count("stablehlo.exponential")

    policies = jax.checkpoint_policies
    assert exponentials(policies.save_only_these_names(attention.SAVED)) == 2
    assert exponentials(policies.nothing_saveable) == 3


@pytest.mark.parametrize("longer", ["train", "eval"])
def test_a_stage_looks_as_far_back_as_the_longest_example_of_either_side(
    longer, monkeypatch, tmp_path
):
    """Or tokens would lose sight of their beginning, and nothing would say so."""
    lengths = {"train": [4, 3, 3], "eval": [4, 3, 3]} | {longer: [40, 3, 3]}
    batches = {
        side: Batches(token_store([each] * 8), batch_size=8) for side, each in lengths.items()
    }
    monkeypatch.setattr(stages, "stage_batches", lambda *_: batches)
    recipe = Path(__file__).parents[1] / "configs/quickstart.py"
    config = runpy.run_path(str(recipe))["get_config"]()
    config.dpo.samples = config.dpo.trajectories = 0
    this = stages.Run(config, tmp_path, sharding.make_mesh(), None, TINY)
    stage = stages._prepared(this, "dpo")
    examples = [(data[0].segment_ids > 0).sum(1).max() for data in batches.values()]
    assert max(examples) == 40 + 2 + 2  # of a response the last token is not in its row
    assert max(examples) <= stage.model.attention_span < max(examples) + 16


def test_an_unknown_program_is_refused(ids):
    heads, _ = heads_and_weights(ids)
    with pytest.raises(ValueError, match="'flash'"):
        attention.attend(*heads, *ids, implementation="flash")


@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_parameters_are_drawn_and_shaped_whatever_runs_them(implementation):
    config = dataclasses.replace(TINY, attention=implementation)
    shapes = jax.eval_shape(functools.partial(pythia.init_params, config), jax.random.key(0))
    assert shapes["embedding"].shape == (TINY.vocab_size, TINY.width)


def test_which_program_runs_where():
    fastest = attention.fastest
    assert fastest("cpu", dtype="bfloat16", head_width=64) == "blocks"
    assert fastest("tpu", dtype="float32", head_width=80) == "splash"
    assert fastest("gpu", dtype="bfloat16", head_width=80) == "cudnn"
    assert fastest("gpu", dtype="float32", head_width=80) == "blocks"  # cuDNN has half precision
    assert fastest("gpu", dtype="bfloat16", head_width=256) == "blocks"
    assert fastest("gpu", dtype="bfloat16", head_width=4) == "blocks"


def test_a_kernel_is_tried_before_it_is_taken(monkeypatch):
    tried = functools.partial(attention.fault, dtype="float32", num_heads=2, head_width=8)
    assert tried("splash").startswith("ValueError")  # there is none for a CPU
    monkeypatch.setattr(
        attention, "_splash", lambda *x, **span: 1.01 * attention._blocks(*x, **span)
    )
    assert tried("splash") == "differs by 1.0e-02 of the largest number"
    monkeypatch.setattr(attention, "_splash", attention._blocks)
    assert not tried("splash")


AHEAD = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxdpo import attention, sharding

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=devices)
spec = lambda *axes: NamedSharding(mesh, P(("data", "fsdp"), *axes))
heads = jax.ShapeDtypeStruct((8, 1152, 4, 80), jnp.bfloat16, sharding=spec(None, "tensor"))
ids = jax.ShapeDtypeStruct((8, 1152), jnp.int32, sharding=spec())

def loss(q, k, v, *ids):
    out = attention.attend(q, k, v, *ids, span=300, implementation="splash")
    return jnp.sum(out.astype(jnp.float32) ** 2)

with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(heads, heads, heads, ids, ids)
text = lowered.compile().as_text()
assert "tpu_custom_call" in text, "no kernel"
assert "all-gather" not in text and "all-to-all" not in text, "rows or heads are moved"
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="a TPU's compiler: pip install -e '.[aot]'"
)
def test_the_tpu_kernel_compiles_for_a_slice_without_moving_anything():
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", AHEAD], env=environment)
    assert done.returncode == 0
