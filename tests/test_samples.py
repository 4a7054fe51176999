"""Which prompts a model is shown while it trains, and what a restart forgets."""

import numpy as np
import pytest
from examples import TINY, token_store

from jaxdpo import InputError, sharding, synthetic
from jaxdpo.decoding import Constraints
from jaxdpo.records import read_log, write_log
from jaxdpo.samples import Samples, first_prompts


def test_the_first_prompts_that_differ():
    store = token_store([[2, 2, 2], [1, 2, 2], [2, 2, 2], [3, 2, 2]])
    start = store.starts
    store.tokens[start[2] : start[2] + 2] = store.tokens[start[0] : start[0] + 2]
    prompts = [store[i].prompt.tolist() for i in (0, 1, 3)]
    assert first_prompts(store, 2) == prompts[:2]
    assert first_prompts(store, 3) == first_prompts(store, 9) == prompts
    assert not np.array_equal(store[2].prompt, store[3].prompt)


def samples(folder, *, sample_tokens):
    return Samples(
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
    one = samples(tmp_path, sample_tokens=1)
    write_log(one.file, [{"step": step} for step in (0, 4, 8)])
    one.cut(after=after)
    assert [record["step"] for record in read_log(one.file)] == left


def test_a_completion_must_fit_into_the_model(tmp_path):
    samples(tmp_path, sample_tokens=TINY.max_positions - 40).check()
    with pytest.raises(InputError, match="dpo.sample_tokens: 2009 more than the 40 of a prompt"):
        samples(tmp_path, sample_tokens=TINY.max_positions - 39).check()
