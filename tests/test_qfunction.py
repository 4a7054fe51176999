"""The narrow waist against a triple loop in float64, in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.qfunction import response_sums, scored_hidden, token_logps

KEY = jax.random.key(0)


def slow_token_logps(hidden, unembedding, targets):
    hidden, unembedding = np.float64(hidden), np.float64(unembedding)
    out = np.zeros(targets.shape)
    for b, s in np.ndindex(targets.shape):
        logits = [float(hidden[b, s] @ row) for row in unembedding]
        top = max(logits)
        normaliser = top + np.log(sum(np.exp(z - top) for z in logits))
        out[b, s] = logits[targets[b, s]] - normaliser
    return out


def case(scale=1.0, dtype=jnp.float32):
    hidden = scale * jax.random.normal(KEY, (2, 5, 8), dtype)
    unembedding = jax.random.normal(jax.random.key(1), (11, 8), dtype)
    return hidden, unembedding, jax.random.randint(jax.random.key(2), (2, 5), 0, 11)


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["mild", "peaked"])
def test_against_the_slow_twin(scale):
    hidden, unembedding, targets = case(scale)
    expected = slow_token_logps(hidden, unembedding, targets)
    # Logits reach `scale` x 10, so their float32 rounding is 1e-6 of that.
    np.testing.assert_allclose(
        token_logps(hidden, unembedding, targets), expected, atol=2e-6 * scale
    )


def test_the_gradient_is_one_hot_minus_softmax():
    hidden, unembedding, targets = case()
    found = jax.grad(lambda h: token_logps(h, unembedding, targets).sum())(hidden)
    probabilities = jax.nn.softmax(hidden @ unembedding.T)
    expected = (jax.nn.one_hot(targets, 11) - probabilities) @ unembedding
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_probabilities_of_all_tokens_sum_to_one():
    hidden, unembedding, _ = case()
    every = jnp.broadcast_to(jnp.arange(5), (2, 5)), jnp.broadcast_to(jnp.arange(6, 11), (2, 5))
    whole = [jnp.repeat(hidden[:, :1], 5, axis=1), jnp.repeat(hidden[:, :1], 5, axis=1)]
    total = sum(
        jnp.exp(token_logps(h, unembedding, t)).sum(1) for h, t in zip(whole, every, strict=True)
    )
    five = jnp.full((2, 5), 5)
    total += jnp.exp(token_logps(whole[0], unembedding, five))[:, 0]
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)


def test_bfloat16_in_float32_out():
    hidden, unembedding, targets = case(dtype=jnp.bfloat16)
    found = token_logps(hidden, unembedding, targets)
    assert found.dtype == jnp.float32
    # Products of bfloat16 values are exact in float32: only the inputs are rounded.
    np.testing.assert_allclose(found, slow_token_logps(hidden, unembedding, targets), atol=1e-5)


def test_scored_hidden_may_read_a_position_twice():
    hidden = jnp.arange(12.0).reshape(1, 4, 3)
    found = scored_hidden(hidden, jnp.array([[2, 2, 0]]))
    np.testing.assert_array_equal(found[0], hidden[0, jnp.array([2, 2, 0])])
    grad = jax.grad(lambda h: scored_hidden(h, jnp.array([[2, 2, 0]])).sum())(hidden)
    np.testing.assert_array_equal(grad[0, :, 0], [1, 0, 2, 0])


def test_response_sums_against_a_loop():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 7)).astype(np.float32)
    slots = rng.integers(-1, 4, (6, 7)).astype(np.int32)
    for groups in (6, 3):  # one row or two rows to a group
        expected = np.zeros((groups, 2, 2), np.float32)
        for b, s in np.ndindex(slots.shape):
            if slots[b, s] >= 0:
                expected[b // (6 // groups), slots[b, s] // 2, slots[b, s] % 2] += values[b, s]
        examples = jnp.zeros((groups, 2), jnp.int32)
        found = response_sums(jnp.array(values), jnp.array(slots), examples)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_unscored_values_never_leak():
    values = jnp.array([[1.0, jnp.nan, jnp.inf]])
    sums = response_sums(values, jnp.array([[0, -1, -1]]), jnp.array([[0]]))
    assert sums.tolist() == [[[1.0, 0.0]]]
