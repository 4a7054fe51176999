"""What a run came to, to look at: a figure for each stage and one table.

Reads `metrics.jsonl` of the stages; needs neither the model nor a device.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt
import numpy as np
from rich.table import Table

from jaxdpo.metrics import read_metrics
from jaxdpo.records import Record

CHOSEN, REJECTED, TRAIN = "#1f6fb4", "#d1495b", "#444444"
FIGURES = {"sft": "sft_loss.png", "dpo": "rewards.png"}
# Each panel: a title, and its curves as (metric, label, colour).
PANELS = {
    "sft": [
        ("Loss per token [nats]", [("loss_per_token", "", TRAIN)]),
        ("Gradient norm before clipping", [("grad_norm", "", TRAIN)]),
    ],
    "dpo": [
        (
            "Implicit rewards, beta log(policy / reference)",
            [("rewards/chosen", "chosen", CHOSEN), ("rewards/rejected", "rejected", REJECTED)],
        ),
        ("Margin: chosen minus rejected", [("rewards/margins", "", TRAIN)]),
        ("Accuracy: chosen above rejected (a tie is not)", [("rewards/accuracies", "", TRAIN)]),
        ("Loss", [("loss", "", TRAIN)]),
    ],
}
SUMMARY = ("loss", "loss_per_token", "rewards/margins", "rewards/accuracies", "rewards/chosen")
SUMMARY += ("rewards/rejected",)


def write(workdir: str | Path, stages: Sequence[str]) -> list[Table | str]:
    """Draw the figures into `workdir` and write `summary.md`; returns what to print."""
    workdir = Path(workdir)
    shown: list[Table | str] = []
    rows = []
    for stage in stages:
        records = read_metrics(workdir / stage)
        figure = workdir / FIGURES[stage]
        draw(records, stage, figure)
        rows += summary(records, stage)
        shown.append(f"figure: {figure}")
    header = ("stage", "metric", "train start", "train end", "eval start", "eval end")
    table = Table(*header, caption="train: means over the first and the last tenth of the steps")
    for row in rows:
        table.add_row(*row)
    lines = [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]
    (workdir / "summary.md").write_text("\n".join(lines) + "\n")
    return [table, *shown]


def summary(records: Sequence[Record], stage: str) -> list[tuple[str, ...]]:
    """Rows (stage, metric, train at the start, at the end, eval before, after) as text."""
    rows = []
    for name in SUMMARY:
        train, evaluated = _curve(records, f"train/{name}"), _curve(records, f"eval/{name}")
        if len(train[1]) == 0 or len(evaluated[1]) == 0:
            continue
        tenth = max(len(train[1]) // 10, 1)
        ends = train[1][:tenth].mean(), train[1][-tenth:].mean(), *evaluated[1][[0, -1]]
        rows.append((stage, name, *(f"{value:.4f}" for value in ends)))
    return rows


def draw(records: Sequence[Record], stage: str, file: str | Path) -> None:
    """The stage's curves over steps: training faint, its running mean, evaluation as dots."""
    panels = PANELS[stage]
    figure, axes = plt.subplots(
        len(panels) // 2, 2, figsize=(11, 3.6 * (len(panels) // 2)), squeeze=False
    )
    for ax, (title, curves) in zip(axes.flat, panels, strict=True):
        for name, label, colour in curves:
            _draw_curve(ax, records, name, label, colour)
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if name.startswith("rewards/") and not name.endswith("accuracies"):
            ax.axhline(0, color="black", linewidth=0.8)
        if name == "rewards/accuracies":
            ax.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
        ax.legend(frameon=False)
    figure.suptitle(f"{stage}: line = training (running mean), dots = evaluation")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _draw_curve(ax, records: Sequence[Record], name: str, label: str, colour: str) -> None:
    steps, values = _curve(records, f"train/{name}")
    label = f"{label} " if label else ""
    ax.plot(steps, values, color=colour, alpha=0.18, linewidth=0.8)
    ax.plot(steps, _running_mean(values), color=colour, label=f"{label}train")
    steps, values = _curve(records, f"eval/{name}")
    if len(steps):
        style = dict(color=colour, marker="o", markersize=5, linestyle="--", linewidth=1)
        ax.plot(steps, values, label=f"{label}eval", **style)


def _curve(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return steps, values


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last twentieth of the curve up to each point, so nothing is shifted ahead."""
    window = max(len(values) // 20, 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
