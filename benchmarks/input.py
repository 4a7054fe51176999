"""Whether batches are built faster than a step takes them: the input pipeline on one core.

    python benchmarks/input.py [--model 160m] [--pairs 4096] [--quick] [--out runs/benchmarks/input]

One core packs TL;DR's lengths into rows as a run does (the recipe's defaults, 64 pairs to a
batch, tokens and cached reference mapped from disk), builds them ahead in threads and puts them
on the device; what it is measured against is the step, on all cores, of the same model and
lengths. It must be 10 times as fast, or the program says so and fails: then a device 10 times as
fast would still not wait. Packing is done before the first step, and counted all the same.

Predictions, counted: a pair's part of a row is 40 NumPy calls of half a microsecond to one, and
2,000 numbers copied twice, 0.03 ms; packing tries it against 64 pairs and 12 rows, twice, in some
5,000 additions and comparisons, 0.005 ms.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import alone
import lengths
import numpy as np
import results
from dpo_step import prepared

BATCH_SIZE, VOCABULARY, LEAST = 64, 50304, 10.0


def pairs_per_second(num_pairs: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Of packing all batches, of building and placing them, and of both, in each round."""
    import jax

    from jaxdpo import recipe, sharding
    from jaxdpo.batching import Batches, prefetch
    from jaxdpo.train import put_batch

    store = lengths.store(lengths.random_pairs(lengths.tldr(num_pairs, 0), VOCABULARY, 0))
    store = dataclasses.replace(store, tokens=mapped(folder, store.tokens.astype(np.uint16)))
    reference = mapped(folder, np.zeros(store.scored_offsets[-1], np.float32))
    stage, mesh = recipe.blank().dpo, sharding.make_mesh(devices=jax.devices()[:1])
    put = functools.partial(put_batch, mesh=mesh)
    rates: dict[str, list[float]] = {"packed": [], "built": [], "both": []}
    for _ in range(rounds):
        began = time.perf_counter()
        batches = Batches(
            store,
            batch_size=BATCH_SIZE,
            seed=0,
            row_length=stage.row_length,
            num_buckets=stage.num_buckets,
            reference=reference,
        )
        packed = time.perf_counter()
        for batch in prefetch(batches, 0, len(batches)):
            jax.block_until_ready(put(batch))
        ended = time.perf_counter()
        rates["packed"].append(num_pairs / (packed - began))
        rates["built"].append(num_pairs / (ended - packed))
        rates["both"].append(num_pairs / (ended - began))
    return rates


def mapped(folder: Path, values: np.ndarray) -> np.ndarray:
    """The values in a file, as a run has its tokens (`tokens`) and its reference (`reference`)."""
    file = folder / f"{values.dtype}.npy"
    np.save(file, values)
    return np.load(file, mmap_mode="r")


@contextlib.contextmanager
def one_core():
    """For threads that are started in here; to be entered before JAX starts its own."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:1])
    yield
    os.sched_setaffinity(0, cores)


def step_pairs_per_second(options: argparse.Namespace) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        _, task = prepared(folder, f"{options.model}:tldr:4:2", options)
        answer = alone.run(alone.Job("time", "jaxdpo", task, options.rounds))
    return [task.batch_size * task.num_batches / sum(times) for times in answer["seconds"]]


def main(options: argparse.Namespace) -> None:
    results.warn_if_busy()
    with tempfile.TemporaryDirectory() as folder, one_core():
        rates = pairs_per_second(options.pairs, options.rounds, Path(folder))
    step = step_pairs_per_second(options)
    ratio = statistics.median(rates["both"]) / statistics.median(step)
    rows = [
        [f"batches of {options.pairs} pairs packed", results.median_and_spread(rates["packed"])],
        ["rows built ahead and placed", results.median_and_spread(rates["built"])],
        ["both", results.median_and_spread(rates["both"])],
        [f"step at {options.model}", results.median_and_spread(step)],
        ["both / step", f"{ratio:.0f}"],
    ]
    results.table("input pipeline on one core", ["", "pairs a second"], rows)
    results.write(options.out, {"input": rates, "step": step, "ratio": ratio})
    per_pair = {"input": rates["both"], f"step at {options.model}": step}
    per_pair = {name: [1e3 / rate for rate in values] for name, values in per_pair.items()}
    results.bars(options.out / "input.png", "Time of a pair", "ms", per_pair, ours="input")
    if ratio < LEAST:
        sys.exit(f"the input pipeline is only {ratio:.1f} times as fast as the step")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="160m")
    parser.add_argument("--pairs", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small model and data set: a try")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/input"))
    asked = parser.parse_args()
    if asked.quick:
        asked.model, asked.pairs, asked.rounds = "14m", 256, 1
    main(asked)
