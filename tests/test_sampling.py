"""Sampling: the distribution that is drawn from, the draws, and their keys."""

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_cases import Case, lm
from table_model import TableModel, table_logps

from jaxdpo.decoding import LM, Constraints, Warp, beam_search, greedy, sample
from jaxdpo.decoding.sample import drawn
from jaxdpo.decoding.top_k import top_k

pytestmark = pytest.mark.usefixtures("quick_compile")

CASE = Case(2, 97, (3,), 1.0, 1, 12, 0.0, False)
CONSTRAINTS = Constraints(12, (3,))
KEY = jax.random.key(3)


def tokens(found):
    return [[h.tokens.tolist() for h in hypotheses] for hypotheses in found]


def ragged_logps(seed=0, shape=(2, 3, 97), ties=False):
    logits = np.random.default_rng(seed).normal(size=shape) * 3
    logits = np.round(logits) if ties else logits
    return jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("shape, k", (((3, 4000), 24), ((2, 3, 1000), 3), ((500,), 7), ((40,), 9)))
def test_top_k_is_laxs_ties_included(shape, k, ties):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    x = jnp.asarray(np.round(x * 4) / 4 if ties else x)
    mine, plain = top_k(x, k), jax.lax.top_k(x, k)
    np.testing.assert_array_equal(mine[0], plain[0])
    np.testing.assert_array_equal(mine[1], plain[1])


def slow_warp(logps, temperature, k, p, keep):
    """One distribution, by sorting; ties of the last kept value are kept."""
    x = logps / np.float32(temperature)
    order = np.argsort(-x, kind="stable")
    if k is not None:
        x = np.where(x >= x[order[max(k, keep) - 1]], x, -np.inf)
    if p is not None:
        weights = np.exp(x.astype(np.float64))
        share = weights[order] / weights.sum()
        before = np.cumsum(share) - share
        kept = order[(before < p) | (np.arange(len(x)) < keep)]
        x = np.where(x >= x[kept].min(), x, -np.inf)
    return x


WARPS = [(1.0, None, None), (0.7, 5, None), (1.0, None, 0.8), (1.3, 20, 0.9), (0.5, 1, 0.3)]


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("keep", (1, 3))
@pytest.mark.parametrize("temperature, k, p", WARPS)
def test_the_warp_is_the_slow_twins(temperature, k, p, keep, ties):
    logps = ragged_logps(ties=ties)
    mine = jax.jit(lambda warp, x: warp(x, keep=keep))(Warp(temperature, k, p), logps)
    for x, y in zip(np.asarray(logps).reshape(-1, 97), mine.reshape(-1, 97), strict=True):
        expected = slow_warp(x, temperature, k, p, keep)
        np.testing.assert_array_equal(np.isfinite(y), np.isfinite(expected))
        np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("temperature, k, p", WARPS)
def test_the_warp_is_that_of_transformers(temperature, k, p):
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logps = ragged_logps()
    x = torch.tensor(np.array(logps).reshape(-1, 97))
    x = TemperatureLogitsWarper(temperature)(None, x)
    x = x if k is None else TopKLogitsWarper(k)(None, x)
    x = x if p is None else TopPLogitsWarper(p)(None, x)
    mine = Warp(temperature, k, p)(logps).reshape(-1, 97)
    np.testing.assert_allclose(mine, x.numpy(), rtol=1e-6)


def test_draws_follow_the_distribution():
    # 300 tokens over three blocks, some of weight zero; 40000 draws
    weights = np.random.default_rng(0).gamma(0.3, size=300)
    weights[::7] = 0
    logps = jnp.log(jnp.asarray(weights, jnp.float32))[None, None]
    keys = jax.random.split(KEY, (1, 40_000))
    found = np.asarray(drawn(keys, jnp.broadcast_to(logps, (1, 40_000, 300))))[0]
    counts = np.bincount(found, minlength=300)
    assert counts[weights == 0].sum() == 0
    expected = 40_000 * weights / weights.sum()
    many = expected > 5
    chi_square = ((counts - expected)[many] ** 2 / expected[many]).sum()
    degrees = many.sum() - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)  # four standard deviations


@pytest.mark.parametrize("uniform", (0.0, 0.5, 1.0 - 2**-24))
def test_no_number_draws_a_token_of_weight_zero(uniform, monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.float32(uniform))
    logps = np.full((1, 1, 384), -np.inf, np.float32)
    logps[0, 0, [5, 200, 301]] = [0.0, -20.0, 1.0]
    found = drawn(jax.random.split(KEY, (1, 1)), jnp.asarray(logps))
    assert int(found[0, 0]) in (5, 200, 301)


def test_samples_have_the_probability_of_the_sequence():
    vocab_size, table = 4, np.random.default_rng(2).normal(size=(4, 4)).astype(np.float32)
    scorer, constraints = LM(TableModel(vocab_size), jnp.asarray(table)), Constraints(3, (0,))
    [found] = sample(scorer, [[2]], constraints, key=KEY, num_samples=20_000)
    counts = Counter(tuple(h.tokens.tolist()) for h in found)
    every = [
        text[: text.index(0) + 1] if 0 in text else text
        for text in itertools.product(range(vocab_size), repeat=3)
    ]
    every = sorted(set(every))
    logps = np.array([table_logps(table, [2], text).sum() for text in every])
    expected = 20_000 * np.exp(logps)
    assert np.isclose(expected.sum(), 20_000)
    chi_square = sum((counts[t] - e) ** 2 / e for t, e in zip(every, expected, strict=True))
    assert chi_square < len(every) + 4 * np.sqrt(2 * len(every))
    for h in found[:50]:
        text = tuple(h.tokens.tolist())
        np.testing.assert_allclose(h.logps, table_logps(table, [2], text), rtol=1e-5)
        np.testing.assert_allclose(h.score, h.logps.sum(), rtol=1e-5)
        assert h.ended == (text[-1] == 0)


def test_a_draw_depends_on_its_prompts_number_and_nothing_else():
    prompts = CASE.prompts
    alone = [
        sample(lm(CASE), prompts[: i + 1], CONSTRAINTS, key=KEY, num_samples=3, batch_size=1)[i]
        for i in range(len(prompts))
    ]
    together = sample(lm(CASE), prompts, CONSTRAINTS, key=KEY, num_samples=3, batch_size=4)
    assert tokens(alone) == tokens(together)
    more = sample(lm(CASE), prompts, CONSTRAINTS, key=KEY, num_samples=5, segment=2)
    assert [t[:3] for t in tokens(more)] == tokens(together)  # sample j is drawn by key j
    other = sample(lm(CASE), prompts, CONSTRAINTS, key=jax.random.key(4), num_samples=3)
    assert tokens(other) != tokens(together)
    each = [text for texts in tokens(together) for text in texts]
    assert len({tuple(text) for text in each}) > len(each) // 2


def test_reported_log_probabilities_are_the_policys_whatever_the_warp():
    warp = Warp(temperature=0.3, top_k=4)
    found = sample(lm(CASE), CASE.prompts, CONSTRAINTS, key=KEY, num_samples=2, warp=warp)
    best = beam_search(lm(CASE), CASE.prompts, CONSTRAINTS, beam_size=4)
    for hypotheses, [top, *_] in zip(found, best, strict=True):
        for h in hypotheses:
            assert h.score < 0 and len(h.logps) == len(h.tokens)
            if h.tokens.tolist() == top.tokens.tolist():
                np.testing.assert_allclose(h.logps, top.logps, atol=1e-5)
    cold = sample(lm(CASE), CASE.prompts, CONSTRAINTS, key=KEY, warp=Warp(temperature=1e-3))
    assert [t for [t] in tokens(cold)] == [
        h.tokens.tolist() for h in greedy(lm(CASE), CASE.prompts, CONSTRAINTS)
    ]
