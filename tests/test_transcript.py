"""A file of completions: what is there is kept, what made it is known, nothing else is touched."""

import json

import pytest
from rich.console import Console
from speakers import TEXTS, checkpoint

from jaxdpo import InputError, prompts, records, transcript
from jaxdpo.completions import completions, decoder, scoring
from jaxdpo.decoding import Samples, Warp

ASKED = prompts.typed([first + last for first in TEXTS for last in TEXTS[:3]])


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("models") / "policy", seed=1)


def ready(name, max_new_tokens=8, seed=3, warp=None):
    rule = Samples(2, Warp() if warp is None else warp)
    return decoder(scoring(model=name), rule, max_new_tokens=max_new_tokens, seed=seed)


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
    transcript.decode(ready(name), ASKED, out=file)
    return file


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_line_a_prompt_in_the_prompts_order(whole):
    said = lines(whole)
    assert [r["index"] for r in said] == list(range(12))
    assert [r["prompt"] for r in said] == [p.texts[0] for p in ASKED]
    assert all(len(r["completions"]) == 2 for r in said)
    assert any(r["completions"][0] != r["completions"][1] for r in said)
    assert len({one["length"] for r in said for one in r["completions"]}) > 2
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
                transcript.decode(ready(name), ASKED, out=file)
        with open(file, "a") as log:
            log.write('{"index": 11, "prompt": " I li')  # a line cut short
    before = lines_of_a_broken(file)
    assert len(before) == 8 and sorted(r["index"] for r in before) != list(range(8))
    said = transcript.decode(ready(name), ASKED, out=file)
    assert lines(file) == said and [r["index"] for r in said] == list(range(12))
    assert [r for r in said if r in before] == sorted(before, key=lambda r: r["index"])
    for ours, theirs in zip(said, lines(whole), strict=True):
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
    said = transcript.decode(ready(name), ASKED, out=whole)
    assert (whole.read_bytes(), whole.stat().st_mtime_ns) == before and said == lines(whole)
    assert "holds the completions of all 12 prompts already" in capfd.readouterr().err


def test_one_killed_before_it_was_put_in_order_is_put_in_order(name, whole, tmp_path):
    file = tmp_path / "said.jsonl"
    backwards = whole.read_text().splitlines(keepends=True)[::-1]
    file.write_text("".join(backwards))
    sidecar = whole.with_name("said.jsonl.settings.json").read_text()
    file.with_name("said.jsonl.settings.json").write_text(sidecar)
    transcript.decode(ready(name), ASKED, out=file)
    assert file.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "changes, asked, named",
    [
        (dict(seed=4), ASKED, "seed"),
        (dict(warp=Warp(0.5, 3)), ASKED, "rule.warp.temperature, rule.warp.top_k"),
        (dict(max_new_tokens=9), ASKED, "max_new_tokens"),
        ({}, ASKED[1:], "prompts.number, prompts.sha256"),
        ({}, prompts.typed([" I"] * 12), "prompts.sha256"),
    ],
)
def test_a_file_of_other_settings_is_refused_with_their_names(name, whole, changes, asked, named):
    before = whole.read_bytes()
    with pytest.raises(InputError, match=f"said.jsonl: .* these differ: {named}\\. Name another"):
        transcript.decode(ready(name, **changes), asked, out=whole)
    assert whole.read_bytes() == before


def test_other_weights_of_the_same_name_are_other_settings(tmp_path):
    model, file = tmp_path / "policy", tmp_path / "said.jsonl"
    transcript.decode(ready(checkpoint(model, seed=1)), ASKED, out=file)
    model.rename(tmp_path / "before")
    with pytest.raises(InputError, match=r"these differ: models.model_0.weights\. "):
        transcript.decode(ready(checkpoint(model, seed=2)), ASKED, out=file)


def test_the_sidecar_says_all_that_was_asked(whole):
    settings = json.loads(whole.with_name("said.jsonl.settings.json").read_text())
    assert settings["rule"]["kind"] == "Samples" and settings["rule"]["num_samples"] == 2
    assert settings["rule"]["warp"] == {"temperature": 1.0, "top_k": None, "top_p": None}
    assert settings["eos_ids"] == [0] and settings["num_tokens"] == 292 and settings["seed"] == 3
    assert settings["prompts"]["number"] == 12 and "jax" in settings["notes"]["versions"]


def test_a_file_of_something_else_is_refused_without_a_model(tmp_path):
    file = tmp_path / "precious.jsonl"
    file.write_text("mine\n")
    with pytest.raises(InputError, match="precious.jsonl: exists, and no precious.jsonl.settings"):
        transcript.check(file)
    assert file.read_text() == "mine\n"


def test_a_file_that_cannot_be_written_is_named_without_a_model(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/said.jsonl: cannot be written to"):
        transcript.check(tmp_path / "file/said.jsonl")
    with pytest.raises(InputError, match="out='': names no file"):
        transcript.check("")
    transcript.check(tmp_path / "new/said.jsonl")
    assert list((tmp_path / "new").iterdir()) == []


def test_what_came_to_nothing_binds_nobody(name, whole, tmp_path):
    """A prompt that cannot be decoded leaves nothing; nor does a kill before the first line."""
    file = tmp_path / "said.jsonl"
    with pytest.raises(InputError, match="prompt 1: has 60 tokens"):
        transcript.decode(ready(name), ASKED + prompts.typed([" I" * 60]), out=file)
    assert list(tmp_path.iterdir()) == []
    records.write_json(file.with_name("said.jsonl.settings.json"), {"seed": 4})
    file.write_text('{"index": 3, "pro')
    transcript.decode(ready(name), ASKED[:2], out=file)
    assert [record["index"] for record in lines(file)] == [0, 1]
    sidecar = records.read_json(file.with_name("said.jsonl.settings.json"))
    assert (sidecar["seed"], sidecar["prompts"]["number"]) == (3, 2)


@pytest.fixture
def copied(whole, tmp_path):
    for file in whole.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / "said.jsonl"


@pytest.mark.parametrize("index", [4, 12, -1, None, "5", [5]])
def test_a_line_of_another_prompt_or_none_is_named(name, copied, index):
    changed = lines(copied)
    changed[5]["index"] = index  # still twelve lines
    records.write_log(copied, changed)
    with pytest.raises(InputError, match="said.jsonl line 6: index .* is of no prompt, or stands"):
        transcript.decode(ready(name), ASKED, out=copied)


def test_a_spoilt_sidecar_is_named(name, copied):
    sidecar = copied.with_name("said.jsonl.settings.json")
    sidecar.write_text(sidecar.read_text()[:40])
    with pytest.raises(InputError, match="said.jsonl.settings.json: does not hold a whole JSON"):
        transcript.decode(ready(name), ASKED, out=copied)


def test_a_model_may_move_and_a_library_change(name, copied, tmp_path):
    sidecar = copied.with_name("said.jsonl.settings.json")
    settings = records.read_json(sidecar)
    settings["notes"]["versions"]["jax"] = "0.0"
    records.write_json(sidecar, settings)
    (tmp_path / "moved").symlink_to(name)
    before = copied.read_bytes()
    transcript.decode(ready(str(tmp_path / "moved")), ASKED, out=copied)
    assert copied.read_bytes() == before


def test_the_table_shows_text_as_it_is_and_says_what_it_leaves_out(capsys):
    one = dict(text=" [red]x[/red]", score=-1.25, logps=-2.5, length=2, ended=True)
    first = {"index": 0, "prompt": "z" * 70 + "a\nb", "completions": [one, one]}
    second = {"index": 1, "prompts": ["c", "d"], "completions": [one] * 30}
    one["implicit_reward"] = 0.5
    Console(width=200).print(transcript.table([first, second]))
    shown = capsys.readouterr().out
    assert shown.count("[red]x[/red]") == 20 and "the first 20 of 32 completions" in shown
    assert shown.count("…" + "z" * 57 + "a⏎b") == 1  # once for its completions
    for word in ("-1.250", "-2.500", "yes", "0.500", "reward"):
        assert word in shown
