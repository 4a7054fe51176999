"""Which prompts a model is shown while it trains, and what a restart forgets."""

import math
import os

import jax
import numpy as np
import pytest
from examples import TINY, token_store

from jaxdpo import InputError, sharding, synthetic
from jaxdpo.decoding import Constraints
from jaxdpo.pythia import init_params
from jaxdpo.records import read_log, write_log
from jaxdpo.samples import Hearing, first_prompts


def test_the_first_prompts_that_differ():
    store = token_store([[2, 2, 2], [1, 2, 2], [2, 2, 2], [3, 2, 2]])
    start = store.starts
    store.tokens[start[2] : start[2] + 2] = store.tokens[start[0] : start[0] + 2]
    prompts = [store[i].prompt.tolist() for i in (0, 1, 3)]
    assert first_prompts(store, 2) == prompts[:2]
    assert first_prompts(store, 3) == first_prompts(store, 9) == prompts
    assert not np.array_equal(store[2].prompt, store[3].prompt)


def hearing(folder, *, sample_tokens):
    return Hearing(
        "dpo",
        folder / "samples.jsonl",
        TINY,
        sharding.make_mesh(),
        synthetic.tokenizer(),
        [[1, 2], [3] * 40],
        Constraints(sample_tokens, eos_ids=(0,)),
    )


@pytest.mark.parametrize("after, left", [(0, []), (4, [0, 4]), (8, [0, 4, 8])])
def test_a_restart_forgets_what_it_will_say_again(tmp_path, after, left):
    one = hearing(tmp_path, sample_tokens=1)
    write_log(one.file, [{"step": step} for step in (0, 4, 8)])
    one.cut(after=after)
    assert [record["step"] for record in read_log(one.file)] == left


def test_a_completion_must_fit_into_the_model(tmp_path):
    hearing(tmp_path, sample_tokens=TINY.max_positions - 40).check()
    with pytest.raises(InputError, match="dpo.sample_tokens: 2009 more than the 40 of a prompt"):
        hearing(tmp_path, sample_tokens=TINY.max_positions - 39).check()


@pytest.fixture(scope="module")
def params():
    return init_params(TINY, jax.random.key(0))


def test_what_does_not_fit_into_memory_is_refused(tmp_path, params, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 2**6)
    one = hearing(tmp_path, sample_tokens=2)
    with pytest.raises(InputError, match="decoding 2 prompts .* but the device has 0.00"):
        one(3, params)
    assert not one.file.exists()


def test_numbers_that_are_not_finite_are_null(tmp_path, params):
    one = hearing(tmp_path, sample_tokens=2)
    one(3, params)
    one(4, params | {"unembedding": params["unembedding"] * math.nan})
    records = read_log(one.file)
    assert [record["step"] for record in records] == [3, 3, 4, 4]
    assert all(record["logps"] < 0 for record in records[:2])
    assert [record["logps"] for record in records[2:]] == [None, None]
