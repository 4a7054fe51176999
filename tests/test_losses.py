"""Losses by identity, by reference values in float64, and by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import SHARED

from jaxdpo.losses import dpo_loss, implicit_rewards, ipo_loss, sft_loss

# beta 0.1; sums of log-probabilities of four pairs, and their losses worked out in float64.
CHOSEN, REJECTED = [-12.5, -80.25, -3.0, -150.0], [-15.0, -60.5, -2.5, -149.0]
REFERENCE = [-13.0, -82.0, -2.0, -140.0], [-14.0, -61.5, -3.5, -152.0]
LOGPS = tuple(jnp.array(x) for x in (CHOSEN, REJECTED, *REFERENCE))
MARGINS = np.array([0.15, 0.075, -0.2, -1.3])  # beta times (chosen minus rejected log-ratios)


@pytest.fixture(params=[lambda f: f, jax.jit], ids=["plain", "jit"])
def jit(request):
    return request.param


def test_dpo_by_hand(jit):
    expected = np.log1p(np.exp(-MARGINS))
    np.testing.assert_allclose(jit(dpo_loss)(*LOGPS, beta=0.1), expected, rtol=1e-6)


def test_label_smoothing_mixes_the_two_labels(jit):
    plain, flipped = np.log1p(np.exp(-MARGINS)), np.log1p(np.exp(MARGINS))
    found = jit(dpo_loss)(*LOGPS, beta=0.1, label_smoothing=0.1)
    np.testing.assert_allclose(found, 0.9 * plain + 0.1 * flipped, rtol=1e-6)


def test_ipo_by_hand(jit):
    expected = (MARGINS / 0.1 - 5.0) ** 2
    np.testing.assert_allclose(jit(ipo_loss)(*LOGPS, beta=0.1), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "name, loss",
    [
        ("official dpo (eps=0) = TRL sigmoid", lambda *x: dpo_loss(*x, beta=0.1)),
        ("official dpo eps=0.1 (cDPO)", lambda *x: dpo_loss(*x, beta=0.1, label_smoothing=0.1)),
        ("official ipo (summed)", lambda *x: ipo_loss(*x, beta=0.1)),
    ],
    ids=["dpo", "cdpo", "ipo"],
)
def test_against_the_stored_reference_values(name, loss):
    path = SHARED / "oracles/dpo_loss_vectors.json"
    if not path.exists():
        pytest.skip("needs the stored loss vectors, which are not beside this checkout")
    vectors = json.loads(path.read_text())
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    # float32 against float64: 1e-6 of a loss, and sums near 150 carry 1e-5 into a margin.
    found = loss(*(jnp.array(vectors[name]) for name in names))
    np.testing.assert_allclose(found, vectors["losses"][name], rtol=3e-6)


def test_policy_equal_to_reference_is_log_2():
    same = (LOGPS[0], LOGPS[1], LOGPS[0], LOGPS[1])
    for smoothing in (0.0, 0.3):
        found = dpo_loss(*same, beta=0.7, label_smoothing=smoothing)
        np.testing.assert_allclose(found, np.log(2), rtol=1e-6)


def test_swapping_the_labels_mirrors_the_margin():
    swapped = (LOGPS[1], LOGPS[0], LOGPS[3], LOGPS[2])
    plain, mirrored = dpo_loss(*LOGPS, beta=0.1), dpo_loss(*swapped, beta=0.1)
    np.testing.assert_allclose(mirrored - plain, MARGINS, rtol=1e-5, atol=1e-6)


def test_a_constant_for_each_prompt_changes_nothing():
    shift = jnp.array([1.0, -2.0, 4.0, 8.0])  # exact in float32
    shifted = (LOGPS[0] + shift, LOGPS[1] + shift, LOGPS[2], LOGPS[3])
    np.testing.assert_array_equal(dpo_loss(*shifted, beta=0.1), dpo_loss(*LOGPS, beta=0.1))


def test_the_gradient_is_the_papers():
    """d loss / d log pi(y_w) = -beta sigmoid(-margin), and the opposite for y_l."""
    total = lambda c, r: dpo_loss(c, r, *LOGPS[2:], beta=0.1).sum()
    chosen, rejected = jax.grad(total, argnums=(0, 1))(*LOGPS[:2])
    expected = -0.1 / (1 + np.exp(MARGINS))
    np.testing.assert_allclose(chosen, expected, rtol=1e-6)
    np.testing.assert_allclose(rejected, -expected, rtol=1e-6)


def test_far_margins_stay_finite():
    far = tuple(jnp.array([x]) for x in (-1e5, 0.0, 0.0, 0.0))
    value, grad = jax.value_and_grad(lambda c: dpo_loss(c, *far[1:], beta=0.1).sum())(far[0])
    np.testing.assert_allclose([value, grad[0]], [1e4, -0.1], rtol=1e-6)


def test_implicit_rewards_and_sft():
    rewards = implicit_rewards(LOGPS[0], LOGPS[2], beta=0.1)
    np.testing.assert_allclose(rewards, [0.05, 0.175, -0.1, -1.0], rtol=1e-5)
    np.testing.assert_array_equal(sft_loss(LOGPS[0]), -LOGPS[0])


def test_one_program_for_every_beta():
    dpo_loss.clear_cache()
    for beta in (0.1, 0.2, 0.5):
        dpo_loss(*LOGPS, beta=beta)
    assert dpo_loss._cache_size() == 1
