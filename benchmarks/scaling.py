"""How a DPO step grows: time and memory against batch, length, vocabulary, responses and devices.

    python benchmarks/scaling.py [--rounds 5] [--quick] [--out runs/benchmarks/scaling]

One quantity is doubled at a time from a small model (4 layers of width 256), the others stay;
each point is a process of its own under the flags of a run. All have the threads that eight fake
devices need, with which one device takes 1.4 times as long as in a run. Time is the median of
`--rounds` steps after one that compiles; `temporary` and `arguments` are bytes of one device as
XLA plans them for the compiled step; `resident` is the process's peak. All pairs of a point are
equally long and have a row each. Exponents are least squares of log against log: 1 is
proportional, 0 is not at all.

Predictions: batch 1 in time and temporaries (less in time where few rows fill the cores badly).
Length 1, a little more where attention, which grows with its square, is no longer small.
Vocabulary and responses between 0 and 1: the unembedding's share of the work, 2 D V S of it.
Devices are fake, threads on the same cores: time 0, temporaries of each device -1, arguments
0 (`data` copies the state), where nothing but the batch is split.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import alone
import lengths
import numpy as np
import results

WIDTH, LAYERS, HEADS = 256, 4, 4


class Point(NamedTuple):
    """A step: so many pairs, positions of a row, tokens, scored positions to a position."""

    batch: int = 8
    length: int = 256
    vocabulary: int = 8192
    responses: float = 0.25
    devices: int = 1


SWEEPS = {
    "batch": (2, 4, 8, 16),
    "length": (128, 256, 512, 1024),
    "vocabulary": (4096, 8192, 16384, 32768),
    "responses": (0.125, 0.25, 0.5),
    "devices": (1, 2, 4, 8),
}
MEASURES = {"seconds": "s", "temporary": "MiB", "arguments": "MiB", "resident": "MiB"}


def measured(point: Point, rounds: int) -> dict[str, float]:
    """`MEASURES` of one step, in this process."""
    import jax

    from jaxdpo import losses, pythia, sharding, step
    from jaxdpo.batching import Batches
    from jaxdpo.pythia_config import PythiaConfig
    from jaxdpo.train import put_batch

    mesh = sharding.make_mesh()
    jax.set_mesh(mesh)
    batches = Batches(lengths.store(pairs(point)), batch_size=point.batch, divisor=point.devices)
    batches.reference = np.full(batches.store.scored_offsets[-1], -9.0, np.float32)
    config = PythiaConfig(
        vocab_size=point.vocabulary,
        num_layers=LAYERS,
        num_heads=HEADS,
        width=WIDTH,
        mlp_width=4 * WIDTH,
        attention_span=int(batches.span),
    )
    loss = functools.partial(losses.dpo_loss, beta=0.1)
    objective = step.preference_objective(config, loss, beta=0.1)
    tx = step.rmsprop(step.warmup(5e-7, 0))
    params = jax.eval_shape(functools.partial(pythia.init_params, config), jax.random.key(0))
    placed = step.state_shardings(params, tx, mesh)
    new = lambda key: step.initial_state(pythia.init_params(config, key), tx)
    state = jax.jit(new, out_shardings=placed)(jax.random.key(0))
    update = step.make_train_step(objective, tx, max_grad_norm=10.0, shardings=placed)
    batch = put_batch(batches[0], mesh)
    program = update.lower(state, batch).compile()
    planned, seconds = program.memory_analysis(), []
    for _ in range(1 + rounds):
        began = time.perf_counter()
        state, _ = program(state, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(seconds[1:]),
        "temporary": planned.temp_size_in_bytes / 2**20,
        "arguments": planned.argument_size_in_bytes / 2**20,
        "resident": alone.peak(),
    }


def pairs(point: Point) -> lengths.Pairs:
    """Rows of exactly `length` positions; the last token of a response is in none of them."""
    response = max(2, int(point.length * point.responses / 2))
    prompt = point.length - 2 * (response - 1)
    sizes = np.tile([prompt, response, response], (point.batch, 1))
    return lengths.random_pairs(sizes, point.vocabulary, 0)


def run(point: Point, rounds: int) -> dict[str, float]:
    """`measured` in a process that has as many devices."""
    environment = os.environ | {"GLIBC_TUNABLES": alone.ALLOCATORS["kept"]}
    devices = f"--xla_force_host_platform_device_count={point.devices}"
    environment["XLA_FLAGS"] = f"{alone.XLA_FLAGS} {devices}"
    environment["NPROC"] = str(4 * max(SWEEPS["devices"]))  # or fake devices starve each other
    command = [sys.executable, __file__, "--point", json.dumps([point, rounds])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{point}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def exponents(values: list[float], found: list[dict[str, float]]) -> dict[str, float]:
    """Slopes of log measure against log value, by least squares.

    >>> exponents([1, 2, 4], [{"seconds": 3.0}, {"seconds": 6.0}, {"seconds": 12.0}])
    {'seconds': 1.0}
    """
    slope = lambda name: np.polyfit(np.log(values), np.log([one[name] for one in found]), 1)[0]
    return {name: round(float(slope(name)), 3) for name in found[0]}


def main(options: argparse.Namespace) -> None:
    results.warn_if_busy()
    known: dict[Point, dict[str, float]] = {}
    sweeps, rows = {}, []
    for quantity, values in SWEEPS.items():
        points = [Point()._replace(**{quantity: value}) for value in values]
        points = points[:2] if options.quick else points
        for point in points:
            if point not in known:
                known[point] = run(point, options.rounds)
        found = [known[point] for point in points]
        fitted = exponents([getattr(point, quantity) for point in points], found)
        sweeps[quantity] = {"points": points, "found": found, "exponents": fitted}
        for point, one in zip(points, found, strict=True):
            shown = [f"{one['seconds']:.3f}", *(f"{one[n]:.1f}" for n in list(MEASURES)[1:])]
            rows.append([f"{quantity} {getattr(point, quantity)}", *shown])
        rows.append(["  exponent", *(f"{fitted[name]:.2f}" for name in MEASURES)])
    columns = ["", *(f"{name}, {unit}" for name, unit in MEASURES.items())]
    results.table("a DPO step, one quantity at a time", columns, rows)
    results.write(options.out, {"base": Point()._asdict(), "sweeps": sweeps})
    figure(options.out / "scaling.png", sweeps)


def figure(file: Path, sweeps: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(sweeps), figsize=(3 * len(sweeps), 3.5), layout="constrained", sharey=True
    )
    for panel, (quantity, sweep) in zip(axes, sweeps.items(), strict=True):
        values = [getattr(point, quantity) for point in sweep["points"]]
        for name in ("seconds", "temporary"):
            measures = [one[name] / sweep["found"][0][name] for one in sweep["found"]]
            label = f"{name}: {sweep['exponents'][name]:.2f}"
            panel.loglog(values, measures, marker="o", label=label, base=2)
        panel.set(xlabel=quantity, ylabel="against the first" if panel is axes[0] else "")
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
        panel.legend(frameon=False, fontsize="small")
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two points of each: a try")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/scaling"))
    parser.add_argument("--point", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.point:
        asked_point, asked_rounds = json.loads(asked.point)
        print(json.dumps(measured(Point(*asked_point), asked_rounds)))
    else:
        main(asked)
