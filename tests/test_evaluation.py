"""A win rate from start to end, gone on with after a cut, and every mistake in a line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from html_document import Document
from rich.console import Console
from speakers import checkpoint

from jaxdpo import InputError, evaluation, judges, synthetic, transcript
from jaxdpo.analysis import verdicts
from jaxdpo.completions import completions
from jaxdpo.evaluation import win_rate
from jaxdpo.judge import FIRST, NONE, SECOND, Judge, Verdict
from jaxdpo.records import read_json, read_log

pytestmark = pytest.mark.usefixtures("quick_compile")
ROOT = Path(__file__).parents[1]
TASK = synthetic.Task(facts=1, stated=1, distractors=1, fillers=0, errors=(1, 1))
FILES = ["verdicts.jsonl", "verdicts.jsonl.settings.json", "win_rate.html", "win_rate.json"]
FILES += ["win_rate.md"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    synthetic.write(folder, TASK, seed=0, sft_train=1, sft_test=1, pairs_train=1, pairs_test=12)
    file = folder / "pairs_test.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    marked = [row | {"half": "ab"[n % 2]} for n, row in enumerate(rows)]
    file.write_text("\n".join(map(json.dumps, marked)))
    return str(file)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [checkpoint(folder / name, seed) for seed, name in enumerate(("policy", "other"), 1)]


def longer(seen=None):
    """A judge who prefers the longer response; but of two as long the first, and says so."""

    def ask(questions):
        for place, one in enumerate(questions):
            if seen is not None:
                seen.append(one)
            ahead = len(one.first) >= len(one.second)
            yield place, Verdict(FIRST if ahead else SECOND, f"{len(one.first)} letters")

    return Judge("longer", {"kind": "longer"}, ask, fair=False)


@pytest.fixture
def judge(monkeypatch):
    """The judge that every name stands for; replace it in this list."""
    current = [longer()]
    real = judges.judge
    monkeypatch.setattr(
        judges,
        "judge",
        lambda kind, *arguments, **options: (
            current[0] if kind == "server" else real(kind, *arguments, **options)
        ),
    )
    return current


SERVER = {"judge": "server", "judge_model": "any"}
DATA_SIDES = {"policy": "chosen", "opponent": "rejected"}


def printed(shown) -> str:
    with open(os.devnull, "w") as nowhere:
        console = Console(width=200, record=True, file=nowhere)
        for one in shown:
            console.print(one, markup=False)
        return console.export_text()


def test_an_oracle_tells_right_responses_from_wrong_ones(data, tmp_path):
    out = tmp_path / "new" / "[out]"
    text = printed(win_rate(**DATA_SIDES, data=data, judge="oracle", subset="half", out=str(out)))
    assert sorted(file.name for file in out.iterdir()) == FILES
    numbers = read_json(out / "win_rate.json")
    assert (numbers["wins"], numbers["losses"], numbers["win_rate"]) == (12, 0, 1.0)
    assert numbers["subsets"].keys() == {"a", "b"} and numbers["subsets"]["a"]["wins"] == 6
    assert numbers["unit"] == "characters" and numbers["data"]["rows"] == 12
    assert numbers["settings"]["judge"] == {"kind": "oracle"} and numbers["judge"]["fair"]
    assert "1.000 [0.758, 1.000]" in text and f"{out}/win_rate.html" in text
    rows = read_log(out / "verdicts.jsonl")
    assert [row["place"] for row in rows] == [f"{data} line {n}" for n in range(1, 13)]
    assert {row["winner"] for row in rows} == {"left"}
    assert rows[0]["lengths"] == [len(rows[0]["left"]), len(rows[0]["right"])]
    assert len(rows[0]["verdicts"]) == 1 and rows[0]["verdicts"][0]["reason"]
    html = (out / "win_rate.html").read_text(encoding="utf-8")
    assert Document(html).faults == [] and unnumbered(verdicts.page(numbers, rows)) == unnumbered(
        html
    )
    assert "| all | 12 | 0 | 0 | 0 |" in (out / "win_rate.md").read_text()


def unnumbered(html):
    """A page without the numbers of its figures, which go on from page to page."""
    return re.sub(r"figure-\d+-", "", html)


def test_two_models_answer_the_same_prompts(data, models, tmp_path, judge):
    policy, other = models
    out = tmp_path / "out"
    asked = dict(policy=policy, opponent=other, data=data, limit=6, max_new_tokens=5, **SERVER)
    win_rate(**asked, both_orders=True, seed=3, out=str(out))
    sides = {name: read_log(out / f"{name}.jsonl") for name in ("policy", "opponent")}
    rows = read_log(out / "verdicts.jsonl")
    for side, records in zip(("left", "right"), sides.values(), strict=True):
        assert [row[side] for row in rows] == [one["completions"][0]["text"] for one in records]
        assert [row["prompt"] for row in rows] == [one["prompt"] for one in records]
    numbers = read_json(out / "win_rate.json")
    assert numbers["unit"] == f"tokens of {policy}" and len(rows) == 6
    assert max(length for row in rows for length in row["lengths"]) <= 5
    assert numbers["settings"]["policy"]["models"] != numbers["settings"]["opponent"]["models"]
    for row in rows:
        left, right = len(row["left"]), len(row["right"])
        assert row["winner"] == ("left" if left > right else "right" if right > left else "tie")
        assert {one["left_first"] for one in row["verdicts"]} == {True, False}

    files = {f"{name}": str(out / f"{name}.jsonl") for name in sides}
    again = tmp_path / "again"  # the files say the same as the models
    asked |= files | {"max_new_tokens": None}
    win_rate(**asked, both_orders=True, seed=3, out=str(again))
    assert (again / "verdicts.jsonl").read_bytes() == (out / "verdicts.jsonl").read_bytes()
    assert read_json(again / "win_rate.json")["win_rate"] == numbers["win_rate"]
    assert read_json(again / "win_rate.json")["unit"] == f"tokens of {files['policy']}"


def test_a_replay_equals_the_original_and_asks_nobody(data, tmp_path, judge):
    made = dict(**DATA_SIDES, data=data, both_orders=True, seed=5)
    win_rate(**made, **SERVER, out=str(tmp_path / "one"))
    seen = []
    judge[0] = longer(seen)
    recorded = str(tmp_path / "one/verdicts.jsonl")
    win_rate(**made, judge="replay", recorded=recorded, out=str(tmp_path / "two"))
    one, two = (read_json(tmp_path / name / "win_rate.json") for name in ("one", "two"))
    for record in (one, two):
        del record["judge"], record["settings"]["judge"]
    assert one == two and not seen
    files = [(tmp_path / name / "verdicts.jsonl").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_a_cut_one_goes_on_to_the_same(data, models, tmp_path, monkeypatch, judge):
    """Cut while a side decodes, and while the judge is asked."""
    asked = dict(policy=models[0], data=data, max_new_tokens=5, **SERVER)
    win_rate(**asked, out=str(tmp_path / "whole"))
    out = tmp_path / "cut"

    def cut(*arguments, **options):
        yield next(completions(*arguments, **options))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transcript, "completions", cut)
        with pytest.raises(KeyboardInterrupt):
            win_rate(**asked, out=str(out))
    assert len(read_log(out / "policy.jsonl")) == 1 and not (out / "verdicts.jsonl").exists()

    def stops(questions):
        yield next(longer().ask(questions))
        raise KeyboardInterrupt

    judge[0] = longer()._replace(ask=stops)
    with pytest.raises(KeyboardInterrupt):
        win_rate(**asked, out=str(out))
    assert not (out / "win_rate.json").exists()
    judge[0] = longer()
    win_rate(**asked, out=str(out))
    for name in ("verdicts.jsonl", "win_rate.json", "win_rate.md"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("finished"))
    win_rate(**DATA_SIDES, data=data, judge="oracle", out=out)
    return out


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 1}, "seed"),
        ({"limit": 5}, "prompts.number, prompts.sha256"),
        ({"subset": "half"}, "prompts.sha256, subset"),
        ({"policy": "rejected", "opponent": "chosen"}, "sides"),
        ({**SERVER, "both_orders": True}, "both_orders, judge.kind"),
        (SERVER, "judge.kind"),
    ],
)
def test_a_folder_of_other_settings_is_refused_with_their_names(
    data, finished, judge, change, named
):
    before = {file: file.read_bytes() for file in Path(finished).iterdir()}
    asked = DATA_SIDES | {"data": data, "judge": "oracle", "out": finished} | change
    with pytest.raises(InputError, match=f"other settings; these differ: {named}\\. Name another"):
        win_rate(**asked)
    assert {file: file.read_bytes() for file in Path(finished).iterdir()} == before


def test_other_responses_of_the_same_kind_are_other_settings(data, tmp_path, judge):
    """Which is known only once they are read."""
    file, out = tmp_path / "said.jsonl", tmp_path / "out"
    prompts = [json.loads(line)["prompt"] for line in Path(data).read_text().splitlines()]
    for text in (" one", " other"):
        said = [{"prompt": prompt, "completions": [{"text": text}]} for prompt in prompts]
        file.write_text("\n".join(map(json.dumps, said)))
        asked = dict(policy=str(file), data=data, **SERVER, out=str(out))
        if text == " one":
            win_rate(**asked)
            before = (out / "verdicts.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"these differ: policy.sha256\. Name another"):
        win_rate(**asked)
    assert (out / "verdicts.jsonl").read_bytes() == before


def test_the_seed_is_that_of_tokens_where_they_are_drawn(data, models, tmp_path, judge):
    asked = dict(policy=models[0], data=data, limit=2, max_new_tokens=3, **SERVER)
    win_rate(**asked, method="sample", temperature=2.0, seed=9, out=str(tmp_path / "drawn"))
    settings = read_json(tmp_path / "drawn/win_rate.json")["settings"]
    assert settings["policy"]["seed"] == settings["seed"] == 9
    assert settings["policy"]["rule"]["warp"]["temperature"] == 2.0


def test_the_same_settings_write_the_same_again(data, finished):
    before = {file: file.read_bytes() for file in Path(finished).iterdir()}
    win_rate(**DATA_SIDES, data=data, judge="oracle", out=finished)
    after = {file: file.read_bytes() for file in Path(finished).iterdir()}
    assert {file for file in before if before[file] != after[file]} <= {
        Path(finished, "win_rate.html")  # its figure is numbered on
    }


def test_verdicts_of_nobody_knows_are_not_touched(data, tmp_path):
    (tmp_path / "verdicts.jsonl").write_text("mine\n")
    with pytest.raises(InputError, match="exists, and no verdicts.jsonl.settings.json says"):
        win_rate(**DATA_SIDES, data=data, judge="oracle", out=str(tmp_path))
    assert (tmp_path / "verdicts.jsonl").read_text() == "mine\n"


def test_an_attempt_that_came_to_nothing_binds_nobody(data, tmp_path, judge):
    def broke(questions):
        yield 0, Verdict(FIRST)
        raise InputError("the budget is spent")

    judge[0] = longer()._replace(ask=broke)
    asked = dict(**DATA_SIDES, data=data, **SERVER, out=str(tmp_path / "out"))
    with pytest.raises(InputError, match="the budget is spent"):
        win_rate(**asked)
    judge[0] = longer()
    win_rate(**asked, seed=7)
    assert read_json(tmp_path / "out/win_rate.json")["settings"]["seed"] == 7


def test_a_server_is_asked_once_and_goes_on_with_what_it_answered(data, tmp_path, monkeypatch):
    """Over real connections: its budget ends half-way, and the same command goes on."""
    chat_server = pytest.importorskip("chat_server")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    out = tmp_path / "out"
    asked = dict(**DATA_SIDES, data=data, **SERVER, both_orders=True, out=str(out))
    with chat_server.ChatServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        with pytest.raises(InputError, match="the same command goes on"):
            win_rate(**asked, max_requests=9, concurrency=1)
        assert not (out / "verdicts.jsonl").exists()
        win_rate(**asked)
        assert set(server.answered.values()) == {1} and len(server.answered) == 24
        before = (out / "verdicts.jsonl").read_bytes()
        win_rate(**asked)
        assert server.answered.total() == 24 and (out / "verdicts.jsonl").read_bytes() == before
    numbers = read_json(out / "win_rate.json")
    assert numbers["judge"]["name"] == "server any" and numbers["position_bias"]["answers"] == 24
    assert numbers["settings"]["judge"]["kind"] == "server"
    (tmp_path / "mine.txt").write_text("{post} {summary_a} {summary_b}")
    with pytest.raises(InputError, match="these differ: "):
        win_rate(**asked, template=str(tmp_path / "mine.txt"))
    for missing in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        with monkeypatch.context() as patch:
            patch.delenv(missing)
            with pytest.raises(InputError, match=missing):
                win_rate(**asked | {"out": str(tmp_path / missing)})


def test_fewer_prompts_than_asked_are_told(data, tmp_path, capfd):
    asked = dict(**DATA_SIDES, data=data, judge="oracle", out=str(tmp_path / "out"))
    said = printed(win_rate(**asked, limit=99))
    warning = "warning: limit=99 prompts were asked for, and the data has 12"
    assert warning in capfd.readouterr().err.splitlines()
    assert "99 prompts were asked for, but the data has 12" in said
    assert read_json(tmp_path / "out/win_rate.json")["asked"] == 99


def test_an_empty_generation_is_judged_as_empty_and_counted(data, tmp_path, judge):
    file = tmp_path / "said.jsonl"
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    said = [{"prompt": row["prompt"], "completions": [{"text": " " * (n > 5)}]}
            for n, row in enumerate(rows)]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, said)))
    shown = win_rate(policy=str(file), data=data, **SERVER, out=str(tmp_path / "out"))
    numbers = read_json(tmp_path / "out/win_rate.json")
    assert numbers["empty"] == {"left": 12, "right": 0} and numbers["losses"] == 12
    assert "policy: 12 of 12 responses are empty, and judged as they are" in printed(shown)


def test_a_judge_that_always_says_the_first_is_called_biased(data, tmp_path, judge):
    always = lambda questions: ((place, Verdict(FIRST)) for place, _ in enumerate(questions))
    judge[0] = Judge("always A", {"kind": "always"}, always, fair=False)
    asked = dict(**DATA_SIDES, data=data, **SERVER, both_orders=True)
    said = printed(win_rate(**asked, out=str(tmp_path / "out")))
    assert "first in 100% [86%, 100%]: its win rates say little" in said
    assert read_json(tmp_path / "out/win_rate.json")["ties"] == 12


def test_what_cannot_be_read_is_left_out_and_counted(data, tmp_path, judge):
    none = lambda questions: ((place, Verdict(NONE, "is empty")) for place, _ in
                              enumerate(questions))  # fmt: skip
    judge[0] = Judge("mute", {"kind": "mute"}, none, fair=False)
    said = printed(win_rate(**DATA_SIDES, data=data, **SERVER, out=str(tmp_path / "out")))
    assert "12 of 12 comparisons have no answer that could be read" in said
    numbers = read_json(tmp_path / "out/win_rate.json")
    assert numbers["unread"] == 12 and numbers["win_rate"] is None


def test_the_judges_models_are_loaded_after_those_of_the_sides(data, models, tmp_path, monkeypatch):
    """A judge without models is made first: what is wrong with it is known before decoding."""
    order, side, made = [], evaluation.sides.side, longer()
    monkeypatch.setattr(
        evaluation.sides, "side", lambda name, *a, **k: order.append(name) or side(name, *a, **k)
    )
    monkeypatch.setattr(judges, "judge", lambda kind, *_, **__: order.append(kind) or made)
    asked = dict(**DATA_SIDES, data=data)
    win_rate(**asked, judge="likelihood", judge_model="m", out=str(tmp_path / "1"))
    win_rate(**asked, **SERVER, out=str(tmp_path / "2"))
    assert order == ["chosen", "rejected", "likelihood", "server", "chosen", "rejected"]


def test_a_reward_judge_compares_files_of_completions(data, models, tmp_path):
    of = dict(judge="reward", judge_policy=models[0], judge_reference=models[1], judge_beta=0.1)
    asked = dict(**DATA_SIDES, data=data, limit=4, **of, dtype="float32")
    win_rate(**asked, out=str(tmp_path / "out"))
    numbers = read_json(tmp_path / "out/win_rate.json")
    assert numbers["settings"]["judge"]["beta"] == 0.1 and numbers["unread"] == 0


@pytest.mark.parametrize(
    "change, said",
    [
        ({"policy": None}, "policy: is missing; give it"),
        ({"data": None}, "data: is missing"),
        ({"judge": None}, "judge: is missing"),
        ({"out": None}, "out: is missing"),
        ({"opponent": "chosen"}, "opponent=chosen: is the policy itself; give another"),
        ({"both_orders": True}, "both_orders: has no effect on the oracle judge"),
        ({"seed": -1}, "seed=-1: must be 0 or above"),
        ({"limit": 0}, "limit=0: give a positive number of prompts"),
        ({"dtype": "bfloat16"}, "dtype: has no effect where neither a side nor the judge"),
        ({"beam_size": 4}, "beam_size: has no effect where no side is a model"),
        ({"max_new_tokens": 4}, "max_new_tokens: has no effect where no side is a model"),
        ({"policy": "m", "beam_size": 4}, "beam_size: has no effect on greedy, only on beam"),
        ({"policy": "m", "method": "viterbi"}, "method='viterbi': is unknown; choose from"),
        ({"timeout": 3.0}, "timeout: has no effect on the oracle judge; leave it out"),
        ({"judge": "replay"}, "recorded: is missing; the replay judge needs it"),
        ({"judge": "replay", "recorded": "no.jsonl"}, "no.jsonl: no such file; give the verdicts"),
        ({"judge": "server", "judge_model": "m", "price_input": 1.0}, "price_input: alone says"),
        ({"opponent": "no.jsonl"}, "no.jsonl: no such file; give one that launch/decode.py"),
        ({"data": "no.jsonl"}, "no.jsonl: no such file"),
        ({"subset": "nowhere"}, "line 1: missing field 'nowhere'; name a field"),
    ],
)
def test_a_mistake_is_one_line(data, tmp_path, change, said):
    asked = DATA_SIDES | {"data": data, "judge": "oracle", "out": str(tmp_path / "out")}
    with pytest.raises(InputError, match=said) as caught:
        win_rate(**asked | change)
    assert "\n" not in str(caught.value)


def test_an_option_that_nobody_knows_is_a_mistake_of_ours(data, tmp_path):
    with pytest.raises(TypeError, match="takes no option num_samples"):
        win_rate(**DATA_SIDES, data=data, judge="oracle", out=str(tmp_path), num_samples=3)


def launch(*arguments):
    return subprocess.run(
        [sys.executable, "launch/evaluate.py", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_launcher_prints_the_numbers(data, tmp_path):
    done = launch(
        "win-rate", "--policy", "rejected", "--data", data, "--judge", "oracle",
        "--limit", 8, "--out", tmp_path / "[out]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0.000 [0.000, 0.324]" in done.stdout and "Lengths are in characters" in done.stdout
    assert f"{tmp_path}/[out]/win_rate.html" in done.stdout
    assert "12 rows" in done.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["accuracy", "--judge", "oracle"], "--judge: has no effect on accuracy; leave it out"),
        (["win-rate", "--beta", "0.1"], "--beta: has no effect on win-rate"),
        (["win-rate", "--policy", "x", "--method", "beam"], "data: is missing; give it"),
    ],
)
def test_the_launcher_names_a_mistake_in_a_line(arguments, said):
    done = launch(*arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
