"""What a run says while it trains: `metrics.jsonl`, TensorBoard, and a line of progress.

`metrics.jsonl` holds every step once, also over restarts: resuming at a step cuts the
lines past it. Left out: figures (`analysis.curves`).
"""

import math
import os
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from jaxdpo.records import Record, cut_log, line, read_log

LINE_EVERY_SECONDS = 10.0  # where the output is no terminal

console = Console(stderr=True, soft_wrap=True, highlight=False)
"""Where people read what goes on; what they asked for goes to the standard output."""


def read_metrics(folder: str | Path) -> list[Record]:
    """The records of a stage in order; a line cut short by a kill is left out."""
    return read_log(Path(folder) / "metrics.jsonl")


class MetricsWriter:
    """Appends records {"step": s, name: value}; keeps those up to `after` (None: none).

    Used as a context manager.
    """

    def __init__(self, folder: str | Path, *, after: int | None):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "metrics.jsonl"
        cut_log(file, lambda record: after is not None and record["step"] <= after)
        self._file = open(file, "a", encoding="utf-8")
        purge = 0 if after is None else after + 1
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

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
        os.fsync(self._file.fileno())
        self._board.flush()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._board.close()


class ProgressLine:
    """A bar with rate, loss and time left; a line every few seconds without a terminal.

    `update(done, seen=..., **values)` says how many steps are done and how many pairs, or
    what else is counted as `unit`, they held; used as a context manager.
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
        """Show that `done` steps are over, with `seen` units since the start of this line."""
        now = time.monotonic()
        rate = f"{seen / max(now - self.began, 1e-9):.1f} {self.unit}/s"
        shown = "  ".join([rate] + [f"{k} {v:.4f}" for k, v in values.items()])
        self._bar.update(self._task, completed=done, values=shown)
        if not self.console.is_terminal and (
            now - self.spoke > LINE_EVERY_SECONDS or done == self.total
        ):
            left = (now - self.began) / max(done - self.start, 1) * (self.total - done)
            self.console.print(f"{self.label} {done}/{self.total}  {shown}  {left:.0f} s left")
            self.spoke = now
