"""A report shows what a run's folder holds, says what it does not, and takes text as text."""

import base64
import json

import matplotlib.image
import numpy as np
import pytest
from examples import token_store
from html_document import Document
from markupsafe import Markup
from matplotlib.figure import Figure
from test_page import HOSTILE

from jaxdpo import InputError, recipe, synthetic
from jaxdpo.analysis import curves, report, side_by_side
from jaxdpo.analysis.row_table import row_table
from jaxdpo.batching import RowShape, rows
from jaxdpo.metrics import MetricsWriter
from jaxdpo.records import line, write_json

SECTIONS = [part.title for part in report.PARTS] + ["Completions side by side"]
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def write_metrics(folder, names):
    with MetricsWriter(folder, after=None) as writer:
        writer.write({"step": 0} | {f"eval/{name}": 1.0 for name in names})
        for step in range(1, 21):
            writer.write({"step": step} | {f"train/{name}": step / 10 for name in names})
        writer.write({"step": 21} | {f"eval/{name}": 0.25 for name in names})


def data_report(text="data.jsonl"):
    read = {"source": text, "format": "pairs", "limit": None, "rows": 12, "kept": 9}
    read |= {"duplicates": 1, "contradictions": 0, "skipped": {text: {"count": 3, "lines": [4]}}}
    cut = dict(examples=9, prompts_cut=2, responses_cut=1, eos_lost=0, identical=0)
    cut |= {"dropped": [7, 8], "empty": [], "tokens": 512}
    return {
        "rows": {"train": read},
        "pairs_merged_by_prompt": {"train": 0},
        "prompts_in_train_and_eval": 5,
        "truncation": {"train": cut, "eval": cut},
        "tokens": {},
    }


def completion(text, **numbers):
    return {"text": text, "logps": -2.5, "length": 3, "ended": True} | numbers


def settings(rule, model="runs/a:dpo"):
    return {
        "rule": rule,
        "beta": 0.1,
        "exponents": None,
        "seed": 7,
        "notes": {"models": {"model_0": [model, 500], "reference": ["runs/a:sft", None]}},
        "max_new_tokens": 32,
        "min_new_tokens": 0,
        "no_repeat_ngram": 0,
    }


GREEDY = {"kind": "Samples", "num_samples": 1, "warp": None}


def write_completions(folder, name, records, rule, **about):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(map(line, records)))
    write_json(folder / f"{name}.jsonl.settings.json", settings(rule, **about))


@pytest.fixture
def run(tmp_path):
    """A folder with everything that needs no analysis beforehand."""
    folder = tmp_path / "a run"
    for stage, names in (
        ("sft", ("loss", "loss_per_token", "grad_norm")),
        ("dpo", [name for panel in curves.PANELS["dpo"] for name, *_ in panel.curves]),
    ):
        write_metrics(folder / stage, names)
        write_json(folder / stage / "done.json", {"step": 21})
        write_json(folder / stage / "data_report.json", data_report())
    config = recipe.blank()
    config.dpo.beta = 0.25
    config.model.name = "pythia-14m"
    write_json(folder / "config.json", json.loads(config.to_json_best_effort()))
    write_json(folder / "versions.json", {"jax": "0.10.2", "devices": 1})
    said = [
        {"step": step, "prompt": "Why?", "text": f" said at {step}", "ended": step, "logps": -1.0}
        for step in range(0, 3000, 100)
    ]
    (folder / "dpo/samples.jsonl").write_text("".join(map(line, said)))
    for name, rule in (("greedy", GREEDY), ("beam", {"kind": "Beams", "size": 5, "warp": None})):
        found = [{"index": 0, "prompt": "Why?", "completions": [completion(f" {name} says")]}]
        write_completions(folder / "decoded", name, found, rule)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing is what takes time."""
    monkeypatch.setattr(curves, "draw", lambda *_: Figure(figsize=(1, 1)))
    monkeypatch.setattr(curves, "panels", lambda *_: [])


def written(folder) -> Document:
    report.write(folder)
    document = Document((folder / "report.html").read_text(encoding="utf-8"))
    assert document.faults == []
    return document


def test_summary_by_hand(run):
    table = curves.summary(report.read_metrics(run / "dpo"), "dpo")
    # The first tenth of twenty steps is steps 1 and 2, the last 19 and 20.
    assert ("dpo", "rewards/margins", "0.1500", "1.9500", "1.0000", "0.2500") in table
    assert [row[1] for row in table][0] == "loss"


def test_summary_says_where_a_metric_was_not_finite():
    train = [{"step": n, "train/loss": n / 2 if n < 20 else None} for n in range(1, 21)]
    ends = [{"step": n, "eval/loss": loss} for n, loss in ((0, 0.7), (10, 0.5), (20, None))]
    [row] = curves.summary([*train, *ends], "dpo")
    assert row == ("dpo", "loss", "0.7500", "not finite", "0.7000", "not finite")
    [row] = curves.summary(train[1:19], "dpo")
    assert row == ("dpo", "loss", "1.0000", "9.5000", "–", "–")  # and no evaluation
    [row] = curves.summary(ends[:1], "dpo")
    assert row == ("dpo", "loss", "–", "–", "0.7000", "0.7000")
    assert curves.summary([{"step": 1, "train/grad_norm": 1.0}], "dpo") == []
    steps, values = curves.curve([*train, *ends], "eval/loss")  # drawn without it
    assert steps.tolist() == [0, 10] and values.tolist() == [0.7, 0.5]


def test_a_run_that_diverged_says_so_first(run, undrawn):
    with open(run / "dpo/metrics.jsonl", "a") as log:
        log.write(line({"step": 30, "train/loss": None}))
        log.write(line({"step": 30, "eval/loss": None, "eval/rewards/margins": None}))
    text = " ".join(written(run).text.split())
    said = text[text.index("dpo finished at step") :][:200]
    assert "where not all was finite" in said
    assert "loss not finite" in said and "rewards/margins not finite" in said
    assert "| not finite |" in (run / "summary.md").read_text()


def test_figures_table_and_page_are_written(run):
    shown = report.write(run)
    for name in ("sft_loss.png", "rewards.png"):
        image = matplotlib.image.imread(run / name)
        assert image.shape[0] > 300 and len(np.unique(image.reshape(-1, 4), axis=0)) > 50
    lines = (run / "summary.md").read_text().splitlines()
    assert lines[0].count("|") == 7 and any("rewards/accuracies" in line for line in lines)
    assert shown[-1] == f"report: {run / 'report.html'}"


def test_page_says_what_the_folder_holds(run, monkeypatch):
    monkeypatch.setattr(report.trajectories, "read", lambda folder: [folder.name])
    monkeypatch.setattr(report.trajectories, "draw", lambda records: Figure())
    monkeypatch.setattr(report.trajectories, "captions", lambda records: [f"seen in {records}"])
    for module in (report.credit, report.credit_benchmark):
        monkeypatch.setattr(module, "section", lambda record: Markup("<p>{}</p>").format(record))
    (run / "dpo" / report.trajectories.FILE).touch()
    write_json(run / "credit.json", {"reward": "of a token"})
    write_json(run / "credit_benchmark.json", {"auroc": "0.99"})
    text = written(run).text
    assert all(title in text for title in SECTIONS)
    for said in (
        "finished at step 21 · loss 0.2500",
        "beta – 0.25 0.1",
        '"max_grad_norm": 10.0',  # of the whole configuration
        "jax 0.10.2",
        "skipped: data.jsonl",
        "5 prompts stand in both train and eval.",
        "seen in ['dpo']",
        "{'reward': 'of a token'}",
        "{'auroc': '0.99'}",
    ):
        assert said in " ".join(text.split()), said
    assert "not there yet" not in text


def test_what_is_missing_is_said_with_the_command_that_makes_it(run, undrawn):
    for file in [*(run / "decoded").iterdir(), *run.glob("*/samples.jsonl")]:
        file.unlink()
    (run / "sft/data_report.json").unlink()
    (run / "versions.json").unlink()
    text = " ".join(written(run).text.split())
    for what, command in (  # training makes nothing more of a stage that has finished
        (
            "(sft/data_report.json)",
            "sft has finished. A run in a new --workdir measures it: python",
        ),
        ("(dpo/trajectories.jsonl)", "--workdir ... --config.dpo.trajectories="),
        ("(credit.json)", "python launch/analyze.py credit --run '"),  # quoted: it has a space
        ("(credit_benchmark.json)", "python launch/analyze.py credit-benchmark --run '"),
        ("(*/samples.jsonl)", "--workdir ... --config.dpo.samples="),
        ("(decoded/*.jsonl)", "python launch/decode.py --model '"),
    ):
        where = text.index(what)
        assert command in text[where : where + 200], what
    assert text.count("not there yet") == 3 and text.count("not measured while") == 3
    assert "rewards/accuracies" in text  # the rest is drawn


def test_a_run_of_sft_alone_has_nothing_of_dpo(run, undrawn):
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", config | {"stages": ["sft"]})
    text = written(run).text
    assert text.count("this run has no stage dpo") == 3 and "dpo/metrics" not in text
    for file in (run / "decoded").iterdir():  # they name the stage that they came from
        file.unlink()
    (run / "sft/done.json").unlink()
    text = " ".join(written(run).text.split())
    assert ":sft --data" in text and ":dpo" not in text
    assert f"--workdir '{report.os.path.abspath(run)}' --config.sft.samples=4" in text
    assert "dpo.samples=4" not in text


def test_training_half_done_says_so(run):
    (run / "dpo/done.json").unlink()
    metrics = run / "dpo/metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])  # killed in the middle of a line
    for file in (run / "sft").iterdir():
        if file.is_file():
            file.unlink()
    text = " ".join(written(run).text.split())
    assert "not finished: at step 20" in text and "sft not begun" in text


def test_a_folder_with_nothing_but_a_configuration(tmp_path):
    write_json(tmp_path / "config.json", json.loads(recipe.blank().to_json_best_effort()))
    text = written(tmp_path).text
    assert text.count("not begun") == 2 and text.count("not there yet") == 9


@pytest.mark.parametrize(
    "content, why",
    [
        ('{"stages": ["sft", ', "config.json: does not hold a whole JSON object; restore it"),
        ('{"stages": []}', "stages: names none of sft, dpo"),
        ('{"stages": null}', "config.json: does not hold what it should"),
        ('{"a":' * 100_000, "config.json: does not hold a whole JSON object"),
        (
            '{"stages": ["sft"], "a": ' + '{"a":' * 900 + "1" + "}" * 901,
            "config.json: does not hold",
        ),
    ],
)
def test_a_folder_with_nothing_but_a_configuration_that_is_none(tmp_path, content, why):
    (tmp_path / "config.json").write_text(content)
    text = written(tmp_path).text
    assert why in text and all(title in text for title in SECTIONS)
    for name in ("credit.json", "sft/metrics.jsonl", "decoded/*.jsonl"):
        assert f"({name})" in text or "no stage dpo" in text


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", '{"stages": ["sft", '),
        ("versions.json", "[]"),
        ("sft/data_report.json", "{}"),
        ("dpo/data_report.json", '{"truncation": {"train": null}, "rows": 3}'),
        ("dpo/metrics.jsonl", "nonsense\n{}\n"),
        ("dpo/metrics.jsonl", '{"train/loss": "high", "step": 1}\n'),
        ("dpo/metrics.jsonl", '{"train/rewards/chosen": [], "step": 1}\n'),
        ("dpo/done.json", '{"steps": 1}'),
        ("dpo/samples.jsonl", '{"step": 1}\n'),
        ("dpo/trajectories.jsonl", '{"step": 1}\n'),
        ("credit.json", "{"),
        ("credit.json", "{}"),
        ("credit_benchmark.json", '{"trials": 3}'),
        ("decoded/greedy.jsonl", '{"prompt": "Why?", "completions": 3}\n'),
    ],
)
def test_a_file_that_cannot_be_shown_is_named_and_the_rest_is_drawn(run, undrawn, name, content):
    (run / name).write_text(content)
    text = written(run).text
    assert name in text
    if "make it again: python launch/train.py" in text:  # these stages have finished
        assert "make it again: python launch/train.py --config ... --workdir ..." in text
    assert all(title in text for title in SECTIONS)
    assert "beam says" in text and "said at 2900" in text or name == "dpo/samples.jsonl"


@pytest.mark.parametrize("text", HOSTILE + ["\u202eleft\ud83d", "\x00"])
def test_text_of_models_data_and_recipes_is_text(run, undrawn, text):
    config = json.loads((run / "config.json").read_text())
    config["tokenizer"] = config["model"]["overrides"][text] = text
    write_json(run / "config.json", config)
    write_json(run / "versions.json", {text: text})
    write_json(run / "sft/data_report.json", data_report(text))
    said = {"step": 1, "prompt": text, "text": text, "ended": False, "logps": None}
    (run / "sft/samples.jsonl").write_text(json.dumps(said) + "\n")
    (run / "decoded" / "greedy.jsonl").write_text(
        json.dumps({"index": 0, "prompts": [text, "b"], "completions": [completion(text)] * 5})
    )
    write_json(run / "decoded/greedy.jsonl.settings.json", settings(GREEDY, model=text))
    document = written(run)
    assert document.text.count(report.page.visible(text)) >= 14


def test_samples_are_thinned_and_it_says_so(run, undrawn):
    text = written(run).text
    assert "12 of 30 evaluations" in text
    assert "said at 0" in text and "said at 2900" in text and "said at 100\n" not in text


def test_completions_stand_side_by_side(run, undrawn):
    several = [completion(f"answer {n}", implicit_reward=0.5) for n in range(5)]
    records = [{"index": 1, "prompt": f"Question {n}", "completions": several} for n in range(20)]
    warp = {"temperature": 0.7, "top_k": None}
    rule = {"kind": "Samples", "num_samples": 5, "warp": warp}
    write_completions(run / "decoded", "draws", records, rule)
    text = " ".join(written(run).text.split())
    assert "greedy · model runs/a:dpo, step 500 · reference runs/a:sft · beta 0.1" in text
    assert "num samples 5 · temperature 0.7 · seed 7" in text
    assert "the first 12 of 21 prompts" in text and "the first 3 of 5 completions" in text
    asked, said = text.rindex("Why?"), text.rindex("greedy says")
    assert asked < text.rindex("beam says") < said < asked + 200
    assert "implicit reward +0.500 · 3 tokens" in text and "answer 3" not in text


def test_samples_stand_in_the_order_of_the_stages(run, undrawn):
    said = {"step": 1, "prompt": "Why?", "text": "before dpo", "ended": True, "logps": -1.0}
    (run / "sft/samples.jsonl").write_text(line(said))
    text = written(run).text
    assert text.index("before dpo") < text.index("said at 0")


def test_a_prompt_that_stands_twice_keeps_what_was_said_to_it(run):
    records = [
        {"index": n, "prompt": "Why?", "completions": [completion(f"answer {n}")]} for n in range(5)
    ]
    write_completions(run / "decoded", "twice", [*records, records[0] | {"prompt": ""}], GREEDY)
    name, told, cards = side_by_side.column(run / "decoded/twice.jsonl")
    assert [card.text for card in cards["Why?"]] == ["answer 0", "answer 1", "answer 2"]
    assert [card.heading for card in cards["Why?"]] == ["twice 1", "twice 2", "twice 3"]
    assert told[-1] == ("shown", "the first 3 of 5 completions")
    assert [card.heading for card in cards[""]] == ["twice"]


@pytest.mark.parametrize("content, why", [(None, "is not there"), ("{}", "cannot be read")])
def test_completions_are_shown_without_their_settings(run, undrawn, content, why):
    sidecar = run / "decoded/greedy.jsonl.settings.json"
    sidecar.unlink()
    if content is not None:
        sidecar.write_text(content)
    text = written(run).text
    assert f"greedy · settings not known ({sidecar.name} {why})" in text
    assert "greedy says" in text and "restore it" not in text


def test_a_figure_that_cannot_be_parsed_takes_no_page_with_it(run, undrawn, monkeypatch):
    broken = lambda record: report.ElementTree.fromstring("<svg>\x1b</svg>")
    monkeypatch.setattr(report.credit_benchmark, "section", broken)
    write_json(run / "credit_benchmark.json", {})
    text = written(run).text
    assert "credit_benchmark.json: does not hold what it should (ParseError" in text
    assert "beam says" in text


def test_several_runs_stand_side_by_side(run):
    other = run.parent / "b<run>"
    (other / "dpo").mkdir(parents=True)
    config = json.loads((run / "config.json").read_text())
    config["dpo"]["beta"] = 0.5
    write_json(other / "config.json", config)
    (run.parent / "comparison.png").write_bytes(PIXEL)
    (run.parent / "comparison.md").write_text("- it <b>fell</b>\n")
    (run.parent / "c").mkdir()
    (run.parent / "c/config.json").write_text("{")
    for name in ("c", "b<run>"):
        write_json(run.parent / name / "versions.json", {})
    (run.parent / "folder.png").mkdir()
    (run.parent / "letters.png").write_bytes(PIXEL)
    (run.parent / "letters.md").write_bytes(b"\xff\xfe")
    (run.parent / "deep").mkdir()
    deep = '{"stages": ["sft"], "a": ' + '{"a":' * 900 + "1" + "}" * 901
    (run.parent / "deep/config.json").write_text(deep)
    write_json(run.parent / "deep/versions.json", {})
    document = written(run.parent)
    assert all(text in document.text for text in ("b<run>", "it <b>fell</b>", "c/config.json"))
    for name in ("folder.png", "letters.png", "deep/config.json"):
        assert f"{name}: does not hold what it should" in document.text
    differences = document.text[document.text.rindex("Differences") :].split()
    assert differences[-3:] == ["dpo.beta", "0.25", "0.5"]


def test_a_model_exported_into_a_run_makes_it_no_comparison(run, undrawn):
    (run / "exported").mkdir()
    write_json(run / "exported/config.json", {"model_type": "gpt_neox"})
    assert "The run" in written(run).text


def test_a_configuration_names_no_folder_outside(run, undrawn):
    config = json.loads((run / "config.json").read_text())
    stages = ["../elsewhere", str(run.parent), "dpo"]
    write_json(run / "config.json", config | {"stages": stages})
    text = written(run).text
    assert "elsewhere finished" not in text and "dpo finished" in " ".join(text.split())


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run there"):
        report.write(tmp_path)
    with pytest.raises(InputError, match="no run there"):
        report.write(tmp_path / "nowhere")


def test_running_mean_looks_back_only():
    values = np.arange(40.0)
    smooth = curves._running_mean(values)  # a window of two
    np.testing.assert_allclose(smooth[:3], [0.0, 0.5, 1.5])


def test_evaluations_are_spread_over_all():
    steps = [{"step": step} for step in range(30)]
    shown = [one["step"] for one in side_by_side._spread(steps)]
    assert len(shown) == side_by_side.MOST and shown[0] == 0 and shown[-1] == 29
    assert side_by_side._spread(steps[:3]) == steps[:3]


def test_row_table_shows_what_each_token_predicts():
    pieces = synthetic.tokenizer()
    store = token_store([[2, 2, 3]], vocab_size=pieces.get_vocab_size())
    _, chosen, rejected = store[0]
    table = row_table(rows(store, [[0]], RowShape(1, 6, 5, 1)), 0, pieces)
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert cells[0] == ["0", "1", "2", "3", "4"]
    assert cells[3] == ["prompt", "prompt", "chosen", "rejected", "rejected"]
    predicts = [[int(cell.split()[0]) if cell else None for cell in column] for column in cells[6:]]
    # The prompt's last token predicts the first of both; the last of each is the EOS, 0.
    assert predicts[0] == [None, chosen[0], 0, None, None]
    assert predicts[1] == [None, rejected[0], None, rejected[1], 0]
    assert "5 tokens are scored; 1 places of padding" in str(table.caption)
