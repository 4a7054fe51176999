"""What a DPO step costs with jaxdpo, against what a user would pick instead, on one machine.

    make benchmark
    GLIBC_TUNABLES=... python benchmarks/dpo_step.py [--cells 70m:tldr:8:2 ...] [--rounds 3]
        [--contenders jaxdpo official ...] [--trl PYTHON] [--data FOLDER --tokenizer FILE]
        [--ladder 70m:tldr:4:2] [--quick] [--out runs/benchmarks/dpo_step]

A cell is MODEL:LENGTHS:PAIRS:BATCHES, so many batches of so many pairs; lengths are `tldr` or
`hh` (`lengths.py`), or `data`, those of --data. All contenders (`contenders.py`) have the same
random weights and pairs, float32 and as many threads. First each runs every batch once, and
loss, rewards and gradient norm of each, all gradients of the first and what the updates did to its
loss must agree, or nothing is timed. Then each runs alone in its process under the same allocator
settings: a round (all batches) that is not counted, then `--rounds` of them; contenders take
turns, `--passes` times. Medians of rounds, with the least and the greatest.

The official code asks for batches of 64 pairs in micro-batches; 8 pairs of TL;DR at Pythia-70m
are what 24 GiB hold of it (13 GiB), 4 at Pythia-160m. Row shapes of jaxdpo are those of a data
set of 512 pairs, of which the batches are the first.

On two cores all of it takes about 25 minutes, most of them the official code's; give more batches
where there is time. `trl` runs where it is installed; --trl names an interpreter that has it. It
is no dependency.

The ladder is the step of jaxdpo with each of its levers left out alone, and with all of them.

Predictions: a contender's products of matrices, padding included, over those of jaxdpo, is how
much longer it takes if all run at one rate; what is left is the library's. A lever that
multiplies nothing (donation) is predicted at 1. Norms, softmax and optimizer are in no count.

What a cached reference costs stands beside: one pass over the pairs ("reference", in seconds per
round), spent once, whatever the epochs. In a run of one epoch it is the reference's share still.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import alone
import lengths
import results
from contenders import CONTENDERS, Levers

from jaxdpo.pythia_config import PythiaConfig

POPULATION = 512  # pairs of the data set
QUICK = "14m:tldr:4:2"
RUNGS = {"jaxdpo": {}} | {f"without {lever}": {lever: False} for lever in Levers._fields}
RUNGS |= {"without any": dict.fromkeys(Levers._fields, False)}
# Each rung against the one that it differs from by its lever alone: separate rows are not packed.
BESIDE = {"without shared": "without packed"}


def main(options: argparse.Namespace) -> None:
    results.warn_if_busy()
    found = {"options": {k: str(v) for k, v in vars(options).items()}, "cells": {}}
    for cell in options.cells:
        found["cells"][cell] = compared(cell, options)
        results.write(options.out, found)
    if options.ladder:
        found["ladder"] = {options.ladder: climbed(options.ladder, options)}
    results.write(options.out, found)


def compared(cell: str, options: argparse.Namespace) -> dict[str, Any]:
    """The contenders of one cell, checked, timed and shown."""
    with tempfile.TemporaryDirectory() as folder:
        config, task = prepared(folder, cell, options)
        python = {name: options.trl for name in options.contenders if name.startswith("trl")}
        run = lambda kind, name: alone.run(
            alone.Job(kind, name, task, options.rounds), python=python.get(name, sys.executable)
        )
        checks, skipped = {}, {}
        for name in options.contenders:
            answer = run("check", name)
            (skipped if "skipped" in answer else checks)[name] = answer
        errors = agreement(folder, checks)
        times = turns(list(checks), options.passes, lambda name: run("time", name))
    flops = {name: work(config, report) for name, report in times.items()}
    rows = []
    for name, report in times.items():
        report |= {"gradient_error": errors[name], "flops": flops[name]}
        rows.append(row(name, times, "jaxdpo", task.batch_size * task.num_batches))
    title = f"{cell}: {task.num_batches} batches of {task.batch_size} pairs, a round"
    results.table(title, COLUMNS, rows)
    for name, answer in skipped.items():
        results.console.print(f"{name}: skipped, {answer['skipped']}", markup=False)
    file = options.out / f"{cell.replace(':', '-')}.png"
    results.bars(file, title, "seconds", {name: report["rounds"] for name, report in times.items()})
    return times | skipped


def climbed(cell: str, options: argparse.Namespace) -> dict[str, Any]:
    """The ladder: what each lever is worth."""
    with tempfile.TemporaryDirectory() as folder:
        config, task = prepared(folder, cell, options)
        job = lambda rung: alone.Job("time", "jaxdpo", task, options.rounds, RUNGS[rung])
        times = turns(list(RUNGS), options.passes, lambda rung: alone.run(job(rung)))
    refuse(alone.disagreements(times, "without any"))
    for report in times.values():
        report["flops"] = work(config, report)
    pairs = task.batch_size * task.num_batches
    rows = [row(rung, times, BESIDE.get(rung, "jaxdpo"), pairs) for rung in times]
    title = f"{cell}: jaxdpo with a lever left out"
    results.table(title, [*COLUMNS[:3], "x with it", "predicted", *COLUMNS[5:]], rows)
    file = options.out / f"ladder-{cell.replace(':', '-')}.png"
    results.bars(file, title, "seconds", {rung: report["rounds"] for rung, report in times.items()})
    return times


COLUMNS = ["", "s a round", "pairs/s", "x jaxdpo", "predicted"]
COLUMNS += ["GFLOP", "GFLOP/s", "peak MiB", "reference", "gradients"]


def row(name: str, times: dict[str, Any], beside: str, pairs: int) -> list[str]:
    report, other = times[name], times.get(beside, times[name])
    median = statistics.median(report["rounds"])
    reference, error = report["reference_seconds"], report.get("gradient_error")
    return [
        name,
        results.median_and_spread(report["rounds"]),
        f"{pairs / median:.2f}",
        f"{median / statistics.median(other['rounds']):.2f}",
        f"{report['flops'] / other['flops']:.2f}",
        f"{report['flops'] / 1e9:.1f}",
        f"{report['flops'] / median / 1e9:.0f}",
        f"{report['peak']:.0f}",
        "each step" if reference is None else f"{reference:.2f}",
        "" if error is None else f"{error:.0e}",
    ]


def prepared(folder: str, cell: str, options: argparse.Namespace):
    model, source, batch_size, num_batches = cell.split(":")
    small = {"vocab_size": 1024, "num_layers": 2} if options.quick else {}
    config, population = PythiaConfig.from_name(f"pythia-{model}", **small), POPULATION
    if source == "data":
        drawn = lengths.measured(options.data, options.tokenizer, population, options.seed)
    else:
        drawn = lengths.DRAWN[source](population, options.seed)
    pairs = lengths.random_pairs(drawn, config.vocab_size, options.seed)
    sizes = int(batch_size), int(num_batches), options.threads
    return config, alone.write_task(folder, config, pairs, *sizes)


def agreement(folder: str, checks: dict[str, Any]) -> dict[str, float]:
    """The contenders' gradient errors; ends the program where they disagree."""
    least = "official" if "official" in checks else next(iter(checks))
    errors = alone.gradient_errors(folder, list(checks), least)
    wrong = alone.disagreements(checks, least)
    wrong += [
        f"{name}: gradients are {error:.1e} of their norm off"
        for name, error in errors.items()
        if not error <= alone.GRADIENT_TOLERANCE
    ]
    refuse(wrong)
    return errors


def refuse(wrong: list[str]) -> None:
    if wrong:
        sys.exit("\n".join(["the contenders disagree, so no time counts:", *wrong]))


def turns(names: list[str], passes: int, run) -> dict[str, dict[str, Any]]:
    """Reports of runs that took turns, with the seconds of all their `rounds`."""
    reports: dict[str, dict[str, Any]] = {}
    for _ in range(passes):
        for name in names:
            before, report = reports.get(name, {"rounds": [], "peak": 0.0}), run(name)
            report["rounds"] = before["rounds"] + [sum(times) for times in report["seconds"]]
            reports[name] = report | {"peak": max(before["peak"], report["peak"])}
    return reports


def work(config: PythiaConfig, report: dict[str, Any]) -> float:
    """FLOPs of a round's products: one pass forward, two backward, and the reference's, if any.

    A pass over P positions with K keys each, S of them with logits, takes
    L (2 (4 D^2 + 2 D F) P + 4 D P K) + 2 D V S.
    """
    width, passes = config.width, 3 + (report["reference_seconds"] is None)
    layer = 2 * (4 * width**2 + 2 * width * config.mlp_width)
    every = sum(
        rows * length * config.num_layers * (layer + 4 * width * keys)
        + rows * scored * 2 * width * config.vocab_size
        for rows, length, scored, keys in report["shapes"]
    )
    return passes * every


CELLS = ["70m:tldr:8:2", "70m:hh:8:2", "160m:tldr:4:1"]
LADDER = "70m:tldr:4:2"
USUAL = [name for name in CONTENDERS if name not in ("compiled-torch", "trl+checkpointing")]


def arguments(description: str, *, cells: list[str], out: str) -> argparse.ArgumentParser:
    """What the benchmarks that run contenders are asked."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="*", default=cells)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=USUAL)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trl", default=sys.executable, help="an interpreter that has trl")
    parser.add_argument("--data", type=Path, help="a folder with comparisons_train.jsonl")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--quick", action="store_true", help="one small cell: a try")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.quick:
        options.cells = [QUICK]
    if any(":data:" in cell for cell in options.cells) and not (options.data and options.tokenizer):
        parser.error("a cell of `data` needs --data and --tokenizer")
    return options


if __name__ == "__main__":
    asking = arguments(__doc__, cells=CELLS, out="runs/benchmarks/dpo_step")
    asking.add_argument("--ladder", default=LADDER, help="a cell; empty for none")
    asking.add_argument("--rounds", type=int, default=3)
    asking.add_argument("--passes", type=int, default=1)
    asked = checked(asking)
    if asked.quick:
        asked.rounds, asked.ladder = 1, asked.ladder and QUICK
    main(asked)
