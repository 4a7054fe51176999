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

VOCAB_SIZE, EOS, WIDTH = 64, 0, 32
BATCH_SIZE, ACCUMULATION, NUM_STEPS = 4, 2, 5
BETA, WARMUP_STEPS = 0.1, 3
# An update is at most 10 x the learning rate in every coordinate, times the relative
# rounding error of its gradient where the two programs differ: 1e-4 x 1e-3 for a gradient
# a thousand times smaller than its neighbours.
LEARNING_RATE = 1e-5
MAX_GRAD_NORM = {"dpo": 8.0, "sft": 8.0}


class Run(NamedTuple):
    """What a training run showed: the metrics of every update, and the parameters at the end."""

    metrics: list[dict[str, float]]
    params: Any


def ragged_pairs():
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(1, VOCAB_SIZE, rng.integers(low, high)).tolist()

    return [(ids(2, 9), [*ids(1, 8), EOS], [*ids(1, 8), EOS]) for _ in range(20)]


PAIRS = ragged_pairs()  # prompt, chosen, rejected


# The twin.


def random_model(seed):
    """Queries and keys so large that attention is far from uniform.

    All of a head is rotated. A key bias that is not adds the same to all scores of a query:
    its gradient is nothing but rounding, which RMSprop would blow up to a full update.
    """
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        rotary_pct=1.0,
        attn_implementation="eager",
    )
    model = transformers.GPTNeoXForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        std = 1 / math.sqrt(WIDTH) if parameter.ndim == 2 else 0.2
        std *= 2 if name.endswith("query_key_value.weight") else 1
        torch.nn.init.normal_(parameter, mean, std, generator=generator)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The weights of the policy, and of a reference that lies a little beside it."""
    folder = tmp_path_factory.mktemp("weights")
    model = random_model(seed=0)
    model.save_pretrained(folder / "policy")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
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
    chosen, rejected = summed_logps(policy, sequences).chunk(2)
    with torch.no_grad():
        reference_chosen, reference_rejected = summed_logps(reference_model, sequences).chunk(2)
    h = (chosen - rejected) - (reference_chosen - reference_rejected)
    logsigmoid, e = torch.nn.functional.logsigmoid, label_smoothing
    chosen_rewards = BETA * (chosen - reference_chosen).detach()
    rejected_rewards = BETA * (rejected - reference_rejected).detach()
    return {
        "loss": -(1 - e) * logsigmoid(BETA * h) - e * logsigmoid(-BETA * h),
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
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


def our_run(
    folders,
    objective="dpo",
    num_steps=NUM_STEPS,
    *,
    label_smoothing=0.0,
    layout="shared",
    micro_batches=2,
    pairs_per_row=1,
):
    config, params = weights(folders / "policy")
    rows = {"batch_size": BATCH_SIZE, "layout": layout, "pairs_per_row": pairs_per_row}
    if objective == "sft":
        store = token_store([(prompt, chosen, []) for prompt, chosen, _ in PAIRS])
        batches, objective_fn = batching.Batches(store, **rows), step.sft_objective(config)
    else:
        store = token_store(PAIRS)
        token_logps = functools.partial(reference_pass, *weights(folders / "reference"))
        whole = batching.Batches(store, batch_size=BATCH_SIZE)
        cached = reference.reference_token_logps(token_logps, whole)
        batches = batching.Batches(store, **rows, reference=cached)
        pair_loss = functools.partial(losses.dpo_loss, beta=BETA, label_smoothing=label_smoothing)
        objective_fn = step.preference_objective(config, pair_loss, beta=BETA)
    tx = step.rmsprop(step.warmup(LEARNING_RATE, WARMUP_STEPS))
    train_step = step.make_train_step(
        objective_fn, tx, max_grad_norm=MAX_GRAD_NORM[objective], micro_batches=micro_batches
    )
    state, history = step.initial_state(jax.tree.map(jnp.array, params), tx), []
    for s in range(num_steps):
        state, metrics = train_step(state, batches[s])
        history.append(step.means(metrics))
    assert train_step._cache_size() == 1
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
    ("layout", "micro_batches", "pairs_per_row"),
    [
        ("shared", 2, 1),
        ("shared", 1, 1),
        ("separate", 2, 1),
        ("separate", 1, 1),
        ("shared", 1, 2),
        ("separate", 2, 2),
    ],
    ids=lambda value: str(value),
)
def test_dpo_steps_match_the_official_ones(folders, dpo_twin, layout, micro_batches, pairs_per_row):
    rows = {"layout": layout, "micro_batches": micro_batches, "pairs_per_row": pairs_per_row}
    assert_same(our_run(folders, **rows), dpo_twin)


def test_the_run_compared_exercises_the_step(folders, dpo_twin):
    """Clipping bites on some updates, rewards differ, and parameters move far beyond 1e-6."""
    clips = {metrics["grad_norm"] > MAX_GRAD_NORM["dpo"] for metrics in dpo_twin.metrics}
    assert clips == {True, False}
    assert abs(dpo_twin.metrics[0]["rewards/margins"]) > 1e-2
    assert len({metrics["rewards/accuracies"] for metrics in dpo_twin.metrics}) > 1
    start = weights(folders / "policy")[1]
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), dpo_twin.params, start)
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_a_conservative_dpo_step_matches(folders):
    twin = twin_run(folders, "dpo", 1, label_smoothing=0.2)
    assert_same(our_run(folders, "dpo", 1, label_smoothing=0.2), twin)


def test_sft_steps_match_the_official_ones(folders):
    twin = twin_run(folders, "sft", 3)
    assert all(metrics["grad_norm"] > MAX_GRAD_NORM["sft"] for metrics in twin.metrics)
    assert_same(our_run(folders, "sft", 3), twin)


# What must not.


def with_slots(change):
    """Sum other positions than the ones that belong to the response."""

    def mutate(patch):
        sums = qfunction.response_sums
        changed = lambda values, slots, examples: sums(values, change(slots), examples)
        patch.setattr(qfunction, "response_sums", changed)

    return mutate


def mean_over_tokens(patch):
    sums = qfunction.response_sums
    mean = lambda values, *where: sums(values, *where) / sums(jnp.ones_like(values), *where)
    patch.setattr(qfunction, "response_sums", mean)


def prompt_end_scored(patch):
    shifted = [(x[:-1], x[-1:] + chosen, x[-1:] + rejected) for x, chosen, rejected in PAIRS]
    patch.setattr(f"{__name__}.PAIRS", shifted)


def positions_run_on(patch):
    restarted = batching.rows

    def rows(*args, **options):
        batch = restarted(*args, **options)
        along = np.arange(batch.positions.shape[1], dtype=np.int32)
        return batch._replace(positions=np.tile(along, (len(batch.positions), 1)))

    patch.setattr(batching, "rows", rows)


def each_part_clipped(patch):
    whole, clip = step.sums_and_grads, step.clipped

    def sums_and_grads(objective, params, batch, micro_batches):
        parts = []
        for i in range(micro_batches):
            part = jax.tree.map(lambda x, i=i: x[i::micro_batches], batch)
            grads, pairs, metrics = whole(objective, params, part, 1)
            clipped = clip(grads, optax.tree.norm(grads) / pairs, MAX_GRAD_NORM["dpo"])
            parts.append((clipped, pairs, metrics))
        return jax.tree.map(lambda *leaves: sum(leaves), *parts)

    patch.setattr(step, "sums_and_grads", sums_and_grads)
    not_clipped(patch)


def not_clipped(patch):
    patch.setattr(step, "clipped", lambda grads, norm, max_norm: grads)


def warmup_from_zero(patch):
    schedule = lambda peak, steps: lambda s: peak * jnp.minimum(1.0, s / steps)
    patch.setattr(step, "warmup", schedule)


ends = lambda slots, shift: jnp.where(slots == jnp.roll(slots, shift, axis=1), slots, -1)
MUTATIONS = {
    "rmsprop-of-optax": lambda patch: patch.setattr(step, "rmsprop", optax.rmsprop),
    "warmup-from-zero": warmup_from_zero,
    "mean-over-tokens": mean_over_tokens,
    "eos-not-scored": with_slots(functools.partial(ends, shift=-1)),
    "first-token-not-scored": with_slots(functools.partial(ends, shift=1)),
    "prompt-end-scored": prompt_end_scored,
    "positions-run-on": positions_run_on,
    "each-part-clipped": each_part_clipped,
    "not-clipped": not_clipped,
}


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_wrong_step_is_noticed(folders, dpo_twin, monkeypatch, mutate):
    mutate(monkeypatch)
    wrong = our_run(folders)
    with pytest.raises(AssertionError):
        assert_same(wrong, dpo_twin)


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
    grads = [np.float32([3.0, 0.0]), np.float32([4.0])]
    parameters = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = torch.tensor(grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    ours = step.clipped(grads, jnp.float32(norm.item()), max_norm)
    chex.assert_trees_all_close(ours, [p.grad.numpy() for p in parameters], rtol=2e-7)
    assert float(ours[0][0]) == pytest.approx(3 * min(1, max_norm / 5), rel=1e-6)
