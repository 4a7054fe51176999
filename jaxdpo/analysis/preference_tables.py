"""The record of preference accuracy, to look at: tables and a figure.

Left out: what the numbers mean (`preference_accuracy`).
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxdpo.analysis.page import visible
from jaxdpo.analysis.tables import Shown
from jaxdpo.records import Record

INK, MEAN = "#000000", "#2a9d6f"
SIDES = {"longer": "#d1495b", "shorter": "#1f6fb4"}  # than the rejected response, the chosen one


def shown(record: Record) -> list[Shown]:
    """Everything in the record that a table can say."""
    found = [_scores(record)]
    if record["equally_long"] < record["pairs"]:
        found.append(_length(record))
    return found if record["subset"] is None else [*found, _subsets(record)]


def draw(record: Record) -> Figure:
    """Accuracy by score, where the chosen response is longer and shorter, and by subset."""
    subsets = record.get("subsets", [])
    most = max(len(record["scores"]), len(subsets) + 1)
    figure = Figure(figsize=(5.5 * (1 + bool(subsets)), 1.6 + 0.35 * most), layout="constrained")
    axes = figure.subplots(1, 1 + bool(subsets), squeeze=False)[0]
    _draw_scores(axes[0], record)
    if subsets:
        _draw_subsets(axes[1], record)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    for ax in axes:
        ax.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
        ax.set_xlabel("accuracy; 1/2 is chance")
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _scores(record: Record) -> Shown:
    rows = [
        (name, _interval(found, "bootstrap"), _interval(found, "wilson"), str(found["ties"]))
        for name, found in record["scores"].items()
    ]
    chosen, rejected = (record["mean_lengths"][side] for side in ("chosen", "rejected"))
    data = record["data"]
    note = (
        f"{record['pairs']} pairs of {record['prompts']} prompts, {data['duplicates']} of them "
        f"duplicates, {data['contradictions']} comparisons with both labels. A tie is half won. "
        f"Chosen responses have {chosen:.1f} tokens, rejected ones {rejected:.1f}; "
        f"{record['equally_long']} pairs are equally long. 95% intervals."
    )
    header = ("score", "accuracy, over prompts", "as independent pairs", "ties")
    return Shown("How often the chosen response scores higher", header, rows, note)


def _length(record: Record) -> Shown:
    rows = [
        (
            name,
            _interval(found["chosen_longer"], "bootstrap"),
            _interval(found["chosen_shorter"], "bootstrap"),
            _estimate(found["balanced"]),
            _estimate(found["picks_longer"]),
            _number(found["r_squared"]),
        )
        for name, found in record["length"].items()
    ]
    sides = [next(iter(record["length"].values()))[f"chosen_{side}"] for side in SIDES]
    note = (
        f"The chosen response is the longer one in {sides[0]['pairs']} pairs, the shorter one in "
        f"{sides[1]['pairs']}. r squared: of the margins with the differences in length."
    )
    header = ("score", "chosen longer", "chosen shorter", "mean of both", "picks the longer")
    return Shown("What length alone explains", (*header, "r squared"), rows, note)


def _subsets(record: Record) -> Shown:
    rows = [
        (
            row["subset"],
            str(row["pairs"]),
            str(row["prompts"]),
            *(_interval(found, "wilson") for found in row["scores"].values()),
        )
        for row in record["subsets"]
    ]
    means = map(_estimate, record["mean_over_subsets"].values())
    rows.append(("mean over subsets", "", "", *means))
    note = "Intervals as of independent pairs; those of the mean over prompts."
    header = (record["subset"], "pairs", "prompts", *record["scores"])
    return Shown(f"Accuracy by {record['subset']}", header, rows, note)


def _draw_scores(ax: Axes, record: Record) -> None:
    names = list(record["scores"])[::-1]
    for place, name in enumerate(names):
        _dot(ax, record["scores"][name], "bootstrap", float(place), INK)
        sides = record["length"].get(name, {})
        for side, up, colour in zip(SIDES, (0.22, -0.22), SIDES.values(), strict=True):
            if sides and sides[f"chosen_{side}"]["pairs"]:
                _dot(ax, sides[f"chosen_{side}"], "bootstrap", place + up, colour)
    ax.set_yticks(range(len(names)), names)
    for side, colour in SIDES.items():
        ax.plot([], [], "o", color=colour, label=f"where the chosen one is {side}")
    ax.set_title("The chosen response scores higher", fontsize=10)


def _draw_subsets(ax: Axes, record: Record) -> None:
    name = next(iter(record["scores"]))
    rows = record["subsets"][::-1]
    value, low, high = np.array(record["mean_over_subsets"][name], float)
    ax.plot([low, high], [0, 0], color=MEAN)
    ax.plot([value], [0], "D", color=MEAN)
    for place, row in enumerate(rows, 1):
        _dot(ax, row["scores"][name], "wilson", float(place), INK)
    labels = ["mean over subsets", *(f"{visible(row['subset'])} ({row['pairs']})" for row in rows)]
    ax.set_yticks(range(len(labels)), labels, fontsize=7, parse_math=False)
    ax.set_title(f"{name}, by {record['subset']}", fontsize=10, parse_math=False)


def _dot(ax: Axes, found: Record, interval: str, place: float, colour: str) -> None:
    ax.plot(np.array(found[interval], float), [place, place], color=colour, linewidth=1.2)
    ax.plot([found["accuracy"]], [place], "o", color=colour, markersize=5)


def _interval(found: Record, of: str) -> str:
    return _estimate([found["accuracy"], *found[of]])


def _estimate(estimate: Sequence[float | None]) -> str:
    value, low, high = map(_number, estimate)
    return value if estimate[1] is None else f"{value} [{low}, {high}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
