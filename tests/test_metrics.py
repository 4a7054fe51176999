"""The log holds each step once, over restarts and kills."""

import json

from rich.console import Console

from jaxdpo.metrics import MetricsWriter, ProgressLine, read_metrics


def write(folder, after, steps):
    with MetricsWriter(folder, after=after) as writer:
        for step in steps:
            writer.write({"step": step, "train/loss": step / 4})
        writer.flush()


def steps(folder):
    return [record["step"] for record in read_metrics(folder)]


def test_resuming_cuts_what_comes_after(tmp_path):
    write(tmp_path, None, range(8))
    write(tmp_path, 4, range(5, 7))
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
    write(tmp_path, None, range(2))  # from the start again
    assert steps(tmp_path) == [0, 1]


def test_a_line_cut_short_by_a_kill_is_dropped_and_rewritten(tmp_path):
    write(tmp_path, None, range(3))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "tra')
    assert steps(tmp_path) == [0, 1, 2]
    write(tmp_path, 2, [3])
    assert steps(tmp_path) == [0, 1, 2, 3]


def test_numbers_survive_exactly_and_the_rest_is_null(tmp_path):
    with MetricsWriter(tmp_path, after=None) as writer:
        writer.write({"step": 1, "train/loss": 0.1 + 0.2, "train/grad_norm": float("inf")})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda name: f"not JSON: {name}")
    assert record["train/loss"].hex() == (0.1 + 0.2).hex()
    assert record["train/grad_norm"] is None


def test_tensorboard_gets_the_same_numbers(tmp_path):
    write(tmp_path, None, range(3))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"train/loss") == 3


def test_progress_says_rate_loss_and_time_left(capsys):
    console = Console(width=200, force_terminal=False)
    with ProgressLine("dpo", 4, start=2, console=console) as line:
        line.update(3, seen=8, loss=0.5)  # too soon after the start to say anything
        line.update(4, seen=16, loss=0.25)
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("dpo 4/4") and "pairs/s" in said and "loss 0.2500" in said
