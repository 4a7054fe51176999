"""Which prompts a model is shown while it trains, and what is kept of what it says."""

import math
import os

import jax
import numpy as np
import pytest
from examples import TINY, token_store

from jaxdpo import InputError, sharding, synthetic
from jaxdpo.decoding import Constraints
from jaxdpo.pythia import init_params
from jaxdpo.samples import Hearing, check_room, first_prompts


def test_the_first_prompts_that_differ():
    store = token_store([[2, 2, 2], [1, 2, 2], [2, 2, 2], [3, 2, 2]])
    start = store.starts
    store.tokens[start[2] : start[2] + 2] = store.tokens[start[0] : start[0] + 2]
    prompts = [store[i].prompt.tolist() for i in (0, 1, 3)]
    assert first_prompts(store, 2) == prompts[:2]
    assert first_prompts(store, 3) == first_prompts(store, 9) == prompts
    assert not np.array_equal(store[2].prompt, store[3].prompt)


def hearing(sample_tokens):
    return Hearing(
        "dpo",
        TINY,
        sharding.make_mesh(),
        synthetic.tokenizer(),
        [[1, 2], [3] * 40],
        Constraints(sample_tokens, eos_ids=(0,)),
    )


def test_a_completion_must_fit_into_the_model():
    store = token_store([[2, 2, 2], [40, 2, 2]])
    check_room("dpo.sample_tokens", TINY.max_positions - 40, store, TINY)
    with pytest.raises(InputError, match="dpo.sample_tokens: 2009 more than the 40 of a prompt"):
        check_room("dpo.sample_tokens", TINY.max_positions - 39, store, TINY)


@pytest.fixture(scope="module")
def params():
    return init_params(TINY, jax.random.key(0))


def test_what_does_not_fit_into_memory_is_refused(params, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 2**6)
    with pytest.raises(InputError, match="decoding 2 prompts .* but the device has 0.00"):
        hearing(2).records(3, params)


def test_numbers_that_are_not_finite_are_null(params):
    said = hearing(2).records(3, params)
    assert [record["step"] for record in said] == [3, 3]
    assert all(record["logps"] < 0 for record in said)
    broken = params | {"unembedding": params["unembedding"] * math.nan}
    assert [record["logps"] for record in hearing(2).records(4, broken)] == [None, None]
