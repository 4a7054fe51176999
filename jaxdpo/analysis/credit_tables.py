"""The record of the credit benchmark, to look at: tables and a figure.

Left out: what the numbers mean (`credit_measures`, `detection`).
"""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from jaxdpo.analysis import page, tables
from jaxdpo.analysis.credit_measures import EVENLY, LOST, RANDOM, REWARD, SFT
from jaxdpo.analysis.page import visible
from jaxdpo.analysis.tables import Shown
from jaxdpo.records import Record

INK, WRONG, OTHERS = "#000000", "#d1495b", ("#1f6fb4", "#2a9d6f", "#a06ab4", "#8a8a8a", "#b98a2f")
STATISTICS = {  # of the record -> what its column is called
    "auroc": "AUROC",
    "reward_above": "reward's AUROC above it",
    "right_value": "below the right value",
    "average_precision": "average precision",
    "top_1": "lowest is wrong",
    "gap": "gap [spreads]",
    "pooled_auroc": "AUROC, pooled",
}
SELF = (REWARD, "reward_above")
COMPARED = (REWARD, SFT)
NARROW = 0.02  # no axis of AUROCs is shorter
BELOW = "The last columns: how often an error scores below the right value in its place."


def shown(record: Record) -> list[Shown]:
    """Everything in the record that a table can say; tables without rows are left out."""
    made = [
        _scores(record),
        _breakdown(record),
        _stitching(record),
        _spill(record),
        _sweep(record),
        _left_out(record),
    ]
    return [table for table in made if table.rows]


def rich_tables(record: Record) -> list[Table]:
    """The tables for a console."""
    return list(map(tables.rich_table, shown(record)))


def markdown(record: Record) -> str:
    """The tables as Markdown."""
    return tables.markdown(shown(record))


def section(record: Record) -> Markup:
    """The figure and the tables as a part of a page."""
    figure = page.figure(draw(record), "Which scores find the wrong tokens")
    return Markup("\n").join([figure, *map(tables.html, shown(record))])


def draw(record: Record) -> Figure:
    """AUROC by score, by error, and where they were varied by beta and pairs; rewards as bars."""
    swept = [key for key in ("beta", "pairs") if len(_line(record, key)) > 1]
    figure = Figure(figsize=(11, 4.2 * (2 + bool(swept))), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)  # inches: a title is not the axis above's
    axes = figure.subplots(2 + bool(swept), 2)
    _draw_scores(axes[0, 0], record)
    _draw_rewards(axes[0, 1], record["histogram"])
    _draw_breakdown(axes[1, 0], record)
    _draw_spill(axes[1, 1], record["spill"])
    for ax, key in zip(axes[-1], swept, strict=False) if swept else ():
        _draw_sweep(ax, record, key)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_visible(ax.has_data())
    return figure


def _scores(record: Record) -> Shown:
    rows = [
        (name, *("-" if (name, key) == SELF else _interval(found.get(key)) for key in STATISTICS))
        for name, found in record["scores"].items()
    ]
    return Shown(
        f"Finding wrong tokens: {_of(record)}",
        ("score", *STATISTICS.values()),
        rows,
        f"{record['responses']} responses with {_errors(record)} errors; 95% intervals. 'Below "
        "the right value': the wrong value scores lower than the right one in its place. Rounding "
        f"alone moves a reward by up to {record['noise_floor']:.1e}.",
    )


def _breakdown(record: Record) -> Shown:
    rows = [
        (row["by"], visible(row["group"]), _errors(row), *_both(record, row))
        for row in record["breakdown"]
    ]
    header = ("by", "", "errors", *_both_headers(record))
    return Shown("AUROC of single errors, by what they are", header, rows, BELOW)


def _stitching(record: Record) -> Shown:
    rows = [
        (row["error"], str(row["errors"]), *_aurocs(record, row)) for row in record["stitching"]
    ]
    note = "The second error is looked for among the right tokens after the first."
    header = ("error", "errors", *_informed(record))
    return Shown("AUROC with another error in the context", header, rows, note)


def _spill(record: Record) -> Shown:
    rows = [
        (row["part"], f"{row['tokens']:.1f}", *(_interval(row["difference"][REWARD], 4),))
        + tuple(_interval(share) for share in row["share"].values())
        for row in record["spill"]["rows"]
    ]
    names = record["spill"]["rows"][0]["share"] if rows else ()
    header = ("tokens", "how many", "reward, wrong minus right", *(f"share: {n}" for n in names))
    note = (
        f"Sums over each part, mean of {record['spill']['responses']} responses, each beside the "
        "same with its errors put right. Shares are of the whole difference of a score."
    )
    return Shown("Where a response differs from the same put right", header, rows, note)


def _sweep(record: Record) -> Shown:
    rows = [
        (f"{row['beta']:g}", _count(row["pairs"]), str(row["runs"]), *_both(record, row))
        for row in sorted(record["sweep"], key=lambda row: (row["beta"], row["pairs"] or 0))
    ]
    header = ("beta", "pairs", "runs", *_both_headers(record))
    return Shown("AUROC by beta and pairs", header, rows if len(rows) > 1 else [], BELOW)


def _left_out(record: Record) -> Shown:
    counts = record["counts"]
    rows = [(why, str(count)) for why, count in counts["left_out"].items() if count]
    note = f"of {counts['rows']} rows read"
    return Shown("Left out", ("why", "how many"), rows, note)


def _of(record: Record) -> str:
    main = record["main"]
    pairs = "" if main["pairs"] is None else f", {main['pairs']} pairs"
    runs = "" if main["runs"] == 1 else f", mean of {main['runs']} runs"
    return f"beta {main['beta']:g}{pairs}{runs}"


def _errors(row: Record) -> str:
    """How many errors there are, and of how many the right values can be compared with."""
    every, compared = row["errors"], row["compared"]
    return str(every) if every == compared else f"{every} ({compared} beside right values)"


def _informed(record: Record) -> list[str]:
    """The scores that can tell tokens of a response apart."""
    return [name for name in record["scores"] if name not in (EVENLY, RANDOM)]


def _aurocs(record: Record, row: Record) -> tuple[str, ...]:
    return tuple(_interval(row["auroc"][name]) for name in _informed(record))


def _both(record: Record, row: Record) -> tuple[str, ...]:
    below = tuple(_interval(row["right_value"][name]) for name in COMPARED)
    return _aurocs(record, row) + below


def _both_headers(record: Record) -> tuple[str, ...]:
    return (*_informed(record), *(f"{name}, below right" for name in COMPARED))


def _interval(estimate: Sequence[float | None] | None, digits: int = 3) -> str:
    value, low, high = estimate or (None, None, None)
    if value is None:
        return "-"
    shown = lambda number: f"{round(number, digits) + 0.0:.{digits}f}"  # no -0.000
    return shown(value) + ("" if low is None else f" [{shown(low)}, {shown(high)}]")


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _draw_scores(ax: Axes, record: Record) -> None:
    """Above all right tokens and, hollow, against the right value in the error's place."""
    names = list(record["scores"])[::-1]
    for place, name in enumerate(names):
        found = record["scores"][name]
        colour = INK if name == REWARD else OTHERS[0]
        shown = (("auroc", 0.14, None), ("right_value", -0.14, "none"))
        for statistic, up, face in (one for one in shown if one[0] in found):
            _dot(ax, found[statistic], place + up, colour, markerfacecolor=face or colour)
    ax.set_yticks(range(len(names)), names)
    ax.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    ax.plot([], [], "o", color=OTHERS[0], label="AUROC within a response")
    ax.plot([], [], "o", color=OTHERS[0], markerfacecolor="none", label="below the right value")
    _show_equal(ax, "x")
    ax.legend(fontsize=8, loc="center")
    ax.set_title(f"Finding wrong tokens: {_of(record)}", fontsize=10)


def _draw_rewards(ax: Axes, histogram: Record) -> None:
    edges = np.array(histogram["edges"])
    for name, colour in (("right", OTHERS[0]), ("wrong", WRONG)):
        shares = np.array(histogram[name])
        ax.stairs(shares, edges, fill=True, alpha=0.45, color=colour, label=f"{name} tokens")
    ax.set_yscale("log")
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.legend(fontsize=8)
    ax.locator_params(axis="x", nbins=5)
    ax.set(xlabel="DPO reward of a token", ylabel="share of such tokens")
    ax.set_title("Rewards of right and wrong tokens", fontsize=10)


def _draw_breakdown(ax: Axes, record: Record) -> None:
    rows = [(row["group"], row) for row in record["breakdown"]]
    rows += [(row["error"], row) for row in record["stitching"] if row["error"] != LOST]
    for place, (_, row) in enumerate(rows[::-1]):
        _dot(ax, row["auroc"][SFT], place - 0.15, OTHERS[0])
        _dot(ax, row["auroc"][REWARD], place + 0.15, INK)
    labels = [f"errors: {group}" if group.isdigit() else visible(group) for group, _ in rows]
    ax.set_yticks(range(len(rows)), labels[::-1], fontsize=7, parse_math=False)
    for name, colour in zip(COMPARED, (INK, OTHERS[0]), strict=True):
        ax.plot([], [], "o", color=colour, label=name)
    _show_equal(ax, "x")
    ax.legend(fontsize=8, loc="lower left")
    ax.set_title("AUROC within a response, by error", fontsize=10)


def _draw_spill(ax: Axes, spill: Record) -> None:
    for place, row in enumerate(spill["rows"][::-1]):
        _dot(ax, row["difference"][REWARD], float(place), INK)
    ax.set_yticks(range(len(spill["rows"])), [row["part"] for row in spill["rows"]][::-1])
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel("DPO reward, wrong minus right, by part")
    ax.set_title("Where a response differs from the same put right", fontsize=10)


def _draw_sweep(ax: Axes, record: Record, key: str) -> None:
    rows = _line(record, key)
    for name, colour in zip(_informed(record), (INK, *OTHERS), strict=False):
        style = dict(color=colour, marker="o")
        _curve(ax, rows, key, "auroc", name, label=name, **style)
        if name in COMPARED:
            style |= dict(markerfacecolor="none", linestyle=":")
            _curve(ax, rows, key, "right_value", name, label=f"{name}, below right", **style)
    ax.set_xscale("log")
    ax.set_xticks([row[key] for row in rows], [f"{row[key]:g}" for row in rows])
    ax.minorticks_off()
    _show_equal(ax, "y")
    ax.legend(fontsize=8)
    ax.set(xlabel=key, ylabel="AUROC within a response; below right")
    other = f"{record['main']['pairs']} pairs" if key == "beta" else f"beta {rows[0]['beta']:g}"
    ax.set_title(f"By {key}, with {other}", fontsize=10)


def _curve(ax: Axes, rows: list[Record], key: str, statistic: str, name: str, **style) -> None:
    value, low, high = np.array([row[statistic][name] for row in rows], float).T
    beside = np.maximum([value - low, high - value], 0)  # rounding may turn an end of no length
    ax.errorbar([row[key] for row in rows], value, beside, **style)


def _show_equal(ax: Axes, axis: str) -> None:
    """Keep rounding from filling an axis of numbers that are the same."""
    low, high = getattr(ax, f"get_{axis}lim")()
    if high - low < NARROW:
        middle = (low + high) / 2
        ax.set(**{f"{axis}lim": (middle - NARROW / 2, middle + NARROW / 2)})


def _line(record: Record, key: str) -> list[Record]:
    """The groups of runs that differ from the main one in `key` alone, in its order."""
    (other,) = {"beta", "pairs"} - {key}
    rows = [row for row in record["sweep"] if row[other] == record["main"][other]]
    return sorted(rows, key=lambda row: row[key] or 0)


def _dot(ax: Axes, estimate: Sequence[float | None], place: float, colour: str, **style) -> None:
    value, low, high = np.array(estimate, float)
    ax.plot([low, high], [place, place], color=colour, linewidth=1.2)
    ax.plot([value], [place], "o", color=colour, markersize=5, **style)
