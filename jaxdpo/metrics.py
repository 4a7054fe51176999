"""What a run says while it trains: `metrics.jsonl`, `speed.jsonl`, TensorBoard, and progress.

`metrics.jsonl` holds every step once, also over restarts: resuming at a step cuts the lines
past it. It is the same bit for bit whenever the run is repeated; what depends on the machine and
the hour stands in `speed.jsonl`. Left out: figures (`analysis.curves`), and what a speed is
(`accounting`).
"""

import math
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxdpo import processes
from jaxdpo.accounting import Accounts, Work, peak_flops, speeds
from jaxdpo.batching import Batch
from jaxdpo.compilation import Compilations
from jaxdpo.records import Record, append_log, cut_log, line, read_log

LINE_EVERY_SECONDS = 10.0  # where the output is no terminal

console = Console(stderr=True, soft_wrap=True, highlight=False)
"""Where people read what goes on; what they asked for goes to the standard output."""


def read_metrics(folder: str | Path) -> list[Record]:
    """The records of a stage in order; a line cut short by a kill is left out."""
    return read_log(Path(folder) / "metrics.jsonl")


class MetricsWriter:
    """Appends records {"step": s, name: value}; keeps those up to `after` (None: none).

    Used as a context manager. Of several processes the first one writes.
    """

    def __init__(self, folder: str | Path, *, after: int | None):
        from tensorboardX import SummaryWriter  # brings torch where that is installed: seconds

        folder, writes = Path(folder), processes.is_first()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "metrics.jsonl"
        cut_log(file, lambda record: after is not None and record["step"] <= after)
        self._file = open(file if writes else os.devnull, "a", encoding="utf-8")
        purge = 0 if after is None else after + 1
        board = str(folder / "tensorboard")
        self._board = SummaryWriter(board, purge_step=purge, write_to_disk=writes)

    def write(self, record: Record) -> None:
        """One line; a value that is not finite is written as null."""
        finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
        self._file.write(line(finite))
        for name, value in record.items():
            if name != "step":
                self._board.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        """Make what was written survive a kill; called before each checkpoint."""
        self._file.flush()
        if processes.is_first():  # what others write goes nowhere
            os.fsync(self._file.fileno())
        self._board.flush()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._board.close()


TRAINING = ("input", "host", "device")  # what the time of the steps themselves is spent on


class SpeedLog:
    """Appends to `speed.jsonl` how fast the steps since the last record went.

    A record holds `step`, the last one that it covers; `steps`, `pairs` and `tokens`;
    `seconds/input` (waiting for the next batch), `seconds/device` (waiting for what steps
    return), `seconds/host` (the rest: Python, dispatch, logs; before the first step, compiling and
    loading), and apart from these, which are the steps' own, `seconds/reference`,
    `seconds/evaluation`, `seconds/observers` and `seconds/checkpoint` (of the save that came after
    the record before); the rates and shares of `accounting.speeds`; what was compiled (not for
    observers, nor by Orbax when it saves), after the first record nothing; and `peak_memory_mib`
    since the process began. Of several processes the work is that of all, the time and memory
    those of the first; `copies` of them hold the same rows. Used as a context manager; time is
    counted from its creation on.
    """

    def __init__(self, folder: str | Path, accounts: Accounts, *, copies: int = 1):
        self._file, self._accounts, self._copies = Path(folder) / "speed.jsonl", accounts, copies
        kind, devices = jax.devices()[0].device_kind, jax.device_count()
        peak = peak_flops(kind)
        self._peak = None if peak is None else peak * devices
        self._compilations, self._counted = Compilations(), Counter()
        self._work, self._spent, self._since = Work(), Counter(), time.perf_counter()
        self._all_work, self._all_spent = Work(), Counter()

    def resume(self, start: int) -> None:
        """Forget what was recorded past the step that training goes on from; at 0, everything."""
        cut_log(self._file, lambda record: 0 < start and record["step"] <= start)

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Claim the time within for something; not to be nested."""
        began, compiled = time.perf_counter(), Counter(self._compilations.so_far())
        try:
            yield
        finally:
            self._spent[what] += time.perf_counter() - began
            if what in ("observers", "checkpoint"):
                self._counted.update(Counter(self._compilations.so_far()) - compiled)

    def add(self, batch: Batch) -> None:
        """Count a step on this batch, as the host made it."""
        self._work = self._work.plus(self._accounts.of(batch))

    def write(self, step: int) -> None:
        """Record the steps since the last record, of which `step` is the last one."""
        elapsed, spent = time.perf_counter() - self._since, self._spent
        work = _of_all(self._work, self._copies)
        spent["host"] = elapsed - sum(spent.values())
        so_far = self._compilations.so_far()
        compiled = {name: value - self._counted[name] for name, value in so_far.items()}
        self._counted.update(compiled)
        record = {"step": step, "steps": work.steps, "pairs": work.pairs, "tokens": work.tokens}
        record |= {f"seconds/{what}": value for what, value in spent.items()}
        if work.steps:
            record |= self._speeds(work, spent)
            self._all_work = self._all_work.plus(work)
            self._all_spent.update(spent)
        record |= compiled | {"peak_memory_mib": peak_memory()[0] / 2**20}
        append_log(self._file, [record])
        self._work, self._spent, self._since = Work(), Counter(), self._since + elapsed

    def summary(self) -> str:
        """All steps that were recorded, as a line for people."""
        found, (size, whose) = self._speeds(self._all_work, self._all_spent), peak_memory()
        utilisation = f" (MFU {found['mfu']:.1%})" if "mfu" in found else ""
        return (
            f"{found['pairs_per_second']:.1f} pairs/s, {found['tokens_per_second']:.0f} tokens/s, "
            f"{found['real_positions_share']:.0%} of positions real, "
            f"{found['model_tflops_per_second']:.3g} TFLOP/s of the model{utilisation}, "
            f"{found['input_share']:.1%} of the time waiting for input, "
            f"at most {size / 2**30:.1f} GiB of {whose}"
        )

    def _speeds(self, work: Work, spent: Counter) -> dict[str, float]:
        return speeds(work, {what: float(spent[what]) for what in TRAINING}, peak=self._peak)

    def __enter__(self) -> "SpeedLog":
        self._compilations.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._compilations.__exit__()


def _of_all(work: Work, copies: int) -> Work:
    """The work of all processes, of which each has counted its rows; all of them must call."""
    steps, *rest = work
    return Work(steps, *(processes.of_each(np.array(rest)).sum(0) // copies).tolist())


def peak_memory() -> tuple[int, str]:
    """The most bytes held so far, and of what: a device, or this process where none says so."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if found := [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]:
        return max(found), "device memory"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process memory"


class ProgressLine:
    """A bar with rate, loss and time left; a line every few seconds without a terminal.

    `update(done, seen=..., **values)` says how many steps are done and how many pairs, or what
    else is counted as `unit`, were seen here. Steps that are done where nothing was seen yet were
    there before, and say nothing of the time left. Used as a context manager.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        start: int = 0,
        unit: str = "pairs",
        console: Console = console,
    ):
        self.label, self.total, self.start, self.unit = label, total, start, unit
        self.console = console
        self.began = self.spoke = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=total, completed=start, values="")

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def update(self, done: int, *, seen: int, **values: float) -> None:
        """Show that `done` steps are over, with `seen` units since this line began."""
        now = time.monotonic()
        if not seen:
            self.start, self.began = done, now
        rate = f"{seen / max(now - self.began, 1e-9):.1f} {self.unit}/s"
        shown = "  ".join([rate] + [f"{k} {v:.4f}" for k, v in values.items()])
        self._bar.update(self._task, completed=done, values=shown)
        quiet = self.console.is_terminal or not seen
        if not quiet and (now - self.spoke > LINE_EVERY_SECONDS or done == self.total):
            left = (now - self.began) / max(done - self.start, 1) * (self.total - done)
            self.console.print(f"{self.label} {done}/{self.total}  {shown}  {left:.0f} s left")
            self.spoke = now
