"""Chunks of logits against all of them: values, gradients, memory, what devices exchange."""

import dataclasses
import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import TINY, ragged_lengths, token_store
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdpo import InputError, batching, drift, pythia, sharding, step
from jaxdpo.qfunction import token_logps
from jaxdpo.scored_logps import chunk_size

KEY = jax.random.key(0)
VOCABULARY, WIDTH = 2**14, 8  # 16 positions' logits take 1 MiB


def case(rows=8, scored=40, dtype=jnp.float32):
    """Hidden states, an unembedding, targets, and cotangents of which some are zero."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    hidden, unembedding = normal(rows, scored, WIDTH), normal(VOCABULARY, WIDTH)
    targets = rng.integers(0, VOCABULARY, (rows, scored), dtype=np.int32)
    cotangents = normal(rows, scored)
    cotangents[:, ::3] = 0.0
    # Targets at the ends of the vocabulary and of a device's part of it; two that do not exist.
    some = [0, VOCABULARY - 1, VOCABULARY // 2, VOCABULARY // 2 - 1, VOCABULARY, -1]
    targets[0, : len(some)], cotangents[0, 4:6] = some, 0.0
    return jnp.asarray(hidden, dtype), *map(jnp.asarray, (unembedding, targets, cotangents))


def plain(hidden, unembedding, targets):
    """The twin: all logits, `log_softmax`, autodiff."""
    logps = jax.nn.log_softmax(jnp.einsum("bsd,vd->bsv", hidden, unembedding))
    known = (targets >= 0) & (targets < unembedding.shape[0])
    found = jnp.take_along_axis(logps, jnp.where(known, targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(known, found, jnp.nan)


def gradients(function, hidden, unembedding, targets, cotangents):
    """Values and both gradients of their sum, weighted by the cotangents."""
    values, pull = jax.vjp(lambda h, u: function(h, u, targets), hidden, unembedding)
    return values, *pull(cotangents)


def within(memory):
    return jax.jit(partial(gradients, partial(token_logps, logits_memory=memory)))


def assert_close(found, expected, atol=1e-5):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


twin = jax.jit(partial(gradients, plain))


@pytest.fixture(scope="module")
def expected():
    return jax.device_get(twin(*case()))


@pytest.mark.parametrize(
    "memory, chunks", [(512, 1), (10, 2), (1, 20)], ids=["kept", "two chunks", "small chunks"]
)
def test_any_memory_gives_the_same_values_and_gradients(expected, memory, chunks):
    assert -(-320 // chunk_size(320, VOCABULARY, memory)) == chunks
    assert_close(within(memory)(*case()), expected)


def test_chunks_are_as_few_as_fit_and_of_one_size():
    assert chunk_size(320, VOCABULARY, 20) == 320  # all fit
    assert chunk_size(321, VOCABULARY, 20) == 176  # two chunks of 160.5, in sixteens
    assert chunk_size(1000, VOCABULARY, 10) == 144  # seven: six of 160 are too few
    assert chunk_size(50, 50304, 1) == 5  # 5.2 fit, less than sixteen
    assert chunk_size(7, 2**18, 1) == 1
    with pytest.raises(InputError) as error:
        chunk_size(7, 2**18 + 1, 1)
    assert "logits_memory=1 MiB: one position's logits of 262145 tokens" in str(error.value)
    assert "take 1.00; give at least 2" in str(error.value)


def test_the_models_configuration_says_how_much_memory():
    config = dataclasses.replace(TINY, vocab_size=2**18 + 1, logits_memory=1)
    params = jax.eval_shape(partial(pythia.init_params, config), KEY)
    store, groups = token_store(ragged_lengths(1)), np.zeros((1, 1), int)
    batch = batching.rows(store, groups, batching.row_shape(store, groups))
    for reader in (step.token_logps, lambda c, p, b: drift.states(c, p, p, b)):
        with pytest.raises(InputError, match="logits_memory=1 MiB"):
            jax.eval_shape(partial(reader, config), params, batch)


def test_a_ragged_last_chunk():
    arguments = case(rows=1, scored=37)
    assert chunk_size(37, VOCABULARY, 1) == 16
    assert_close(within(1)(*arguments), twin(*arguments))


@pytest.mark.parametrize("memory", [512, 1], ids=["kept", "chunks"])
def test_bfloat16_sums_in_float32(memory):
    """Only gradients of logits are rounded; in bfloat16 sums of 320 would lose 1e-2."""
    hidden, unembedding, targets, cotangents = case(dtype=jnp.bfloat16)
    rounded = unembedding.astype(jnp.bfloat16).astype(jnp.float32)
    whole = hidden.astype(jnp.float32)
    values, of_hidden, of_unembedding = within(memory)(hidden, unembedding, targets, cotangents)
    np.testing.assert_allclose(values, plain(whole, rounded, targets), atol=1e-5)
    assert of_hidden.dtype == jnp.bfloat16 and of_unembedding.dtype == jnp.float32
    of_logits = jax.nn.one_hot(targets, VOCABULARY) - jax.nn.softmax(whole @ rounded.T)
    of_logits = (of_logits * cotangents[..., None]).astype(jnp.bfloat16).astype(jnp.float32)
    error = lambda x, twin: jnp.linalg.norm(x - twin) / jnp.linalg.norm(twin)
    assert error(of_unembedding, jnp.einsum("bsv,bsd->vd", of_logits, whole)) < 1e-4
    assert error(of_hidden, jnp.einsum("bsv,vd->bsd", of_logits, rounded)) < 2**-8


def test_under_vmap_scan_and_checkpoint(expected):
    """Each of eight rows by itself, in chunks: mapped, one after the other, computed twice."""
    hidden, unembedding, *rest = case()
    alone = jax.checkpoint(lambda h, u, t: token_logps(h[None], u, t[None], logits_memory=1)[0])
    mapped = jax.vmap(alone, in_axes=(0, None, 0))

    def scanned(hidden, unembedding, targets):
        one = lambda _, row: (None, alone(row[0], unembedding, row[1]))
        return jax.lax.scan(one, None, (hidden, targets))[1]

    for function in (mapped, scanned):
        found = jax.jit(partial(gradients, function))(hidden, unembedding, *rest)
        assert_close(found, expected)


def placed(mesh, hidden, unembedding, targets, cotangents):
    """Rows and the unembedding on the mesh, as training has them."""
    rows, table = sharding.batch_spec, P("tensor", "fsdp")
    rows = rows if len(targets) % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else P()
    places = [NamedSharding(mesh, spec) for spec in (rows, table, rows, rows)]
    return [
        jax.device_put(x, place)
        for x, place in zip((hidden, unembedding, targets, cotangents), places, strict=True)
    ]


ONCE = {"all-gather": 1, "reduce-scatter": 1}  # the unembedding, and its gradient
EXCHANGED = {  # maxima, sums and targets, gradient of the hidden states; of the unembedding
    (8, 1, 1): {"all-reduce": 1},
    (1, 8, 1): ONCE,
    (1, 1, 8): {"all-reduce": 3},
    (2, 2, 2): ONCE | {"all-reduce": 4},
}


@pytest.mark.parametrize("axes, memory", [((2, 2, 2), 512), *((axes, 1) for axes in EXCHANGED)])
def test_on_any_mesh_with_no_more_exchanged_than_must_be(expected, axes, memory):
    mesh = sharding.make_mesh(data=axes[0], fsdp=axes[1], tensor=axes[2])
    with jax.set_mesh(mesh):
        arguments = placed(mesh, *case())
        program = within(memory).lower(*arguments).compile()
    moves = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = Counter(re.findall(rf" ({moves})(?:-start)?\(", program.as_text()))
    assert found == EXCHANGED[axes]
    assert_close(program(*arguments), expected)
    largest = max(map(int, re.findall(rf"f32\[(\d+),{VOCABULARY // axes[2]}\]", program.as_text())))
    positions = 320 // (axes[0] * axes[1])
    assert largest == chunk_size(positions, VOCABULARY // axes[2], memory)


def test_the_unembedding_travels_in_bfloat16_and_products_add_up_in_float32():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    with jax.set_mesh(mesh):
        program = within(1).lower(*placed(mesh, *case(dtype=jnp.bfloat16))).as_text()
    whole = rf"tensor<{VOCABULARY}x{WIDTH}xbf16>"
    assert re.findall(r"all_gather.* -> (\S+)", program) == [whole]
    # Of compiled programs a CPU's would not show it: there products are rounded late or never.
    sums = re.findall(r"dot_general.* -> tensor<\w+x(\w+)>", program)
    assert len(sums) == 4 and set(sums) == {"f32"}


def test_rows_that_no_mesh_divides_and_a_backward_pass_outside():
    mesh, arguments = sharding.make_mesh(data=2, fsdp=2, tensor=2), case(rows=3)
    with jax.set_mesh(mesh):
        hidden, unembedding, targets, cotangents = placed(mesh, *arguments)
        logps = partial(token_logps, targets=targets, logits_memory=1)
        values, pull = jax.vjp(logps, hidden, unembedding)
    assert_close((values, *pull(cotangents)), twin(*arguments))


def test_rows_split_by_hand_exchange_nothing(expected):
    mesh = sharding.make_mesh(data=8)
    rows = P("data")
    by_hand = jax.shard_map(
        partial(token_logps, logits_memory=1),
        mesh=mesh,
        in_specs=(rows, P(), rows),
        out_specs=rows,
    )
    with jax.set_mesh(mesh):
        program = jax.jit(by_hand).lower(*placed(mesh, *case())[:3]).compile()
    assert not re.search("all-|collective", program.as_text())
    np.testing.assert_allclose(program(*placed(mesh, *case())[:3]), expected[0], atol=1e-5)


def test_memory_falls_as_asked():
    """1024 positions' logits take 64 MiB; the unembedding 0.5, in its gradient twice that."""
    arguments = case(rows=8, scored=128)
    sizes = {}
    for memory in (64, 16, 2):
        program = within(memory).lower(*arguments).compile()
        sizes[memory] = program.memory_analysis().temp_size_in_bytes / 2**20
        widest = max(map(int, re.findall(rf"f32\[(\d+),{VOCABULARY}\]", program.as_text())))
        assert widest == chunk_size(1024, VOCABULARY, memory)
        # A chunk, in the backward pass perhaps with its gradient beside it.
        assert memory <= sizes[memory] < 2 * memory + 2, sizes
