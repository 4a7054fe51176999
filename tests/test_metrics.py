"""The log holds each step once, over restarts and kills; speed is what the clock says it is."""

import json
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

from jaxdpo import metrics
from jaxdpo.accounting import Accounts, Work
from jaxdpo.batching import Batch
from jaxdpo.metrics import MetricsWriter, ProgressLine, SpeedLog, peak_memory, read_metrics
from jaxdpo.records import read_log


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


def test_the_time_left_is_that_of_what_is_done_here(capsys, monkeypatch):
    """Of 100,000 pairs 50,000 were there; 320 more in 20 seconds leave 49,680, at 16 a second."""
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now.time)
    with ProgressLine("reference", 100_000, console=Console(width=200)) as line:
        now.time += 30.0  # reading what is there
        line.update(50_000, seen=0)
        now.time += 20.0
        line.update(50_320, seen=320)
    with ProgressLine("reference", 8, console=Console(width=200)) as line:
        line.update(8, seen=0)  # nothing is left to do, or to say
    (said,) = capsys.readouterr().out.splitlines()
    assert said == "reference 50320/100000  16.0 pairs/s  3105 s left"


STEP = Work(1, 4, 300, 400, 300, 200, 100, 10**12, 4 * 10**12, 2 * 10**12)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands unless it is set, and a device of 1 TFLOP/s."""
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now.time)
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: 1e12 / jax.device_count())
    return now


class Same(Accounts):
    """Every batch is the same work."""

    def __init__(self):
        pass

    def of(self, batch):
        return STEP


BATCH = Batch(*[None] * len(Batch._fields))


def speed_log(folder):
    return SpeedLog(folder, Same())


def spend(speed, clock, **seconds):
    for what, duration in seconds.items():
        with speed.on(what):
            clock.time += duration


def test_speed_is_of_the_steps_alone(tmp_path, clock):
    with speed_log(tmp_path) as speed:
        clock.time += 30.0  # compiling
        spend(speed, clock, evaluation=8.0)
        speed.write(0)
        for _ in range(2):
            spend(speed, clock, input=1.0, device=2.0)
            clock.time += 1.0
            speed.add(BATCH)
        spend(speed, clock, evaluation=5.0, observers=7.0, checkpoint=3.0)
        speed.write(2)
    first, record = read_log(tmp_path / "speed.jsonl")
    assert (first["step"], first["steps"]) == (0, 0) and "mfu" not in first
    assert (first["seconds/host"], first["seconds/evaluation"]) == (30.0, 8.0)
    spent = dict(input=2.0, device=4.0, host=2.0, evaluation=5.0, observers=7.0, checkpoint=3.0)
    expected = {"step": 2, "steps": 2, "pairs": 8, "tokens": 600}
    expected |= {f"seconds/{what}": value for what, value in spent.items()}
    expected |= {"pairs_per_second": 1.0, "tokens_per_second": 75.0, "input_share": 0.25}
    expected |= {"real_positions_share": 0.75, "real_scored_share": 0.5, "mfu": 0.25, "hfu": 0.5}
    expected |= {"model_tflops_per_second": 0.25, "plain_tflops_per_second": 1.0}
    expected |= {"hardware_tflops_per_second": 0.5, "programs": 0, "programs_from_cache": 0}
    assert record == pytest.approx(
        expected | {"compile_seconds": 0.0, "peak_memory_mib": record["peak_memory_mib"]}
    )
    for part in ("1.0 pairs/s", "75% of positions real", "MFU 25.0%", "25.0% of the time waiting"):
        assert part in speed.summary()


def test_steps_that_are_trained_again_are_covered_again(tmp_path, clock):
    for start, stops in ((0, (0, 2, 4, 5)), (0, (0, 2, 4, 5)), (4, (4, 6, 8))):
        with speed_log(tmp_path) as speed:
            speed.resume(start)
            for stop, before in zip(stops, (stops[0], *stops), strict=False):
                for _ in range(stop - before):
                    speed.add(BATCH)
                clock.time += 1.0
                speed.write(stop)
    found = [(record["step"], record["steps"]) for record in read_log(tmp_path / "speed.jsonl")]
    assert found == [(0, 0), (2, 2), (4, 2), (4, 0), (6, 2), (8, 2)]


def test_what_is_compiled_counts_but_for_observers_and_checkpoints(tmp_path):
    double = lambda: jax.jit(lambda x: x * 2)(1.0)
    with speed_log(tmp_path) as speed:
        double()
        with speed.on("reference"):
            double()
        speed.write(0)
        for what in ("observers", "checkpoint", "evaluation"):
            with speed.on(what):
                double()
        speed.write(1)
    assert [record["programs"] for record in read_log(tmp_path / "speed.jsonl")] == [2, 1]


def test_memory_is_a_devices_where_it_says_so(monkeypatch):
    size, whose = peak_memory()
    assert whose == "process memory" and 2**26 < size < 2**40  # in bytes, not in KiB
    devices = [SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (5, 7)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory() == (7, "device memory")
