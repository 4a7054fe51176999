"""What the metrics of a stage say, to look at: curves over steps, and a table of their ends.

Needs neither the model nor a device. Left out: everything else that a run leaves (`report`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxdpo.analysis.trajectories import COLOURS, curve
from jaxdpo.records import Record

TRAIN = "black"  # the ink of a page


class Panel(NamedTuple):
    """What is drawn together: curves as (metric, label, colour), and a line across."""

    title: str
    curves: Sequence[tuple[str, str, str]]
    level: float | None = None


PANELS = {
    "sft": [
        Panel("Loss per token [nats]", [("loss_per_token", "", TRAIN)]),
        Panel("Gradient norm before clipping", [("grad_norm", "", TRAIN)]),
    ],
    "dpo": [
        Panel(
            "Implicit rewards, beta log(policy / reference)",
            [(f"rewards/{side}", side, COLOURS[side]) for side in ("chosen", "rejected")],
            level=0,
        ),
        Panel("Margin: chosen minus rejected", [("rewards/margins", "", TRAIN)], level=0),
        Panel(
            "Accuracy: chosen above rejected (a tie is not)",
            [("rewards/accuracies", "", TRAIN)],
            level=0.5,
        ),
        Panel("Loss", [("loss", "", TRAIN)]),
    ],
}
LEGEND = "line = training (running mean), dots = evaluation"
SUMMARY = ("loss", "loss_per_token", "rewards/margins", "rewards/accuracies", "rewards/chosen")
SUMMARY += ("rewards/rejected",)
HEADER = ("stage", "metric", "train start", "train end", "eval start", "eval end")
NOTE = "train: means over the first and the last tenth of the steps"
NOTHING = "–"


def summary(records: Sequence[Record], stage: str) -> list[tuple[str, ...]]:
    """Rows of `HEADER` as text: train at the start and the end, evaluation before and after.

    Where a value was not finite there is no other in its place; a dash says that none was taken.
    """
    rows = []
    for name in SUMMARY:
        train, evaluated = _values(records, f"train/{name}"), _values(records, f"eval/{name}")
        if len(train) or len(evaluated):
            tenth = max(len(train) // 10, 1)
            ends = train[:tenth], train[-tenth:], evaluated[:1], evaluated[-1:]
            rows.append((stage, name, *map(_mean, ends)))
    return rows


def draw(records: Sequence[Record], stage: str) -> Figure:
    """All panels of a stage in one figure."""
    rows = len(PANELS[stage]) // 2
    figure = Figure(figsize=(11, 3.6 * rows))
    for ax, panel in zip(figure.subplots(rows, 2).flat, PANELS[stage], strict=True):
        _draw_panel(ax, records, panel)
    figure.suptitle(f"{stage}: {LEGEND}")
    figure.tight_layout()
    return figure


def panels(records: Sequence[Record], stage: str) -> list[Figure]:
    """Each panel of a stage as a figure of its own, for a page that is narrow or wide."""
    figures = []
    for panel in PANELS[stage]:
        figures.append(Figure(figsize=(5.6, 3.4)))
        _draw_panel(figures[-1].subplots(), records, panel)
        figures[-1].tight_layout()
    return figures


def _draw_panel(ax: Axes, records: Sequence[Record], panel: Panel) -> None:
    for name, label, colour in panel.curves:
        _draw_curve(ax, records, name, label, colour)
    ax.set_title(panel.title, fontsize=11)
    ax.set_xlabel("step")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if panel.level is not None:
        ax.axhline(panel.level, color="black", linewidth=0.8, linestyle=":" if panel.level else "-")
    ax.legend(frameon=False)


def _draw_curve(ax: Axes, records: Sequence[Record], name: str, label: str, colour: str) -> None:
    """Training faint with its running mean, evaluation as dots."""
    steps, values = curve(records, f"train/{name}")
    label = f"{label} " if label else ""
    ax.plot(steps, values, color=colour, alpha=0.18, linewidth=0.8)
    ax.plot(steps, _running_mean(values), color=colour, label=f"{label}train")
    steps, values = curve(records, f"eval/{name}")
    if len(steps):
        style = dict(color=colour, marker="o", markersize=5, linestyle="--", linewidth=1)
        ax.plot(steps, values, label=f"{label}eval", **style)


def _values(records: Sequence[Record], name: str) -> np.ndarray:
    """All values of a metric; those that were not finite are NaN."""
    values = [record[name] for record in records if name in record]
    return np.array([np.nan if value is None else float(value) for value in values])


def _mean(values: np.ndarray) -> str:
    if len(values) == 0:
        return NOTHING
    return f"{values.mean():.4f}" if np.isfinite(values).all() else "not finite"


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last twentieth of the curve up to each point, so nothing is shifted ahead."""
    window = max(len(values) // 20, 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
