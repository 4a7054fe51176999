"""Exact soft dynamic programming: a recursive twin, hand numbers, and where it has no answer."""

import numpy as np
import pytest

from jaxdpo import InputError, token_mdp
from jaxdpo.token_mdp import (
    TokenMDP,
    preferences,
    prefix_tree,
    random_mdp,
    rewards_of,
    shaped,
    solve,
    walks,
)

EXACT = 1e-12  # float64, numbers of order ten, sums of a few hundred terms
DRAWN = dict(num_tokens=3, horizon=3, outcomes=(0.3, 0.7))


def slow_values(mdp, beta, state):
    """V of a state by recursion over what can follow, one number at a time."""
    total = 0.0
    for token, reward in enumerate(mdp.rewards[state]):
        q = reward + beta * mdp.reference_logps[state, token]
        for after, chance in enumerate(mdp.transitions[state, token]):
            if chance and after < len(mdp.rewards):
                q += chance * slow_values(mdp, beta, after)
        total += np.exp(q / beta)
    return beta * np.log(total)


def test_a_tree_has_a_state_for_each_prefix_that_goes_on():
    states, transitions = prefix_tree(num_tokens=4, horizon=3, eos=2)
    assert states[:5] == [(), (0,), (1,), (3,), (0, 0)]
    assert len(states) == len(set(states)) == 1 + 3 + 9
    assert not any(2 in state for state in states)
    ends = transitions[..., -1]
    assert ends[:, 2].all() and not ends[:4, [0, 1, 3]].any() and ends[4:].all()
    arrivals = transitions[..., :-1].sum(axis=(0, 1))
    assert arrivals.tolist() == [0.0] + [1.0] * 12  # each state has one history


@pytest.mark.parametrize("kinds", [{}, {"state_of": lambda p: tuple(sorted(p))}, DRAWN])
def test_transitions_are_distributions(kinds):
    _, transitions = prefix_tree(**{"num_tokens": 4, "horizon": 3} | kinds)
    np.testing.assert_allclose(transitions.sum(axis=-1), 1.0, rtol=1e-15)


def test_merged_prefixes_share_a_state():
    states, transitions = prefix_tree(3, 3, state_of=lambda prefix: tuple(sorted(prefix)))
    assert states == [(), (1,), (2,), (1, 1), (1, 2), (2, 2)]
    assert transitions[1, 2, 4] == transitions[2, 1, 4] == 1.0


def test_one_token_is_a_softmax_by_hand():
    # pi ~ pi_ref exp(r / beta) = (1/4 e^0, 3/4 e^2) for r = (0, 1), beta = 1/2
    _, transitions = prefix_tree(num_tokens=2, horizon=1)
    mdp = TokenMDP(np.array([[0.0, 1.0]]), np.log([[0.25, 0.75]]), transitions)
    found = solve(mdp, beta=0.5)
    total = 0.25 + 0.75 * np.e**2
    np.testing.assert_allclose(found.state_values, 0.5 * np.log(total), rtol=1e-15)
    np.testing.assert_allclose(np.exp(found.policy_logps), [[0.25 / total, 1 - 0.25 / total]])


def test_two_tokens_by_hand():
    # beta = 1, no reward but 3 for (1, 1): V((1,)) = log(1/2 + e^3 / 2), V(()) = log of
    # pi_ref's mean of exp(return) = 3/4 + e^3 / 4
    _, transitions = prefix_tree(num_tokens=2, horizon=2)
    mdp = TokenMDP(np.array([[0.0, 0.0], [0.0, 3.0]]), np.log(np.full((2, 2), 0.5)), transitions)
    expected = [np.log(3 / 4 + np.e**3 / 4), np.log(1 / 2 + np.e**3 / 2)]
    np.testing.assert_allclose(solve(mdp, beta=1.0).state_values, expected, rtol=1e-15)


@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize("kinds", [{}, {"state_of": lambda p: tuple(sorted(p))}, DRAWN])
def test_values_are_those_of_the_recursive_twin(kinds, beta):
    _, transitions = prefix_tree(**{"num_tokens": 3, "horizon": 4} | kinds)
    mdp = random_mdp(transitions, seed=1)
    found = solve(mdp, beta=beta)
    expected = [slow_values(mdp, beta, state) for state in range(len(mdp.rewards))]
    np.testing.assert_allclose(found.state_values, expected, atol=EXACT)
    np.testing.assert_allclose(np.exp(found.policy_logps).sum(axis=-1), 1.0, atol=EXACT)


def test_the_optimum_tilts_the_reference_over_whole_responses():
    """pi*(y) ~ pi_ref(y) exp(return / beta), with V*(s_0) / beta the log of its normaliser."""
    _, transitions = prefix_tree(num_tokens=3, horizon=4)
    mdp, beta = random_mdp(transitions, seed=2), 0.3
    found, responses = solve(mdp, beta=beta), walks(transitions, max_length=4).responses()
    tilted = responses.sums(mdp.reference_logps) + responses.sums(mdp.rewards) / beta
    normaliser = np.logaddexp.reduce(tilted)
    np.testing.assert_allclose(found.state_values[0] / beta, normaliser, atol=EXACT)
    np.testing.assert_allclose(responses.sums(found.policy_logps), tilted - normaliser, atol=EXACT)


def test_shaping_moves_q_by_the_potential_and_nothing_else():
    _, transitions = prefix_tree(**DRAWN)
    mdp = random_mdp(transitions, seed=3)
    potential = np.random.default_rng(0).normal(size=len(mdp.rewards))
    before, after = solve(mdp, beta=0.2), solve(shaped(mdp, potential), beta=0.2)
    np.testing.assert_allclose(after.q_values, before.q_values - potential[:, None], atol=EXACT)
    np.testing.assert_allclose(after.policy_logps, before.policy_logps, atol=EXACT)


def test_rewards_are_read_back_from_their_q():
    _, transitions = prefix_tree(**DRAWN)
    mdp = random_mdp(transitions, seed=4)
    found = rewards_of(mdp, solve(mdp, beta=0.2).q_values, beta=0.2)
    np.testing.assert_allclose(found.rewards, mdp.rewards, atol=EXACT)


def test_a_value_at_the_end_would_be_noticed(monkeypatch):
    """Mutation: V' is 1 after the last token instead of 0."""
    _, transitions = prefix_tree(num_tokens=3, horizon=3)
    mdp = random_mdp(transitions, seed=1)
    expected = slow_values(mdp, 0.5, 0)
    assert solve(mdp, beta=0.5).state_values[0] == pytest.approx(expected, abs=EXACT)
    wrong = lambda mdp, values: mdp.transitions @ np.append(values, 1.0)
    monkeypatch.setattr(token_mdp, "_following", wrong)
    assert abs(solve(mdp, beta=0.5).state_values[0] - expected) > 0.9


def loop(reward):
    """One state: token 0 ends, token 1 comes back to it for a reward."""
    transitions = np.array([[[0.0, 1.0], [1.0, 0.0]]])
    return TokenMDP(np.array([[0.0, reward]]), np.log([[0.5, 0.5]]), transitions)


def test_a_loop_has_values_while_it_earns_less_than_leaving():
    # u = exp(V / beta) = 1/2 + 1/2 e^(r / beta) u: finite if and only if e^(r / beta) < 2
    beta = 0.5
    for reward in (-1.0, 0.0, 0.3):
        u = 0.5 / (1 - 0.5 * np.exp(reward / beta))
        found = solve(loop(reward), beta=beta).state_values[0]
        assert found == pytest.approx(beta * np.log(u), abs=EXACT)
    for reward in (beta * np.log(2.0), 0.4, 5.0):
        with pytest.raises(InputError, match="no finite values after 1000 sweeps; a loop"):
            solve(loop(reward), beta=beta, max_sweeps=1000)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_a_loop_may_have_values_of_zero(beta):
    """Any pi is optimal for beta log pi/pi_ref, with V = 0 in every state; states are the last
    tokens of five, and token 0 ends."""
    transitions = np.zeros((5, 5, 6))
    transitions[:, range(5), [5, 1, 2, 3, 4]] = 1.0
    for seed in range(20):
        mdp = random_mdp(transitions, seed)
        policy = np.log(np.random.default_rng(seed).dirichlet(np.full(5, 2.0), size=5))
        rewards = beta * (policy - mdp.reference_logps)
        found = solve(mdp._replace(rewards=rewards), beta=beta)
        np.testing.assert_allclose(found.state_values, 0.0, atol=EXACT)
        np.testing.assert_allclose(found.policy_logps, policy, atol=EXACT)


def test_walks_are_every_beginning_once():
    _, transitions = prefix_tree(num_tokens=3, horizon=2)
    found = walks(transitions, max_length=2)
    assert found.tokens == [(0,), (1,), (2,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert found.ends.tolist() == [3, 1, 2, 3, 3, 3, 3, 3, 3]
    assert found.responses().tokens == [(0,), *found.tokens[3:]]
    assert found.visits.sum(axis=(1, 2)).tolist() == [1.0] * 3 + [2.0] * 6
    assert found.chances.tolist() == [1.0] * 9


@pytest.mark.parametrize("kinds", [{}, {"state_of": lambda p: tuple(sorted(p))}, DRAWN])
def test_responses_have_probability_one_together(kinds):
    _, transitions = prefix_tree(**{"num_tokens": 3, "horizon": 3} | kinds)
    responses = walks(transitions, max_length=3).responses()
    logps = responses.sums(random_mdp(transitions, seed=0).reference_logps)
    assert (np.exp(logps) * responses.chances).sum() == pytest.approx(1.0, abs=EXACT)


def test_a_walk_through_a_loop_counts_its_visits():
    found = walks(loop(0.0).transitions, max_length=3)
    assert found.tokens == [(0,), (1,), (1, 0), (1, 1), (1, 1, 0), (1, 1, 1)]
    assert found.visits[:, 0].tolist() == [[1, 0], [0, 1], [1, 1], [0, 2], [1, 2], [0, 3]]


def test_preferences_are_logistic_and_sum_to_one():
    returns = np.array([0.0, 1.0, -800.0])
    found = preferences(returns)
    np.testing.assert_allclose(found + found.T, 1.0, rtol=1e-15)
    assert found[1, 0] == pytest.approx(1 / (1 + np.exp(-1.0)), rel=1e-15)
    assert found[2, 0] == 0.0  # and no overflow
