"""A contender alone in its process: what a benchmark asks of it, and what it answers.

Left out: what is measured (`contenders`), and what the numbers are for (the benchmarks).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import contenders
import numpy as np

KEEP = 17179869184
ALLOCATORS = {  # as in the Makefile, and as an unprepared user has it
    "kept": f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={KEEP}:"
    f"glibc.malloc.trim_threshold={KEEP}",
    "default": "",
}
XLA_FLAGS = "--xla_cpu_enable_concurrency_optimized_scheduler=false"  # as launch/door.py has it
# How far float32 may put two stacks apart: sums of log-probabilities near -400 are spaced by
# 3e-5, and RMSprop moves a coordinate by ten learning rates whatever rounding left of its
# gradient, so later batches agree less, and what a loss changed by to a few parts of a hundred.
# PyTorch's norm of 160M gradients is itself off by 4e-5. The same sums weigh each pair's gradient:
# with long responses (hh) all tensors of a contender were off by one factor, 1.4e-5.
METRIC_TOLERANCE, LATER_TOLERANCE, NORM_TOLERANCE, CHANGE_TOLERANCE = 1e-5, 1e-3, 2e-4, 0.05
GRADIENT_TOLERANCE = 5e-5


class Job(NamedTuple):
    """`kind` is "check" (metrics of every batch, gradients of the first) or "time".

    `contender` is one of `contenders.CONTENDERS` or of its `RUNGS`.
    """

    kind: str
    contender: str
    task: contenders.Task
    rounds: int = 1


def run(job: Job, *, allocator: str = "kept", python: str = sys.executable) -> dict[str, Any]:
    """What the contender says: see `answer`; or `{"skipped": why}`."""
    environment = os.environ | {"GLIBC_TUNABLES": ALLOCATORS[allocator]}
    environment |= {"OMP_NUM_THREADS": str(job.task.threads), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"XLA_FLAGS": XLA_FLAGS}
    command = [python, __file__, json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job.contender}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(job: Job) -> dict[str, Any]:
    """Run a job in this process.

    Always the `metrics` of steps, from the initial weights, by which contenders are compared. Of
    "check" they are of each batch in turn and of the first again, and the gradients go into a file
    `gradients-CONTENDER.npz` in the task's folder. Of "time" they are of all batches in each
    round; of every round but the first, the `warm_up`, also the `seconds` of each batch, and of the
    process its greatest resident memory in MiB: once `loaded`, and at the `peak`.
    """
    try:
        ready = (contenders.CONTENDERS | contenders.RUNGS)[job.contender](job.task)
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    batches = range(len(ready.shapes))
    report = {"shapes": ready.shapes, "reference_seconds": ready.reference_seconds}
    if job.kind == "check":
        np.savez(gradients_file(job.task.folder, job.contender), **ready.gradients())
        return report | {"metrics": [ready.step(i) for i in (*batches, 0)]}
    report["loaded"] = peak()
    rounds = [[timed(ready.step, i) for i in batches] for _ in range(1 + job.rounds)]
    report["metrics"] = [metrics for one in rounds for metrics, _ in one]
    warm_up, *report["seconds"] = [[seconds for _, seconds in one] for one in rounds]
    return report | {"warm_up": sum(warm_up), "peak": peak()}


def timed(step, i: int) -> tuple[dict[str, float], float]:
    began = time.perf_counter()
    metrics = step(i)
    return metrics, time.perf_counter() - began


def gradients_file(folder: str | Path, contender: str) -> Path:
    return Path(folder) / f"gradients-{contender}.npz"


def peak() -> float:
    """The greatest resident memory of this process so far, in MiB.

    `ru_maxrss` would be at least that of the process which started this one.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def disagreements(reports: dict[str, dict[str, Any]], with_: str) -> list[str]:
    """Where the metrics of contenders differ from those of one of them beyond rounding."""
    found, expected = [], reports[with_]["metrics"]
    again = len(reports[with_]["shapes"])  # the step that has the first batch once more
    for name, report in reports.items():
        for i, (mine, theirs) in enumerate(zip(report["metrics"], expected, strict=True)):
            for metric, value in theirs.items():
                tolerance = NORM_TOLERANCE if metric == "grad_norm" else METRIC_TOLERANCE
                tolerance = LATER_TOLERANCE if i else tolerance
                if not abs(mine[metric] - value) <= tolerance * max(1.0, abs(value)):
                    found.append(f"{name}: {metric} of step {i} is {mine[metric]}, not {value}")
        mine, theirs = (
            seen[again]["loss"] - seen[0]["loss"] for seen in (report["metrics"], expected)
        )
        if not abs(mine - theirs) <= CHANGE_TOLERANCE * abs(theirs):
            found.append(f"{name}: a loss changed by {mine}, not {theirs}")
    return found


def gradient_errors(folder: str | Path, name: str, of: str) -> dict[str, float]:
    """How far a contender's gradients of the first batch lie from those of another, of their norm.

    By tensor, and of "all" together, in which a small one could be anything.
    """
    found, expected = (np.load(gradients_file(folder, one)) for one in (name, of))
    apart = {tensor: np.linalg.norm(found[tensor] - expected[tensor]) for tensor in expected}
    norms = {tensor: np.linalg.norm(expected[tensor]) for tensor in expected}
    errors = {tensor: float(apart[tensor] / norms[tensor]) for tensor in expected}
    whole = [np.linalg.norm(list(lengths.values())) for lengths in (apart, norms)]
    return errors | {"all": float(whole[0] / whole[1])}


def write_task(folder: str | Path, config: Any, pairs: list, *sizes: int) -> contenders.Task:
    """The weights and pairs of a task: a reference a little beside the policy, both random.

    `sizes` are those of `contenders.Task`.
    """
    import jax

    from jaxdpo import convert, pythia

    key, folder = jax.random.key(0), Path(folder)
    policy = pythia.init_params(config, key)
    leaves, tree = jax.tree.flatten(policy)
    keys = jax.random.split(key, len(leaves))
    beside = [x + 0.002 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    convert.save_hf(folder / "policy", config, policy)
    convert.save_hf(folder / "reference", config, jax.tree.unflatten(tree, beside))
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return contenders.Task(str(folder), *sizes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job")
    kind, contender, task, *rest = json.loads(parser.parse_args().job)
    asked = Job(kind, contender, contenders.Task(*task), *rest)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.task.threads])
    print(json.dumps(answer(asked)))
