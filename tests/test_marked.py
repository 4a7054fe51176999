"""Responses and their marks are read as they stand; what is wrong is said in one line."""

import json

import pytest
from examples import SHARED

from jaxdpo import InputError, synthetic
from jaxdpo.analysis import marked
from jaxdpo.analysis.marked import Mark
from jaxdpo.analysis.token_scores import Span, marked_tokens, pieces
from jaxdpo.tokens import load_tokenizer

SPAN = {"char_start": 11, "char_end": 15}
RESPONSE = {"name": "first", "text": " I live in Oslo.", "spans": [SPAN | {"label": "city"}]}
ITEM = {"prompt": "Where?", "responses": [RESPONSE, {"name": "second", "text": " I"}]}
PAPER = {"prompt": "Where?", "base": "Oslo", "corrupted": "Rome", "title": "t", "edits": []}
PAPER |= {"base_spans": [], "corrupted_spans": [{"char_start": 0, "char_end": 4, "text": "Rome"}]}
TASK = synthetic.Task(facts=2, stated=2, distractors=2, fillers=0, errors=(2, 2))


def written(folder, value) -> str:
    file = folder / "marked.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("held", [[ITEM], {"items": [ITEM], "note": "any"}])
def test_both_forms_of_a_file_hold_the_same(tmp_path, held):
    (item,) = marked.from_file(written(tmp_path, held))
    first, second = item.responses
    assert (item.name, item.prompt, first.name, second.text) == ("item 1", "Where?", "first", " I")
    assert first.marks == (Mark(Span(11, 15, "city"), {}),) and second.marks == ()
    assert first.place.endswith("marked.json item 1, response 1")


def test_a_right_and_a_corrupted_response_are_two_responses(tmp_path):
    ((_, prompt, (base, corrupted)),) = marked.from_file(written(tmp_path, [PAPER]))
    assert (prompt, base.name, base.text, base.marks) == ("Where?", "base", "Oslo", ())
    assert corrupted.marks == (Mark(Span(0, 4), {"text": "Rome"}),)


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


def spanned(**change):
    return [ITEM | {"responses": [RESPONSE | {"spans": [SPAN | change]}]}]


@pytest.mark.parametrize(
    "held, said",
    [
        ("{", "not a readable JSON file"),
        ([], "holds no items"),
        ({"items": []}, "holds no items"),
        ("3", "holds no items"),
        ({"rows": [ITEM]}, "has no field 'items'"),
        ({"items": [ITEM], "more": 1}, "field 'more' is unknown; there are items, source, note"),
        ([ITEM, 7], "item 2: must be an object with prompt, responses"),
        ([ITEM | {"prompt": 7}], "item 1: field 'prompt' must be a string"),
        ([ITEM | {"prompt": ""}], "item 1: prompt or responses is empty"),
        ([ITEM | {"responses": []}], "item 1: prompt or responses is empty"),
        ([without(ITEM, "prompt")], "item 1: has no field 'prompt'"),
        ([ITEM | {"answer": ""}], "item 1: field 'answer' is unknown"),
        ([without(PAPER, "corrupted")], "item 1: has no field 'corrupted'"),
        ([PAPER | {"corupted": ""}], "item 1: field 'corupted' is unknown"),
        ([ITEM | {"responses": ["x"]}], "item 1, response 1: must be an object"),
        ([ITEM | {"responses": [without(RESPONSE, "name")]}], "response 1: has no field 'name'"),
        ([ITEM | {"responses": [RESPONSE | {"text": ""}]}], "response 1: its text is empty"),
        ([ITEM | {"responses": [RESPONSE | {"spans": {}}]}], "'spans' must be a list"),
        ([ITEM | {"responses": [RESPONSE | {"spans": [3]}]}], "span 1: must be an object"),
        (spanned(char_end=1.5), "span 1: field 'char_end' must be a whole number"),
        (spanned(char_start=True), "span 1: field 'char_start' must be a whole number"),
        (spanned(tokens="Oslo"), "span 1: field 'tokens' must be a list"),
        (spanned(label="a\ud800"), "span 1: field 'label' holds a lone surrogate"),
        ([ITEM | {"prompt": "\ud800"}], "item 1: field 'prompt' holds a lone surrogate"),
        ([ITEM | {"responses": [RESPONSE | {"name": "\udfff"}]}], "'name' holds a lone surrogate"),
        ([ITEM | {"responses": [RESPONSE | {"text": "\udfff"}]}], "'text' holds a lone surrogate"),
        (spanned(lable="x"), "span 1: field 'lable' is unknown; .*, label, text, tokens"),
    ],
)
def test_a_wrong_file_is_named_with_its_item_and_field(tmp_path, held, said):
    with pytest.raises(InputError, match=said) as raised:
        marked.from_file(written(tmp_path, held))
    error = str(raised.value)
    assert error.startswith(str(tmp_path / "marked.json")) and "\n" not in error


def test_no_such_file_and_no_text(tmp_path):
    with pytest.raises(InputError, match="nowhere.json: not a readable JSON file"):
        marked.from_file(tmp_path / "nowhere.json")
    (tmp_path / "latin.json").write_bytes(b'["\xff"]')
    with pytest.raises(InputError, match="latin.json: not a readable JSON file"):
        marked.from_file(tmp_path / "latin.json")


@pytest.mark.parametrize(
    "says, said",
    [
        ({"text": "Rome"}, "text should be 'Rome', but the span holds 'Oslo'"),
        ({"tokens": [" Os", "lo"]}, r"tokens should be \[' Os', 'lo'\], .* holds \[' Oslo'\]"),
        ({"token_start": 4}, "token_start should be 4, but the span holds 3"),
        ({"token_end": 3}, "token_end should be 3, but the span holds 4"),
    ],
)
def test_what_a_span_says_of_itself_is_checked(tmp_path, says, said):
    words, file = synthetic.tokenizer(), written(tmp_path, spanned(**says))
    ((_, _, (response,)),) = marked.from_file(file)
    spans = marked_tokens(response.text, [mark.span for mark in response.marks], words)
    texts = [piece.text for piece in pieces(response.text, words)]
    with pytest.raises(InputError, match=f"item 1, response 1, span 1: {said}"):
        marked.check(response, spans, texts)
    right = {"text": "Oslo", "tokens": [" Oslo"], "token_start": 3, "token_end": 4}
    marks = (Mark(response.marks[0].span, right),)
    marked.check(response._replace(marks=marks), spans, texts)


def test_the_built_in_tasks_errors_are_marked(tmp_path):
    synthetic.write(tmp_path, TASK, seed=0, sft_train=1, sft_test=1, pairs_train=1, pairs_test=3)
    file = tmp_path / "pairs_test.jsonl"
    items, report = marked.from_data(str(file), limit=2)
    assert report.rows == 2 and [item.name for item in items] == ["line 1", "line 2"]
    rows = [json.loads(line) for line in file.read_text().splitlines()[:2]]
    for row, (_, prompt, (chosen, rejected)) in zip(rows, items, strict=True):
        assert prompt == row["prompt"]
        assert (chosen.text, rejected.text) == (row["chosen"], row["rejected"])
        assert chosen.marks == () and len(rejected.marks) == 2
        for error, mark in zip(row["errors"], rejected.marks, strict=True):
            assert mark.span == (
                error["start"],
                error["end"],
                f"{error['kind']}: {error['right']} is right",
            )
            assert mark.says == {"text": error["wrong"]}


ERROR = {"kind": "pet", "start": 3, "end": 6, "right": "dog", "wrong": "cat"}


@pytest.mark.parametrize(
    "errors, said",
    [
        (None, "line 2: field 'errors' must be a list"),
        ([ERROR | {"more": 1}], "line 2: error 1 must be an object with kind, start"),
        ([ERROR | {"kind": None}], "line 2: error 1: 'kind' must be a string"),
        ([ERROR | {"kind": "a\ud800"}], "line 2: error 1: .*lone surrogate"),
        ([ERROR | {"end": 7}], "line 2: error 1 is not where it says"),
    ],
)
def test_errors_that_are_there_but_wrong_are_named(tmp_path, errors, said):
    row = {"prompt": "p", "chosen": " a dog", "rejected": " a cat."}
    file = tmp_path / "rows.jsonl"
    file.write_text("\ufeff" + json.dumps(row) + "\n" + json.dumps(row | {"errors": errors}))
    with pytest.raises(InputError, match=said):
        marked.from_data(str(file))
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"errors": [ERROR]}))
    (first, second), _ = marked.from_data(str(file))
    assert not first.responses[1].marks and len(second.responses[1].marks) == 1


def test_other_data_has_no_marks_and_its_bad_rows_are_counted(tmp_path):
    good = {"prompt": "p", "chosen": " a", "rejected": " b"}
    rows = [b"\xff", json.dumps(good | {"note": 3}).encode(), b"{}", json.dumps(good).encode()]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    items, report = marked.from_data(str(tmp_path / "rows.jsonl"))
    assert [item.name for item in items] == ["line 2", "line 4"] and report.rows == 4
    assert not any(response.marks for item in items for response in item.responses)
    (tmp_path / "sft.jsonl").write_text('{"prompt": "p", "completion": " a"}')
    ((_, _, (only,)),), _ = marked.from_data(str(tmp_path / "sft.jsonl"), format="completions")
    assert (only.name, only.text) == ("completion", " a")


@pytest.mark.skipif(not (SHARED / "data/paper").exists(), reason="the paper's examples are absent")
def test_the_papers_spans_are_the_tokens_that_the_paper_printed():
    tokenizer = load_tokenizer(SHARED / "data/tokenizer/20B_tokenizer.json")
    file = SHARED / "data/paper/credit_assignment.json"
    items = marked.from_file(file)
    counts = []
    for held, item in zip(json.loads(file.read_text())["items"], items, strict=True):
        for response in item.responses:
            texts = [piece.text for piece in pieces(response.text, tokenizer)]
            assert [text.strip() for text in texts] == held[f"paper_tokens_{response.name}"]
            spans = marked_tokens(response.text, [mark.span for mark in response.marks], tokenizer)
            marked.check(response, spans, texts)
            expected = [-1] * len(texts)
            for number, told in enumerate(held[f"{response.name}_spans"]):
                places = range(told["token_start"], told["token_end"])
                assert [texts[at] for at in places] == told["tokens"]
                for at in places:
                    expected[at] = number
            assert spans.tolist() == expected
            counts.append(sum(span >= 0 for span in spans))
            shifted = response._replace(text=" " + response.text)
            marks = [mark.span for mark in shifted.marks]
            with pytest.raises(InputError, match="span [12]"):
                spans = marked_tokens(shifted.text, marks, tokenizer)
                marked.check(shifted, spans, [p.text for p in pieces(shifted.text, tokenizer)])
    assert counts == [4, 3, 5, 2, 6, 5]
