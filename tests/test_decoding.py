"""Batches, buckets, neighbours, meshes, memory; and what cannot be searched."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_cases import Case, config, lm, params
from table_model import TableModel

from jaxdpo import InputError
from jaxdpo.decoding import (
    LM,
    Beams,
    Constraints,
    Product,
    Samples,
    Search,
    Warp,
    beam_search,
    loop,
    sample,
)
from jaxdpo.pythia_cache import decoding_params
from jaxdpo.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compile")

CASE = Case(4, 97, (3,), 2.5, 3, 14, 1.0, False)
CONSTRAINTS = Constraints(14, (3,))
PROMPTS = [*CASE.prompts, *CASE._replace(seed=9).prompts]


def results(prompts, **more):
    options = {"beam_size": 3, "batch_size": 8, "segment": 4} | more
    return beam_search(lm(CASE), prompts, CONSTRAINTS, **options)


def assert_same(mine, theirs, atol=1e-5):
    """The same tokens; log-probabilities to the rounding of sums in another order."""
    for one, other in zip(mine, theirs, strict=True):
        assert [h.tokens.tolist() for h in one] == [h.tokens.tolist() for h in other]
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a.logps, b.logps, atol=atol)
            np.testing.assert_allclose(a.score, b.score, atol=atol)


# --- neighbours --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together():
    return results(PROMPTS)


def test_the_prompts_finish_at_different_times(together):
    lengths = {max(len(h.tokens) for h in hypotheses) for hypotheses in together}
    assert len(lengths) > 2  # some leave the batch while others go on


def test_permuting_the_prompts_permutes_the_results(together):
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    assert_same(results([PROMPTS[i] for i in order]), [together[i] for i in order])


def test_replacing_the_other_prompts_changes_nothing(together):
    others = [[50 + i] * 8 for i in range(7)]
    for i in (0, 5):
        assert_same([results([PROMPTS[i], *others])[0]], [together[i]])


def test_removing_the_other_prompts_changes_nothing(together):
    assert_same([results([prompt])[0] for prompt in PROMPTS], together)


@pytest.mark.parametrize("more", ({"batch_size": 3}, {"segment": 1}, {"segment": None}), ids=str)
def test_batches_and_segments_change_nothing(more, together):
    assert_same(results(PROMPTS, **more), together)


def test_prompts_are_yielded_as_they_finish():
    search = Search(lm(CASE), Beams(3), CONSTRAINTS, batch_size=8, segment=2)
    found = list(search.run(PROMPTS))
    assert sorted(place for place, _ in found) == list(range(8))
    longest = [max(len(h.tokens) for h in hypotheses) for _, hypotheses in found]
    assert longest != sorted(longest, reverse=True)
    assert longest[0] < max(longest)


# --- meshes ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((8, 1, 1), (2, 2, 2), (1, 1, 2)), ids=str)
def test_a_mesh_gives_what_one_device_gives(shape, together):
    data, fsdp, tensor = shape
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: math.prod(shape)])
    case = CASE._replace(vocab_size=98)  # tensor splits the vocabulary
    scorer = LM(*decoding_params(config(98), params(case), mesh))
    mine = beam_search(scorer, PROMPTS, CONSTRAINTS, beam_size=3, mesh=mesh, segment=4)
    plain = beam_search(lm(case), PROMPTS, CONSTRAINTS, beam_size=3, segment=4)
    assert_same(mine, plain)


def test_devices_do_not_wait_for_each_other():
    mesh = make_mesh(data=4, fsdp=2)
    scorer = LM(*decoding_params(config(97), params(CASE), mesh))
    rows = (jnp.ones((8, 16), jnp.int32), jnp.full(8, 5))
    args = (scorer, Beams(3), CONSTRAINTS)
    state = loop.start(
        *args,
        (rows,),
        jax.random.split(jax.random.key(0), 8),
        jnp.ones(8, bool),
        mesh=mesh,
        room=12,
        capacity=16,
    )
    text = loop.segment.lower(*args, 1, 5, state, mesh=mesh, steps=4).compile().as_text()
    assert "while(" in text
    assert not re.search(r"(all-reduce|all-gather|all-to-all|collective-permute)\(", text)


# --- compilation and memory --------------------------------------------------------------


def test_one_program_serves_a_bucket():
    count = lambda: (loop.start._cache_size(), loop.segment._cache_size())
    search = dict(batch_size=4, segment=16)
    call = lambda prompts, constraints, **more: beam_search(
        lm(CASE), prompts, constraints, **{"beam_size": 4, **search, **more}
    )
    call(CASE.prompts, Constraints(10, (3,)))
    before = count()
    call(CASE.prompts, Constraints(16, (5,), min_new_tokens=2), length_penalty=0.3)
    call([p * 2 for p in CASE.prompts], Constraints(12, (3,), num_tokens=None))
    assert count() == before  # lengths up to 16, limits up to 16, penalties, end tokens
    call([p * 3 for p in CASE.prompts], Constraints(12, (3,)))  # prompts of up to 24
    assert count() == (before[0] + 1, before[1] + 1)
    for temperature in (0.5, 0.7):
        warp = Warp(temperature, top_k=5)
        sample(lm(CASE), CASE.prompts, CONSTRAINTS, key=jax.random.key(0), warp=warp, **search)
    assert count() == (before[0] + 2, before[1] + 2)


@pytest.mark.parametrize("rule", (Beams(6), Samples(4, Warp())), ids=("beams", "samples"))
def test_the_memory_a_search_takes_is_predicted(rule):
    """Against XLA's own account of the largest program there can be."""
    constraints, prompts, batch = Constraints(24, (3,)), 24, 8
    search = Search(lm(CASE), rule, constraints, batch_size=batch)
    predicted = search.memory(batch, [prompts])
    rows = (jnp.ones((batch, prompts), jnp.int32), jnp.full(batch, 5))
    args = (lm(CASE), rule, constraints)
    state = loop.start(
        *args,
        (rows,),
        jax.random.split(jax.random.key(0), batch),
        jnp.ones(batch, bool),
        mesh=None,
        room=24 * rule.width,
        capacity=24,
    )
    compiled = loop.segment.lower(*args, 1, 24, state, mesh=None, steps=24).compile()
    account = compiled.memory_analysis()
    used = account.argument_size_in_bytes + account.temp_size_in_bytes
    # The copy of the caches is made between segments, and not by this program.
    assert used < predicted.total < 1.6 * (used + predicted.caches // 2)
    assert predicted.parameters == sum(x.nbytes for x in jax.tree.leaves(params(CASE)))


def test_a_search_that_does_not_fit_says_so_before_it_compiles():
    compiled = loop.start._cache_size()
    search = Search(lm(CASE), Beams(11), CONSTRAINTS, memory_limit=2**20)
    with pytest.raises(InputError, match=r"8 prompts of up to 16 tokens with 11 .* GiB \(param"):
        next(search.run(PROMPTS))
    assert loop.start._cache_size() == compiled
    assert next(Search(lm(CASE), Beams(2), CONSTRAINTS, memory_limit=2**24).run(PROMPTS))


# --- what cannot be searched -------------------------------------------------------------

TABLE = lambda size: LM(TableModel(size, max_length=20), jnp.zeros((size, size)))


def searched(rule=None, scorer=None, prompts=([1, 2],), batch_size=8, **constraints):
    constraints = Constraints(**{"max_new_tokens": 4, "eos_ids": (0,)} | constraints)
    search = Search(scorer or TABLE(9), rule or Beams(2), constraints, batch_size=batch_size)
    return list(search.run(prompts))


PAIR = (TABLE(9), TABLE(9))
REFUSED = {
    "beam_size=10: must be between 1 and the 9": dict(rule=Beams(10)),
    "beam_size=8: must be between 1 and the 7": dict(rule=Beams(8), num_tokens=7),
    "beam_size=0": dict(rule=Beams(0)),
    "early_stopping='maybe'": dict(rule=Beams(2, early_stopping="maybe")),
    "length_norm='mean'": dict(rule=Beams(2, length_norm="mean")),
    "num_samples=0": dict(rule=Samples(0)),
    "temperature=0": dict(rule=Samples(1, Warp(temperature=0))),
    "temperature=inf": dict(rule=Samples(1, Warp(temperature=float("inf")))),
    "length_penalty=nan": dict(rule=Beams(2, length_penalty=float("nan"))),
    "exponents [1.0, inf] must be finite": dict(
        scorer=Product(PAIR, jnp.array([1.0, float("inf")]))
    ),
    "top_k=0": dict(rule=Samples(1, Warp(top_k=0))),
    "top_p=1.5": dict(rule=Beams(2, warp=Warp(top_p=1.5))),
    "prompt 1: is empty": dict(prompts=([1], [])),
    "prompt 0: has ids outside 0 to 8": dict(prompts=([1, 9],)),
    "prompt 1: has 17 tokens; the model's 20 positions leave 16": dict(prompts=([1], [1] * 17)),
    "eos_ids: 9 is outside the vocabulary of 9": dict(eos_ids=(0, 9)),
    "eos_ids: -1 is outside": dict(eos_ids=(-1,)),
    "max_new_tokens=0": dict(max_new_tokens=0),
    "min_new_tokens=5: must be between 0 and max_new_tokens=4": dict(min_new_tokens=5),
    "no_repeat_ngram=-1": dict(no_repeat_ngram=-1),
    "num_tokens=10: the models share 9 ids": dict(num_tokens=10),
    "prompt 0: no continuation obeys": dict(
        scorer=TABLE(3), prompts=([1],), eos_ids=(), no_repeat_ngram=1
    ),
    "batch_size=0": dict(batch_size=0),
    "3 exponents for 2 models": dict(scorer=Product(PAIR, jnp.ones(3))),
    "normalised='word'": dict(scorer=Product(PAIR, jnp.ones(2), "word")),
    "no distribution over tokens": dict(
        scorer=Product(PAIR, jnp.ones(2), "sequence"), rule=Samples(1, Warp())
    ),
    "vocabularies have 7 and 9 ids": dict(scorer=Product((TABLE(7), TABLE(9)), jnp.ones(2))),
    "prompt 0: 3 lists of ids for 2 models": dict(
        scorer=Product(PAIR, jnp.ones(2)), prompts=([[1], [1], [1]],)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_searched_is_refused_in_one_line(message):
    with pytest.raises(InputError) as raised:
        searched(**REFUSED[message])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_more_returned_than_beams_is_refused():
    with pytest.raises(InputError, match="num_return=3: must be between 1 and beam_size=2"):
        beam_search(TABLE(9), [[1]], Constraints(4, (0,)), beam_size=2, num_return=3)


def test_a_batch_must_fill_the_mesh():
    with pytest.raises(InputError, match="batch_size=6: must be a multiple of the mesh's 8"):
        beam_search(
            TABLE(9), [[1]], Constraints(4, (0,)), beam_size=2, batch_size=6, mesh=make_mesh()
        )


def test_vocabularies_with_other_padding_are_cut_to_the_tokenizers():
    table = np.random.default_rng(0).normal(size=(9, 9)).astype(np.float32)
    wide = np.full((12, 12), 5.0, np.float32)  # the padding would be chosen
    wide[:9, :9] = table
    models = (LM(TableModel(9), jnp.asarray(table)), LM(TableModel(12), jnp.asarray(wide)))
    scorer = Product(models, jnp.array([0.5, 0.5]))
    [hypotheses] = beam_search(scorer, [[1]], Constraints(5, (0,), num_tokens=9), beam_size=3)
    assert all(max(h.tokens) < 9 for h in hypotheses)


def test_no_prompts_give_no_results():
    assert beam_search(TABLE(9), [], Constraints(4, (0,)), beam_size=2) == []


def test_a_search_of_a_model_that_was_never_told_of():
    # The table is Markov: the best first step from 1 is 5, from 5 it is the end.
    table = np.zeros((9, 9), np.float32)
    table[1, 5], table[5, 0] = 9.0, 9.0
    scorer = LM(TableModel(9), jnp.asarray(table))
    [[best, *_]] = beam_search(scorer, [[1]], Constraints(4, (0,)), beam_size=2)
    assert best.tokens.tolist() == [5, 0] and best.ended
