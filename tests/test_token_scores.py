"""A mark finds its tokens, a token its score, whatever the batch; what cannot be is said."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speakers import MODEL, TEXTS, checkpoint, spoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxdpo import InputError, pythia, sharding, synthetic
from jaxdpo.analysis import token_scores
from jaxdpo.analysis.token_scores import (
    Part,
    Span,
    marked_tokens,
    noise_floor,
    pieces,
    token_logps,
    whole_store,
)
from jaxdpo.language_models import language_model
from jaxdpo.pairs import Pair

FLOAT32 = 1e-4  # of log-probabilities down to -30, summed in another order
WORDS = synthetic.tokenizer()
TEXT = " I live in Oslo. I have a pet dog."
EXAMPLES = [
    Pair(prompt, chosen, rejected, line)
    for line, (prompt, chosen, rejected) in enumerate(
        [
            (TEXTS[0], TEXTS[1], TEXTS[3]),
            (TEXTS[1], TEXTS[2], None),
            (TEXTS[3] + TEXTS[1], TEXTS[0], TEXTS[1] + TEXTS[0]),
        ],
        start=1,
    )
]


def bytes_tokenizer() -> Tokenizer:
    """Every byte is a token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.encode_special_tokens = True
    return tokenizer


def test_marks_of_a_hand_worked_text():
    """I live in Oslo . I have a pet dog . are tokens 0 to 10; Oslo is 11:15, a pet dog 24:33."""
    marked = marked_tokens(TEXT, [Span(24, 33, "pet"), Span(11, 15, "city")], WORDS)
    assert marked.tolist() == [-1, -1, -1, 1, -1, -1, -1, 0, 0, 0, -1]
    with_space = marked_tokens(TEXT, [Span(10, 15)], WORDS)  # the space in front marks nothing more
    assert with_space.tolist() == [-1, -1, -1, 0, *[-1] * 7]
    beside = marked_tokens(TEXT, [Span(11, 15), Span(15, 16)], WORDS)
    assert beside.tolist()[3:5] == [0, 1]
    assert marked_tokens(TEXT, [], WORDS).tolist() == [-1] * 11


@pytest.mark.parametrize(
    "spans, said",
    [
        ([Span(11, 99)], r"span 1 \(11:99\) is empty, or outside the text of 34 characters"),
        ([Span(-4, 15)], r"span 1 \(-4:15\) is empty, or outside"),
        ([Span(11, 11)], r"span 1 \(11:11\) is empty"),
        ([Span(15, 11)], r"span 1 \(15:11\) is empty"),
        ([Span(11, 15), Span(14, 16)], r"span 2 \(14:16\) overlaps span 1 \(11:15\)"),
        ([Span(11, 14)], r"span 1 \(11:14\) cuts the token of characters 10:15"),
        ([Span(12, 16)], r"span 1 \(12:16\) cuts the token"),
        ([Span(11, 13), Span(13, 15)], r"span 2 \(13:15\) cuts the token"),
        ([Span(10, 11)], r"span 1 \(10:11\) marks no token"),
    ],
)
def test_marks_that_mean_no_tokens_are_refused(spans, said):
    with pytest.raises(InputError, match=said):
        marked_tokens(TEXT, spans, WORDS)


def test_a_text_that_cannot_be_spelled_is_refused():
    for reads in (lambda text: marked_tokens(text, [], WORDS), lambda text: pieces(text, WORDS)):
        with pytest.raises(InputError, match="the tokenizer cannot encode the text"):
            reads(" I live in Atlantis.")


def test_bytes_of_a_character_are_told_apart():
    """é is two bytes, 😀 four; a mark on the character marks them all."""
    text, tokenizer = "a é\n😀😀b\ufffd", bytes_tokenizer()
    found = pieces(text, tokenizer)
    parts = [None, None, Part(1, 2, "é"), Part(2, 2, "é"), None]
    parts += [Part(number, 4, "😀") for number in (1, 2, 3, 4)] * 2
    assert [piece.part for piece in found] == [*parts, None, None, None, None]  # U+FFFD is itself
    assert [piece.text for piece in found][:5] == ["a", " ", "\ufffd", "\ufffd", "\n"]
    assert [piece.id for piece in found] == tokenizer.encode(text).ids
    marked = marked_tokens(text, [Span(2, 3), Span(5, 6)], tokenizer)
    assert marked.tolist() == [-1, -1, 0, 0, -1, *[-1] * 4, *[1] * 4, *[-1] * 4]


def test_a_character_that_shares_a_token_is_the_one_that_is_spelled():
    """Two letters of two bytes, split after the third: the first stands whole in its token."""
    single = bytes_tokenizer()
    a, b, c, _ = single.encode("ום").tokens
    vocabulary = single.get_vocab() | {a + b: 300, a + b + c: 301}
    merged = Tokenizer(models.BPE(vocabulary, [(a, b), (a + b, c)]))
    merged.pre_tokenizer, merged.decoder = single.pre_tokenizer, single.decoder
    found = pieces("ום", merged)
    assert [piece.text for piece in found] == ["ו\ufffd", "\ufffd"]
    assert [piece.part for piece in found] == [Part(1, 2, "ם"), Part(2, 2, "ם")]


def test_a_store_holds_all_of_every_example():
    store = whole_store(EXAMPLES, WORDS, 0, 64)
    assert store.lines.tolist() == [1, 2, 3]
    for index, pair in enumerate(EXAMPLES):
        prompt, chosen, rejected = store[index]
        assert prompt.tolist() == WORDS.encode(pair.prompt).ids
        assert chosen.tolist() == [*WORDS.encode(pair.chosen).ids, 0]
        wanted = [] if pair.rejected is None else [*WORDS.encode(pair.rejected).ids, 0]
        assert rejected.tolist() == wanted


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(prompt=""), "line 2: the prompt or a response is empty"),
        (dict(chosen=""), "line 2: the prompt or a response is empty"),
        (dict(rejected=""), "line 2: the prompt or a response is empty"),
        (dict(chosen=" Atlantis"), "line 2: the tokenizer cannot encode"),
        (dict(prompt=TEXT * 2), "line 2: prompt and response are 24 tokens, more than 20"),
        (dict(rejected=TEXT * 2), "line 2: prompt and response are 33 tokens, more than 20"),
    ],
)
def test_nothing_is_cut_or_left_out_of_a_store(change, said):
    good = EXAMPLES[1]
    with pytest.raises(InputError, match=said):
        whole_store([good._replace(line=1), good._replace(**change)], WORDS, 0, 20)
    with pytest.raises(InputError, match=said):
        whole_store([good._replace(**change)], WORDS, 0, 20)


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("models") / "policy", seed=1)


@pytest.fixture(scope="module")
def model(name):
    return language_model(name, sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def store():
    return whole_store(EXAMPLES, WORDS, 0, 64)


@pytest.fixture(scope="module")
def logps(model, store):
    return token_logps(model, store, label="policy")


@jax.jit
def all_logps(params, row):
    """The log-probability of every token of the vocabulary after each place of one row."""
    ones, places = jnp.ones_like(row), jnp.arange(row.size)[None]
    hidden = pythia.hidden_states(MODEL, params, row, places, ones, ones)
    return jax.nn.log_softmax(pythia.unembed(hidden, params["unembedding"]))[0]


def slow_logps(store) -> np.ndarray:
    """One response at a time through the whole model, a token's place counted from the front."""
    found, params = [], spoken(1)
    for prompt, *responses in (store[index] for index in range(len(store))):
        for response in filter(len, responses):
            row = np.zeros((1, 64), np.int32)  # what stands behind a token does not matter
            row[0, : len(prompt) + len(response)] = np.concatenate([prompt, response])
            at = len(prompt) - 1 + np.arange(len(response))
            found.append(np.asarray(all_logps(params, row))[at, response])
    return np.concatenate(found)


def test_every_token_has_its_own_log_probability(store, logps):
    assert logps.shape == (store.scored_offsets[-1],) and logps.dtype == np.float32
    expected = slow_logps(store)
    np.testing.assert_allclose(logps, expected, atol=FLOAT32)
    assert not np.allclose(np.roll(logps, 1), expected, atol=1e-2)  # a shift would show


def test_no_batch_or_mesh_changes_a_score(name, model, store, logps):
    alone = token_logps(model, store, batch_size=1, label="one by one")
    np.testing.assert_allclose(alone, logps, atol=FLOAT32)
    split = language_model(name, sharding.make_mesh(fsdp=2, tensor=2))
    np.testing.assert_allclose(token_logps(split, store, label="split"), logps, atol=FLOAT32)


def test_the_noise_floor_is_rounding_and_nothing_else(model, store, logps):
    assert 0 <= noise_floor(model, store, logps) <= FLOAT32
    moved = logps.copy()
    moved[4] += 0.25
    assert noise_floor(model, store, moved) == pytest.approx(0.25, abs=FLOAT32)
    moved[4], moved[-1] = logps[4], 9.0  # of the third example, which is not looked at
    assert noise_floor(model, store, moved, examples=2) <= FLOAT32


@pytest.mark.parametrize("mesh", [dict(devices=jax.devices()[:1]), dict(fsdp=2)])
def test_two_examples_share_a_row_also_where_devices_are_more(
    name, store, logps, monkeypatch, mesh
):
    """Of three examples two: the third is alone in any case."""
    right, together = token_scores._scorer, []

    def looking(model):
        score = right(model)

        def looked(batch):
            together.append((batch.examples >= 0).sum(1).max().item())
            return score(batch)

        return looked

    monkeypatch.setattr(token_scores, "_scorer", looking)
    model = language_model(name, sharding.make_mesh(**mesh))
    assert noise_floor(model, store, logps) <= FLOAT32
    assert max(together) == 2


def test_a_batch_of_another_shape_that_is_read_wrongly_would_show(model, store, logps, monkeypatch):
    right = token_scores._scorer
    wrong = lambda model: lambda batch: jnp.roll(right(model)(batch), 1, axis=1)
    monkeypatch.setattr(token_scores, "_scorer", wrong)
    assert noise_floor(model, store, logps) > 0.1


def test_weights_that_are_not_finite_are_named(model, store):
    lm = dataclasses.replace(
        model.lm, params=jax.tree.map(lambda leaf: leaf * jnp.nan, model.lm.params)
    )
    with pytest.raises(InputError, match="policy: log-probabilities are not finite"):
        token_logps(model._replace(lm=lm), store, label="broken")


@pytest.mark.parametrize("scored", [1, 2, 15, 16, 32])
@pytest.mark.parametrize("length", [10, 300, 1300, 9000])
def test_rounding_is_looked_for_in_another_number_of_rows_that_costs_little(scored, length):
    other = token_scores._other_rows(scored, length)
    assert other != scored and other * length <= max(token_scores._SHORT, 2 * scored * length)
