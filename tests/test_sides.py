"""What the sides of a comparison say: of a model, a file or the data set, to the same prompts."""

import gc
import json

import jax
import pytest
from speakers import TEXTS, checkpoint

from jaxdpo import InputError, sides, synthetic
from jaxdpo.completions import METHODS
from jaxdpo.records import write_json, write_log
from jaxdpo.sides import Side, asked, decoding, lengths, side

pytestmark = pytest.mark.usefixtures("quick_compile")


def rows(tmp_path, *more):
    file = tmp_path / "pairs.jsonl"
    made = [
        {"prompt": text, "chosen": f" good {n}", "rejected": f" bad {n}", "meta": {"kind": n % 2}}
        for n, text in enumerate(TEXTS)
    ]
    file.write_text("\n".join(map(json.dumps, [*made, *more])))
    return str(file)


def transcript(tmp_path, texts, name="said.jsonl", vocabulary=None, **more):
    """A file of completions, as long as they have words, of which the first was cut short."""
    complete = lambda text, n: {"text": text, "length": len(text.split()) + 1, "ended": n > 0}
    records = [
        {"index": n, "prompt": TEXTS[n], "completions": [complete(text, n)]} | more
        for n, text in enumerate(texts)
    ]
    write_log(tmp_path / name, records)
    if vocabulary:
        made_by = {"models": {"model_0": {"tokenizer": vocabulary}}}
        write_json(tmp_path / f"{name}.settings.json", made_by)
    return str(tmp_path / name)


@pytest.fixture
def the_four(tmp_path):
    return asked(rows(tmp_path))[0]


def take(name, of, tmp_path, **options):
    given = {"decoding": decoding({"max_new_tokens": 2} | options), "dtype": None}
    return side(name, of, **given, out=tmp_path / "out.jsonl")


def test_each_prompt_is_asked_once_with_its_first_rows_responses(tmp_path):
    again = {"prompt": TEXTS[1], "chosen": " other", "rejected": " x", "meta": {"kind": 7}}
    data = rows(tmp_path, again, {"prompt": "p"}, {"prompt": "q", "chosen": " a", "rejected": " b"})
    found, report = asked(data, limit=None)
    assert [one.prompt.texts[0] for one in found] == [*TEXTS, "q"]
    assert [one.chosen for one in found][:2] == [" good 0", " good 1"]
    assert found[2].prompt.place == f"{data} line 3" and found[4].prompt.place.endswith("line 7")
    assert report.rows == 7 and report.skipped == {"missing field 'chosen'": [6]}
    assert {one.subset for one in found} == {""}


def test_a_limit_is_of_prompts_not_of_rows(tmp_path):
    repeated = [{"prompt": TEXTS[0], "chosen": f" {n}", "rejected": " b"} for n in range(9)]
    data = rows(tmp_path, *repeated, {"prompt": "q", "chosen": " a", "rejected": " b"})
    assert len(asked(data, limit=5)[0]) == 5 and len(asked(data, limit=99)[0]) == 5
    with pytest.raises(InputError, match="limit=0: give a positive number of prompts"):
        asked(data, limit=0)


def test_a_subset_is_a_field_of_the_row(tmp_path):
    found, _ = asked(rows(tmp_path), subset="meta.kind", limit=3)
    assert [one.subset for one in found] == ["0", "1", "0"]
    with pytest.raises(InputError, match="line 1: missing field 'nowhere'"):
        asked(rows(tmp_path), subset="nowhere")


def test_the_data_sets_own_responses(the_four, tmp_path):
    chosen, rejected = (take(name, the_four, tmp_path) for name in ("chosen", "rejected"))
    assert chosen.texts[0] == " good 0" and rejected.texts[3] == " bad 3"
    assert chosen.identity["kind"] == "chosen" and chosen.cut is None
    assert chosen.identity["sha256"] != rejected.identity["sha256"]
    sft = the_four[:2] + [the_four[2]._replace(rejected=None)]
    with pytest.raises(InputError, match="line 3: has no rejected response; compare with another"):
        take("rejected", sft, tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("models") / "policy", seed=1)


def test_a_model_decodes_and_its_file_is_the_same_side(model, the_four, tmp_path):
    said = take(model, the_four, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    first = [record["completions"][0] for record in records]
    assert said.texts == [one["text"] for one in first]
    assert said.lengths == [one["length"] - one["ended"] for one in first]
    assert said.cut == sum(not one["ended"] for one in first) > 0
    assert said.identity["kind"] == "model" and said.identity["max_new_tokens"] == 2
    assert "notes" not in said.identity and json.dumps(said.identity)
    read = take(str(tmp_path / "out.jsonl"), the_four, tmp_path)
    assert read[1:2] == said[1:2] and read[3:6] == said[3:6] and read.tokenizer is None
    assert lengths([read, said])[0].T.tolist() == [said.lengths] * 2


def test_a_file_must_cover_the_prompts_and_tells_what_is_not_compared(the_four, tmp_path, capfd):
    file = transcript(tmp_path, ["a", "b b", "", "d"])
    said = take(file, the_four, tmp_path)
    assert said.texts == ["a", "b b", "", "d"] and said.cut == 1 and said.lengths == [2, 2, 0, 1]
    assert capfd.readouterr().err == ""
    take(file, the_four[:3], tmp_path)
    assert "1 of its 4 prompts are not asked here" in capfd.readouterr().err
    with pytest.raises(InputError, match=r"said.jsonl: has no completion for .*line 4, ' My home"):
        take(transcript(tmp_path, ["a", "b", "c"]), the_four, tmp_path)
    several = [{"text": "x"}, {"text": "y"}]
    said = take(transcript(tmp_path, ["a"] * 4, completions=several), the_four, tmp_path)
    assert said.texts == ["x"] * 4 and (said.lengths, said.cut) == (None, 0)
    assert "the first completion of each prompt is compared; 4 others" in capfd.readouterr().err


@pytest.mark.parametrize(
    "more, said",
    [
        ({"prompt": None}, "line 1: has no prompt with completions"),
        ({"completions": []}, "line 1: has no prompt with completions"),
        ({"completions": [{"text": 3}]}, "line 1: has no prompt with completions"),
        ({"completions": ["a"]}, "line 1: has no prompt with completions"),
        ({"prompt": "same"}, "line 2: its prompt stands there before; delete one"),
    ],
)
def test_a_file_of_something_else_is_named_with_its_line(the_four, tmp_path, more, said):
    with pytest.raises(InputError, match=said):
        take(transcript(tmp_path, ["a"] * 4, **more), the_four, tmp_path)
    with pytest.raises(InputError, match="nowhere.jsonl: no such file; give one that"):
        take("nowhere.jsonl", the_four, tmp_path)


def test_lengths_are_in_one_unit_and_say_which():
    words = synthetic.tokenizer()
    data = Side("chosen", [" I feel sad.", " I"], {})
    model = Side("M", [" I live in Oslo", ""], {}, [4, 0], 0, "v", words)
    counted, unit = lengths([data, model])
    assert unit == "tokens of M" and counted.tolist() == [[4, 4], [1, 0]]
    assert lengths([data, data])[1] == "characters"
    assert lengths([data, data])[0].tolist() == [[12, 12], [2, 2]]


def test_what_was_decoded_with_one_vocabulary_needs_no_tokenizer():
    of = lambda vocabulary: Side("x", ["a b", "c"], {}, [2, 1], 0, vocabulary)
    assert lengths([of("v"), of("v")])[1] == "tokens of x"
    assert lengths([of("v"), of("w")])[1] == "characters"
    assert lengths([of(None), Side("chosen", ["a", "b"], {})])[1] == "characters"


def test_a_text_that_a_tokenizer_cannot_write_is_told(capfd):
    """The built-in task's knows its own words alone."""
    model = Side("M", [" I"], {}, [1], 0, "v", synthetic.tokenizer())
    counted, unit = lengths([model, Side("chosen", ["quixotic"], {})])
    assert unit == "characters" and counted.tolist() == [[2, 8]]
    assert "lengths are in characters: the tokenizer cannot encode" in capfd.readouterr().err


def test_how_to_decode_is_one_method_with_its_options_and_limits():
    assert decoding({"method": None})["max_new_tokens"] == sides.MAX_NEW_TOKENS
    found = decoding({"method": "beam", "beam_size": 3, "batch_size": 2, "max_new_tokens": 5})
    assert (found["max_new_tokens"], found["batch_size"], found["num_return"]) == (5, 2, 1)
    assert found["rule"].width == 3 and set(METHODS) >= {"greedy", "beam"}
    with pytest.raises(InputError, match="beam_size: has no effect on greedy"):
        decoding({"beam_size": 3})


def test_a_model_is_let_go_before_the_next_one_is_loaded(model, the_four, tmp_path):
    """Of two large models, one fits."""
    held = lambda: sum(array.nbytes for array in jax.live_arrays())
    gc.collect()
    before = held()
    said = take(model, the_four, tmp_path)
    gc.collect()
    assert held() <= before and said.tokenizer is not None
