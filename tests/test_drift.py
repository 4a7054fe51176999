"""What is measured while a policy leaves its reference equals what slow arithmetic says."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import TINY, token_store
from jax.sharding import NamedSharding, PartitionSpec

from jaxdpo import InputError, drift, losses, pythia, sharding
from jaxdpo.analysis.trajectories import PARTS, SAID, SIDES, captions, draw
from jaxdpo.batching import Batches
from jaxdpo.decoding import Constraints
from jaxdpo.pythia import init_params
from jaxdpo.records import read_log
from jaxdpo.reference import reference_token_logps
from jaxdpo.step import means, preference_objective, token_logps
from jaxdpo.train import Observer, due, put_batch

BETA = 0.3
# One response without an end token, one that is nothing but its end, short and long ones.
LENGTHS = [[4, 6, 3], [2, 1, 8], [7, 5, 5], [1, 2, 4], [3, 4, 4]]


@pytest.fixture(scope="module")
def store():
    store = token_store(LENGTHS)
    store.tokens[store.starts[2] + 7 + 5 - 1] = 9  # the chosen response of the third is cut
    return store


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def models(mesh):
    """A policy and a reference that differ as much as trained ones do."""
    place = NamedSharding(mesh, PartitionSpec())
    drawn = (init_params(TINY, jax.random.key(seed)) for seed in (0, 1))
    return [jax.device_put(jax.tree.map(lambda x: 2 * x, params), place) for params in drawn]


@pytest.fixture(scope="module")
def measured(store, mesh):
    return drift.Drift(TINY, mesh, store, Constraints(6, eos_ids=(0,)), BETA, 0, 8)


@pytest.fixture(scope="module")
def heard(measured, models):
    """A record, and the samples that were drawn for it."""
    drawn, sample = [], drift.decoding.sample
    with pytest.MonkeyPatch.context() as patch:
        keep = lambda *x, **more: drawn.extend(found := sample(*x, **more)) or found
        patch.setattr(drift.decoding, "sample", keep)
        return measured.record(10, *models), [one for [one] in drawn]


@pytest.fixture(scope="module")
def record(heard):
    return heard[0]


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def plain(params, prompt, response):
    """The distributions of a response's tokens [T, V], float64, from a plain sequence."""
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(prompt) + len(response)] = np.concatenate([prompt, response])
    hidden = hidden_states(params, tokens)
    logits = np.asarray(hidden, np.float64)[0] @ np.asarray(params["unembedding"], np.float64).T
    return log_softmax(logits[len(prompt) - 1 :][: len(response)])


@jax.jit
def hidden_states(params, tokens):
    of_all = jnp.ones_like(tokens)
    places = jnp.arange(tokens.shape[1])[None]
    return pythia.hidden_states(TINY, params, tokens, places, of_all, 0 * of_all)


def scored(models, prompt, response):
    """The implicit rewards of a response, whole and in parts, and what else is known of it."""
    ours, theirs = (plain(params, prompt, response) for params in models)
    taken = np.arange(len(response)), response
    rewards = BETA * (ours[taken] - theirs[taken])
    end = len(response) - (response[-1] == 0)
    parts = rewards[: min(3, end)], rewards[min(3, end) : end], rewards[end:]
    return rewards, *parts, ours[taken], (np.exp(theirs) * (ours - theirs)).sum(-1)


def of_rewards(who, rows):
    """What a record says of the rewards of `scored` responses."""
    sums = np.array([[x.sum() for x in row[:4]] for row in rows])
    names = ("", "/first", "/middle", "/end")
    found = {f"rewards/{who}{n}": x for n, x in zip(names, sums.mean(0), strict=True)}
    found[f"lengths/{who}"] = np.mean([len(row[0]) for row in rows])
    return found | {f"errors/{who}": standard_error(sums[:, 0])}


def standard_error(values):
    return values.std(ddof=1) / math.sqrt(len(values))


def test_every_number_is_what_slow_arithmetic_gives(store, models, record):
    expected, per_token, rewards = {}, [], []
    for side, who in enumerate(SIDES):
        rows = [scored(models, one[0], one[1 + side]) for one in map(store.__getitem__, range(5))]
        sums = np.array([[x.sum() for x in row] for row in rows])
        expected |= of_rewards(who, rows)
        rewards.append(sums[:, 0])
        expected[f"logps/{who}"] = sums[:, 4].mean()
        expected[f"expected_rewards/{who}"] = BETA * sums[:, 5].mean()
        expected[f"expected/{who}"] = np.concatenate([row[5] for row in rows]).mean()
        expected[f"kl/{who}"] = -expected[f"expected/{who}"]
        per_token.append(np.mean([row[0].mean() for row in rows]))
    expected["rewards/margins_per_token"] = per_token[0] - per_token[1]
    pairs = {"margins": rewards[0] - rewards[1], "averages": (rewards[0] + rewards[1]) / 2}
    for name, of in pairs.items():
        expected[f"rewards/{name}"] = of.mean()
        expected[f"errors/{name}"] = standard_error(of)
    found = {name: record[name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)  # float32 against float64
    assert abs(record["rewards/chosen"]) > 0.1 < record["kl/chosen"]  # there is something to see


def test_samples_earn_what_slow_arithmetic_gives(store, models, heard):
    record, samples = heard
    ids = [np.asarray(sample.tokens) for sample in samples]
    rows = [scored(models, store[index].prompt, one) for index, one in enumerate(ids)]
    expected = of_rewards("samples", rows) | {"ended/samples": np.mean([x[-1] == 0 for x in ids])}
    found = {name: record[name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)  # float32 against float64
    assert 0 < record["ended/samples"] < 1 and abs(record["rewards/samples"]) > 0.1


def test_parts_add_up_to_the_whole(record):
    for who in SAID:
        parts = sum(record[f"rewards/{who}/{part}"] for part in PARTS)
        assert parts == pytest.approx(record[f"rewards/{who}"], abs=1e-5)
    average = (record["rewards/chosen"] + record["rewards/rejected"]) / 2
    assert record["rewards/averages"] == pytest.approx(average, abs=1e-9)


def test_the_two_sides_of_equation_16_cancel_at_every_state(record, measured, models, monkeypatch):
    assert 0 < record["residual"] <= 1e-5  # two routes: rounding differs, and nothing else
    for who in SIDES:
        assert record[f"expected/{who}"] < 0
    states = drift.states
    reverse = lambda model, *pair, batch: states(model, *reversed(pair), batch).kl
    monkeypatch.setattr(
        drift,
        "states",
        lambda model, ours, theirs, batch: states(model, ours, theirs, batch)._replace(
            kl=reverse(model, ours, theirs, batch=batch)
        ),
    )
    assert measured.record(10, *models)["residual"] > 1e-3  # the other KL is another number


def test_sums_are_the_evaluations_metrics(store, mesh, models, record):
    policy, reference = models
    logps = jax.jit(lambda batch: token_logps(TINY, reference, batch))
    batches = Batches(store, batch_size=8)
    batches.reference = reference_token_logps(lambda b: logps(put_batch(b, mesh)), batches)
    [batch] = map(batches.__getitem__, range(1))
    objective = preference_objective(TINY, lambda *x: losses.dpo_loss(*x, beta=BETA), beta=BETA)
    metrics = means(jax.jit(objective)(policy, put_batch(batch, mesh))[2])
    shared = metrics.keys() & record.keys()
    assert {"rewards/chosen", "rewards/accuracies", "logps/rejected"} <= shared
    found = {name: record[name] for name in shared}
    assert found == pytest.approx({name: metrics[name] for name in shared}, rel=1e-5, abs=1e-5)


def test_logits_of_both_models_take_no_more_memory_than_they_are_given(store):
    """As all at once; of a device's positions 16 at a time, where two share 2^14 tokens."""
    wide = dataclasses.replace(TINY, vocab_size=2**14)
    params = [jax.jit(init_params, static_argnums=0)(wide, jax.random.key(i)) for i in (0, 1)]
    batch = Batches(store, batch_size=8)[0]
    expected = drift.states(wide, *params, batch)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(params, mesh))
        small = dataclasses.replace(wide, logits_memory=1)
        program = drift.states.lower(small, *placed, put_batch(batch, mesh)).compile()
    found = program(*placed, put_batch(batch, mesh))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    sizes = re.findall(rf"f32\[([\d,]+),{2**13}\]", program.as_text())
    assert max(math.prod(map(int, size.split(","))) for size in sizes) == 16


def test_a_policy_that_is_its_reference_earns_nothing(measured, models):
    same = measured.record(0, models[0], models[0])
    for who in SAID:
        assert same[f"rewards/{who}"] == pytest.approx(0, abs=1e-6)
    assert same["residual"] <= 1e-6 and same["kl/chosen"] == pytest.approx(0, abs=1e-6)


def test_samples_depend_on_seed_and_step_alone(measured, models, record):
    assert measured.record(10, *models) == record
    other = measured.record(11, *models)
    assert other["rewards/samples"] != record["rewards/samples"]
    of_pairs = [name for name in record if name != "step" and "samples" not in name]
    assert {name: other[name] for name in of_pairs} == {name: record[name] for name in of_pairs}
    assert 0 <= record["ended/samples"] <= 1 <= record["lengths/samples"] <= 6
    reseeded = dataclasses.replace(measured, seed=1).record(10, *models)
    assert reseeded["rewards/samples"] != record["rewards/samples"]
    assert {name: reseeded[name] for name in of_pairs} == {name: record[name] for name in of_pairs}


def test_a_record_can_be_written_whatever_the_weights(measured, models):
    broken = models[0] | {"unembedding": models[0]["unembedding"] * math.nan}
    record = json.loads(json.dumps(measured.record(3, broken, models[1]), allow_nan=False))
    assert record["rewards/chosen"] is None and record["lengths/chosen"] == np.mean([6, 1, 5, 2, 4])
    said = " ".join(captions([record]))
    assert "not finite" in said and "inf nats at any state" in said
    draw([record])


def test_the_first_pairs_and_more_than_there_are(store):
    first = drift.first_pairs(store, 2)
    assert len(first) == 2 and first.scored_offsets.tolist() == [0, 9, 18]
    np.testing.assert_array_equal(first[1].rejected, store[1].rejected)
    with pytest.raises(InputError, match="6 are more than the 5 held-out pairs"):
        drift.first_pairs(store, 6)


@pytest.mark.parametrize("start, left", [(0, []), (4, [0, 4]), (8, [0, 4, 8])])
def test_a_restart_forgets_what_it_will_see_again(tmp_path, start, left):
    observer = Observer(tmp_path / "log", 4, lambda step, params: [{"step": step}] * params)
    observer.resume(start)  # there is no log yet
    for step in (0, 4, 8):
        observer.look(step, 1)
    with open(observer.log, "a") as log:
        log.write('{"step": 12, ')
    observer.resume(start)
    assert [record["step"] for record in read_log(observer.log)] == left
    observer.look(12, 2)
    assert [record["step"] for record in read_log(observer.log)] == [*left, 12, 12]


def test_what_is_due():
    assert [step for step in range(11) if due(4, step, 10)] == [0, 4, 8, 10]
    assert [step for step in range(11) if due(0, step, 10)] == [0, 10]
