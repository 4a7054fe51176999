"""The narrow waist against a triple loop in float64; Q, V and rewards: identities, hand numbers.

Twins are in float64; quantities are of order one to ten, and the tolerance of 1e-5 that most
tests have is what float32 leaves of sums of a few such terms.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import TINY, ragged_lengths, token_store

from jaxdpo import batching, losses, pythia, token_mdp
from jaxdpo.qfunction import (
    advantages,
    bellman_rewards,
    expected_log_ratios,
    kl_divergences,
    logits,
    q_values,
    response_sums,
    return_decomposition,
    scored_hidden,
    shape,
    state_values,
    token_logps,
    token_rewards,
)

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


BETA = 0.3
LENGTHS = jnp.array([4, 1, 3])


class Responses(NamedTuple):
    """Three responses of a prompt: logits [3, 4, 7] of a policy and a reference, their tokens."""

    policy: jax.Array
    reference: jax.Array
    tokens: jax.Array

    def of_the_tokens(self, values):
        return jnp.take_along_axis(values, self.tokens[..., None], axis=-1)[..., 0]

    def arguments(self):
        """What `bellman_rewards` and `return_decomposition` take."""
        reference = self.of_the_tokens(jax.nn.log_softmax(self.reference))
        q = self.of_the_tokens(q_values(self.policy, beta=BETA))
        return q, state_values(self.policy, beta=BETA), reference, LENGTHS

    def token_rewards(self):
        policy, reference = (
            self.of_the_tokens(jax.nn.log_softmax(z)) for z in (self.policy, self.reference)
        )
        inside = jnp.arange(4)[None] < LENGTHS[:, None]
        return jnp.where(inside, token_rewards(policy, reference, beta=BETA), 0.0)


@pytest.fixture
def responses():
    keys = jax.random.split(jax.random.key(3), 3)
    policy, reference = (3 * jax.random.normal(key, (3, 4, 7)) for key in keys[:2])
    policy = policy.at[:, 0].set(policy[0, 0])  # one prompt, one first state
    return Responses(policy, reference, jax.random.randint(keys[2], (3, 4), 0, 7))


def shifted(responses, shifts):
    """The same policy with other logits: a constant of its own added at each state."""
    return responses._replace(policy=responses.policy + shifts[..., None])


def preferences(returns):
    return jax.nn.sigmoid(returns[:, None] - returns[None, :])


def test_logits_are_the_products_that_token_logps_normalises():
    hidden, unembedding, targets = case()
    z = np.float64(hidden) @ np.float64(unembedding).T
    np.testing.assert_allclose(logits(hidden, unembedding), z, atol=1e-5)
    logps = jax.nn.log_softmax(logits(hidden, unembedding))
    expected = jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(token_logps(hidden, unembedding, targets), expected, atol=1e-5)
    assert logits(hidden.astype(jnp.bfloat16), unembedding).dtype == jnp.float32


def test_q_v_and_advantages_against_the_slow_twin(responses):
    z = np.float64(responses.policy)
    v = BETA * np.log(np.exp(z).sum(axis=-1))
    np.testing.assert_allclose(q_values(responses.policy, beta=BETA), BETA * z, atol=1e-6)
    np.testing.assert_allclose(state_values(responses.policy, beta=BETA), v, atol=1e-6)
    expected = BETA * z - v[..., None]
    np.testing.assert_allclose(advantages(responses.policy, beta=BETA), expected, atol=2e-6)


def test_softmax_of_q_over_beta_is_the_policy(responses):
    q = q_values(responses.policy, beta=BETA)
    policy = jax.nn.softmax(responses.policy)
    np.testing.assert_allclose(jax.nn.softmax(q / BETA), policy, rtol=1e-5)
    found = jnp.exp(advantages(responses.policy, beta=BETA) / BETA)
    np.testing.assert_allclose(found, policy, rtol=1e-5)


def test_bellman_rewards_by_hand():
    # r_0 = Q_0 - beta log ref_0 - V_1 = 1 - 0.5 (-2) - 0.25; r_1 = Q_1 - beta log ref_1 - 0
    q, v, reference = jnp.array([1.0, 2.0]), jnp.array([0.5, 0.25]), jnp.array([-2.0, -4.0])
    found = bellman_rewards(q, v, reference, jnp.array(2), beta=0.5)
    assert found.tolist() == [1.75, 4.0]
    found = bellman_rewards(q, v, reference, jnp.array(1), beta=0.5)
    assert found.tolist() == [2.0, 0.0]
    parts = return_decomposition(q, v, reference, jnp.array(2), beta=0.5)
    assert parts.start_values == 0.5 and parts.token_rewards.tolist() == [1.5, 3.75]


def test_bellman_rewards_against_the_slow_twin(responses):
    found = bellman_rewards(*responses.arguments(), beta=BETA)
    q, v, reference, lengths = map(np.float64, responses.arguments())
    for i, t in np.ndindex(q.shape):
        following = v[i, t + 1] if t + 1 < lengths[i] else 0.0
        expected = q[i, t] - BETA * reference[i, t] - following if t < lengths[i] else 0.0
        assert found[i, t] == pytest.approx(expected, abs=1e-5)


def test_what_follows_a_response_never_leaks(responses):
    q, v, reference, lengths = responses.arguments()
    inside = jnp.arange(4)[None] < lengths[:, None]
    spoilt = (jnp.where(inside, x, jnp.nan) for x in (q, v, reference))
    found = bellman_rewards(*spoilt, lengths, beta=BETA)
    np.testing.assert_array_equal(found, bellman_rewards(*responses.arguments(), beta=BETA))


def test_the_return_is_the_first_value_plus_the_token_rewards(responses):
    arguments = responses.arguments()
    parts = return_decomposition(*arguments, beta=BETA)
    np.testing.assert_allclose(parts.token_rewards, responses.token_rewards(), atol=1e-5)
    total = parts.start_values + parts.token_rewards.sum(axis=-1)
    returns = bellman_rewards(*arguments, beta=BETA).sum(axis=-1)
    np.testing.assert_allclose(returns, total, atol=1e-5)
    # Mutations: the printed sign of V(s_0), and V kept after the last token.
    wrong = -parts.start_values + parts.token_rewards.sum(axis=-1)
    assert float(jnp.abs(returns - wrong).min()) > 0.1
    q, v, reference, _ = arguments
    kept = (q - BETA * reference - jnp.roll(v, -1, axis=-1))[1, 0]
    assert abs(float(kept - total[1])) > 0.1


def test_other_logits_of_the_policy_give_a_reward_of_the_same_class(responses):
    """Q, V and rewards move by a potential; advantages, token rewards, preferences stay."""
    shifts = jax.random.normal(jax.random.key(9), (3, 4))
    shifts = shifts.at[:, 0].set(shifts[0, 0])
    other = shifted(responses, shifts)
    inside = jnp.arange(5)[None] < LENGTHS[:, None]
    potential = jnp.where(inside, -BETA * jnp.pad(shifts, [(0, 0), (0, 1)]), 0.0)
    before = bellman_rewards(*responses.arguments(), beta=BETA)
    after = bellman_rewards(*other.arguments(), beta=BETA)
    np.testing.assert_allclose(after, shape(before, potential), atol=1e-5)
    assert float(jnp.abs(after - before).max()) > 0.1
    q = q_values(responses.policy, beta=BETA) - potential[:, :4, None]
    q_moved = jnp.where(inside[:, :4, None], q_values(other.policy, beta=BETA), 0.0)
    np.testing.assert_allclose(q_moved, jnp.where(inside[:, :4, None], q, 0.0), atol=1e-5)
    stays = partial(np.testing.assert_allclose, atol=1e-5)
    stays(jax.nn.softmax(other.policy), jax.nn.softmax(responses.policy))
    stays(advantages(other.policy, beta=BETA), advantages(responses.policy, beta=BETA))
    stays(other.token_rewards(), responses.token_rewards())
    stays(preferences(after.sum(-1)), preferences(before.sum(-1)))
    stays(preferences(before.sum(-1)), preferences(responses.token_rewards().sum(-1)))


def test_a_potential_in_a_terminal_state_changes_preferences(responses):
    rewards = bellman_rewards(*responses.arguments(), beta=BETA)
    ends = jnp.zeros((3, 5)).at[0, 4].set(2.0)
    before, after = preferences(rewards.sum(-1)), preferences(shape(rewards, ends).sum(-1))
    assert float(jnp.abs(after - before).max()) > 0.1


def test_a_trained_policy_read_as_q_gives_back_the_reward_that_made_it():
    """From `token_mdp`'s rewards to logits Q*/beta, and by this module to the rewards again."""
    _, transitions = token_mdp.prefix_tree(num_tokens=4, horizon=4)
    mdp = token_mdp.random_mdp(transitions, seed=0)
    best = token_mdp.solve(mdp, beta=BETA)
    path = [0]  # the states that the response (1, 3, 2, 0) passes
    for token in (1, 3, 2):
        path.append(int(transitions[path[-1], token].argmax()))
    at = path, (1, 3, 2, 0)
    z = jnp.asarray(best.q_values[path] / BETA, jnp.float32)
    q = jnp.take_along_axis(q_values(z, beta=BETA), jnp.array(at[1])[:, None], axis=1)[:, 0]
    v = state_values(z, beta=BETA)
    np.testing.assert_allclose(v, best.state_values[path], atol=1e-5)
    reference = jnp.asarray(mdp.reference_logps[at], jnp.float32)
    found = bellman_rewards(q, v, reference, jnp.array(4), beta=BETA)
    np.testing.assert_allclose(found, mdp.rewards[at], atol=1e-5)
    # Cut after two tokens: the last reward holds V of the state reached as well.
    found = bellman_rewards(q, v, reference, jnp.array(2), beta=BETA)
    first, last = mdp.rewards[at][:2]
    expected = [first, last + best.state_values[path[2]], 0.0, 0.0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert abs(best.state_values[path[2]]) > 0.1


class Read(NamedTuple):
    """A batch, and what a policy and another model as its reference make of it, in this order."""

    batch: batching.Batch
    logits: list[jax.Array]
    token_logps: list[jax.Array]


@pytest.fixture(scope="module")
def read():
    @jax.jit
    def both(seed, some):
        params = pythia.init_params(TINY, jax.random.key(seed))
        params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)  # far from uniform
        fields = some.tokens, some.positions, some.segment_ids, some.branch_ids
        hidden = pythia.hidden_states(TINY, params, *fields)
        hidden = scored_hidden(hidden, some.scored_positions)
        z = logits(hidden, params["unembedding"])
        return z, token_logps(hidden, params["unembedding"], some.targets)

    store = token_store(ragged_lengths(4, seed=2))
    groups = np.arange(4)[:, None]
    some = batching.rows(store, groups, batching.row_shape(store, groups))
    some = jax.tree.map(jnp.asarray, some)
    return Read(some, *map(list, zip(both(0, some), both(1, some), strict=True)))


def test_token_rewards_add_up_to_the_sequence_reward_of_a_model(read):
    where = read.batch.slots, read.batch.examples
    found = response_sums(token_rewards(*read.token_logps, beta=BETA), *where)
    sums = (response_sums(logps, *where) for logps in read.token_logps)
    expected = losses.implicit_rewards(*sums, beta=BETA)
    assert float(jnp.abs(expected).max()) > 1.0
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_two_sides_of_eq_16_on_a_models_logits(read):
    policy, reference = read.logits
    ratios, kls = expected_log_ratios(policy, reference), kl_divergences(reference, policy)
    assert float(kls.min()) > 0.05
    np.testing.assert_allclose(ratios + kls, 0.0, atol=1e-5)
    p, q = (np.float64(jax.nn.softmax(z)) for z in (reference, policy))
    np.testing.assert_allclose(kls, (p * np.log(p / q)).sum(-1), atol=1e-5)
    # Mutations: the other direction of the KL, and the expectation under the policy.
    assert float(jnp.abs(ratios + kl_divergences(policy, reference)).max()) > 0.05
    assert float(jnp.abs(expected_log_ratios(reference, policy) + kls).max()) > 0.05


def test_eq_16_forgets_what_is_added_to_all_logits(read):
    policy, reference = read.logits
    found = kl_divergences(reference - 100.0, policy + 100.0)
    # 1e-4: logits of size 100 are rounded to 4e-6 each
    np.testing.assert_allclose(found, kl_divergences(reference, policy), atol=1e-4)
    np.testing.assert_allclose(kl_divergences(policy, policy), 0.0, atol=1e-6)
    assert jnp.all(expected_log_ratios(policy, policy) == 0.0)
