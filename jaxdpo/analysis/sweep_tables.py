"""A beam sweep to look at: the table, what it says in words, and the panels of Figure 2.

Left out: what the numbers mean (`sweep`).
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxdpo.analysis import tables
from jaxdpo.analysis.tables import Shown
from jaxdpo.records import Record

HEADER = (
    *("beta", "method", "score", "beams", "win rate", "less the fewest", "length"),
    *("implicit reward", "log-probability", "ended"),
)
REWARD = "implicit_reward"
PANELS = {  # row of the figure -> its name on the axis
    "win_rate": "win rate",
    "length": "length [tokens]",
    REWARD: "implicit reward",
}
COLOURS = ("#1f6fb4", "#d1495b", "#2a9d6f", "#a06ab4", "#b98a2f", "#8a8a8a")
STYLES = {"beam": "-", "beam_sample": "--"}


def rows(record: Record) -> list[tuple[str, ...]]:
    """A row of text for each cell."""
    return [
        (
            *(f"{cell['beta']:g}", cell["method"], cell["norm"], str(cell["beam_size"])),
            *(shown(cell["win_rate"]), shown(cell["gain"], signed=True)),
            *(shown(cell["length"], digits=1), shown(cell[REWARD])),
            *(shown(cell["logps"], digits=2), f"{cell['ended'][0]:.0%}"),
        )
        for cell in record["cells"]
    ]


def table(record: Record) -> Shown:
    """The table of all cells."""
    return Shown(_title(record), HEADER, rows(record))


def brief(record: Record) -> Shown:
    """As narrow as a console."""
    few = [HEADER.index(name) for name in ("beta", "method", "score", "beams", "win rate")]
    shown = [
        (*(row[at] for at in few), *(f"{cell[name][0]:.2f}" for name in ("length", REWARD)))
        for row, cell in zip(rows(record), record["cells"], strict=True)
    ]
    return Shown(_title(record), (*(HEADER[at] for at in few), "length", "reward"), shown)


def markdown(record: Record) -> str:
    """The table and the words as Markdown."""
    said = "\n".join(f"- {line}" for line in readings(record))
    return f"{tables.markdown([table(record)])}\n{said}\n"


def readings(record: Record) -> list[str]:
    """For each line of cells, whether more beams win more, and where over-optimisation begins.

    It begins with the fewest beams whose win rate lies below that of the next fewer ones, by
    more than chance, while what the search maximises has not fallen.
    """
    return [_reading(*line) for line in _lines(record)]


def draw(record: Record) -> Figure:
    """Win rate, length and implicit reward by the number of beams, a column for each score."""
    norms = list(dict.fromkeys(cell["norm"] for cell in record["cells"]))
    fig = Figure(figsize=(4.2 * len(norms), 3.0 * len(PANELS)), layout="constrained")
    axes = fig.subplots(len(PANELS), len(norms), squeeze=False, sharex=True, sharey="row")
    betas = list(dict.fromkeys(cell["beta"] for cell in record["cells"]))
    colours = dict(zip(betas, itertools.cycle(COLOURS), strict=False))
    for (name, label), across in zip(PANELS.items(), axes, strict=True):
        for norm, ax in zip(norms, across, strict=True):
            lines = [line for line in _lines(record) if line[2] == norm]
            _draw_panel(ax, name, lines, colours)
        across[0].set_ylabel(label)
    for norm, top, bottom in zip(norms, axes[0], axes[-1], strict=True):
        top.set_title(f"score: {norm}", fontsize=10)
        bottom.set_xlabel("beams")
    lines = axes[0, 0].get_legend_handles_labels()
    fig.legend(*lines, loc="outside lower center", ncols=len(betas), fontsize=8)
    fig.suptitle(_title(record), fontsize=10)
    return fig


def shown(estimate: Sequence[float | None] | None, *, digits: int = 3, signed: bool = False) -> str:
    """An estimate with its interval as text.

    >>> shown([0.5, 0.4, 0.6], digits=1), shown(None)
    ('0.5 [0.4, 0.6]', '-')
    """
    if estimate is None or estimate[0] is None:
        return "-"
    value, low, high = (f"{one:{'+' if signed else ''}.{digits}f}" for one in estimate)
    return f"{value} [{low}, {high}]"


def _title(record: Record) -> str:
    runs = max(cell["runs"] for cell in record["cells"])
    return (
        f"{record['prompts']} prompts against {record['opponent']}, judge: {record['judge']}"
        f"{f', {runs} runs' if runs > 1 else ''}; 95% intervals"
    )


def _lines(record: Record) -> Iterator[tuple[float, str, str, list[Record]]]:
    """(beta, method, norm, its cells by beams)."""
    of = lambda cell: (cell["beta"], cell["method"], cell["norm"])
    ordered = sorted(record["cells"], key=lambda cell: (*of(cell), cell["beam_size"]))
    for line, found in itertools.groupby(ordered, of):
        yield *line, list(found)


def _reading(beta: float, method: str, norm: str, line: Sequence[Record]) -> str:
    first, last = line[0], line[-1]
    text = f"beta {beta:g}, {method}, {norm}: win rate {shown(first['win_rate'])} with "
    text += f"{first['beam_size']}"
    for cell in line[1:]:
        text += f", {cell['win_rate'][0]:.3f} with {cell['beam_size']}"
    if last is not first:
        text += f"; {last['beam_size']} less {first['beam_size']}: "
        text += shown(last["gain"], signed=True)
    over = _over_optimised(line)
    return text + (
        f"; over-optimised from {over['beam_size']} beams on (a step of "
        f"{shown(over['step'], signed=True)})"
        if over
        else "; over-optimisation is not seen"
    )


def _over_optimised(line: Sequence[Record]) -> Record | None:
    for fewer, cell in itertools.pairwise(line):
        _, _, high = cell["step"]
        if high is not None and high < 0 and cell["logps"][0] >= fewer["logps"][0]:
            return cell
    return None


def _draw_panel(ax: Axes, name: str, lines, colours: dict[float, str]) -> None:
    for place, (beta, method, _, cells) in enumerate(lines):
        value, low, high = np.array([cell[name] for cell in cells], float).T
        beside = np.maximum([value - low, high - value], 0)  # rounding may turn an end of no length
        ax.errorbar(
            [cell["beam_size"] * 1.04**place for cell in cells],  # no interval hides another
            value,
            beside,
            color=colours[beta],
            linestyle=STYLES[method],
            marker="o",
            markersize=3,
            linewidth=1.2,
            label=f"beta {beta:g}, {method}",
        )
    sizes = sorted({cell["beam_size"] for *_, cells in lines for cell in cells})
    ax.set_xscale("log")
    ax.set_xticks(sizes, list(map(str, sizes)))
    ax.minorticks_off()
