"""The theory's table, row by row, with mutations that a row must notice; and the learning claim."""

import importlib
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from jaxdpo import InputError, token_mdp
from jaxdpo.token_mdp import prefix_tree, random_mdp, solve

sys.path.append(str(Path(__file__).parents[1] / "examples"))
theory, learning = map(importlib.import_module, ("theory", "learning"))


@pytest.fixture(scope="module")
def rows():
    return list(theory.rows())


@pytest.fixture(scope="module")
def learnt():
    return learning.learning(num_draws=6)


@pytest.fixture(scope="module")
def case():
    _, transitions = prefix_tree(theory.NUM_TOKENS, theory.HORIZON)
    return theory.case(random_mdp(transitions, seed=7), 0.3)


def test_every_row_is_as_it_must_be(rows):
    assert not [row for row in rows if not row.as_it_must_be]
    for words in ("Lemma 1", "Theorem 1", "Definition 1", "Eq. 8/9", "Eq. 12", "Eq. 14", "Eq. 16"):
        assert any(row.holds and row.claim.startswith(words) for row in rows), words


def test_only_float32_is_given_more_than_1e_10(rows):
    assert all(row.bound <= 1e-10 or "float32" in row.where for row in rows if row.holds)


def test_a_row_is_as_it_must_be_only_with_a_number_on_its_side_of_the_bound():
    nan, where = float("nan"), "nowhere"
    assert theory.Row("holds", where, 1e-12).as_it_must_be
    assert theory.failing("fails", where, 0.5).as_it_must_be
    for error in (nan, float("inf"), 0.5):
        assert not theory.Row("holds", where, error).as_it_must_be
    for error in (nan, float("inf"), 1e-9, -0.5):  # 1e-9: above EXACT, and still no failure
        assert not theory.failing("fails", where, error).as_it_must_be
    assert np.isnan(theory.worst([1e-16, nan, 1e-16]))
    assert np.isnan(theory.gap([0.0, nan, 0.0], 0.0))


def test_what_fails_fails_by_a_size_worth_naming(rows):
    sizes = {(row.claim, row.where): row.error for row in rows if not row.holds}
    assert len(sizes) == 13 and min(sizes.values()) > 0.03, sizes
    broken = "order of tokens forgotten", "loops", "stochastic dynamics"
    assert all(any(where.startswith(b) for _, where in sizes) for b in broken)


@pytest.mark.parametrize("error", [error for _, error in theory.HOLDS], ids=lambda e: e.__name__)
def test_a_claim_holds_on_another_tree(case, error):
    assert error(case) < 1e-10


def test_rewards_of_responses_have_as_many_dimensions_as_policies_of_a_tree(case):
    """The count behind Theorem 1, which merged states lose."""
    num_states, num_tokens = case.mdp.rewards.shape
    assert len(case.responses.tokens) - 1 == num_states * (num_tokens - 1)


def without_the_zero_at_the_end(monkeypatch):
    wrong = lambda mdp, values: mdp.transitions @ np.append(values, 1.0)
    monkeypatch.setattr(token_mdp, "_following", wrong)


def without_the_reference(monkeypatch):
    plain = lambda mdp, *args, **kwargs: solve(
        mdp._replace(reference_logps=0 * mdp.reference_logps), *args, **kwargs
    )
    monkeypatch.setattr(theory, "solve", plain)


def with_a_potential_at_the_end(monkeypatch):
    def wrong(mdp, potential):
        following = mdp.transitions @ np.append(potential, 1.0)
        return mdp._replace(rewards=mdp.rewards + following - potential[:, None])

    monkeypatch.setattr(theory, "shaped", wrong)


def with_the_printed_sign(monkeypatch):
    right = theory.eq_13
    monkeypatch.setattr(theory, "eq_13", lambda c, walks: right(c, walks, sign=-1.0))


def with_rewards_that_forget_the_next_value(monkeypatch):
    def wrong(mdp, q_values, *, beta):
        return mdp._replace(rewards=q_values - beta * mdp.reference_logps)

    monkeypatch.setattr(theory, "rewards_of", wrong)


def with_another_policy(monkeypatch):
    def wrong(mdp, *, beta):
        right = solve(mdp, beta=beta)
        z = np.random.default_rng(9).normal(size=right.policy_logps.shape)
        return right._replace(policy_logps=learning.log_softmax(z))

    monkeypatch.setattr(theory, "solve", wrong)


def with_a_policy_that_is_not_normalised(monkeypatch):
    def wrong(mdp, *, beta):
        right = solve(mdp, beta=beta)
        return right._replace(policy_logps=right.q_values / beta)

    monkeypatch.setattr(theory, "solve", wrong)


MUTATIONS = [
    (without_the_zero_at_the_end, theory.return_telescopes),
    (without_the_zero_at_the_end, theory.representative),
    (without_the_zero_at_the_end, theory.shaping),
    (without_the_zero_at_the_end, theory.value_search_is_likelihood_search),
    (without_the_reference, theory.return_telescopes),
    (without_the_reference, theory.any_policy_is_optimal),
    (without_the_reference, theory.any_reward_of_responses),
    (without_the_reference, theory.proxy_tuning),
    (with_a_potential_at_the_end, theory.shaping),
    (with_a_potential_at_the_end, theory.representative),
    (with_the_printed_sign, theory.value_search_is_likelihood_search),
    (with_rewards_that_forget_the_next_value, theory.rewards_from_q),
    (with_rewards_that_forget_the_next_value, theory.q_from_rewards),
    (without_the_reference, theory.expected_advantage_is_minus_kl),
    (with_a_potential_at_the_end, theory.expected_advantage_is_minus_kl),
    (with_another_policy, theory.expected_advantage_is_minus_kl),
    (with_a_policy_that_is_not_normalised, theory.expected_advantage_is_minus_kl),
]


@pytest.mark.parametrize("mutation, error", MUTATIONS, ids=lambda f: f.__name__)
def test_a_mutation_is_noticed(case, monkeypatch, mutation, error):
    mutation(monkeypatch)
    case = theory.case(case.mdp, case.beta)
    assert error(case) > 1e-2


def test_value_beams_without_the_value_are_other_beams(case, monkeypatch):
    """Mutation: Eq. 12 without V* of the state that is reached."""
    expected = [tokens for tokens, _ in theory.likelihood_beams(case, 5)]
    assert [tokens for tokens, _ in theory.value_beams(case, 5)] == expected
    rewards = case.mdp.rewards + case.beta * case.mdp.reference_logps
    monkeypatch.setattr(theory, "eq_12", lambda c, walks: walks.sums(rewards))
    assert [tokens for tokens, _ in theory.value_beams(case, 5)] != expected


def test_loops_have_values_if_and_only_if_the_spectral_radius_is_below_one():
    finite, growing = 0, 0
    for seed in range(40):
        mdp, radius = theory.last_token_only(seed, beta=1.0)
        if radius < 0.95:
            finite += bool(np.isfinite(solve(mdp, beta=1.0).state_values).all())
        elif radius > 1.05:
            growing += 1
            with pytest.raises(InputError, match="no finite values"):
                solve(mdp, beta=1.0, max_sweeps=2000)
    assert finite > 3 and growing > 10


def test_dpo_reaches_the_optimum_as_fast_as_theory_expects(learnt):
    assert learnt.all_pairs < 1e-10
    # The mean of KL over seven sizes and six draws; one draw has a spread of about its mean.
    ratio = learnt.forward * learnt.pairs[:, None] / learnt.per_pair
    assert 0.6 < ratio.mean() < 1.6
    assert -1.2 < learnt.slope < -0.8
    # Near the optimum both directions are half the variance of the same error.
    np.testing.assert_allclose(learnt.forward[-1], learnt.backward[-1], rtol=0.05)


def test_learning_with_another_loss_does_not_get_there(monkeypatch):
    """Mutation: the margin without its reference."""
    mdp, responses = learning.known_reward()
    rewards, best = responses.sums(mdp.rewards), solve(mdp, beta=learning.BETA).policy_logps
    right = learning.losses.dpo_loss
    wrong = lambda chosen, rejected, *_, beta: right(
        chosen, rejected, 0 * chosen, 0 * rejected, beta=beta
    )
    monkeypatch.setattr(learning.losses, "dpo_loss", wrong)
    learning._trained.clear_cache()
    [found] = learning.dpo_optima(mdp, responses, rewards[None], beta=learning.BETA)
    learning._trained.clear_cache()
    assert np.abs(found - best).max() > 0.1


def test_divergences_by_hand():
    # One token of two: KL((1/2, 1/2) || (1/4, 3/4)) = log 2 - (log 3) / 2
    _, transitions = prefix_tree(num_tokens=2, horizon=1)
    responses = token_mdp.walks(transitions, max_length=1)
    best, found = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    [forward], [backward] = learning.divergences(responses, responses.sums(best), found[None])
    assert forward == pytest.approx(np.log(2) - np.log(3) / 2)
    assert backward == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5))


def test_the_script_prints_draws_and_says_whether_all_is_well(
    rows, learnt, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["theory.py", "--out", str(tmp_path / "theory")])
    monkeypatch.setattr(learning, "learning", lambda: learnt)
    monkeypatch.setattr(theory, "rows", lambda: rows)
    assert theory.main() == 0
    out = capsys.readouterr().out
    assert out.count("holds") == sum(row.holds for row in rows) + 2
    assert "MUST BE" not in out and "DPO on 1000 pairs" in out
    assert matplotlib.image.imread(tmp_path / "theory" / "learning.png").std() > 0.05
    diverged = learnt._replace(forward=np.ones_like(learnt.forward))
    monkeypatch.setattr(learning, "learning", lambda: diverged)
    assert theory.main() == 1
    monkeypatch.setattr(learning, "learning", lambda: learnt)
    for row in (theory.Row("1 = 2", "nowhere", 1.0), theory.failing("1 = 1", "nowhere", 1e-16)):
        monkeypatch.setattr(theory, "rows", lambda row=row: [row])
        assert theory.main() == 1
        assert "NOT AS IT MUST BE" in capsys.readouterr().out
