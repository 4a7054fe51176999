"""The built-in task is only as good as its labels: every wrong token known, no leak."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
import transformers

from jaxdpo import InputError, synthetic
from jaxdpo.records import read_log
from jaxdpo.synthetic import Task, example, tokenizer, write

SIZES = {"sft_train": 30, "sft_test": 10, "pairs_train": 30, "pairs_test": 10}
HARD = Task(facts=8, stated=6, distractors=8, fillers=8, errors=(1, 6), rephrase=0.5, values=3)


def drawn(task: Task, count: int, split: str = "train", seed: int = 0) -> list:
    return [example(task, seed=seed, split=split, index=i) for i in range(count)]


def post_of(prompt: str) -> str:
    return re.fullmatch(r"SUBREDDIT: r/\w+\n\nTITLE: .+\n\nPOST: (.+)\n\nTL;DR:", prompt).group(1)


def told(post: str, kind: str, wording: str) -> list[str]:
    """Values that the post gives for a kind, read by its sentences, not by its record."""
    wordings = [
        re.escape(sentence).replace(r"\{\}", r"(\w+)").replace(r"\{who\}", "[A-Z][a-z ]+")
        for sentence in getattr(synthetic.KINDS[kind], wording)
    ]
    pattern = "|".join(f"(?<![^.?] ){wording}" for wording in wordings)
    return [value for found in re.findall(pattern, post) for value in found if value]


def within_four_sigmas(hits: int, trials: int, share: float) -> bool:
    return abs(hits - trials * share) <= 4 * math.sqrt(trials * share * (1 - share))


@pytest.mark.parametrize("task", [Task(), HARD], ids=["default", "hard"])
def test_an_error_spans_a_wrong_value_that_the_post_refutes(task):
    for one in drawn(task, 500):
        post = post_of(one.prompt)
        assert task.errors[0] <= len(one.errors) <= task.errors[1]
        for text, errors in [
            (one.rejected, one.errors),
            (one.completion, one.completion_errors),
        ]:
            for kind, start, end, right, wrong in errors:
                assert text[start:end] == wrong != right
                assert {right, wrong} <= set(synthetic.KINDS[kind].values[: task.values])
                assert told(post, kind, "own") == [right]


@pytest.mark.parametrize("rate", [0.0, 1.0], ids=["right", "wrong"])
def test_mending_the_errors_gives_the_chosen_summary(rate):
    def mended(text, errors):
        for _, start, end, right, _ in reversed(errors):
            text = text[:start] + right + text[end:]
        return text

    for one in drawn(Task(sft_error_rate=rate), 500):
        assert mended(one.rejected, one.errors) == one.chosen != one.rejected
        assert mended(one.completion, one.completion_errors) == one.chosen
        assert bool(one.completion_errors) == (rate == 1.0)


def test_the_chosen_summary_states_only_facts_of_the_post():
    kind_of = {value: kind for kind, k in synthetic.KINDS.items() for value in k.values}
    for one in drawn(Task(), 500):
        values = [word for word in re.findall(r"\w+", one.chosen) if word in kind_of]
        assert len(values) == Task().stated
        for value in values:
            assert told(post_of(one.prompt), kind_of[value], "own") == [value]


def test_a_value_is_one_word_of_one_kind_and_stands_in_no_wording():
    values = [value for kind in synthetic.KINDS.values() for value in kind.values]
    assert len(values) == len(set(values))
    wordings = synthetic.OTHERS + synthetic.FILLERS + synthetic._TITLES
    for kind in synthetic.KINDS.values():
        assert len(kind.values) == synthetic._MOST_VALUES
        wordings = wordings + kind.own + kind.others + kind.summary
    assert not set(values) & set(re.findall(r"\w+", " ".join(wordings)))
    assert all(len(tokenizer().encode(" " + value).ids) == 1 for value in values)


def test_the_word_before_a_value_tells_the_kind_and_whose_fact_it_is():
    def cues(kind, wording):
        texts = getattr(synthetic.KINDS[kind], wording)
        return {text.split("{}")[0].split()[-1] for text in texts}

    own = {kind: cues(kind, "own") | cues(kind, "summary") for kind in synthetic.KINDS}
    assert all(len(words) == 1 for words in own.values())
    assert len(set.union(*own.values())) == len(own)
    for kind in synthetic.KINDS:
        assert not cues(kind, "others") & set.union(*own.values())


def test_an_article_fits_its_word():
    texts = " ".join(one.prompt + one.chosen + one.rejected for one in drawn(HARD, 300))
    assert not re.findall(r"\b[Aa] [aeiou]\w*|\b[Aa]n [^aeiou\W]\w*", texts)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_wrong_values_come_from_the_post_as_often_as_asked(share):
    found = [
        told(post_of(one.prompt), error.kind, "others") == [error.wrong]
        for one in drawn(Task(from_post=share), 1000)
        for error in one.errors
    ]
    assert within_four_sigmas(sum(found), len(found), share)


def test_errors_and_erroneous_completions_come_as_often_as_asked():
    sample = drawn(Task(sft_error_rate=0.3), 2000)
    assert within_four_sigmas(sum(bool(one.completion_errors) for one in sample), 2000, 0.3)
    assert within_four_sigmas(sum(len(one.errors) == 2 for one in sample), 2000, 0.5)


def test_a_rephrased_rejected_differs_in_length_but_not_in_facts():
    sample = drawn(Task(rephrase=1.0), 300)
    sizes = [len(one.rejected.split()) - len(one.chosen.split()) for one in sample]
    assert min(sizes) < 0 < max(sizes)
    for one in sample:
        mended = one.rejected
        for error in one.errors:
            assert error.right in one.chosen
            mended = mended.replace(error.wrong, error.right)
        values = {v for kind in synthetic.KINDS.values() for v in kind.values}
        words = [set(re.findall(r"\w+", text)) & values for text in (mended, one.chosen)]
        assert words[0] == words[1]


@pytest.mark.parametrize(
    "knob",
    [
        {"facts": 6},
        {"stated": 2},
        {"distractors": 4},
        {"fillers": 2},
        {"values": 5},
        {"errors": (3, 3)},
        {"from_post": 1.0},
        {"rephrase": 1.0},
        {"sft_error_rate": 1.0},
    ],
    ids=lambda knob: next(iter(knob)),
)
def test_every_knob_has_an_effect(knob):
    assert drawn(Task(**knob), 20) != drawn(Task(), 20)


def test_the_knob_test_knows_every_knob():
    mark = test_every_knob_has_an_effect.pytestmark[0]
    assert [next(iter(knob)) for knob in mark.args[1]] == [
        field.name for field in dataclasses.fields(Task)
    ]


def test_a_post_holds_as_many_sentences_as_asked():
    for task in (Task(), HARD, Task(facts=1, stated=1, distractors=1, errors=(1, 1), fillers=0)):
        sentences = task.facts + task.distractors + task.fillers
        assert len(re.findall(r"[.?]", post_of(drawn(task, 1)[0].prompt))) == sentences


@pytest.mark.parametrize(
    ("knob", "name"),
    [
        ({"facts": 0}, "facts"),
        ({"facts": 99}, "facts"),
        ({"stated": 6}, "stated"),
        ({"distractors": 6}, "distractors"),
        ({"fillers": 99}, "fillers"),
        ({"fillers": True}, "fillers"),
        ({"values": 2}, "values"),
        ({"errors": (2, 1)}, "errors"),
        ({"errors": (0, 1)}, "errors"),
        ({"errors": (1, 4)}, "errors"),
        ({"from_post": 1.5}, "from_post"),
        ({"from_post": 0.1, "distractors": 2}, "from_post"),
        ({"rephrase": float("nan")}, "rephrase"),
        ({"sft_error_rate": -0.1}, "sft_error_rate"),
    ],
    ids=str,
)
def test_a_bad_knob_is_named(knob, name):
    with pytest.raises(InputError, match=f"^{name}"):
        Task(**knob)


def test_a_knob_of_a_wrong_type_is_named_without_the_type_checker():
    knobs = [{"fillers": 1.0}, {"errors": 1}, {"errors": "ab"}, {"sft_error_rate": "0.1"}]
    code = f"""
from jaxdpo import InputError, synthetic
for knob in {knobs}:
    try:
        synthetic.Task(**knob)
    except InputError as error:
        print(str(error).split()[0].strip(":"))
"""
    named = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert named.stdout.decode().split() == ["fillers", "errors", "errors", "sft_error_rate"]


def test_an_unknown_split_is_named():
    with pytest.raises(InputError, match="split: 'valid'"):
        example(Task(), seed=0, split="valid", index=0)


def test_train_and_test_share_no_prompt_even_where_few_exist():
    tiny = Task(facts=1, stated=1, distractors=0, fillers=0, values=3, errors=(1, 1), from_post=0.0)
    train, test = ({one.prompt for one in drawn(tiny, 2000, s)} for s in ("train", "test"))
    assert len(train) < 2000  # so collisions do happen, and none crosses the border
    assert not train & test
    assert train & {one.prompt for one in drawn(tiny, 2000, seed=1)}


def test_tokens_give_back_the_text_and_cover_the_vocabulary():
    pieces, seen = tokenizer(), set()
    for task in (Task(), HARD, dataclasses.replace(HARD, values=16)):
        for one in drawn(task, 700):
            texts = [one.prompt, one.chosen, one.rejected, one.prompt + one.chosen]
            encoded = [encoding.ids for encoding in pieces.encode_batch(texts)]
            assert [pieces.decode(ids) for ids in encoded] == texts
            assert encoded[3] == encoded[0] + encoded[1]  # no piece spans the border
            seen.update(*encoded)
    vocabulary = pieces.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert [pieces.id_to_token(i) for i in (0, 1)] == ["<|endoftext|>", "<|padding|>"]
    assert set(vocabulary.values()) - seen == {0, 1}


def test_a_word_outside_the_task_is_refused_not_swallowed():
    with pytest.raises(Exception, match="UNK"):
        tokenizer().encode(" I live in Atlantis.")


def test_lengths_fit_a_small_model():
    pieces = tokenizer()
    for one in drawn(Task(), 500):
        assert 60 <= len(pieces.encode(one.prompt).ids) <= 110
        assert 12 <= len(pieces.encode(one.chosen).ids) <= 25


def test_files_hold_the_examples_and_load_in_transformers(tmp_path):
    write(tmp_path, Task(), seed=3, **SIZES)
    names = [f"{name}.jsonl" for name in SIZES] + ["tokenizer.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in SIZES
    }
    assert {name: len(found) for name, found in rows.items()} == SIZES
    one = example(Task(), seed=3, split="test", index=10)
    assert rows["pairs_test"][0] == {
        "prompt": one.prompt,
        "chosen": one.chosen,
        "rejected": one.rejected,
        "errors": [error._asdict() for error in one.errors],
    }
    prompts = [row["prompt"] for found in rows.values() for row in found]
    assert len(prompts) == len(set(prompts))
    loaded = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        eos_token="<|endoftext|>",
        pad_token="<|padding|>",
    )
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1)
    for row in rows["pairs_train"]:
        text = row["prompt"] + row["rejected"]
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_the_bytes_do_not_depend_on_the_process(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    write(here, Task(), seed=3, **SIZES)
    first = {path.name: path.read_bytes() for path in here.iterdir()}
    write(here, Task(), seed=3, **SIZES)
    code = f"from jaxdpo.synthetic import *; write({str(there)!r}, Task(), seed=3, **{SIZES})"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "7"})
    for folder in (here, there):
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write(tmp_path, Task(), seed=3, **SIZES)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(InputError, match=r"sft_train\.jsonl: cannot be written \(full\)"):
        write(tmp_path, Task(), seed=4, **SIZES)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_is_a_file_and_a_negative_count_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="sft_train.jsonl: cannot be written"):
        write(tmp_path / "file", Task(), seed=3, **SIZES)
    with pytest.raises(InputError, match="pairs_test: -1"):
        write(tmp_path / "new", Task(), seed=3, **SIZES | {"pairs_test": -1})
    assert not (tmp_path / "new").exists()


def test_a_file_of_now_no_rows_is_removed(tmp_path):
    write(tmp_path, Task(), seed=3, **SIZES, posts_test=2)
    write(tmp_path, Task(), seed=3, **SIZES | {"sft_train": 0})
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {f"{name}.jsonl" for name in SIZES if name != "sft_train"} | {"tokenizer.json"}


@pytest.mark.parametrize("task", [Task(), HARD], ids=["default", "hard"])
def test_a_post_tells_its_facts_twice_and_says_nothing_else(task):
    pieces = tokenizer()
    for index in range(200):
        header, text = synthetic.post(task, seed=0, split="train", index=index)
        assert re.fullmatch(r"SUBREDDIT: r/\w+\n\nTITLE: .+\n\nPOST:", header)
        first, again = re.fullmatch(r" (.+)\n\nPOST: (.+)", text).groups()
        facts = {kind: told(first, kind, "own") for kind in synthetic.KINDS}
        assert sum(map(len, facts.values())) == task.facts
        assert facts == {kind: told(again, kind, "own") for kind in synthetic.KINDS}
        assert not any(told(again, kind, "others") for kind in synthetic.KINDS)
        assert pieces.decode(pieces.encode(text).ids) == text and "TL;DR" not in text


def test_posts_are_files_of_their_own_and_no_rows_are_no_file(tmp_path):
    task = Task()
    write(tmp_path, task, seed=3, **SIZES | {"sft_train": 0}, posts_train=4, posts_test=2)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {
        *("sft_test.jsonl", "pairs_train.jsonl", "pairs_test.jsonl", "tokenizer.json"),
        *("posts_train.jsonl", "posts_test.jsonl"),
    }
    rows = read_log(tmp_path / "posts_test.jsonl")
    expected = [synthetic.post(task, seed=3, split="test", index=i) for i in range(2)]
    assert rows == [dict(zip(("prompt", "completion"), post, strict=True)) for post in expected]
