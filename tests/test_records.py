"""A log outlives a kill: half a line is left out by readers and cut off by the next writer."""

import json

import pytest

from jaxdpo import InputError, records

DEEP = '{"n":' * 100_000 + "1" + "}" * 100_000  # deeper than Python reads


@pytest.mark.parametrize("half", ['{"n": 2, "te', '{"n": 2', '{"n": 2, "text": "\u00e9'])
def test_half_a_line_is_left_out_and_cut(tmp_path, half):
    file = tmp_path / "a.jsonl"
    whole = [{"n": 0, "text": "\u2028 \u00e9"}, {"n": 1}]
    records.write_log(file, whole)
    with open(file, "ab") as log:
        log.write(half.encode()[: -1 if half[-1] == "\u00e9" else None])  # within a character
    assert records.read_log(file) == whole
    assert records.cut_log(file, lambda record: record["n"] < 1) == whole[:1]
    assert file.read_text(encoding="utf-8") == records.line(whole[0])


@pytest.mark.parametrize("wrong", ['{"n": 1, "te', "", "3", "[]", DEEP])
def test_a_line_before_the_last_that_is_no_record_is_named(tmp_path, wrong):
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"n": 0}}\n{wrong}\n{{"n": 2}}\n')
    with pytest.raises(InputError, match="a.jsonl line 2: is no record"):
        records.read_log(file)


@pytest.mark.parametrize("wrong", ['{"n": 1', "", "3", '{"n": "\udcff"}', DEEP])
def test_a_whole_file_that_is_no_object_is_named(tmp_path, wrong):
    file = tmp_path / "a.json"
    file.write_bytes(wrong.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="a.json: does not hold a whole JSON object"):
        records.read_json(file)
    records.write_json(file, {"n": 1})
    assert records.read_json(file) == {"n": 1}


def test_no_file_is_an_empty_log(tmp_path):
    assert records.read_log(tmp_path / "none") == []


def test_a_whole_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    for value in ({"a": 1}, {"b": [2]}):
        records.write_json(file, value)
        assert json.loads(file.read_text()) == value
    with pytest.raises(TypeError):
        records.write_json(file, {"c": object()})
    assert json.loads(file.read_text()) == {"b": [2]} and list(tmp_path.iterdir()) == [file]


def test_numbers_that_are_not_json_are_not_written(tmp_path):
    for write in (records.line, lambda value: records.write_json(tmp_path / "a.json", value)):
        with pytest.raises(ValueError):
            write({"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_keys_that_differ_are_named_with_their_path():
    found = {"a": 1, "b": {"c": None, "d": (1, 2)}, "e": 0}
    assert records.differing(found, json.loads(json.dumps(found))) == []
    wanted = {"a": 1.0, "b": {"d": [1, 3], "f": None}, "e": {"g": 1}}
    assert records.differing(found, wanted) == ["a", "b.c", "b.d", "b.f", "e"]
