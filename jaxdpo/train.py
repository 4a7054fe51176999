"""The loop: batches in order, one update each, evaluation, checkpoints, a line a step.

The programs of all row shapes are compiled before the first step, and none after it.
Observers look at the parameters at a cadence of their own, and change nothing.

Left out: what an update does (`step`), where the pieces come from (`stages`), what
observers see (`samples`, `drift`), and what a speed is (`accounting`).
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxdpo import InputError, sharding
from jaxdpo.accounting import Accounts
from jaxdpo.batching import Batch, Batches, RowShape, prefetch
from jaxdpo.checkpoint import Checkpoints
from jaxdpo.compilation import Programs, compile_all
from jaxdpo.metrics import MetricsWriter, ProgressLine, SpeedLog, console
from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.records import Record, cut_log, line
from jaxdpo.step import Metrics, TrainState, means


class Observer(NamedTuple):
    """Looks at the parameters before the first step, every `every` steps and after the last.

    `records(step, params)` is what it sees, each record with its `step`; they are appended to
    `log`, where every step that is looked at stands once, also over restarts.
    """

    log: Path
    every: int  # steps; 0: at the start and the end only
    records: Callable[[int, Any], Iterable[Record]]

    def resume(self, start: int) -> None:
        """Forget what was seen past the step that training goes on from; at 0, everything."""
        if self.log.exists():
            cut_log(self.log, lambda record: 0 < start and record["step"] <= start)

    def look(self, step: int, params: Any) -> None:
        """Append what is seen, all of a step or nothing."""
        seen = "".join(map(line, self.records(step, params)))
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(seen)


class Loop(NamedTuple):
    """What the loop calls and obeys; everything in it is fixed over the stage."""

    name: str
    model: PythiaConfig
    micro_batches: int
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]  # jitted
    eval_step: Callable[[Any, Batch], Metrics]  # jitted
    schedule: Callable[[int], Any]
    put: Callable[[Batch], Batch]
    source: str  # the training data, for people
    eval_every: int  # steps; 0: at the start and the end only
    checkpoint_every: int
    max_skipped_in_a_row: int
    expected_first_loss: float | None  # a preference loss where policy is reference
    noise_floor: float  # how far rounding alone can move it
    observers: Sequence[Observer]


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows as one global batch, split over the mesh's `data` and `fsdp` axes."""
    place = NamedSharding(mesh, sharding.batch_spec)
    put = functools.partial(jax.make_array_from_process_local_data, place)
    return jax.tree.map(put, batch)


def abstract_batch(batch: Batch, shape: RowShape) -> Batch:
    """The shapes that a batch of another row shape has, placed as this one is."""
    rows = shape.rows * (batch.tokens.shape[0] // batch.examples.shape[0])
    sizes = dict.fromkeys(Batch._fields[:4], (rows, shape.length))
    sizes |= dict.fromkeys(Batch._fields[4:], (rows, shape.scored))
    sizes["examples"] = (shape.rows, shape.pairs)

    def one(name, x):
        if x is not None:
            return jax.ShapeDtypeStruct(sizes[name], x.dtype, sharding=x.sharding)

    return Batch(*map(one, Batch._fields, batch))


def compiled_ahead(loop: Loop, state: TrainState, batches: dict[str, Batches]) -> Loop:
    """The loop with both steps compiled for all row shapes, and its learning rates known.

    Raises `InputError` where a step does not fit the memory of a device. A learning rate that
    was computed in the loop would have to wait for the step that a device is at.
    """

    def programs(function, first, data):
        like = loop.put(data[0])
        return Programs(function, first, [abstract_batch(like, shape) for shape in data.shapes])

    steps = {
        "train_step": programs(loop.train_step, state, batches["train"]),
        "eval_step": programs(loop.eval_step, state.params, batches["eval"]),
    }
    console.print(f"{loop.name}: compiling {sum(map(len, steps.values()))} programs ...")
    try:
        compile_all(list(steps.values()))
    except InputError as error:
        raise InputError(f"{loop.name}: {error}") from error
    rates = jax.device_get(loop.schedule(np.arange(len(batches["train"]))))
    return loop._replace(**steps, schedule=rates.__getitem__)


def due(every: int, step: int, total: int) -> bool:
    """Whether something that is done every so many steps is due: always at the first and last.

    >>> [step for step in range(8) if due(3, step, 7)], [s for s in range(8) if due(0, s, 7)]
    ([0, 3, 6, 7], [0, 7])
    """
    return step in (0, total) or bool(every) and step % every == 0


def evaluate(loop: Loop, params: Any, batches: Batches) -> dict[str, float]:
    """The objective's metrics over the whole data set, every example once."""
    totals: dict[str, tuple[float, float]] = {}
    for batch in prefetch(batches, 0, len(batches)):
        for name, pair in jax.device_get(loop.eval_step(params, loop.put(batch))).items():
            total, count = totals.get(name, (0.0, 0.0))
            totals[name] = (total + float(pair[0]), count + float(pair[1]))
    return {f"eval/{name}": value for name, value in means(totals).items()}


def train_loop(
    loop: Loop,
    state: TrainState,
    start: int,
    batches: dict[str, Batches],
    checkpoints: Checkpoints,
    folder: Path,
) -> None:
    """Train from step `start` to the last batch, leaving checkpoints and logs in `folder`.

    A step's metrics are fetched while the next one runs. Before a checkpoint they are
    written to disk, so that a resumed run finds the lines of all steps before it.
    """
    total, after = len(batches["train"]), start if start else None
    for observer in loop.observers:
        observer.resume(start)
    # Steps in flight on fake devices can starve each other.
    block = jax.default_backend() == "cpu" and jax.device_count() > 1
    parts = jax.device_count() * loop.micro_batches
    accounts = Accounts(loop.model, batches["train"].store.lengths, parts=parts)
    with SpeedLog(folder, accounts, after=after) as speed:
        loop = compiled_ahead(loop, state, batches)  # or else nothing has begun
        console.print(f"{loop.name}: {speed.compiled()}")
        with (
            MetricsWriter(folder, after=after) as writer,
            ProgressLine(loop.name, total, start=start) as progress,
        ):

            def observed(step: int, params: Any) -> dict[str, float]:
                with speed.on("observers"):
                    for observer in loop.observers:
                        if due(observer.every, step, total):
                            observer.look(step, params)
                with speed.on("evaluation"):
                    now = due(loop.eval_every, step, total)
                    return evaluate(loop, params, batches["eval"]) if now else {}

            if start == 0:
                evaluated = observed(0, state.params)
                _check_first(loop, evaluated, "eval")
                writer.write({"step": 0} | evaluated)
            speed.write(start)

            def finish(step: int, metrics: Metrics, evaluated: dict) -> None:
                with speed.on("device"):
                    metrics = jax.device_get(metrics)
                record = _record(loop, step, metrics, evaluated, batches["train"])
                writer.write(record)
                done = (step - start) * batches["train"].batch_size
                progress.update(step, seen=done, loss=record["train/loss"])

            cadences = [loop.eval_every, loop.checkpoint_every, *(o.every for o in loop.observers)]
            ahead, pending = prefetch(batches["train"], start, total), None
            for step in range(start + 1, total + 1):
                with speed.on("input"):
                    batch = next(ahead)
                with jax.transfer_guard("disallow"):  # nothing moves to or from a device unasked
                    state, metrics = loop.train_step(state, loop.put(batch))
                speed.add(batch)
                stop = any(due(every, step, total) for every in cadences)
                if block or stop:  # what is done at a stop is not the step's time
                    with speed.on("device"):
                        jax.block_until_ready(state)
                if pending:
                    finish(*pending)
                evaluated = observed(step, state.params)
                pending = (step, metrics, evaluated)
                if due(loop.checkpoint_every, step, total):
                    finish(*pending)
                    pending = None
                    writer.flush()
                    with speed.on("checkpoint"):
                        checkpoints.save(step, state, loss=evaluated.get("eval/loss"))
                if stop:
                    speed.write(step)
        if start < total:
            console.print(f"{loop.name}: {speed.summary()}")


def _record(loop: Loop, step: int, metrics: Metrics, evaluated: dict, batches: Batches) -> dict:
    """A step's line for `metrics.jsonl`; stops the run if too many in a row were skipped."""
    values = means(metrics)
    in_a_row, skipped = int(values.pop("skipped_in_a_row")), int(values["skipped"])
    if in_a_row >= loop.max_skipped_in_a_row:
        lines = [
            str(int(line))
            for at in range(step - in_a_row, step)
            for line in batches.store.lines[[i for i in batches.indices(at) if i >= 0]]
        ]
        raise InputError(
            f"{loop.name}: the loss or gradient was not finite at {in_a_row} steps in a row, up "
            f"to step {step}; lower the learning rate, or look at lines {', '.join(lines)} of "
            f"{loop.source}"
        )
    updates_before = step - 1 - (skipped - (in_a_row > 0))
    values["learning_rate"] = float(loop.schedule(updates_before))
    record = {"step": step} | {f"train/{name}": v for name, v in values.items()} | evaluated
    if step == 1 and not in_a_row:
        _check_first(loop, record, "train")
    return record


def _check_first(loop: Loop, record: dict[str, Any], side: str) -> None:
    """Policy and reference are the same model at step 0: anything but log 2 is a fault.

    The loss sees rewards that scatter around zero, their means those that are shifted.
    """
    expected = loop.expected_first_loss
    if expected is None:
        return
    off = {"loss": (record[f"{side}/loss"] - expected) / max(1.0, expected)}
    off |= {key: record[f"{side}/{key}"] for key in ("rewards/chosen", "rewards/rejected")}
    wrong = {key: value for key, value in off.items() if not abs(value) <= loop.noise_floor}
    if wrong:
        raise InputError(
            f"{loop.name}: before the first update the {side} loss must be {expected:.4f} and "
            f"rewards zero, but {', '.join(wrong)} are off by {max(wrong.values(), key=abs):.4f}: "
            f"the reference is not this policy; delete {loop.name}/reference in the work directory"
        )
