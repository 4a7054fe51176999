"""A file of completions: what is there is kept, what made it is known, nothing else is touched."""

import json

import pytest
from rich.console import Console
from speakers import TEXTS, checkpoint

from jaxdpo import InputError, prompts, transcript
from jaxdpo.completions import Request, completions, method, scoring
from jaxdpo.decoding import Constraints

ASKED = prompts.typed([first + last for first in TEXTS for last in TEXTS[:3]])


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("models") / "policy", seed=1)


def request(name, max_new_tokens=8, **options):
    options = dict(num_samples=2, seed=3) | options
    limits = Constraints(max_new_tokens, eos_ids=())
    return Request(scoring(model=name), method("sample", options), limits)


def stopping_after(count):
    """As `completions`, but killed; eight prompts are decoded together."""

    def stopped(*arguments, **options):
        for n, each in enumerate(completions(*arguments, **options)):
            if n == count:
                raise KeyboardInterrupt
            yield each

    return stopped


@pytest.fixture(scope="module")
def whole(name, tmp_path_factory):
    file = tmp_path_factory.mktemp("whole") / "new/said.jsonl"
    transcript.decode(request(name), ASKED, out=file)
    return file


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_line_a_prompt_in_the_prompts_order(whole):
    records = lines(whole)
    assert [r["index"] for r in records] == list(range(12))
    assert [r["prompt"] for r in records] == [p.texts[0] for p in ASKED]
    assert all(len(r["completions"]) == 2 for r in records)
    assert any(r["completions"][0] != r["completions"][1] for r in records)
    assert len({one["length"] for r in records for one in r["completions"]}) > 2
    assert sorted(file.name for file in whole.parent.iterdir()) == [
        "said.jsonl",
        "said.jsonl.settings.json",
    ]


def test_a_killed_one_goes_on_to_say_the_same(name, whole, tmp_path, monkeypatch, capfd):
    """Draws are keyed by the prompt: what is decoded beside it, and when, says nothing."""
    file = tmp_path / "said.jsonl"
    for count in (5, 3):
        with monkeypatch.context() as patch:
            patch.setattr(transcript, "completions", stopping_after(count))
            with pytest.raises(KeyboardInterrupt):
                transcript.decode(request(name), ASKED, out=file)
        with open(file, "a") as log:
            log.write('{"index": 11, "prompt": " I li')  # a line cut short
    before = lines_of_a_broken(file)
    assert len(before) == 8 and sorted(r["index"] for r in before) != list(range(8))
    records = transcript.decode(request(name), ASKED, out=file)
    assert lines(file) == records and [r["index"] for r in records] == list(range(12))
    assert [r for r in records if r in before] == sorted(before, key=lambda r: r["index"])
    for ours, theirs in zip(records, lines(whole), strict=True):
        assert ours["prompt"] == theirs["prompt"]
        for one, other in zip(ours["completions"], theirs["completions"], strict=True):
            assert one["tokens"] == other["tokens"] and one["text"] == other["text"]
            assert one["token_logps"] == pytest.approx(other["token_logps"], rel=1e-4)
    assert "decoded 12/12" in capfd.readouterr().err


def lines_of_a_broken(file):
    *good, half = file.read_text(encoding="utf-8").splitlines()
    with pytest.raises(json.JSONDecodeError):
        json.loads(half)
    return [json.loads(line) for line in good]


def test_a_finished_one_is_left_alone(name, whole, capfd):
    before = whole.read_bytes(), whole.stat().st_mtime_ns
    records = transcript.decode(request(name), ASKED, out=whole)
    assert (whole.read_bytes(), whole.stat().st_mtime_ns) == before and records == lines(whole)
    assert "holds the completions of all 12 prompts already" in capfd.readouterr().err


def test_one_killed_before_it_was_put_in_order_is_put_in_order(name, whole, tmp_path):
    file = tmp_path / "said.jsonl"
    backwards = whole.read_text().splitlines(keepends=True)[::-1]
    file.write_text("".join(backwards))
    sidecar = whole.with_name("said.jsonl.settings.json").read_text()
    file.with_name("said.jsonl.settings.json").write_text(sidecar)
    transcript.decode(request(name), ASKED, out=file)
    assert file.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "changes, asked, named",
    [
        (dict(seed=4), ASKED, "seed"),
        (dict(temperature=0.5, top_k=3), ASKED, "temperature, top_k"),
        (dict(max_new_tokens=9), ASKED, "max_new_tokens"),
        ({}, ASKED[1:], "prompts.number, prompts.sha256"),
        ({}, prompts.typed([" I"] * 12), "prompts.sha256"),
    ],
)
def test_a_file_of_other_settings_is_refused_with_their_names(name, whole, changes, asked, named):
    before = whole.read_bytes()
    with pytest.raises(InputError, match=f"said.jsonl: .* these differ: {named}\\. Name another"):
        transcript.decode(request(name, **changes), asked, out=whole)
    assert whole.read_bytes() == before


def test_other_weights_of_the_same_name_are_other_settings(tmp_path):
    model, file = tmp_path / "policy", tmp_path / "said.jsonl"
    transcript.decode(request(checkpoint(model, seed=1)), ASKED, out=file)
    model.rename(tmp_path / "before")
    with pytest.raises(InputError, match=r"these differ: models.model_0.weights\. "):
        transcript.decode(request(checkpoint(model, seed=2)), ASKED, out=file)


def test_the_sidecar_says_all_that_was_asked(whole):
    settings = json.loads(whole.with_name("said.jsonl.settings.json").read_text())
    assert settings["method"] == "sample" and settings["num_samples"] == 2
    assert settings["temperature"] == 1.0 and settings["top_p"] is None  # the defaults too
    assert settings["eos_ids"] == [0] and settings["num_tokens"] == 292
    assert settings["prompts"]["number"] == 12 and "jax" in settings["versions"]


def test_a_file_of_something_else_is_refused_before_a_model_is_loaded(tmp_path):
    file = tmp_path / "precious.jsonl"
    file.write_text("mine\n")
    with pytest.raises(InputError, match="precious.jsonl: exists, and no precious.jsonl.settings"):
        transcript.decode(request("no/such:model"), ASKED, out=file)
    assert file.read_text() == "mine\n"


def test_a_folder_that_cannot_be_made_is_named(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/said.jsonl: cannot be written to"):
        transcript.decode(request(name), ASKED, out=tmp_path / "file/said.jsonl")


def test_the_table_shows_text_as_it_is_and_says_what_it_leaves_out(capsys):
    one = dict(text=" [red]x[/red]", score=-1.25, logps=-2.5, length=2, ended=True)
    first = {"index": 0, "prompt": "z" * 60 + "a\nb", "completions": [one, one]}
    second = {"index": 1, "prompts": ["c", "d"], "completions": [one] * 30}
    one["implicit_reward"] = 0.5
    Console(width=150).print(transcript.table([first, second]))
    shown = capsys.readouterr().out
    assert shown.count("[red]x[/red]") == 20 and "the first 20 of 32 completions" in shown
    assert shown.count("…" + "z" * 45 + "a⏎b") == 1  # once for its completions
    for word in ("-1.250", "-2.500", "yes", "0.500", "reward"):
        assert word in shown
