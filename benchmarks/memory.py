"""What a DPO step takes of a machine's memory, with jaxdpo and with what a user would pick instead.

    python benchmarks/memory.py [--cells 70m:tldr:8:1 ...] [--contenders jaxdpo official ...]
        [--trl PYTHON] [--quick] [--out runs/benchmarks/memory]

Each contender (`contenders.py`) runs alone in its process, all batches twice, under the default
allocator and under the settings of the Makefile, which keep freed memory: faster, and never
smaller. The figure is the greatest resident memory of the process since it began, so imports,
compilation, loading and a reference pass are in it; "loaded" is that before the first step.
A jaxdpo process imports jax, flax, orbax and grain but no torch; a PyTorch one torch and
transformers but no jax; trl brings datasets and accelerate on top.

Prediction for the official code at Pythia-70m, 8 pairs padded to 512: 16 x 512 x 50304 float32
logits are 1.6 GB, of which the step holds the logits, their log-softmax, two gradients of that
size and, between, a fifth: 6.5 to 8 GB, with 0.3 GB a copy for weights, gradients, moments and the
reference. jaxdpo has logits at 8 x 70 positions: 0.1 GB.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import alone
import dpo_step
import results


def main(options: argparse.Namespace) -> None:
    found = {}
    for cell in options.cells:
        found[cell] = measured(cell, options)
        show(cell, found[cell], options.out)
        results.write(options.out, {"cells": found})


def measured(cell: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By contender and allocator, what the process took."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _, task = dpo_step.prepared(folder, cell, options)
        for name in options.contenders:
            python = options.trl if name.startswith("trl") else sys.executable
            job = alone.Job("time", name, task, rounds=1)
            runs = {a: alone.run(job, allocator=a, python=python) for a in alone.ALLOCATORS}
            if any("skipped" in answer for answer in runs.values()):
                results.console.print(f"{name}: {runs['default']['skipped']}", markup=False)
            else:
                found[name] = runs
    for allocator in alone.ALLOCATORS:
        dpo_step.refuse(dpo_step.disagreements({n: runs[allocator] for n, runs in found.items()}))
    return found


def show(cell: str, found: dict[str, dict[str, Any]], out: Path) -> None:
    rows = []
    for name, runs in found.items():
        rows.append([name])
        for allocator in ("default", "kept"):
            loaded, peak = runs[allocator]["loaded"], runs[allocator]["peak"]
            ratio = f"{peak / found['jaxdpo'][allocator]['peak']:.2f}" if "jaxdpo" in found else ""
            rows[-1] += [f"{loaded:.0f}", f"{peak:.0f}", ratio]
    columns = ["MiB", "default: loaded", "peak", "x jaxdpo", "kept: loaded", "peak", "x jaxdpo"]
    results.table(f"{cell}: greatest resident memory", columns, rows)
    peaks = {name: [runs["default"]["peak"]] for name, runs in found.items()}
    file = out / f"{cell.replace(':', '-')}.png"
    results.bars(file, f"{cell}: peak memory, default allocator", "MiB", peaks)


if __name__ == "__main__":
    cells = ["70m:tldr:8:1", "160m:tldr:4:1"]
    asking = dpo_step.arguments(__doc__, cells=cells, out="runs/benchmarks/memory")
    asking.set_defaults(contenders=[name for name in dpo_step.USUAL if "onednn" not in name])
    main(dpo_step.checked(asking))
