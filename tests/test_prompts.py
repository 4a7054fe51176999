"""A prompt is a line as it stands, and a line that is none is named."""

import json

import pytest

from jaxdpo import InputError, prompts
from jaxdpo.prompts import Prompt


def written(folder, name, text):
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def test_a_text_file_has_a_prompt_to_a_line_as_it_stands(tmp_path):
    file = written(tmp_path, "a.txt", "\ufeff one \\n two\u2028three\r\n4\n")
    assert prompts.from_file(file) == [
        Prompt((" one \\n two\u2028three",), f"{file} line 1"),
        Prompt(("4",), f"{file} line 2"),
    ]


def test_a_json_file_has_one_text_or_one_for_each_model(tmp_path):
    rows = [{"prompt": "a\nb", "other": 1}, {"prompts": ["c", "d"]}]
    file = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))  # no last line's end
    one, two = prompts.from_file(file)
    assert (one.texts, two.texts) == (("a\nb",), ("c", "d"))
    assert one.for_each(2) == ("a\nb", "a\nb") and two.for_each(2) == ("c", "d")
    with pytest.raises(InputError, match=r"a.jsonl line 2: 2 prompts, but 3 models"):
        two.for_each(3)


def test_a_data_set_gives_each_prompt_once_where_it_stands_first(tmp_path):
    rows = [{"prompt": p, "chosen": f" {i}", "rejected": " x"} for i, p in enumerate("baab")]
    file = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    found, report = prompts.collected(data=str(file))
    assert report.rows == 4 and found == [
        Prompt(("b",), f"{file} line 1"),
        Prompt(("a",), f"{file} line 2"),
    ]
    assert prompts.collected(data=str(file), limit=1)[0] == found[:1]


def test_bad_rows_of_a_data_set_are_counted_and_left_out(tmp_path):
    good = {"prompt": "a", "chosen": " b", "rejected": " c"}
    file = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, [{"prompt": 3}, good])))
    found, report = prompts.collected(data=str(file))
    assert found == [Prompt(("a",), f"{file} line 2")] and (report.rows, report.kept) == (2, 1)


WRONG = {
    "empty file": ("a.txt", "", "a.txt: is empty"),
    "blank line": ("a.txt", "one\n \nthree", "a.txt line 2: is empty"),
    "blank last line": ("a.txt", "one\n\n", "a.txt line 2: is empty"),
    "not text": ("a.txt", b"\xff\xfe", "a.txt: not a readable text file"),
    "suffix": ("a.csv", "one", "a.csv: prompts stand in a .txt or .jsonl"),
    "not JSON": ("a.jsonl", '{"prompt": "a"}\n{"prompt', "a.jsonl line 2: not JSON"),
    "not an object": ("a.jsonl", '"a"', "a.jsonl line 1: must be an object"),
    "no field": ("a.jsonl", '{"prompt": "a"}\n{"text": "a"}', "line 2: .* prompt or prompts"),
    "both fields": ("a.jsonl", '{"prompt": "a", "prompts": ["b"]}', "either prompt or prompts"),
    "a number": ("a.jsonl", '{"prompt": 3}', "line 1: prompt must be a string"),
    "null": ("a.jsonl", '{"prompt": null}', "line 1: prompt must be a string"),
    "no list": ("a.jsonl", '{"prompts": "ab"}', "prompts a list of strings"),
    "an empty list": ("a.jsonl", '{"prompts": []}', "prompts a list of strings"),
    "an empty prompt": ("a.jsonl", '{"prompt": " "}', "line 1: is empty"),
    "one empty of several": ("a.jsonl", '{"prompts": ["a", ""]}', "line 1: is empty"),
    "blank JSON line": ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"}', "line 2: not JSON"),
}


@pytest.mark.parametrize("name, text, said", WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_with_a_file_is_named_in_one_line(tmp_path, name, text, said):
    with pytest.raises(InputError, match=said) as caught:
        prompts.from_file(written(tmp_path, name, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "give one of"),
        ({"prompt": ["a"], "prompts": "a.txt"}, "give one of"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt: not a readable"),
        ({"prompt": ["a", ""]}, "prompt 2: is empty"),
        ({"prompt": ["a"], "format": "pairs"}, "format: has no effect without data"),
        ({"prompt": ["a"], "split": "test"}, "split: has no effect"),
        ({"prompts": "a.txt", "limit": 3}, "limit: has no effect"),
    ],
)
def test_one_source_and_nothing_without_effect(given, said):
    with pytest.raises(InputError, match=said):
        prompts.collected(**given)
