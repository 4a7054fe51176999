"""Truncation by the official vectors, one EOS, counts that add up, a store never stale."""

import json

import numpy as np
import pytest
from examples import SHARED

from jaxdpo import InputError, synthetic
from jaxdpo.pairs import Pair
from jaxdpo.tokens import Example, Limits, eos_id, load_tokenizer, tokenize, truncate

EOS = 0
OFFICIAL = Limits(10, 5, "official")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    synthetic.tokenizer().save(str(path))
    return load_tokenizer(path)


def example(prompt, chosen, rejected):
    """Ids 1.. with EOS appended to both responses; sizes are before EOS."""
    with_eos = lambda n: np.append(np.arange(1, n + 1), EOS)
    return Example(np.arange(1, prompt + 1), with_eos(chosen), with_eos(rejected))


def words(n):
    return " I" * n


# Sizes of prompt, chosen, rejected before EOS, and after truncation to 10 with prompts of 5:
# reference vectors of the official code.
@pytest.mark.parametrize(
    "sizes, expected",
    [
        ((8, 3, 2), (5, 4, 3)),
        ((3, 9, 2), (3, 5, 3)),
        ((8, 7, 1), (5, 5, 2)),
        ((4, 4, 2), (4, 5, 3)),
        ((6, 5, 1), (5, 5, 2)),
    ],
)
@pytest.mark.parametrize("keep", ["start", "end"])
def test_official_truncation_vectors(sizes, expected, keep):
    whole = example(*sizes)
    cut = truncate(whole, OFFICIAL if keep == "start" else Limits(10, 5, "official_keep_end"))
    assert tuple(map(len, cut)) == expected
    kept = whole.prompt[: expected[0]] if keep == "start" else whole.prompt[-expected[0] :]
    np.testing.assert_array_equal(cut.prompt, kept)
    for now, was in zip(cut[1:], whole[1:], strict=True):
        np.testing.assert_array_equal(now, was[: len(now)])  # responses lose their end


def test_official_cuts_the_response_even_where_the_prompt_leaves_room():
    cut = truncate(example(3, 9, 2), OFFICIAL)
    assert len(cut.prompt) + len(cut.chosen) == 8  # two places of ten are wasted
    assert cut.chosen[-1] != EOS and cut.rejected[-1] == EOS


def test_keep_start_and_keep_end_cut_no_more_than_is_needed():
    whole = example(8, 3, 2)  # 8 + 4 = 12: two too many
    for policy, prompt in (("keep_start", whole.prompt[:6]), ("keep_end", whole.prompt[2:])):
        cut = truncate(whole, Limits(10, 5, policy))
        np.testing.assert_array_equal(cut.prompt, prompt)
        assert cut.chosen[-1] == EOS
    cut = truncate(example(3, 9, 2), Limits(10, 5, "keep_start"))
    assert tuple(map(len, cut)) == (3, 7, 3)  # the response gets all that the prompt leaves


@pytest.mark.parametrize("policy", ["official", "official_keep_end", "keep_start", "keep_end"])
def test_nothing_ever_exceeds_max_length(policy):
    rng = np.random.default_rng(0)
    for sizes in rng.integers(1, 20, (200, 3)):
        cut = truncate(example(*sizes), Limits(10, 5, policy))
        assert len(cut.prompt) + max(len(cut.chosen), len(cut.rejected)) <= 10
        assert min(map(len, cut)) > 0


def test_drop_leaves_out_what_does_not_fit():
    assert truncate(example(8, 3, 2), Limits(10, None, "drop")) is None
    assert truncate(example(6, 3, 2), Limits(10, None, "drop")) is not None


@pytest.mark.parametrize(
    "limits, named",
    [
        (Limits(10, 5, "middle"), "truncation"),
        (Limits(10, 10, "official"), "max_prompt_length"),
        (Limits(10, 0, "keep_end"), "max_prompt_length"),
        (Limits(10, None, "official"), "max_prompt_length"),
        (Limits(10, 5, "drop"), "max_prompt_length"),
    ],
)
def test_limits_that_cannot_hold_are_refused(limits, named):
    with pytest.raises(InputError, match=named):
        limits.check()


def test_every_response_ends_in_one_eos_and_parts_are_encoded_apart(tokenizer, tmp_path):
    pairs = [Pair(words(4), words(2), words(3), 7)]
    store = tokenize(pairs, tokenizer, eos=EOS, limits=OFFICIAL, folder=tmp_path)
    prompt, chosen, rejected = store[0]
    word = tokenizer.encode(" I").ids[0]
    assert prompt.tolist() == [word] * 4
    assert chosen.tolist() == [word] * 2 + [EOS]
    assert rejected.tolist() == [word] * 3 + [EOS]
    assert store.lines.tolist() == [7]


def test_report_counts_what_was_done(tokenizer, tmp_path):
    pairs = [
        Pair(words(4), words(2), words(3), 1),  # fits
        Pair(words(9), words(2), words(3), 2),  # prompt cut
        Pair(words(3), words(9), words(2), 3),  # response cut: EOS lost
        Pair(words(9), words(9), words(8), 4),  # both, and equal once cut
        Pair("", words(2), words(3), 5),  # no prompt to predict from
    ]
    report = tokenize(pairs, tokenizer, eos=EOS, limits=OFFICIAL, folder=tmp_path).report
    assert (report.examples, report.prompts_cut, report.responses_cut) == (4, 2, 2)
    assert (report.eos_lost, report.identical, report.empty) == (2, 1, [5])
    assert report.tokens == (4 + 3 + 4) + (5 + 3 + 4) + (3 + 5 + 3) + (5 + 5 + 5)
    dropping = Limits(10, None, "drop")
    report = tokenize(pairs, tokenizer, eos=EOS, limits=dropping, folder=tmp_path).report
    assert (report.examples, report.dropped, report.empty) == (1, [2, 3, 4], [5])


def test_sft_rows_have_one_response(tokenizer, tmp_path):
    pairs = [Pair(words(2), words(2), None, 1)]
    store = tokenize(pairs, tokenizer, eos=EOS, limits=OFFICIAL, folder=tmp_path)
    assert store.lengths.tolist() == [[2, 3, 0]] and not store.has_pairs


def test_the_store_is_read_back_and_keyed_by_all_that_shapes_it(tokenizer, tmp_path):
    pairs = [Pair(words(4), words(2), words(3), 1), Pair(words(2), words(5), words(1), 2)]
    make = lambda rows=pairs, eos=EOS, limits=OFFICIAL: tokenize(
        rows, tokenizer, eos=eos, limits=limits, folder=tmp_path
    )
    first, again = make(), make()
    assert isinstance(again.tokens, np.memmap) and again.key == first.key
    for a, b in zip([*first[0], *first[1]], [*again[0], *again[1]], strict=True):
        np.testing.assert_array_equal(a, b)
    others = [
        make(rows=pairs[::-1]),
        make(rows=[pairs[0]._replace(chosen=words(1)), pairs[1]]),
        make(eos=1),
        make(limits=Limits(11, 5, "official")),
        make(limits=Limits(10, 4, "official")),
        make(limits=Limits(10, 5, "official_keep_end")),
    ]
    assert len({store.key for store in [first, *others]}) == 7


def test_scored_offsets_count_response_tokens():
    from examples import token_store

    assert token_store([[3, 2, 4], [1, 1, 1]]).scored_offsets.tolist() == [0, 6, 8]


def test_special_tokens_in_text_are_plain_text(tmp_path):
    """A literal <|endoftext|> must not become the EOS id, whatever the file asks for."""
    path = SHARED / "data/tokenizer/20B_tokenizer.json"
    if not path.exists():
        pytest.skip("needs Pythia's tokenizer, which is not beside this checkout")
    tokenizer = load_tokenizer(path)
    assert eos_id(tokenizer) == 0
    assert 0 not in tokenizer.encode("end<|endoftext|>of", add_special_tokens=False).ids


def test_pythias_tokenizer_gives_the_published_ids():
    path = SHARED / "data/golden/golden.json"
    if not path.exists():
        pytest.skip("needs the reference values, which are not beside this checkout")
    golden = json.loads(path.read_text())["tokenizer"]
    tokenizer = load_tokenizer(SHARED / "data/tokenizer/20B_tokenizer.json")
    assert tokenizer.encode(golden["text"], add_special_tokens=False).ids == golden["ids"]
    for case in golden["more"]:
        if "<|endoftext|>" not in case["text"]:  # there we differ on purpose
            assert tokenizer.encode(case["text"], add_special_tokens=False).ids == case["ids"]


def test_bad_tokenizers_are_named(tmp_path, tokenizer):
    with pytest.raises(InputError, match="no tokenizer there"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer file"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="<stop>"):
        eos_id(tokenizer, "<stop>")


def test_nothing_left_and_text_that_spells_eos_are_refused(tokenizer, tmp_path):
    pair = Pair(words(9), words(9), words(9), 3)
    with pytest.raises(InputError, match="no example is left"):
        tokenize([pair], tokenizer, eos=EOS, limits=Limits(10, None, "drop"), folder=tmp_path)
    word = tokenizer.encode(" I").ids[0]
    with pytest.raises(InputError, match="line 3"):
        tokenize([pair], tokenizer, eos=word, limits=OFFICIAL, folder=tmp_path)
