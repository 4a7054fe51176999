"""One update: the same whatever the layout, packing, micro-batches or mesh; and what it refuses."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from examples import TINY, ragged_lengths, token_store

from jaxdpo import batching, losses, pythia, scored_logps, sharding
from jaxdpo.batching import Batches, row_shape
from jaxdpo.reference import reference_token_logps
from jaxdpo.step import (
    initial_state,
    make_train_step,
    means,
    preference_objective,
    sft_objective,
    state_shardings,
    sums_and_grads,
    token_logps,
    warmup,
)
from jaxdpo.train import put_batch

pytestmark = pytest.mark.usefixtures("quick_compile")

STORE = token_store(ragged_lengths(8, seed=4))
SFT_STORE = token_store(ragged_lengths(8, seed=4) * [1, 1, 0])
logps_of = jax.jit(partial(token_logps, TINY))
DPO = preference_objective(TINY, partial(losses.dpo_loss, beta=0.3), beta=0.3)


def make_params(seed, scale=3.0):
    """Weights scaled up, so that attention and logits are far from uniform."""
    params = pythia.init_params(TINY, jax.random.key(seed))
    return jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, params)


@pytest.fixture(scope="module")
def params():
    return make_params(0)


@pytest.fixture(scope="module")
def reference():
    """Another model's log-probabilities, so that no reward is zero."""
    other = make_params(1)
    return reference_token_logps(partial(logps_of, other), Batches(STORE, batch_size=8))


def batch_of(groups, *, layout="shared", reference=None, store=STORE, slack=0):
    groups = np.array(groups)
    shape = row_shape(store, groups, layout=layout)
    shape = shape._replace(length=shape.length + slack, scored=shape.scored + slack)
    return batching.rows(store, groups, shape, layout=layout, reference=reference)


ALONE = np.arange(8)[:, None]
result = jax.jit(sums_and_grads, static_argnums=(0, 3))  # (objective, params, batch, micro_batches)
CASES = {
    "a pair to a row": dict(groups=ALONE),
    "separate rows": dict(groups=ALONE, layout="separate"),
    "two pairs to a row": dict(groups=ALONE.reshape(4, 2)),
    "four pairs to a row": dict(groups=[[5, 0, 3, 6], [1, 7, 2, 4]]),
    "ragged packing with fillers": dict(groups=[[0, 1, 2], [3, 4, -1], [5, 6, -1], [7, -1, -1]]),
    "separate and packed": dict(groups=ALONE.reshape(4, 2), layout="separate"),
    "another order": dict(groups=ALONE[::-1]),
    "more padding": dict(groups=ALONE, slack=16),
}


def check_equal(found, expected, tolerance=1e-5):
    """Loss, weight, metrics and every gradient; gradients relative to their largest entry."""
    (grads, weight, metrics), (grads_, weight_, metrics_) = found, expected
    assert float(weight) == float(weight_)
    for name, value in means(metrics).items():
        assert value == pytest.approx(means(metrics_)[name], rel=tolerance, abs=tolerance), name
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads_))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(grads_), strict=True
    ):
        np.testing.assert_allclose(
            a, b, atol=tolerance * largest, rtol=tolerance, err_msg=jax.tree_util.keystr(path)
        )


@pytest.fixture(scope="module")
def plain(params):
    """The plain twin's result: a row for each response, all logits, the reference in the step."""
    sequences = [
        [np.concatenate([x, y]) for y in (chosen, rejected)] for x, chosen, rejected in STORE
    ]
    width = max(len(sequence) for pair in sequences for sequence in pair)
    tokens = np.stack([[np.pad(s, (0, width - len(s))) for s in pair] for pair in sequences])
    tokens = tokens.reshape(16, width)
    lengths, prompts = np.array([[len(s) for s in pair] for pair in sequences]), STORE.lengths[:, 0]
    at = np.broadcast_to(np.arange(width), (16, width))
    scored = (np.repeat(prompts, 2)[:, None] <= at) & (at < lengths.reshape(16, 1))

    def sums(params):
        row = tokens, at.astype(np.int32), np.ones_like(tokens), np.zeros_like(tokens)
        hidden = pythia.hidden_states(TINY, params, *map(jnp.asarray, row))
        logps = jax.nn.log_softmax(hidden @ params["unembedding"].T)[:, :-1]
        logps = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=2)[..., 0]
        return jnp.where(scored[:, 1:], logps, 0).sum(1).reshape(8, 2)

    def loss_first(params):
        logps = sums(params)
        rewards = 0.3 * (logps - jax.lax.stop_gradient(sums(make_params(1))))
        margins = rewards[:, 0] - rewards[:, 1]
        values = {"loss": -jax.nn.log_sigmoid(margins), "rewards/accuracies": margins > 0}
        values |= {"rewards/margins": margins}
        for side, name in enumerate(("chosen", "rejected")):
            values |= {f"rewards/{name}": rewards[:, side], f"logps/{name}": logps[:, side]}
        metrics = {name: (value.sum(), 8) for name, value in values.items()}
        return values["loss"].sum(), metrics

    (_, metrics), grads = jax.jit(jax.value_and_grad(loss_first, has_aux=True))(params)
    return grads, 8, metrics


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_layout_and_packing_change_nothing(params, reference, plain, case):
    check_equal(result(DPO, params, batch_of(**case, reference=reference), 1), plain)


def test_packing_by_length_changes_nothing(params, reference, plain):
    batches = Batches(STORE, batch_size=8, seed=0, row_length=50, divisor=2, reference=reference)
    assert batches.shapes[0].rows == 2
    check_equal(result(DPO, params, batches[0], 2), plain)


@pytest.mark.parametrize("micro_batches", [2, 8])
@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_micro_batches_change_nothing(params, reference, plain, micro_batches, layout):
    batch = batch_of(ALONE, layout=layout, reference=reference)
    check_equal(result(DPO, params, batch, micro_batches), plain)


@pytest.mark.parametrize(
    "axes, groups",
    [
        ((8, 1, 1), [[0, 1, 2], [3, 4, -1], *[[i, -1, -1] for i in (5, -1, 6, 7, -1, -1)]]),
        ((2, 2, 2), ALONE.reshape(4, 2)),
    ],
    ids=["8x1x1", "2x2x2"],
)
def test_every_gradient_is_the_plain_twins_on_eight_devices(
    params, reference, plain, monkeypatch, axes, groups
):
    """Packed, prompts shared, the reference cached, logits in chunks; each tensor by itself."""
    positions = []  # of a device: no memory in MiB is as small as these rows
    monkeypatch.setattr(scored_logps, "chunk_size", lambda n, *_: positions.append(n) or 8)
    model = dataclasses.replace(TINY, logits_memory=3)  # as no other test has it, so traced anew
    objective = preference_objective(model, partial(losses.dpo_loss, beta=0.3), beta=0.3)
    mesh = sharding.make_mesh(data=axes[0], fsdp=axes[1], tensor=axes[2])
    batch = put_batch(batch_of(groups, reference=reference), mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(params, mesh))
        found = jax.device_get(result(objective, placed, batch, 1))
    assert min(positions) > 8
    check_equal(found, plain)
    grads, expected = found[0], jax.device_get(plain[0])
    error = lambda a, b: np.abs(a - b).max() / np.abs(b).max()
    for path, value in jax.tree_util.tree_leaves_with_path(jax.tree.map(error, grads, expected)):
        assert value <= 1e-5, jax.tree_util.keystr(path)


def test_sft_is_the_mean_of_summed_log_probabilities(params):
    objective = sft_objective(TINY)
    batch = batch_of(ALONE, store=SFT_STORE)
    loss_sum, weight, metrics = jax.jit(objective)(params, batch)
    logps = np.asarray(logps_of(params, batch))
    per_pair = [logps[g][batch.slots[g] == 0].sum() for g in range(8)]
    assert float(loss_sum / weight) == pytest.approx(-np.mean(per_pair), rel=1e-5)
    tokens = SFT_STORE.lengths[:, 1].sum()
    assert means(metrics)["loss_per_token"] == pytest.approx(-np.sum(per_pair) / tokens, rel=1e-5)
    packed = batch_of(ALONE.reshape(2, 4), store=SFT_STORE)
    check_equal(result(objective, params, packed, 2), result(objective, params, batch, 1))


def test_policy_equal_to_reference_is_log_2_with_no_accuracy(params):
    own = reference_token_logps(partial(logps_of, params), Batches(STORE, batch_size=8))
    metrics = means(jax.jit(DPO)(params, batch_of(ALONE, reference=own))[2])
    assert metrics["loss"] == pytest.approx(np.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert metrics[name] == pytest.approx(0.0, abs=1e-6), name  # ties are not wins


def test_metrics_by_hand(params, reference):
    batch = batch_of(ALONE, reference=reference)
    policy = np.asarray(logps_of(params, batch), np.float64)
    rewards = np.array(
        [
            [
                0.3 * (policy - batch.reference_token_logps)[g][batch.slots[g] == b].sum()
                for b in (0, 1)
            ]
            for g in range(8)
        ]
    )
    margins = rewards[:, 0] - rewards[:, 1]
    assert 0 < (margins > 0).mean() < 1  # both kinds occur, or accuracy is not tested
    found = means(jax.jit(DPO)(params, batch)[2])
    expected = {
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).mean(),
        "loss": np.log1p(np.exp(-margins)).mean(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


# RMSprop and Adam divide a gradient by its own size. The gradients of key biases are zero but
# for rounding, which eps = 1e-8 would blow up to whole learning rates; 1e-2 leaves it small.
ADAM = optax.adamw(warmup(1e-2, 2), eps=1e-2)


def trained(params, batch, mesh, steps=3, micro_batches=1, tx=ADAM):
    params = jax.tree.map(jnp.copy, params)  # the step takes its state's memory
    shardings = state_shardings(params, tx, mesh)
    state = jax.jit(partial(initial_state, tx=tx), out_shardings=shardings)(params)
    step = make_train_step(
        DPO, tx, max_grad_norm=1.0, micro_batches=micro_batches, shardings=shardings
    )
    batch, history = put_batch(batch, mesh), []
    with jax.set_mesh(mesh):
        for _ in range(steps):
            state, metrics = step(state, batch)
            history.append(means(metrics))
    return state, history, step


@pytest.fixture(scope="module")
def on_one_device(params, reference):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return trained(params, batch_of(ALONE, reference=reference), mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes, micro_batches, rows",
    [
        (
            (8, 1, 1),
            1,
            dict(groups=[[0, 1, 2], [3, 4, -1], *[[i, -1, -1] for i in (5, -1, 6, 7, -1, -1)]]),
        ),
        ((2, 2, 2), 1, dict(groups=ALONE.reshape(4, 2))),
        ((2, 2, 2), 2, dict(groups=ALONE, layout="separate")),
    ],
    ids=["8x1x1, packed", "2x2x2, packed", "2x2x2, separate rows, two micro-batches"],
)
def test_any_mesh_gives_the_same_parameters(
    params, reference, on_one_device, axes, micro_batches, rows
):
    mesh = sharding.make_mesh(data=axes[0], fsdp=axes[1], tensor=axes[2])
    batch = batch_of(**rows, reference=reference)
    state, history, _ = trained(params, batch, mesh, micro_batches=micro_batches)
    single, single_history, _ = on_one_device
    for here, there in zip(history, single_history, strict=True):
        for name in there:
            assert here[name] == pytest.approx(there[name], rel=1e-5, abs=1e-5), name
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), jax.device_get(single.params), params)
    assert max(map(float, jax.tree.leaves(moved))) > 1e-3  # a hundred times the tolerance
    chex.assert_trees_all_close(state.params, jax.device_get(single.params), atol=1e-5)
    moments = state.opt_state[0].nu["layers_0"]["up"]["kernel"]
    assert moments.sharding == state.params["layers_0"]["up"]["kernel"].sharding


def test_one_program_and_donated_memory(params, reference):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    batch = batch_of(ALONE, reference=reference)
    state, _, step = trained(params, batch, mesh)
    old = state.params["embedding"]
    with jax.set_mesh(mesh):
        step(state, put_batch(batch_of(ALONE[::-1], reference=reference), mesh))
    assert old.is_deleted()
    assert step._cache_size() == 1


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(params, reference):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    good = put_batch(batch_of(ALONE, reference=reference), mesh)
    poisoned = reference.copy()
    poisoned[3] = np.nan
    bad = put_batch(batch_of(ALONE, reference=poisoned), mesh)
    state, _, step = trained(params, batch_of(ALONE, reference=reference), mesh, steps=1)
    before = jax.device_get((state.params, state.opt_state))
    for in_a_row in (1, 2):
        state, metrics = step(state, bad)
        assert means(metrics)["skipped_in_a_row"] == in_a_row
    chex.assert_trees_all_equal(jax.device_get((state.params, state.opt_state)), before)
    state, metrics = step(state, good)
    assert means(metrics)["skipped_in_a_row"] == 0 and int(state.skipped) == 2
    assert int(state.step) == 4
    assert float(jnp.abs(state.params["embedding"] - before[0]["embedding"]).max()) > 0
