"""What the metrics of a stage say, to look at: curves over steps, and a table of their ends.

Needs neither the model nor a device. Left out: everything else that a run leaves (`report`).
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxdpo.records import Record

CHOSEN, REJECTED, TRAIN = "#2b7fc4", "#d1495b", "black"  # black is the ink of a page
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
LEGEND = "line = training (running mean), dots = evaluation"
SUMMARY = ("loss", "loss_per_token", "rewards/margins", "rewards/accuracies", "rewards/chosen")
SUMMARY += ("rewards/rejected",)
HEADER = ("stage", "metric", "train start", "train end", "eval start", "eval end")
NOTE = "train: means over the first and the last tenth of the steps"


def summary(records: Sequence[Record], stage: str) -> list[tuple[str, ...]]:
    """Rows of `HEADER` as text: train at the start and the end, evaluation before and after."""
    rows = []
    for name in SUMMARY:
        train, evaluated = _curve(records, f"train/{name}"), _curve(records, f"eval/{name}")
        if len(train[1]) == 0 or len(evaluated[1]) == 0:
            continue
        tenth = max(len(train[1]) // 10, 1)
        ends = train[1][:tenth].mean(), train[1][-tenth:].mean(), *evaluated[1][[0, -1]]
        rows.append((stage, name, *(f"{value:.4f}" for value in ends)))
    return rows


def draw(records: Sequence[Record], stage: str) -> Figure:
    """All panels of a stage in one figure."""
    rows = len(PANELS[stage]) // 2
    figure = Figure(figsize=(11, 3.6 * rows))
    for ax, panel in zip(figure.subplots(rows, 2).flat, PANELS[stage], strict=True):
        _draw_panel(ax, records, *panel)
    figure.suptitle(f"{stage}: {LEGEND}")
    figure.tight_layout()
    return figure


def panels(records: Sequence[Record], stage: str) -> list[Figure]:
    """Each panel of a stage as a figure of its own, for a page that is narrow or wide."""
    figures = []
    for panel in PANELS[stage]:
        figures.append(Figure(figsize=(5.6, 3.4)))
        _draw_panel(figures[-1].subplots(), records, *panel)
        figures[-1].tight_layout()
    return figures


def _draw_panel(
    ax: Axes, records: Sequence[Record], title: str, curves: Sequence[tuple[str, str, str]]
) -> None:
    for name, label, colour in curves:
        _draw_curve(ax, records, name, label, colour)
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("step")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if name.startswith("rewards/") and not name.endswith("accuracies"):
        ax.axhline(0, color="black", linewidth=0.8)
    if name == "rewards/accuracies":
        ax.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    ax.legend(frameon=False)


def _draw_curve(ax: Axes, records: Sequence[Record], name: str, label: str, colour: str) -> None:
    """Training faint with its running mean, evaluation as dots."""
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
