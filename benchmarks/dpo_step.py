"""What a DPO step costs with jaxdpo, against what a user would pick instead, on one machine.

    make benchmark
    GLIBC_TUNABLES=... python benchmarks/dpo_step.py [--cells 70m:tldr:8:2 ...] [--passes 3]
        [--rounds 1] [--contenders jaxdpo official ...] [--trl PYTHON] [--ladder 70m:tldr:4:2]
        [--data FOLDER --tokenizer FILE] [--quick] [--out runs/benchmarks/dpo_step]

A cell is MODEL:LENGTHS:PAIRS:BATCHES, so many batches of so many pairs; lengths are `tldr` or
`hh` (`lengths.py`), or `data`, those of --data. All contenders (`contenders.py`) have the same
random weights and pairs, float32 and as many threads. First each runs every batch once, and
loss, rewards and gradient norm of each, the gradient of every tensor on the first and what the
updates did to its loss must agree, or nothing is timed. Then each runs alone in its process under
the same allocator settings: a round (all batches) that is not counted, then `--rounds` of them;
contenders take turns, `--passes` times, and what they computed meanwhile must agree too. Medians
of rounds, with the least and the greatest.

The official code asks for batches of 64 pairs in micro-batches; 8 pairs of TL;DR at Pythia-70m
are what 24 GiB hold of it (13 GiB), 4 at Pythia-160m. Row shapes of jaxdpo are those of a data
set of 512 pairs, of which the batches are the first.

On two cores all of it takes most of an hour, half of it the official code's; give more batches
where there is time. `trl` runs where it is installed; --trl names an interpreter that has it. It
is no dependency.

The ladder is the step of jaxdpo with each of its levers left out alone, and with all of them; it
is checked and timed as contenders are.

Predictions: a contender's products of matrices, padding included, over those of jaxdpo, is how
much longer it takes if all run at one rate; what is left is the library's. A lever that
multiplies nothing (donation) is predicted at 1. Norms, softmax and optimizer are in no count.

What a cached reference costs stands beside: a pass over the pairs of a round ("reference", in
seconds, after a pass that is not counted), spent once, whatever the epochs. "x jaxdpo" leaves it
out, as a run of many epochs nearly does; "one epoch" is the ratio of round and pass together.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import alone
import lengths
import results
from contenders import BEST, CONTENDERS, RUNGS

from jaxdpo.pythia_config import PythiaConfig

POPULATION = 512  # pairs of the data set
QUICK = "14m:tldr:4:2"
# Each rung against the one that it differs from by its lever alone: separate rows are not packed.
BESIDE = {"without shared": "without packed"}


def main(options: argparse.Namespace) -> None:
    results.warn_if_busy()
    found = {"options": {k: str(v) for k, v in vars(options).items()}, "cells": {}, "best": {}}
    for cell in options.cells:
        found["cells"][cell] = measured(cell, options.contenders, options)
        show(options.out / f"{named(cell)}.png", cell, COLUMNS, found["cells"][cell])
        if found["best"].setdefault(cell, best_torch(found["cells"][cell])):
            results.console.print(f"the best PyTorch: {found['best'][cell]}")
        results.write(options.out, found)
    if options.ladder:
        rungs = measured(options.ladder, list(RUNGS), options)
        found["ladder"] = {options.ladder: rungs}
        title = f"{options.ladder}: jaxdpo with a lever left out"
        columns = [*COLUMNS[:3], "x with it", *COLUMNS[4:]]
        show(options.out / f"ladder-{named(options.ladder)}.png", title, columns, rungs)
        results.write(options.out, found)


def named(cell: str) -> str:
    return cell.replace(":", "-")


def measured(cell: str, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The reports of the contenders or rungs of a cell: all checked, then timed in turns."""
    with tempfile.TemporaryDirectory() as folder:
        config, task = prepared(folder, cell, options)

        def run(kind, name):
            python = options.trl if name.startswith("trl") else sys.executable
            return alone.run(alone.Job(kind, name, task, options.rounds), python=python)

        reports = {name: run("check", name) for name in names}
        checks = {name: report for name, report in reports.items() if "skipped" not in report}
        errors = agreement(folder, checks)
        times = turns(list(checks), options.passes, lambda name: run("time", name))
    for name, report in times.items():
        report |= {"gradient_errors": errors[name], "flops": work(config, report)}
        report["pairs"] = task.batch_size * task.num_batches
    return reports | times


COLUMNS = ["", "s a round", "pairs/s", "x jaxdpo", "one epoch", "predicted"]
COLUMNS += ["GFLOP", "GFLOP/s", "MiB", "reference", "gradients"]


def show(file: Path, title: str, columns: list[str], reports: dict[str, Any]) -> None:
    times = {name: report for name, report in reports.items() if "rounds" in report}
    rows = [row(name, times, BESIDE.get(name, "jaxdpo")) for name in times]
    results.table(title, columns, rows)
    for name in [name for name in reports if name not in times]:
        results.console.print(f"{name}: skipped, {reports[name]['skipped']}", markup=False)
    results.bars(file, title, "seconds", {name: times[name]["rounds"] for name in times})


def row(name: str, reports: dict[str, Any], beside: str) -> list[str]:
    """What `COLUMNS` say of a report; without that of `beside`, nothing that is held against it."""
    report, other = reports[name], reports.get(beside)
    ratio = lambda of: f"{of(report) / of(other):.2f}" if other else ""
    seconds, reference = a_round(report), report["reference_seconds"]
    return [
        name,
        results.median_and_spread(report["rounds"]),
        f"{report['pairs'] / seconds:.2f}",
        ratio(a_round),
        ratio(one_epoch),
        ratio(lambda report: report["flops"]),
        f"{report['flops'] / 1e9:.1f}",
        f"{report['flops'] / seconds / 1e9:.0f}",
        f"{report['peak']:.0f}",
        "each step" if reference is None else f"{reference:.2f}",
        f"{max(report['gradient_errors'].values()):.0e}",
    ]


def a_round(report: dict[str, Any]) -> float:
    return statistics.median(report["rounds"])


def one_epoch(report: dict[str, Any]) -> float:
    """Seconds of a round and of what was spent on its pairs before training."""
    return a_round(report) + (report["reference_seconds"] or 0.0)


def best_torch(reports: dict[str, Any]) -> str | None:
    """Which of the best PyTorch that ran is the fastest."""
    ran = [name for name in BEST if "rounds" in reports.get(name, {})]
    return min(ran, key=lambda name: a_round(reports[name]), default=None)


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


def agreement(folder: str, checks: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The contenders' gradient errors; ends the program where they disagree."""
    errors = {name: alone.gradient_errors(folder, name, plainest(checks)) for name in checks}
    wrong = disagreements(checks)
    wrong += [
        f"{name}: the gradient of {tensor} is {error:.1e} of its norm off"
        for name in checks
        for tensor, error in errors[name].items()
        if not error <= alone.GRADIENT_TOLERANCE
    ]
    refuse(wrong)
    return errors


def plainest(names: Iterable[str]) -> str:
    """Whose results the others' must be."""
    return next(name for name in ("official", "without any", *names) if name in names)


def disagreements(reports: dict[str, Any]) -> list[str]:
    return alone.disagreements(reports, plainest(reports)) if reports else []


def refuse(wrong: list[str]) -> None:
    if wrong:
        sys.exit("\n".join(["the contenders disagree, so no time counts:", *wrong]))


def turns(names: list[str], passes: int, run) -> dict[str, dict[str, Any]]:
    """Reports of runs that took turns, with the seconds of all their `rounds`.

    Ends the program where what they computed meanwhile disagrees.
    """
    reports: dict[str, dict[str, Any]] = {}
    for _ in range(passes):
        now = {name: run(name) for name in names}
        refuse(disagreements(now))
        for name, report in now.items():
            before = reports.get(name, {"rounds": [], "references": [], "peak": 0.0})
            report["rounds"] = before["rounds"] + [sum(times) for times in report["seconds"]]
            report["peak"] = max(before["peak"], report["peak"])
            if report["reference_seconds"] is not None:
                report["references"] = before["references"] + [report["reference_seconds"]]
                report["reference_seconds"] = statistics.median(report["references"])
            reports[name] = report
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
USUAL = [name for name in CONTENDERS if name != "trl+checkpointing"]


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
    asking.add_argument("--rounds", type=int, default=1)
    asking.add_argument("--passes", type=int, default=3)
    asked = checked(asking)
    if asked.quick:
        asked.passes, asked.ladder = 1, asked.ladder and QUICK
    main(asked)
