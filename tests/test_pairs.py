"""Pairs: every format by hand, every bad row by its reason, every broken source by name."""

import collections
import gzip
import hashlib
import json
import pathlib
import random
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jaxdpo import InputError
from jaxdpo.pairs import Pair, field_values, read_pairs, sft_examples, split_by_prompt

TLDR = pathlib.Path(__file__).parents[2] / "shared/data/tldr"
needs_data = pytest.mark.skipif(not TLDR.is_dir(), reason=f"no {TLDR}: real data is absent")

GOOD = {"prompt": "Sum?\n\nTL;DR:", "chosen": " right", "rejected": " wrong"}
REDDIT = {
    "info": {"id": "t3_1", "subreddit": "pets", "title": "My cat", "post": "It left."},
    "summaries": [{"text": " cat left"}, {"text": " dog left"}],
    "choice": 1,
}
REDDIT_PROMPT = "SUBREDDIT: r/pets\n\nTITLE: My cat\n\nPOST: It left.\n\nTL;DR:"


def jsonl(tmp_path, *rows):
    """A file with one row per line; a row of bytes stands as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def texts(pairs):
    return [pair[:3] for pair in pairs]


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("pairs", GOOD, ("Sum?\n\nTL;DR:", " right", " wrong")),
        ("completions", {"prompt": "1+1=", "completion": "2 "}, ("1+1=", "2 ", None)),
        ("openai_comparisons", REDDIT, (REDDIT_PROMPT, " dog left", " cat left")),
        (
            "openai_comparisons",
            REDDIT | {"choice": 0, "summaries": [{"text": "  cat left\n"}, {"text": "b"}]},
            (REDDIT_PROMPT, " cat left", " b"),
        ),
        (
            "carper_comparisons",
            {"prompt": "POST: x", "chosen": "TL;DR: a", "rejected": "TL;DR:  b "},
            ("POST: x\n\nTL;DR:", " a", " b"),
        ),
        (
            "carper_comparisons",
            {"prompt": "POST: x \n", "chosen": "TL;DR:a", "rejected": "TL;DR: TL;DR: b"},
            ("POST: x\n\nTL;DR:", " a", " TL;DR: b"),
        ),
        (
            "carper_tldr",
            {"prompt": "POST: TL;DR: x\nTL;DR: ", "label": "a "},
            ("POST: TL;DR: x\n\nTL;DR:", " a", None),
        ),
        (
            "hh",
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: no",
            },
            ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " yes", " no"),
        ),
    ],
    ids=[
        "pairs",
        "completions",
        "openai",
        "openai_whitespace",
        "carper",
        "carper_whitespace",
        "carper_tldr",
        "hh",
    ],
)
def test_each_format_gives_the_pair_worked_out_by_hand(tmp_path, format, row, expected):
    pairs, report = read_pairs(jsonl(tmp_path, row), format=format)
    assert pairs == [Pair(*expected, line=1)]
    assert (report.rows, report.kept, report.skipped) == (1, 1, {})


def bad(**fields):
    return GOOD | fields


def side(prompt, answer):
    return f"\n\nHuman: {prompt}\n\nAssistant: {answer}"


BAD_ROWS = {
    "not_json": ("pairs", b'{"prompt": "a', "not JSON"),
    "too_deep": ("pairs", b"[" * 100_000, "not JSON"),
    "not_utf8": (
        "pairs",
        json.dumps(GOOD).encode().replace(b"Sum", b"S\xffm"),
        "not UTF-8",
    ),
    "utf16": ("pairs", '{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "raw_surrogate": ("pairs", b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
    "not_an_object": ("pairs", [1], "not an object"),
    "blank_line": ("pairs", b"  ", "blank line"),
    "missing": ("pairs", {"prompt": "a", "chosen": "b"}, "missing field 'rejected'"),
    "null": ("pairs", bad(chosen=None), "null field 'chosen'"),
    "number": ("pairs", bad(prompt=3), "field 'prompt' is not a string"),
    "surrogate": ("pairs", bad(chosen="a \ud800"), "a lone surrogate"),
    "surrogate_in_rejected": ("pairs", bad(rejected="\udfff"), "a lone surrogate"),
    "empty_prompt": ("pairs", bad(prompt=" \n"), "empty prompt"),
    "empty_chosen": ("pairs", bad(chosen=""), "empty response"),
    "blank_rejected": ("pairs", bad(rejected=" \n\t"), "empty response"),
    "blank_completion": (
        "completions",
        {"prompt": "a", "completion": " "},
        "empty response",
    ),
    "equal": ("pairs", bad(rejected=" right"), "chosen equals rejected"),
    "eos_prompt": ("pairs", bad(prompt="a<|endoftext|>b"), "a literal <|endoftext|>"),
    "eos_rejected": ("pairs", bad(rejected=" b<|endoftext|>"), "a literal <|endoftext|>"),
    "eos_over_the_border": (
        "pairs",
        bad(prompt="a<|endof", chosen="text|>"),
        "a literal <|endoftext|>",
    ),
    "cnn_dm": (
        "openai_comparisons",
        REDDIT | {"info": {"id": "1", "article": "News."}},
        "a CNN/DM article, not a Reddit post",
    ),
    "cnn_dm_null_post": (
        "openai_comparisons",
        REDDIT | {"info": {"post": None, "subreddit": None, "article": "News."}},
        "a CNN/DM article, not a Reddit post",
    ),
    "no_info": (
        "openai_comparisons",
        REDDIT | {"info": "x"},
        "field 'info' is not an object",
    ),
    "no_title": (
        "openai_comparisons",
        REDDIT | {"info": {"subreddit": "a", "post": "b"}},
        "missing field 'info.title'",
    ),
    "choice_2": (
        "openai_comparisons",
        REDDIT | {"choice": 2},
        "'choice' is not 0 or 1 of two 'summaries'",
    ),
    "choice_true": (
        "openai_comparisons",
        REDDIT | {"choice": True},
        "field 'choice' is not an integer",
    ),
    "three_summaries": (
        "openai_comparisons",
        REDDIT | {"summaries": [{"text": "a"}, {"text": "b"}, {"text": "c"}]},
        "'choice' is not 0 or 1 of two 'summaries'",
    ),
    "summary_without_text": (
        "openai_comparisons",
        REDDIT | {"summaries": [{"text": "a"}, {"note": "b"}]},
        "missing field 'summaries.1.text'",
    ),
    "null_summary": (
        "openai_comparisons",
        REDDIT | {"summaries": [{"text": "a"}, None]},
        "missing field 'summaries.1.text'",
    ),
    "carper_response": (
        "carper_comparisons",
        {"prompt": "x", "chosen": "TL;DR: a", "rejected": "b"},
        "a response does not begin with 'TL;DR:'",
    ),
    "carper_only_the_marker": (
        "carper_comparisons",
        {"prompt": "x", "chosen": "TL;DR: a", "rejected": "TL;DR: "},
        "empty response",
    ),
    "carper_blank_prompt": (
        "carper_tldr",
        {"prompt": "TL;DR: ", "label": "a"},
        "empty prompt",
    ),
    "carper_prompt": (
        "carper_tldr",
        {"prompt": "POST: x", "label": "a"},
        "the prompt does not end with 'TL;DR:'",
    ),
    # Prompts of equal length: cutting `rejected` at the length of the prompt of `chosen`
    # would take this row for a good one.
    "hh_sides": (
        "hh",
        {"chosen": side("one", "yes"), "rejected": side("two", "no")},
        "sides disagree on the prompt",
    ),
    "hh_extra_turn": (
        "hh",
        {"chosen": side("a", "b"), "rejected": side("a", "b") + side("c", "d")},
        "sides disagree on the prompt",
    ),
    "hh_no_marker": (
        "hh",
        {"chosen": side("a", "b"), "rejected": "\n\nHuman: a"},
        "no '\\n\\nAssistant:' in a side",
    ),
}


@pytest.mark.parametrize(("format", "row", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_one_bad_row_costs_one_row_and_names_its_reason(tmp_path, format, row, reason):
    good = {
        "pairs": GOOD,
        "completions": {"prompt": "a", "completion": "b"},
        "openai_comparisons": REDDIT,
        "carper_comparisons": {"prompt": "x", "chosen": "TL;DR: a", "rejected": "TL;DR: b"},
        "carper_tldr": {"prompt": "x\nTL;DR: ", "label": "a"},
        "hh": {"chosen": side("a", "b"), "rejected": side("a", "c")},
    }[format]
    source = jsonl(tmp_path, good, row, good)
    pairs, report = read_pairs(source, format=format, max_bad_fraction=0.5)
    assert report.skipped == {reason: [2]}
    assert [pair.line for pair in pairs] == [1, 3]


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prompt": "a", "completion": "\\ud83d\\ude00"}',
        '{"prompt": "a", "completion": "😀"}'.encode(),
        b'\xef\xbb\xbf{"prompt": "a", "completion": "\\ud83d\\ude00"}\r',
    ],
    ids=["escaped_pair_of_surrogates", "utf8", "byte_order_mark_and_crlf"],
)
def test_good_unicode_is_not_mistaken_for_bad(tmp_path, raw):
    pairs, _ = read_pairs(jsonl(tmp_path, raw), format="completions")
    assert texts(pairs) == [("a", "😀", None)]


def test_unicode_line_separators_do_not_split_a_row(tmp_path):
    raw = '{"prompt": "a\u2028b\x85c", "completion": "d"}'.encode()
    pairs, _ = read_pairs(jsonl(tmp_path, raw), format="completions")
    assert texts(pairs) == [("a\u2028b\x85c", "d", None)]


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["no_newline", "newline"])
def test_a_last_newline_is_no_row(tmp_path, end):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + end)
    assert read_pairs(str(path), format="pairs")[1].rows == 1


def test_all_kinds_of_file_hold_the_same_pairs(tmp_path):
    rows = [GOOD | {"prompt": f"prompt {i}", "extra": i} for i in range(3)]
    lines = pathlib.Path(jsonl(tmp_path, *rows)).read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = [Pair(f"prompt {i}", " right", " wrong", i + 1) for i in range(3)]
    for suffix in ("jsonl", "jsonl.gz", "json", "parquet"):
        assert read_pairs(str(tmp_path / f"rows.{suffix}"), format="pairs")[0] == expected


def test_nested_parquet_rows_and_rows_past_a_batch(tmp_path):
    table = pyarrow.Table.from_pylist([REDDIT] * 1025)  # one more than a batch holds
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    pairs, report = read_pairs(str(tmp_path / "rows.parquet"), format="openai_comparisons")
    assert pairs[-1] == Pair(REDDIT_PROMPT, " dog left", " cat left", 1025)
    assert report.duplicates == 1024


def test_one_parquet_row_that_is_not_utf8_costs_one_row(tmp_path):
    raw = pyarrow.array([b"fine", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"prompt": ["a", "b"], "completion": raw})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    source = str(tmp_path / "rows.parquet")
    pairs, report = read_pairs(source, format="completions", max_bad_fraction=0.5)
    assert texts(pairs) == [("a", "fine", None)]
    assert report.skipped == {"not UTF-8": [2]}


def test_non_objects_in_a_json_list_are_bad_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, "text", None]))
    _, report = read_pairs(str(path), format="pairs", max_bad_fraction=1.0)
    assert report.skipped == {"not an object": [2, 3]}


# Random text does not compress: half of the file breaks off inside of the data.
NOISE = random.Random(0).randbytes(4000).hex()
BROKEN_FILES = {
    "truncated_gzip": ("a.jsonl.gz", gzip.compress(json.dumps([NOISE]).encode())[:2000]),
    "not_gzip": ("a.jsonl.gz", json.dumps(GOOD).encode()),
    "corrupt_gzip": ("a.jsonl.gz", gzip.compress(b"x")[:10] + b"\xff" * 20),
    "json_not_a_list": ("a.json", json.dumps(GOOD).encode()),
    "json_lines": ("a.json", json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode()),
    "json_not_utf8": ("a.json", b'["\xff"]'),
    "json_too_deep": ("a.json", b"[" * 100_000),
    "not_parquet": ("a.parquet", json.dumps(GOOD).encode()),
    "empty_parquet": ("a.parquet", b""),
}


@pytest.mark.parametrize(("name", "data"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_broken_file_is_named_on_one_line(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name}: not a readable") as caught:
        read_pairs(str(tmp_path / name), format="pairs")
    assert "\n" not in str(caught.value)
    assert "right" not in str(caught.value)


def test_parquet_that_breaks_off_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="a.parquet: not a readable .parquet file"):
        read_pairs(str(path), format="pairs")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.jsonl", "gone.jsonl: no such file"),
        ("owner/gone.parquet", "owner/gone.parquet: no such file"),
        ("./owner/name", "./owner/name: no such file"),
        ("/a/b/c", "/a/b/c: no such file"),
        ("name", "name: no such file"),
        ("table.csv", "table.csv: not a data file"),
        ("folder", "folder: not a data file"),
        ("folder/inner", "folder/inner: not a data file"),
    ],
    ids=[
        "file",
        "like_a_hub",
        "dot",
        "absolute",
        "bare",
        "suffix",
        "folder",
        "hub_or_folder",
    ],
)
def test_a_source_that_is_no_data_file_is_named(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("prompt,completion\n")
    (tmp_path / "folder/inner").mkdir(parents=True)
    with pytest.raises(InputError, match=f"^{message}; give a file"):
        read_pairs(source, format="pairs")


def test_a_hub_name_is_read_with_its_split(monkeypatch):
    def load_dataset(name, *, split):
        assert (name, split) == ("owner/data.v1", "test")
        return datasets.Dataset.from_list([GOOD, GOOD | {"chosen": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"format": "pairs", "split": "test", "max_bad_fraction": 0.5}
    pairs, report = read_pairs("owner/data.v1", **options)
    assert texts(pairs) == [tuple(GOOD.values())]
    assert report.skipped == {"null field 'chosen'": [2]}


def test_a_fields_values_stand_beside_their_pairs_also_where_rows_before_them_were_bad(tmp_path):
    said = [{"batch": "a", "extra": {"sure": 9}}, {"batch": "b", "extra": {"sure": 2.5}}]
    rows = [GOOD | said[0], b"not JSON", GOOD | said[1] | {"chosen": " also right"}, {"batch": "c"}]
    file = jsonl(tmp_path, *rows)
    pairs, _ = read_pairs(file, format="pairs", max_bad_fraction=1.0)
    assert field_values(file, "batch", pairs) == ["a", "b"]
    assert field_values(file, "extra.sure", pairs) == [9, 2.5]
    assert field_values(file, "chosen", pairs[1:]) == [" also right"]
    assert field_values(file, "batch", []) == []


def test_a_fields_values_come_from_the_split_of_a_hub(monkeypatch):
    load = lambda name, split: datasets.Dataset.from_list([GOOD | {"split": split}])
    monkeypatch.setattr(datasets, "load_dataset", load)
    pairs, _ = read_pairs("owner/name", format="pairs", split="test")
    assert field_values("owner/name", "split", pairs, split="test") == ["test"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "missing field 'extra.sure'"),
        ({"extra": 1}, "missing field 'extra.sure'"),
        ({"extra": {"sure": None}}, "null field 'extra.sure'"),
        ({"extra": {"sure": [1]}}, "field 'extra.sure' is not a string or an integer or a number"),
        ({"extra": {"sure": {}}}, "field 'extra.sure' is not a string"),
    ],
    ids=str,
)
def test_a_row_without_the_field_is_named_by_line(tmp_path, row, reason):
    file = jsonl(tmp_path, GOOD | {"extra": {"sure": True}}, GOOD | row)
    pairs, _ = read_pairs(file, format="pairs")
    assert field_values(file, "extra.sure", pairs[:1]) == [True]
    with pytest.raises(InputError, match=f"rows.jsonl line 2: {reason}"):
        field_values(file, "extra.sure", pairs)


def test_a_hub_that_cannot_be_reached_is_an_input_error(monkeypatch):
    def load_dataset(name, *, split):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"^owner/name: .*ConnectionError: no route\)"):
        read_pairs("owner/name", format="pairs")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "csv"},
            "format='csv' is unknown; choose from pairs, completions, openai",
        ),
        ({"split": "test"}, "split='test' has no effect on a file"),
        ({"limit": 0}, "limit=0"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction=1.5"),
        ({"max_bad_fraction": float("nan")}, "max_bad_fraction=nan"),
    ],
    ids=["format", "split", "limit", "fraction", "nan"],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        read_pairs(jsonl(tmp_path, GOOD), **{"format": "pairs"} | options)


def test_limit_reads_only_the_first_rows_and_says_so(tmp_path):
    source = jsonl(tmp_path, b"", GOOD, b"not JSON")
    pairs, report = read_pairs(source, format="pairs", limit=2, max_bad_fraction=0.5)
    assert [pair.line for pair in pairs] == [2]
    assert (report.rows, report.limit, report.skipped) == (2, 2, {"blank line": [1]})
    assert "the first 2 rows only" in str(report)


@pytest.mark.parametrize("rows", [[], [b""]], ids=["no_rows", "no_good_row"])
def test_a_data_set_without_pairs_is_refused(tmp_path, rows):
    with pytest.raises(InputError, match="(?s)rows.jsonl.*no row"):
        read_pairs(jsonl(tmp_path, *rows), format="pairs", max_bad_fraction=1.0)


def test_the_bad_fraction_is_a_bound_that_may_be_met(tmp_path):
    # 29/100 is 0.29 in floating point too, while 0.29 * 100 is below 29.
    rows = [bad(chosen=None)] * 29 + [GOOD] * 71
    source = jsonl(tmp_path, *rows)
    assert read_pairs(source, format="pairs", max_bad_fraction=0.29)[1].kept == 71
    with pytest.raises(InputError, match="29 of 100 rows are bad"):
        read_pairs(source, format="pairs", max_bad_fraction=0.289)


def test_the_refusal_holds_the_table_and_no_text(tmp_path):
    secret = bad(prompt="secret", chosen="secret", rejected="secret", secret="secret")
    rows = [b'"secret', *[secret] * 7, GOOD | {"chosen": 5}]
    with pytest.raises(InputError) as caught:
        read_pairs(jsonl(tmp_path, *rows), format="pairs")
    message = str(caught.value)
    assert [line.strip() for line in message.splitlines()[1:4]] == [
        "7 skipped: chosen equals rejected (line 2, 3, 4, 5, 6, ...)",
        "1 skipped: not JSON (line 1)",
        "1 skipped: field 'chosen' is not a string (line 9)",
    ]
    assert "raise max_bad_fraction" in message
    assert "secret" not in message


def test_the_json_report_holds_counts_and_the_first_twenty_lines(tmp_path):
    source = jsonl(tmp_path, *[GOOD] * 2, *[bad(chosen=None)] * 30)
    _, report = read_pairs(source, format="pairs", max_bad_fraction=1.0)
    assert report.skipped == {"null field 'chosen'": list(range(3, 33))}
    assert json.loads(json.dumps(report.as_json())) == {
        "source": source,
        "format": "pairs",
        "limit": None,
        "rows": 32,
        "kept": 2,
        "skipped": {"null field 'chosen'": {"count": 30, "lines": list(range(3, 23))}},
        "duplicates": 1,
        "contradictions": 0,
    }


def test_duplicates_and_contradictions_are_kept_and_counted(tmp_path):
    swapped = GOOD | {"chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}
    other = swapped | {"prompt": "another"}
    source = jsonl(tmp_path, GOOD, swapped, GOOD, swapped, GOOD, other)
    _, report = read_pairs(source, format="pairs")
    assert (report.kept, report.duplicates, report.contradictions) == (6, 3, 1)


COMPARISONS = [
    Pair("p", " a", " b", 1),
    Pair("q", " c", " d", 2),
    Pair("p", " b", " e", 5),
]


@pytest.mark.parametrize(
    "responses, expected",
    [
        ("chosen", [("p", " b", 5), ("q", " c", 2)]),
        ("rejected", [("p", " e", 5), ("q", " d", 2)]),
        ("all", [("p", " b", 5), ("p", " e", 5), ("q", " c", 2), ("q", " d", 2)]),
    ],
)
def test_sft_takes_the_responses_of_each_prompts_last_pair(responses, expected):
    found = sft_examples(COMPARISONS, responses)
    assert found == [Pair(prompt, text, None, line) for prompt, text, line in expected]


def test_sft_rows_are_never_merged_and_have_no_other_response():
    sft = [Pair("p", " s", None, 3), Pair("p", " s", None, 4)]
    assert sft_examples([*COMPARISONS, *sft], "chosen")[2:] == sft
    for responses in ("rejected", "all"):
        with pytest.raises(InputError, match="line 3: has no rejected response"):
            sft_examples([*COMPARISONS, *sft], responses)


PAIRS = [Pair(f"prompt {i % 500}", f" a{i}", " b", i + 1) for i in range(1000)]


@pytest.mark.parametrize("seed", [0, 7])
def test_no_prompt_on_both_sides_and_order_does_not_matter(seed):
    train, test = split_by_prompt(PAIRS, test_fraction=0.2, seed=seed)
    assert sorted(train + test) == sorted(PAIRS)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in test}
    # 500 prompts at 0.2: 100 with standard deviation 9; four of them never fail by chance.
    assert abs(len(test) / 2 - 100) < 36
    again, swapped = split_by_prompt(PAIRS[::-1], test_fraction=0.2, seed=seed)
    assert (again[::-1], swapped[::-1]) == (train, test)
    alone = [split_by_prompt([pair], test_fraction=0.2, seed=seed)[1] for pair in PAIRS]
    assert sum(alone, []) == test


def test_the_split_follows_the_seed_and_grows_with_the_fraction():
    sides = {}
    for seed, fraction in [(0, 0.1), (0, 0.4), (1, 0.1)]:
        _, test = split_by_prompt(PAIRS, test_fraction=fraction, seed=seed)
        sides[seed, fraction] = set(test)
    assert sides[0, 0.1] < sides[0, 0.4]
    assert sides[0, 0.1] != sides[1, 0.1]
    assert split_by_prompt(PAIRS, test_fraction=0.0, seed=0) == (PAIRS, [])
    assert split_by_prompt(PAIRS, test_fraction=1.0, seed=0) == ([], PAIRS)


def test_the_split_is_the_same_in_every_process():
    """Against the definition in hexadecimal; `hash` would change with the process."""
    _, test = split_by_prompt(PAIRS, test_fraction=0.25, seed=3)
    first = {p: hashlib.sha256(b"3:" + p.encode()).hexdigest()[0] for p, *_ in PAIRS}
    # A quarter of the sixteen first digits.
    assert test == [pair for pair in PAIRS if first[pair.prompt] in "0123"]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_an_impossible_test_fraction_is_refused(fraction):
    with pytest.raises(InputError, match="test_fraction"):
        split_by_prompt(PAIRS, test_fraction=fraction, seed=0)


@needs_data
def test_the_original_comparisons_equal_the_converted_ones():
    """Every original row stands in the converted files with its post's id and its texts."""
    converted = collections.Counter(
        (row["id"], row["prompt"], row["chosen"], row["rejected"])
        for name in ("comparisons_train.jsonl", "comparisons_test.jsonl")
        for row in map(json.loads, (TLDR / name).read_bytes().splitlines())
    )
    path = TLDR / "openai_comparisons_original_format.jsonl"
    ids = [json.loads(line)["info"]["id"] for line in path.read_bytes().splitlines()]
    pairs, report = read_pairs(str(path), format="openai_comparisons")
    original = collections.Counter((ids[pair.line - 1], *pair[:3]) for pair in pairs)
    absent = (original - converted).total()
    assert (report.rows, report.kept, absent) == (400, 400, 0)


@needs_data
@pytest.mark.parametrize(
    ("name", "format", "rows", "skipped"),
    [
        ("comparisons_train", "pairs", 779, {}),
        ("comparisons_test", "pairs", 156, {}),
        ("sft_train", "completions", 756, {}),
        ("gpt4_judged_test", "pairs", 91, {}),
        ("carper_openai_summarize_tldr_sample", "carper_tldr", 83, {}),
        (
            "carper_openai_summarize_comparisons_sample",
            "carper_comparisons",
            94,
            {"a literal <|endoftext|>": 6, "empty response": 3},
        ),
    ],
    ids=["comparisons", "comparisons_test", "sft", "judged", "carper_tldr", "carper"],
)
def test_the_real_files_are_read_in_canonical_form(name, format, rows, skipped):
    source = str(TLDR / f"{name}.jsonl")
    pairs, report = read_pairs(source, format=format, max_bad_fraction=0.1)
    assert report.rows == rows
    assert {reason: len(lines) for reason, lines in report.skipped.items()} == skipped
    # Line numbers, so that a failure prints none of the text.
    wrong = [
        pair.line
        for pair in pairs
        if not re.search(r"\S\n\nTL;DR:\Z", pair.prompt)
        or not all(text == " " + text.strip() for text in pair[1:3] if text is not None)
    ]
    assert wrong == []


@needs_data
def test_real_contradictions_are_counted():
    """Counted the slow way: every pair against every other one."""
    pairs, report = read_pairs(str(TLDR / "comparisons_test.jsonl"), format="pairs")
    both = {frozenset(a[:3]) for a in pairs for b in pairs if a[:3] == (b[0], b[2], b[1])}
    repeated = [i for i, pair in enumerate(pairs) if pair[:3] in texts(pairs[:i])]
    assert (report.duplicates, report.contradictions) == (len(repeated), len(both))
    assert report.contradictions > 0
