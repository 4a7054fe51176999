"""Whole updates against the official DPO code's, redone in PyTorch from its description.

The twin runs transformers' GPT-NeoX on [all chosen; all rejected], takes full softmaxes,
and updates with torch's own clipping, RMSprop and LambdaLR. A comparison that holds is
worth what it would notice, so every known way to get the step wrong must break it.
"""

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers

from jaxdpo import batching, convert, losses, qfunction, reference, step
from jaxdpo.sharding import make_mesh
from jaxdpo.tokens import TokenReport, TokenStore

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("quick_compile")

VOCAB_SIZE, EOS, WIDTH = 64, 0, 32
BATCH_SIZE, ACCUMULATION, NUM_STEPS = 4, 2, 5
BETA, WARMUP_STEPS = 0.1, 3
# RMSprop moves a coordinate by up to 10 learning rates however small its gradient is, so
# rounding counts most where gradients nearly vanish: at this rate one that is wrong by 5%
# still moves its parameter by no more than 1e-6 too far.
LEARNING_RATE = 2e-6
MAX_GRAD_NORM = {"dpo": 1.4, "sft": 25.0}  # bites on some updates and not on others


class Run(NamedTuple):
    """What a training run showed: the metrics of every update, and the parameters at the end."""

    metrics: list[dict[str, float]]
    params: Any


def ragged_pairs():
    """Pairs (prompt, chosen, rejected) for five batches, of unlike lengths and gradients."""
    rng = np.random.default_rng(1)

    def ids(low, high):
        return rng.integers(1, VOCAB_SIZE, rng.integers(low, high)).tolist()

    longest = np.repeat([3, 14, 5, 8, 14], BATCH_SIZE)
    return [(ids(2, 7), [*ids(1, high), EOS], [*ids(1, high), EOS]) for high in longest]


PAIRS = ragged_pairs()


# The twin.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The weights of the policy, and of a reference that lies a little beside it.

    They are so large that attention is far from uniform. All of a head is rotated: a key
    bias that is not adds the same to all scores of a query, so its gradient is nothing but
    rounding, which RMSprop would blow up to a full update.
    """
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        rotary_pct=1.0,
    )
    model, folder = transformers.GPTNeoXForCausalLM(config), tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        std = 2 / math.sqrt(WIDTH) if parameter.ndim == 2 else 0.2
        torch.nn.init.normal_(parameter, mean, std, generator=generator)
    model.save_pretrained(folder / "policy")
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "reference")
    return folder


def summed_logps(model, sequences):
    """log pi(response | prompt) of each (prompt, response), right-padded into one batch."""
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    labels, attention_mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
        attention_mask[row, :end] = 1
    logits = model(ids, attention_mask=attention_mask).logits.to(torch.float32)[:, :-1]
    scored, targets = labels[:, 1:] != -100, labels[:, 1:].clamp_min(0)
    logps = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
    return (logps * scored).sum(-1)


def dpo_values(policy, reference_model, pairs, label_smoothing):
    """The metrics of each pair; "loss" is what is differentiated."""
    sequences = [(x, chosen) for x, chosen, _ in pairs] + [(x, other) for x, _, other in pairs]
    logps = summed_logps(policy, sequences)
    with torch.no_grad():
        reference_logps = summed_logps(reference_model, sequences)
    chosen, rejected = (BETA * (logps - reference_logps)).chunk(2)
    logsigmoid, e, margins = torch.nn.functional.logsigmoid, label_smoothing, chosen - rejected
    return {
        "loss": -(1 - e) * logsigmoid(margins) - e * logsigmoid(-margins),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (chosen > rejected).float(),
        "logps/chosen": logps[: len(pairs)],
        "logps/rejected": logps[len(pairs) :],
    }


def sft_values(policy, pairs):
    logps = summed_logps(policy, [(prompt, chosen) for prompt, chosen, _ in pairs])
    return {"loss": -logps, "logps/chosen": logps}


def twin_run(folders, objective, num_steps, label_smoothing=0.0):
    """Updates in the official order: backward of every part, clip, step, schedule, zero."""
    policy, reference_model = (
        transformers.GPTNeoXForCausalLM.from_pretrained(
            folders / name, dtype=torch.float32, attn_implementation="eager"
        )
        for name in ("policy", "reference")
    )
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=LEARNING_RATE)
    factor = lambda s: min(1, (s + 1) / (WARMUP_STEPS + 1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    history = []
    for at in range(0, num_steps * BATCH_SIZE, BATCH_SIZE):
        parts, size = [], BATCH_SIZE // ACCUMULATION
        for start in range(at, at + BATCH_SIZE, size):
            pairs = PAIRS[start : start + size]
            if objective == "sft":
                parts.append(sft_values(policy, pairs))
            else:
                parts.append(dpo_values(policy, reference_model, pairs, label_smoothing))
            (parts[-1]["loss"].mean() / ACCUMULATION).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM[objective])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        metrics = {k: torch.cat([part[k] for part in parts]).mean().item() for k in parts[0]}
        history.append(metrics | {"grad_norm": norm.item()})
    trained = folders / f"trained-{objective}-{label_smoothing}"
    policy.save_pretrained(trained)
    return Run(history, weights(trained)[1])


@pytest.fixture(scope="module")
def dpo_twin(folders):
    return twin_run(folders, "dpo", NUM_STEPS)


# This project.


def weights(folder):
    config, params = convert.load_hf(folder, mesh=make_mesh(devices=jax.devices()[:1]))
    return config, jax.device_get(params)


def token_store(pairs):
    lengths = np.array([[len(part) for part in pair] for pair in pairs])
    flat = np.concatenate([np.asarray(part, np.int32) for pair in pairs for part in pair])
    starts = np.cumsum(lengths.sum(1)) - lengths.sum(1)
    report = TokenReport(len(pairs), 0, 0, 0, 0, dropped=[], empty=[], tokens=len(flat))
    return TokenStore(flat, starts, lengths, np.arange(len(pairs)), "in memory", report)


reference_pass = jax.jit(step.token_logps, static_argnums=0)


@functools.cache
def train_step_and_tx(config, objective, label_smoothing, micro_batches):
    pair_loss = functools.partial(losses.dpo_loss, beta=BETA, label_smoothing=label_smoothing)
    summed_loss = step.preference_objective(config, pair_loss, beta=BETA)
    if objective == "sft":
        summed_loss = step.sft_objective(config)
    tx = step.rmsprop(step.warmup(LEARNING_RATE, WARMUP_STEPS))
    limits = {"max_grad_norm": MAX_GRAD_NORM[objective], "micro_batches": micro_batches}
    return step.make_train_step(summed_loss, tx, **limits), tx


def our_run(
    folders,
    objective="dpo",
    num_steps=NUM_STEPS,
    *,
    label_smoothing=0.0,
    micro_batches=2,
    pairs=PAIRS,
    change=lambda batch: batch,
    **rows,
):
    """A run on `pairs`, in rows as the options say; `change` may then spoil each batch."""
    config, params = weights(folders / "policy")
    train_step, tx = train_step_and_tx(config, objective, label_smoothing, micro_batches)
    if objective == "sft":
        store, cached = token_store([(x, chosen, []) for x, chosen, _ in pairs]), None
    else:
        store = token_store(pairs)
        token_logps = functools.partial(reference_pass, *weights(folders / "reference"))
        in_order = batching.Batches(store, batch_size=BATCH_SIZE)
        cached = reference.reference_token_logps(token_logps, in_order)
    batches = batching.Batches(store, batch_size=BATCH_SIZE, reference=cached, **rows)
    state, history = step.initial_state(jax.tree.map(jnp.array, params), tx), []
    for s in range(num_steps):
        state, metrics = train_step(state, change(batches[s]))
        history.append(step.means(metrics))
    return Run(history, jax.device_get(state.params))


def assert_same(ours, twin):
    """Metrics to 1e-5, relative where larger than 1; parameters to 1e-6.

    A sum of log-probabilities near -50 has a float32 spacing of 4e-6, so no absolute bound
    suits it. Parameters below 4 are spaced by 2.4e-7, and both programs round five times.
    """
    for s, (mine, theirs) in enumerate(zip(ours.metrics, twin.metrics, strict=True)):
        for name, value in theirs.items():
            error = abs(mine[name] - value)
            assert error <= 1e-5 * max(1.0, abs(value)), f"{name} of update {s}: off by {error}"
    chex.assert_trees_all_close(ours.params, twin.params, rtol=0, atol=1e-6)


# What must agree.


@pytest.mark.parametrize(
    ("micro_batches", "rows"),
    [
        (2, {}),
        (2, {"layout": "separate"}),
        (1, {"row_length": 64, "num_buckets": 2}),
        (2, {"row_length": 64, "divisor": 2}),
    ],
    ids=["a pair to a row", "separate rows", "packed", "packed, two micro-batches"],
)
def test_dpo_steps_match_the_official_ones(folders, dpo_twin, micro_batches, rows):
    assert_same(our_run(folders, micro_batches=micro_batches, **rows), dpo_twin)


def test_the_run_compared_exercises_the_step(folders, dpo_twin):
    """Clipping bites now and then, rewards are not zero, parameters move beyond 1e-5."""
    clips = {metrics["grad_norm"] > MAX_GRAD_NORM["dpo"] for metrics in dpo_twin.metrics}
    assert clips == {True, False}
    assert max(abs(metrics["rewards/margins"]) for metrics in dpo_twin.metrics) > 0.1
    assert len({metrics["rewards/accuracies"] for metrics in dpo_twin.metrics}) > 1
    start = weights(folders / "policy")[1]
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), dpo_twin.params, start)
    assert min(jax.tree.leaves(moved)) > 1e-5


def test_a_conservative_dpo_step_matches(folders):
    twin = twin_run(folders, "dpo", 1, label_smoothing=0.2)
    assert_same(our_run(folders, "dpo", 1, label_smoothing=0.2), twin)


def test_sft_steps_match_the_official_ones(folders):
    twin = twin_run(folders, "sft", 3)
    assert_same(our_run(folders, "sft", 3), twin)


# What must not.


def without_ends(batch, shift):
    """Leave out the first (shift 1) or the last (-1) token of every response."""
    inner = batch.slots == np.roll(batch.slots, shift, axis=1)
    return batch._replace(slots=np.where(inner, batch.slots, -1))


def without_restart(batch):
    along = np.arange(batch.positions.shape[1], dtype=np.int32)
    return batch._replace(positions=np.broadcast_to(along, batch.positions.shape))


def mean_over_tokens(patch):
    sums = qfunction.response_sums
    mean = lambda values, *where: sums(values, *where) / sums(jnp.ones_like(values), *where)
    patch.setattr(qfunction, "response_sums", mean)


def not_clipped(patch):
    patch.setattr(step, "clipped", lambda grads, norm, max_norm: grads)


def each_part_clipped(patch):
    whole, clip = step.sums_and_grads, step.clipped

    def sums_and_grads(objective, params, batch, micro_batches):
        parts = []
        for i in range(micro_batches):
            part = jax.tree.map(lambda x, i=i: x[i::micro_batches], batch)
            grads, pairs, metrics = whole(objective, params, part, 1)
            norm = optax.tree.norm(grads) / pairs
            parts.append((clip(grads, norm, MAX_GRAD_NORM["dpo"]), pairs, metrics))
        return jax.tree.map(lambda *leaves: sum(leaves), *parts)

    patch.setattr(step, "sums_and_grads", sums_and_grads)
    not_clipped(patch)


def warmup_from_zero(patch):
    schedule = lambda peak, steps: lambda s: peak * jnp.minimum(1.0, s / steps)
    patch.setattr(step, "warmup", schedule)


WRONG_DATA = {
    "eos-not-scored": {"change": functools.partial(without_ends, shift=-1)},
    "first-token-not-scored": {"change": functools.partial(without_ends, shift=1)},
    "positions-not-restarted": {"change": without_restart},
    "prompt-end-scored": {"pairs": [(x[:-1], x[-1:] + y, x[-1:] + z) for x, y, z in PAIRS]},
}
WRONG_STEPS = {
    "mean-over-tokens": mean_over_tokens,
    "not-clipped": not_clipped,
    "each-part-clipped": each_part_clipped,
    "warmup-from-zero": warmup_from_zero,
    "rmsprop-of-optax": lambda patch: patch.setattr(step, "rmsprop", optax.rmsprop),
}


@pytest.mark.parametrize("wrong", WRONG_DATA.values(), ids=WRONG_DATA)
def test_wrong_data_are_noticed(folders, dpo_twin, wrong):
    run = our_run(folders, **wrong)
    with pytest.raises(AssertionError):
        assert_same(run, dpo_twin)


@pytest.mark.parametrize("mutate", WRONG_STEPS.values(), ids=WRONG_STEPS)
def test_a_wrong_step_is_noticed(folders, dpo_twin, monkeypatch, mutate):
    mutate(monkeypatch)
    monkeypatch.setattr(f"{__name__}.train_step_and_tx", train_step_and_tx.__wrapped__)
    run = our_run(folders)
    with pytest.raises(AssertionError):
        assert_same(run, dpo_twin)


# The optimizer alone.


def updates_of(grads, learning_rate=1.0, warmup_steps=0):
    tx = step.rmsprop(step.warmup(learning_rate, warmup_steps))
    state = tx.init(jnp.zeros_like(grads[0]))
    updates = []
    for grad in grads:
        update, state = tx.update(grad, state)
        updates.append(-np.asarray(update))
    return np.array(updates)


def test_rmsprop_starts_ten_times_too_fast():
    """1 / sqrt(1 - 0.99^n) for a constant gradient, whatever its size."""
    updates = updates_of(jnp.array([[1e-3, -7.0]] * 4))
    expected = np.array([10.0, 7.09, 5.80, 5.04])
    np.testing.assert_allclose(updates, np.outer(expected, [1, -1]), rtol=1e-3)


def test_rmsprop_adds_epsilon_outside_the_root():
    """1e-8 / (sqrt(0.01) 1e-8 + 1e-8) = 10 / 11; inside it would be 1e-4."""
    assert updates_of(jnp.array([[1e-8]])).item() == pytest.approx(10 / 11, rel=1e-5)


def test_warmup_starts_at_its_first_fraction():
    """Updates of 10 and 7.09 times 1/151 and 2/151 of the peak."""
    schedule = step.warmup(1.0, 150)
    rates = [float(schedule(s)) for s in (0, 1, 149, 150, 10_000)]
    assert rates == pytest.approx([1 / 151, 2 / 151, 150 / 151, 1, 1], rel=1e-6)
    updates = updates_of(jnp.ones((2, 1)), learning_rate=151.0, warmup_steps=150)
    np.testing.assert_allclose(updates[:, 0], [10.0, 2 * 7.0888], rtol=1e-5)


@pytest.mark.parametrize("max_norm", [0.5, 10.0, 5.0], ids=["bites", "does-not", "at-the-norm"])
def test_clipping_is_that_of_torch(max_norm):
    """[3, 4] has norm 5: scaled by max_norm / (5 + 1e-6), or not at all."""
    vector = torch.nn.Parameter(torch.zeros(2))
    vector.grad = torch.tensor([3.0, 4.0])
    norm = torch.nn.utils.clip_grad_norm_(vector, max_norm)
    ours = step.clipped(jnp.array([3.0, 4.0]), jnp.float32(norm.item()), max_norm)
    np.testing.assert_allclose(ours, vector.grad.numpy(), rtol=2e-7)  # two roundings
    assert float(ours[0]) == pytest.approx(3 * min(1, max_norm / 5), rel=1e-6)
