"""The loop: batches in order, one update each, evaluation, checkpoints, a line a step.

The programs of all row shapes are compiled before the first step, and none after it.
Observers look at the parameters at a cadence of their own, and change nothing.

Left out: what an update does (`step`), where the pieces come from (`stages`), what
observers see (`samples`, `drift`), and what a speed is (`accounting`).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdpo import InputError, sharding
from jaxdpo.batching import Batch, Batches, RowShape, prefetch
from jaxdpo.checkpoint import Checkpoints
from jaxdpo.compilation import Compilations, Programs, compile_all
from jaxdpo.metrics import MetricsWriter, ProgressLine, SpeedLog, console
from jaxdpo.records import Record, append_log, cut_log
from jaxdpo.step import Metrics, TrainState, means
from jaxdpo.stopping import Stop, Stopped

T = TypeVar("T")


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
        append_log(self.log, self.records(step, params))


class Loop(NamedTuple):
    """What the loop calls and obeys; everything in it is fixed over the stage."""

    name: str
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]  # jitted
    eval_step: Callable[[Any, Batch], Metrics]  # jitted
    schedule: Callable[[int], Any]
    put: Callable[[Batch], Batch]
    source: str  # the training data, for people
    eval_every: int  # steps; 0: at the start and the end only
    checkpoint_every: int
    max_skipped_in_a_row: int
    hang_seconds: int  # a step may take, with what is looked at after it; 0: any
    expected_first_loss: float | None  # a preference loss where policy is reference
    noise_floor: float  # how far rounding alone can move it
    observers: Sequence[Observer]


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows as one global batch, split over the mesh's `data` and `fsdp` axes."""
    return sharding.put_rows(batch, mesh)


def one_ahead(results: Iterable[T]) -> Iterator[T]:
    """Each result once the next one is under way, so that no device waits for the host.

    >>> list(one_ahead(iter("abc")))
    ['a', 'b', 'c']
    """
    before = []
    for result in results:
        if _alone():
            jax.block_until_ready(result)
        yield from before
        before = [result]
    yield from before


def _alone() -> bool:
    """Whether a program must have ended before the next begins: on fake devices they can starve
    each other."""
    return jax.default_backend() == "cpu" and jax.device_count() > 1


def abstract_batches(
    batches: Batches, put: Callable[[Batch], Batch], *, logps: bool
) -> list[Batch]:
    """A batch of each row shape without its numbers, placed as `put` does it.

    With the reference's log-probabilities or without, whether or not they are there already.
    """
    like = put(batches[0])
    reference = jax.ShapeDtypeStruct(like.slots.shape, np.float32, sharding=like.slots.sharding)
    like = like._replace(reference_token_logps=reference if logps else None)
    return [_abstract(like, shape) for shape in batches.shapes]


def _abstract(batch: Batch, shape: RowShape) -> Batch:
    rows = shape.rows * (batch.tokens.shape[0] // batch.examples.shape[0])
    sizes = dict.fromkeys(Batch._fields[:4], (rows, shape.length))
    sizes |= dict.fromkeys(Batch._fields[4:], (rows, shape.scored))
    sizes["examples"] = (shape.rows, shape.pairs)

    def one(name, x):
        if x is not None:
            return jax.ShapeDtypeStruct(sizes[name], x.dtype, sharding=x.sharding)

    return Batch(*map(one, Batch._fields, batch))


def compiled(what: str, programs: Sequence[Programs]) -> None:
    """Compile all programs, saying so; `InputError` where one does not fit a device's memory."""
    console.print(f"{what}: compiling {sum(map(len, programs))} programs ...")
    began = time.perf_counter()
    with Compilations() as counted:
        try:
            compile_all(programs)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error
    found, seconds = counted.so_far(), time.perf_counter() - began
    console.print(
        f"{what}: {found['programs']} programs in {seconds:.1f} s, "
        f"{found['programs_from_cache']} of them from the cache"
    )


def compiled_ahead(
    loop: Loop, state: TrainState, batches: dict[str, Batches], *, logps: bool
) -> Loop:
    """The loop with both steps compiled for all row shapes, and its learning rates known.

    `state` may be without its numbers; `logps` says whether the batches will have the reference's.
    Raises `InputError` where a step does not fit the memory of a device. A learning rate that was
    computed in the loop would have to wait for the step that a device is at.
    """
    shapes = {side: abstract_batches(data, loop.put, logps=logps) for side, data in batches.items()}
    steps = {
        "train_step": Programs(loop.train_step, state, shapes["train"]),
        "eval_step": Programs(loop.eval_step, state.params, shapes["eval"]),
    }
    compiled(loop.name, list(steps.values()))
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
    ahead = prefetch(batches, 0, len(batches))
    for metrics in one_ahead(loop.eval_step(params, loop.put(batch)) for batch in ahead):
        for name, pair in jax.device_get(metrics).items():
            total, count = totals.get(name, (0.0, 0.0))
            totals[name] = (total + float(pair[0]), count + float(pair[1]))
    return {f"eval/{name}": value for name, value in means(totals).items()}


class _Session(NamedTuple):
    """A stage that trains from step `start` on: what is looked at on the way, and written down."""

    loop: Loop
    start: int
    batches: dict[str, Batches]
    writer: MetricsWriter
    speed: SpeedLog
    progress: ProgressLine

    def observed(self, step: int, params: Any) -> dict[str, float]:
        """Let the observers look that are due; the metrics of an evaluation, if that is due."""
        loop, total = self.loop, len(self.batches["train"])
        with self.speed.on("observers"):
            for observer in loop.observers:
                if due(observer.every, step, total):
                    observer.look(step, params)
        with self.speed.on("evaluation"):
            if due(loop.eval_every, step, total):
                return evaluate(loop, params, self.batches["eval"])
        return {}

    def began(self, params: Any) -> None:
        """Step 0: what the model is before the first update."""
        evaluated = self.observed(0, params)
        _check_first(self.loop, evaluated, "eval")
        self.writer.write({"step": 0} | evaluated)

    def finish(self, step: int, metrics: Metrics, evaluated: dict[str, float]) -> None:
        """Wait for a step's metrics and write its line."""
        with self.speed.on("device"):
            metrics = jax.device_get(metrics)
        data = self.batches["train"]
        record = _record(self.loop, step, metrics, evaluated, data)
        self.writer.write(record)
        seen = (step - self.start) * data.batch_size
        self.progress.update(step, seen=seen, loss=record["train/loss"])


def train_loop(
    loop: Loop,
    state: TrainState,
    start: int,
    batches: dict[str, Batches],
    checkpoints: Checkpoints,
    folder: Path,
    speed: SpeedLog,
) -> None:
    """Train from step `start` to the last batch, leaving checkpoints and logs in `folder`.

    The loop's steps are compiled already (`compiled_ahead`), and `speed` counts from before that.
    """
    total = len(batches["train"])
    for log in (speed, *loop.observers):
        log.resume(start)
    with (
        MetricsWriter(folder, after=start or None) as writer,
        ProgressLine(loop.name, total, start=start) as progress,
    ):
        session = _Session(loop, start, batches, writer, speed, progress)
        if start == 0:
            session.began(state.params)
        speed.write(start)
        with Stop(loop.hang_seconds) as stop:
            _train(session, state, checkpoints, stop)
    if start < total:
        console.print(f"{loop.name}: {speed.summary()}")


def _train(session: _Session, state: TrainState, checkpoints: Checkpoints, stop: Stop) -> None:
    """All steps that are left; raises `Stopped` after one that was saved because somebody asked.

    A step's metrics are fetched while the next one runs. Before a checkpoint they are written to
    disk, and its speed with them, so that a resumed run finds the lines of all steps before it.
    """
    loop, start, speed, data = session.loop, session.start, session.speed, session.batches["train"]
    looks = [loop.eval_every, *(observer.every for observer in loop.observers)]
    total, pending, ahead = len(data), None, prefetch(data, start, len(data))
    for step in range(start + 1, total + 1):
        stop.alive()
        with speed.on("input"):
            batch = next(ahead)
        with jax.transfer_guard("disallow"):  # nothing moves to or from a device unasked
            state, metrics = loop.train_step(state, loop.put(batch))
        speed.add(batch)
        asked = stop.after(step)
        saves = asked or due(loop.checkpoint_every, step, total)
        stops = saves or any(due(every, step, total) for every in looks)
        if stops or _alone():  # what is done at a stop is not the step's time
            with speed.on("device"):
                jax.block_until_ready(state)
        if pending:
            session.finish(*pending)
        evaluated = session.observed(step, state.params)
        pending = (step, metrics, evaluated)
        if saves:
            session.finish(*pending)
            pending = None
            session.writer.flush()
        if stops:
            speed.write(step)
        if saves:
            with speed.on("checkpoint"):
                checkpoints.save(step, state, loss=evaluated.get("eval/loss"))
        if asked:
            checkpoints.wait()
            raise Stopped(
                f"{loop.name}: stopped after step {step} of {total}, which is saved; the same "
                "command goes on"
            )


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
