"""Text in, text out: what the search says of the ids, and every mistake by its name."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speakers import MODEL, TEXTS, checkpoint, run, spoken

from jaxdpo import InputError, decoding, prompts, pythia, sharding
from jaxdpo.completions import METHODS, OPTIONS, completions, decoder, method, scoring
from jaxdpo.decoding import LM, Constraints
from jaxdpo.pythia_cache import decoding_params
from jaxdpo.tokens import load_tokenizer

ASKED = prompts.typed(TEXTS)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A policy and its reference, named as a user names them."""
    folder = tmp_path_factory.mktemp("models")
    return checkpoint(folder / "policy", seed=1), checkpoint(folder / "reference", seed=2)


@pytest.fixture(scope="module")
def tokenizer(names):
    return load_tokenizer(names[0])


@pytest.fixture(scope="module")
def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def load(mesh, *, method=None, max_new_tokens=9, **models):
    return decoder(scoring(**models), **method or {}, max_new_tokens=max_new_tokens, mesh=mesh)


def said(ready, asked=ASKED):
    found = dict(completions(ready, asked))
    return [found[place] for place in range(len(asked))]


def searched(search, tokenizer, mesh, seed=1, **options):
    """What `decoding` says to the same prompts; the vocabulary's 28 last rows are padding."""
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    limits = Constraints(9, eos_ids=(0,), num_tokens=tokenizer.get_vocab_size())
    lm = LM(*decoding_params(MODEL, spoken(seed), mesh))
    found = search(lm, ids, limits, mesh=mesh, **options)
    return [[one] if isinstance(one, decoding.Hypothesis) else one for one in found]


CASES = {
    "greedy": ({}, decoding.greedy, {}),
    "sample": (
        dict(num_samples=2, temperature=0.8, top_k=20, top_p=0.9, seed=5),
        decoding.sample,
        dict(num_samples=2, warp=decoding.Warp(0.8, 20, 0.9), key=jax.random.key(5)),
    ),
    "beam": (
        dict(beam_size=3, num_return=2, length_penalty=0.5, early_stopping="true"),
        decoding.beam_search,
        dict(beam_size=3, num_return=2, length_penalty=0.5, early_stopping=True),
    ),
    "beam_sample": (
        dict(beam_size=3, temperature=1.5, length_norm="total", seed=2),
        decoding.beam_search,
        dict(
            beam_size=3,
            num_return=1,
            warp=decoding.Warp(1.5),
            length_norm="total",
            key=jax.random.key(2),
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_text_is_the_searchs(names, tokenizer, one_device, name):
    options, search, same = CASES[name]
    texts = said(load(one_device, model=names[0], method=method(name, options)))
    expected = searched(search, tokenizer, one_device, **same)
    assert any(one.ended for each in expected for one in each)  # or the end is never met
    for ours, theirs in zip(texts, expected, strict=True):
        for one, hypothesis in zip(ours, theirs, strict=True):
            tokens = hypothesis.tokens.tolist()
            text = tokens[:-1] if hypothesis.ended else tokens
            assert one["tokens"] == tokens and one["ended"] == hypothesis.ended
            assert one["length"] == len(tokens)
            assert one["text"] == "".join(tokenizer.id_to_token(token) for token in text)
            np.testing.assert_allclose(one["token_logps"], hypothesis.logps, rtol=1e-5)
            assert one["logps"] == pytest.approx(sum(one["token_logps"]), rel=1e-6)
            assert one["score"] == pytest.approx(hypothesis.score, rel=1e-5)


@jax.jit
def all_logps(params, tokens):
    ones = jnp.ones_like(tokens)
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = pythia.Pythia(MODEL).apply({"params": params}, tokens, positions, ones, 0 * ones)
    return jax.nn.log_softmax(hidden @ params["unembedding"].T)[0]


def forward(seed, ids, start):
    """Each token's log-probability by the model as it is trained; what follows is not seen."""
    logps = all_logps(spoken(seed), jnp.array([ids + [0] * (32 - len(ids))]))
    return np.array([logps[at - 1, ids[at]] for at in range(start, len(ids))])


def test_implicit_rewards_are_beta_times_the_difference(names, tokenizer, one_device):
    ready = load(one_device, model=names[0], reference=names[1], beta=0.3)
    found = zip(TEXTS, said(ready), strict=True)
    text, (one,) = max(found, key=lambda each: each[1][0]["length"])
    assert one["length"] > 2
    prompt = tokenizer.encode(text).ids
    policy, reference = (forward(seed, prompt + one["tokens"], len(prompt)) for seed in (1, 2))
    np.testing.assert_allclose(one["token_logps"], policy, rtol=1e-4)
    np.testing.assert_allclose(one["parts"]["reference"], reference, rtol=1e-4)
    expected = 0.3 * (policy - reference)
    np.testing.assert_allclose(one["implicit_rewards"], expected, rtol=1e-3, atol=1e-4)
    assert one["implicit_reward"] == pytest.approx(expected.sum(), rel=1e-3)


def test_a_product_scores_by_its_exponents_each_model_with_its_own_prompt(names, one_device):
    """One model to the power of 1, the other of 0: the first decides, the second is reported."""
    product = [f"{names[0]}=1", f"{names[1]}=0"]
    two = [prompts.Prompt((text, TEXTS[2]), "here") for text in TEXTS]
    together = said(load(one_device, product=product), two)
    alone = said(load(one_device, model=names[0]))
    for (ours,), (theirs,) in zip(together, alone, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        np.testing.assert_allclose(ours["parts"]["model_0"], theirs["token_logps"], rtol=1e-4)
        second = load_tokenizer(names[1]).encode(TEXTS[2]).ids
        expected = forward(2, second + ours["tokens"], len(second))
        np.testing.assert_allclose(ours["parts"]["model_1"], expected, rtol=1e-4)


def test_a_stage_of_a_run_is_a_model(names, tokenizer, one_device, tmp_path):
    run(tmp_path / "r", {1: 0.1, 4: 0.2})
    for name, seed in ((f"{tmp_path}/r:dpo", 4), (f"{tmp_path}/r:dpo:best", 1)):
        (one,) = said(load(one_device, model=name))[0]
        [expected], *_ = searched(decoding.greedy, tokenizer, one_device, seed)
        assert one["tokens"] == expected.tokens.tolist()


def test_every_option_changes_what_its_method_is():
    """So that none is accepted and forgotten."""
    other = dict(
        num_samples=3, temperature=0.5, top_k=7, top_p=0.5, beam_size=7, length_penalty=0.1,
        early_stopping="never", length_norm="total",
    )  # fmt: skip
    assert set(other) | {"num_return", "seed"} == set(OPTIONS)  # these two are the decoder's
    for name, options in METHODS.items():
        for option in set(options) & other.keys():
            changed = method(name, {option: other[option]})["rule"]
            assert changed != method(name, {})["rule"], (name, option)
            fields = dataclasses.asdict(changed) | (dataclasses.asdict(changed)["warp"] or {})
            assert other[option] in fields.values(), (name, option)


MISTAKES = {
    "no model": (lambda: scoring(), "give either model, or product"),
    "two": (lambda: scoring(model="a", product=["b=1"]), "give either model, or product"),
    "normalised": (lambda: scoring(model="a", normalised="token"), "normalised: has no effect"),
    "beta": (lambda: scoring(model="a", beta=0.1), "beta: has no effect without reference"),
    "no beta": (lambda: scoring(model="a", reference="b"), "beta=None: with a reference"),
    "beta of 0": (lambda: scoring(model="a", reference="b", beta=0.0), "beta=0.0"),
    "no exponent": (lambda: scoring(product=["a"]), "'a' is not NAME=EXPONENT"),
    "no number": (lambda: scoring(product=["a=b"]), "'a=b' is not NAME=EXPONENT"),
    "not finite": (lambda: scoring(product=["a=nan"]), "'a=nan' is not NAME=EXPONENT"),
    "method": (lambda: method("mcts", {}), "method='mcts': is unknown; choose from greedy"),
    "temperature": (
        lambda: method("beam", {"temperature": 0.5}),
        "temperature: has no effect on beam, only on sample and beam_sample",
    ),
    "penalty": (lambda: method("greedy", {"length_penalty": 1.0}), "length_penalty: has no effect"),
    "seed": (lambda: method("greedy", {"seed": 0}), "seed: has no effect on greedy"),
    "samples": (lambda: method("beam_sample", {"num_samples": 2}), "num_samples: has no effect"),
    "unknown": (lambda: method("greedy", {"heat": 1}), "heat: .* only on no method at all"),
    "beta beyond float32": (
        lambda: scoring(model="a", reference="b", beta=1e300),
        "beta=1e[+]300: .* at most 1e[+]30",
    ),
    "beta that vanishes": (lambda: scoring(model="a", reference="b", beta=1e-300), "beta=1e-300"),
    "beyond float32": (lambda: scoring(product=["a=1e40"]), "'a=1e40' is not NAME=EXPONENT"),
    # None of these names a model that there is: it would be missed if one were loaded first.
    "num_return": (lambda: unloaded("beam", num_return=5), "num_return=5: .* 1 and the 4 that"),
    "cold": (lambda: unloaded("sample", temperature=0.0), "temperature=0.0"),
    "no beams": (lambda: unloaded("beam", beam_size=0), "beam_size=0"),
    "no samples": (lambda: unloaded("sample", num_samples=0), "num_samples=0"),
    "seed below 0": (lambda: unloaded("sample", seed=-1), "seed=-1: must be between 0"),
    "seed too large": (lambda: unloaded("sample", seed=2**64), "and 4294967295"),
    "no tokens": (lambda: unloaded("greedy", limits={"max_new_tokens": 0}), "max_new_tokens=0"),
    "no more tokens": (
        lambda: unloaded("greedy", limits={"max_new_tokens": 2, "min_new_tokens": 3}),
        "min_new_tokens=3",
    ),
}


def unloaded(name, limits=None, **options):
    return decoder(scoring(model="no"), **method(name, options), **limits or {"max_new_tokens": 9})


@pytest.mark.parametrize("make, said", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_request_refuses_what_is_wrong_or_without_effect(make, said):
    with pytest.raises(InputError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_prompt_that_cannot_be_decoded_is_named_by_file_and_line(names, one_device, tmp_path):
    ready = load(one_device, model=names[0])
    file = tmp_path / "asked.txt"
    for line, said in (
        (" I" * 60, "has 60 tokens; the model's 64 positions leave 55"),
        (" unheard", "the tokenizer cannot encode the text"),
    ):
        file.write_text(f" I live\n{line}\n")
        with pytest.raises(InputError, match=f"asked.txt line 2: {said}"):
            completions(ready, prompts.from_file(file))  # before anything is decoded


def test_a_batch_divides_over_the_mesh(names):
    asked = scoring(model=names[0])
    with pytest.raises(InputError, match="batch_size=3: .* 8 rows"):
        decoder(asked, max_new_tokens=9, batch_size=3)
    assert decoder(asked, max_new_tokens=9).search.batch_size == 8
    three = sharding.make_mesh(devices=jax.devices()[:3])
    assert decoder(asked, max_new_tokens=9, mesh=three).search.batch_size == 9


def test_what_does_not_fit_into_memory_is_refused_before_it_is_compiled(names, monkeypatch):
    share = load(None, model=names[0]).search.memory_limit  # of eight devices in one memory
    assert 0 < 8 * share <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 9 * share
    monkeypatch.setattr(os, "sysconf", lambda name: 2**10)
    with pytest.raises(InputError, match="decoding 4 prompts .* but the device has 0.00"):
        list(completions(load(None, model=names[0]), ASKED))


def test_weights_that_are_broken_are_not_written_as_numbers(names, one_device, tmp_path):
    name = checkpoint(tmp_path / "broken", seed=1, eos_bias=float("inf"))
    for models in (dict(model=name), dict(model=names[0], reference=name, beta=0.1)):
        with pytest.raises(InputError, match="broken: log-probabilities are not finite"):
            said(load(one_device, **models))
