"""Beam search: transformers' answers, brute force, slow twins, identities."""

import inspect
import itertools
import textwrap
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_cases import Case, answers, cases, lm, logits_after, total_cases
from slow_beams import beams
from table_model import TableModel, table_logps

from jaxdpo import InputError
from jaxdpo.decoding import (
    LM,
    Constraints,
    Product,
    Warp,
    WithReference,
    beam_search,
    greedy,
    loop,
)
from jaxdpo.decoding import beam as beam_module

pytestmark = pytest.mark.usefixtures("quick_compile")
CASE = Case(2, 97, (3,), 3.0, 4, 12, 1.0, False)


def found(case, scorer=None, **more):
    constraints = Constraints(
        case.max_new_tokens,
        case.eos_ids,
        case.min_new_tokens,
        no_repeat_ngram=case.no_repeat_ngram,
    )
    return beam_search(
        scorer or lm(case),
        case.prompts,
        constraints,
        beam_size=case.beam_size,
        length_penalty=case.length_penalty,
        early_stopping=case.early_stopping,
        length_norm=case.length_norm,
        batch_size=4,
        **more,
    )


def differing(case, stored, **more):
    """How many hypotheses have other tokens than the stored ones; scores are asserted."""
    wrong = 0
    for mine, theirs in zip(found(case, **more), stored, strict=True):
        same = [m.tolist() == t for m, (t, _) in zip([h.tokens for h in mine], theirs, strict=True)]
        wrong += same.count(False)
        if all(same):
            scores = [h.score for h in mine], [score for _, score in theirs]
            np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-5)
            ended = [h.tokens[-1] in case.eos_ids for h in mine]
            assert [h.ended for h in mine] == ended
    return wrong


GENERATED = list(zip(cases(), answers()["generated"], strict=True))
TOTAL = list(zip(total_cases(), answers()["total"], strict=True))
PROGRAMS = list(itertools.product((2, 3, 5, 10, 20), (False, True, "never")))


@pytest.mark.parametrize("beam_size, early_stopping", PROGRAMS)
def test_beams_are_those_of_transformers(beam_size, early_stopping):
    # In segments of eight steps caches are compacted twice on the way.
    segment = 8 if early_stopping == "never" and beam_size in (3, 20) else None
    for case, stored in GENERATED:
        if (case.beam_size, case.early_stopping) == (beam_size, early_stopping):
            assert differing(case, stored, segment=segment) == 0


@pytest.mark.parametrize("beam_size, early_stopping", PROGRAMS[::2])
def test_total_lengths_are_those_of_transformers_4_29_2(beam_size, early_stopping):
    for case, stored in TOTAL:
        if (case.beam_size, case.early_stopping) == (beam_size, early_stopping):
            assert differing(case, stored) == 0


def test_the_stored_answers_are_many_and_end_early():
    lengths = Counter()
    for case, stored in GENERATED:
        for tokens, _ in itertools.chain.from_iterable(stored):
            lengths[len(tokens) < case.max_new_tokens, tokens[-1] in case.eos_ids] += 1
    assert lengths.total() >= 500
    assert lengths[True, True] > 0.4 * lengths.total() and lengths[False, False] > 100
    first = lambda answers: [[prompt[0][0] for prompt in stored] for _, stored in answers]
    assert first(GENERATED) != first(TOTAL)


# Each is a mistake that some library makes, with the stopping mode whose answers notice it.
MUTATIONS = {
    "an end ranked below the beams enters": (
        False,
        "(jnp.arange(scores.shape[1]) < self.size)",
        "(jnp.arange(scores.shape[1]) < 99)",
    ),
    "the end token is no part of the length": (
        False,
        "length = new.lengths\n",
        "length = new.lengths - new.ended\n",
    ),
    "as many candidates as beams": (
        False,
        "else max(2, 1 + len(constraints.eos_ids)) * size",
        "else size",
    ),
    "never is bounded by the present length": (
        "never",
        'if self.early_stopping == "never":',
        "if False:",
    ),
    "a closed prompt takes more": (False, "enters &= state.open[:, None]", "pass"),
    "a full prompt goes on": (True, "return closed | full if self", "return closed if self"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_rule_fails_the_comparison(name, monkeypatch):
    early_stopping, right, wrong = MUTATIONS[name]
    targets = ("_num_candidates", "Beams.advance", "Beams._merged", "Beams._closed")
    mutate(monkeypatch, targets, right, wrong)
    jax.clear_caches()
    group = [a for a in GENERATED if a[0].early_stopping == early_stopping and a[0].beam_size < 5]
    group = group[:4] if early_stopping == "never" else group[4:]  # two beams, three beams
    try:
        assert sum(differing(case, stored) for case, stored in group) > 0
    except AssertionError as error:
        assert "Not equal to tolerance" in str(error)  # the tokens are right, the scores wrong
    finally:
        jax.clear_caches()


def mutate(monkeypatch, targets, right, wrong):
    """Replace a text in the source of the one of the functions that has it."""
    for target in targets:
        owner = beam_module
        *path, name = target.split(".")
        for part in path:
            owner = getattr(owner, part)
        source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
        if right in source:
            scope = dict(vars(beam_module))
            exec(source.replace(right, wrong), scope)
            monkeypatch.setattr(owner, name, scope[name])
            return
    pytest.fail(f"{right!r} stands in none of {targets}")


# --- identities and slow twins -----------------------------------------------------------


def test_one_beam_is_greedy_decoding():
    case = CASE._replace(beam_size=1, eos_bias=0.5, length_penalty=2.0)
    constraints = Constraints(case.max_new_tokens, case.eos_ids)
    expected = greedy(lm(case), case.prompts, constraints)
    assert any(h.ended for h in expected) and not all(h.ended for h in expected)
    for norm in ("generated", "total"):
        for [mine], plain in zip(found(case._replace(length_norm=norm)), expected, strict=True):
            assert mine.tokens.tolist() == plain.tokens.tolist()
            assert mine.ended == plain.ended
    for prompt, plain in zip(case.prompts, expected, strict=True):
        text = []
        for token in plain.tokens:
            assert token == logits_after(case, prompt)([text])[0].argmax()
            text.append(int(token))


@pytest.mark.parametrize("penalty", (0.0, 1.0, -0.5))
def test_beams_as_many_as_the_space_find_what_enumeration_finds(penalty):
    vocab_size, prompt = 12, [5]
    table = np.random.default_rng(0).normal(size=(vocab_size, vocab_size)).astype(np.float32)
    scorer = LM(TableModel(vocab_size), jnp.asarray(table))
    [mine] = beam_search(
        scorer,
        [prompt],
        Constraints(2, (0,)),
        beam_size=vocab_size,
        length_penalty=penalty,
        early_stopping="never",
    )
    every = [(0,), *((a, b) for a in range(1, vocab_size) for b in range(vocab_size))]
    score = lambda text: table_logps(table, prompt, text).sum() / len(text) ** penalty
    expected = sorted(every, key=score, reverse=True)[:vocab_size]
    assert [tuple(h.tokens.tolist()) for h in mine] == expected
    np.testing.assert_allclose([h.score for h in mine], [*map(score, expected)], rtol=1e-5)


@pytest.mark.parametrize("length_norm", ("generated", "total"))
def test_the_score_is_the_sum_over_the_length_to_the_penalty(length_norm):
    case = CASE._replace(length_penalty=1.7, eos_bias=4.0, length_norm=length_norm)
    for prompt, mine in zip(case.prompts, found(case), strict=True):
        assert [h.score for h in mine] == sorted((h.score for h in mine), reverse=True)
        for h in mine:
            length = len(h.tokens)
            if length_norm == "total":
                length += len(prompt) - h.ended
            np.testing.assert_allclose(h.score, h.logps.sum() / length**1.7, rtol=1e-5)


def test_log_probabilities_are_those_of_the_model_given_the_text():
    # 1e-5: rounding of a float32 softmax over 97 logits, summed in another order
    for prompt, mine in zip(CASE.prompts, found(CASE, segment=3), strict=True):
        for h in mine:
            text = h.tokens.tolist()
            logits = logits_after(CASE, prompt)([text[:i] for i in range(len(text))])
            logps = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(text)), text]
            np.testing.assert_allclose(h.logps, logps, atol=1e-5)


THREE = [CASE._replace(seed=seed, eos_bias=bias) for seed, bias in ((1, 2.0), (2, 3.0), (3, 1.0))]
EXPONENTS = (1.0, 0.7, -0.7)


@pytest.mark.parametrize("normalised", ("token", "sequence"))
def test_a_product_of_three_models_is_what_the_slow_twin_finds(normalised):
    exponents = jnp.array(EXPONENTS, jnp.float32)
    scorer = Product(tuple(lm(case) for case in THREE), exponents, normalised)
    prompts = list(zip(*(case.prompts for case in THREE), strict=True))  # one for each model
    mine = beam_search(
        scorer, prompts, Constraints(8, (3,)), beam_size=4, length_penalty=0.5, segment=3
    )
    for prompt, hypotheses in zip(prompts, mine, strict=True):
        given = [logits_after(*each) for each in zip(THREE, prompt, strict=True)]

        def parts(texts, given=given):
            return [np.asarray(jax.nn.log_softmax(logits(texts))) for logits in given]

        def logps(texts, parts=parts):
            total = sum(w * part for w, part in zip(EXPONENTS, parts(texts), strict=True))
            return np.asarray(jax.nn.log_softmax(total)) if normalised == "token" else total

        expected = beams(logps, 4, 8, (3,), 0.5)
        assert [h.tokens.tolist() for h in hypotheses] == [text for text, _ in expected]
        scores = [h.score for h in hypotheses], [score for _, score in expected]
        np.testing.assert_allclose(*scores, rtol=2e-5)
        text = hypotheses[0].tokens.tolist()
        for i, part in enumerate(parts([text[:j] for j in range(len(text))])):
            reported = hypotheses[0].parts[f"model_{i}"]
            np.testing.assert_allclose(reported, part[np.arange(len(text)), text], atol=1e-5)


def test_the_two_normalisations_of_a_product_differ():
    both = []
    for normalised in ("token", "sequence"):
        scorer = Product(tuple(map(lm, THREE)), jnp.array(EXPONENTS), normalised)
        mine = beam_search(scorer, CASE.prompts, Constraints(8, (3,)), beam_size=4)
        both.append([h.tokens.tolist() for hypotheses in mine for h in hypotheses])
    assert both[0] != both[1]


def test_a_sweep_over_exponents_compiles_once():
    before = None
    for guidance in (0.1, 0.5, 2.0):
        scorer = Product(tuple(map(lm, THREE)), jnp.array([1.0, guidance, -guidance]))
        beam_search(scorer, CASE.prompts, Constraints(8, (3,)), beam_size=4)
        before = before or loop.segment._cache_size()
    assert loop.segment._cache_size() == before


def test_a_reference_gives_the_implicit_reward_and_changes_no_search():
    policy, reference = CASE, CASE._replace(seed=5)
    mine = found(CASE, WithReference(lm(policy), lm(reference)))
    for prompt, hypotheses, plain in zip(CASE.prompts, mine, found(CASE), strict=True):
        for h, p in zip(hypotheses, plain, strict=True):
            assert h.tokens.tolist() == p.tokens.tolist()
            text = h.tokens.tolist()
            texts, at = [text[:i] for i in range(len(text))], (np.arange(len(text)), text)
            ratio = [
                np.asarray(jax.nn.log_softmax(logits_after(case, prompt)(texts)))[at]
                for case in (policy, reference)
            ]
            expected = 0.3 * (ratio[0] - ratio[1])
            np.testing.assert_allclose(h.implicit_rewards(0.3), expected, atol=1e-5)
    with pytest.raises(InputError, match="WithReference"):
        found(CASE)[0][0].implicit_rewards(0.1)


def test_beam_sampling_is_the_slow_twin_with_the_same_noise():
    case, warp = CASE._replace(beam_size=3, eos_bias=1.0), Warp(temperature=0.7, top_k=20)
    key = jax.random.key(7)
    mine = found(case, warp=warp, key=key)
    for number, (prompt, hypotheses) in enumerate(zip(case.prompts, mine, strict=True)):
        own = jax.random.fold_in(key, number)
        logits = logits_after(case, prompt)

        def cut_off(_, given, step):
            given = given / np.float32(0.7)
            return np.where(given >= np.sort(given)[:, -20:-19], given, -np.inf)

        def draw(totals, count, step, own=own):
            noise = jax.random.gumbel(jax.random.fold_in(own, step), totals.shape)
            return np.argsort(-(totals + np.asarray(noise)), kind="stable")[:count]

        logps = lambda texts, logits=logits: np.asarray(jax.nn.log_softmax(logits(texts)))
        expected = beams(logps, 3, case.max_new_tokens, case.eos_ids, rules=[cut_off], draw=draw)
        assert [h.tokens.tolist() for h in hypotheses] == [text for text, _ in expected]
        scores = [h.score for h in hypotheses], [score for _, score in expected]
        np.testing.assert_allclose(*scores, rtol=1e-5)
    other = found(case, warp=warp, key=jax.random.key(8))
    assert [h[0].tokens.tolist() for h in other] != [h[0].tokens.tolist() for h in mine]


def test_padded_ids_are_never_chosen():
    # 60 tokens are real; each prompt's most probable continuations go through the others
    most = [max(max(h.tokens) for h in hypotheses) for hypotheses in found(CASE)]
    assert max(most) >= 60
    constraints = Constraints(CASE.max_new_tokens, CASE.eos_ids, num_tokens=60)
    prompts = [[token % 60 for token in prompt] for prompt in CASE.prompts]
    for hypotheses in beam_search(lm(CASE), prompts, constraints, beam_size=4):
        for h in hypotheses:
            assert max(h.tokens) < 60


def test_no_ngram_of_the_prompt_or_text_is_repeated():
    prompts = [[9, 9, 9, 9], [10, 11, 10, 11, 10]]
    constraints = Constraints(20, (), no_repeat_ngram=2)
    for prompt, [h, *_] in zip(
        prompts, beam_search(lm(CASE), prompts, constraints, beam_size=3), strict=True
    ):
        text = [*prompt, *h.tokens.tolist()]
        new = list(itertools.pairwise(text))[len(prompt) - 1 :]
        assert not set(new) & set(itertools.pairwise(prompt))
        assert len(set(new)) == len(new)
