"""What a run says while it trains: `metrics.jsonl`, TensorBoard, and a line of progress.

`metrics.jsonl` holds every step once, also over restarts: resuming at a step cuts the
lines past it. Left out: figures (`analysis.report`).
"""

import json
import math
import os
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

LINE_EVERY_SECONDS = 10.0  # where the output is no terminal
Record = dict[str, int | float | None]


def read_metrics(folder: str | Path) -> list[Record]:
    """The records of a stage in order; a line cut short by a kill is left out."""
    file = Path(folder) / "metrics.jsonl"
    records = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # only the last line can be: the writer was killed
            break
    return records


class MetricsWriter:
    """Appends records {"step": s, name: value}; keeps those up to `after` (None: none).

    Used as a context manager.
    """

    def __init__(self, folder: str | Path, *, after: int | None):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "metrics.jsonl"
        old = [] if after is None else [r for r in read_metrics(folder) if r["step"] <= after]
        writing = folder / "metrics.jsonl.writing"
        writing.write_text("".join(json.dumps(record) + "\n" for record in old))
        os.replace(writing, file)
        self._file = open(file, "a")
        purge = 0 if after is None else after + 1
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, record: Record) -> None:
        """One line; a value that is not finite is written as null."""
        finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
        self._file.write(json.dumps(finite) + "\n")
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

    `update(done, pairs=..., **values)` says how many steps are done and how many pairs
    they held; used as a context manager.
    """

    def __init__(self, label: str, total: int, *, start: int = 0, console: Console | None = None):
        self.label, self.total, self.start = label, total, start
        self.console = console or Console()
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

    def update(self, done: int, *, pairs: int, **values: float) -> None:
        """Show that `done` steps are over, `pairs` of them since the start of this line."""
        now = time.monotonic()
        rate = pairs / max(now - self.began, 1e-9)
        shown = "  ".join([f"{rate:.1f} pairs/s"] + [f"{k} {v:.4f}" for k, v in values.items()])
        self._bar.update(self._task, completed=done, values=shown)
        if not self.console.is_terminal and (
            now - self.spoke > LINE_EVERY_SECONDS or done == self.total
        ):
            left = (now - self.began) / max(done - self.start, 1) * (self.total - done)
            self.console.print(f"{self.label} {done}/{self.total}  {shown}  {left:.0f} s left")
            self.spoke = now
