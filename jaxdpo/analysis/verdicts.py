"""An evaluation to look at: its numbers as tables, what they warn of, and the pairs side by side.

Reads the record and the verdicts that `evaluation` writes. Left out: what the numbers mean
(`win_rates`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxdpo.analysis import page as pages
from jaxdpo.analysis import tables
from jaxdpo.analysis.page import visible
from jaxdpo.analysis.tables import Shown
from jaxdpo.prompts import tail
from jaxdpo.records import Record

MOST = 50  # pairs of a page that ended alike
MOST_SUBSETS = 20  # of a figure
ENDS = {"left": "Wins", "right": "Losses", "tie": "Ties", "none": "Not read"}
COLOURS = {"wins": "#1f6fb4", "ties": "#8a8a8a", "losses": "#d1495b"}
INK = "#000000"
SIDES = {"left": "policy", "right": "opponent"}


class Card(NamedTuple):
    """One side's response, with what stands above and below it."""

    heading: str
    text: str
    note: str


class Pair(NamedTuple):
    """A comparison as it is shown."""

    heading: str
    prompt: str
    short: str  # the end of the prompt
    cards: list[Card]
    said: list[tuple[str, str]]  # of each order that was asked: the verdict, and why


def shown(record: Record) -> list[Shown]:
    """Everything that a table can say of an evaluation's numbers."""
    return [_rates(record), _controlled(record), _lengths(record), _judge(record)]


def remarks(record: Record) -> list[str]:
    """What a reader must know before the numbers are believed, a sentence each."""
    total, bias = _total(record), record["position_bias"]
    said = []
    if record["asked"] is not None and record["asked"] > total:
        said.append(f"{record['asked']} prompts were asked for, but the data has {total}")
    if not record["judge"]["fair"] and not _holds(bias["first"], 0.5):
        said.append(bias["in_words"])
    if record["unread"]:
        said.append(
            f"{record['unread']} of {total} comparisons have no answer that could be read; they "
            "are left out of all rates"
        )
    for side, role in SIDES.items():
        if count := record["empty"][side]:
            said.append(f"{role}: {count} of {total} responses are empty, and judged as they are")
        if count := record["cut"][role]:
            said.append(f"{role}: {count} of {total} responses were cut at the limit of tokens")
    if record["identical"]:
        said.append(f"{record['identical']} of {total} comparisons are of a text with itself")
    return said


def page(record: Record, rows: Sequence[Record]) -> str:
    """The numbers, and the pairs by how they ended, as one page; `rows` are the verdicts."""
    title = f"{record['policy']} against {record['opponent']}"
    by_end: dict[str, list[Record]] = {}
    for row in rows:
        by_end.setdefault(row["winner"], []).append(row)
    sections = [pages.Section("Win rate", _summary(record))]
    sections += [
        pages.Section(f"{name} ({len(by_end[end])})", _pairs(by_end[end], record))
        for end, name in ENDS.items()
        if end in by_end
    ]
    return pages.page(title, sections)


def draw(record: Record) -> Figure:
    """How comparisons ended, and the win rates with their intervals, over all and by subset."""
    rows = [(_named(name), one) for name, one in _largest(record).items()][::-1]
    figure = Figure(figsize=(10, 1.3 + 0.42 * len(rows)), layout="constrained")
    ends, rates = figure.subplots(1, 2)
    _draw_ends(ends, [one for _, one in rows])
    for place, (_, one) in enumerate(rows):
        _dot(rates, place + 0.12, one["win_rate"], one["wilson"], COLOURS["wins"])
    controlled = record["length_controlled"]["win_rate"]
    _dot(rates, len(rows) - 1 - 0.16, controlled[0], controlled[1:], INK)
    rates.plot([], [], "o", color=COLOURS["wins"], label="win rate, Wilson")
    rates.plot([], [], "o", color=INK, label="length-controlled, bootstrap")
    rates.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    rates.set(xlim=(-0.02, 1.02), xlabel="win rate")
    for ax in (ends, rates):
        ax.set_yticks(range(len(rows)), [name for name, _ in rows])
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def _rates(record: Record) -> Shown:
    names = ("wins", "ties", "losses", "unread")
    rows = [
        (_named(subset), *(str(one[name]) for name in names))
        + tuple(_interval(one["win_rate"], *one[kind]) for kind in ("wilson", "bootstrap"))
        for subset, one in _tallies(record).items()
    ]
    how = ", in both orders" if record["settings"]["both_orders"] else ", in an order drawn by seed"
    how = "" if record["judge"]["fair"] else how
    return Shown(
        f"Win rate of {record['policy']} against {record['opponent']}",
        ("subset", *names, "win rate, Wilson", "win rate, bootstrap"),
        rows,
        f"{_total(record)} prompts, judged by {record['judge']['name']}{how}. The rate is "
        "(wins + ties / 2) over what was read; intervals of 95%, the bootstrap's over prompts.",
    )


def _controlled(record: Record) -> Shown:
    found = record["length_controlled"]
    rows = [
        ("win rate at equal length, neither shown first", _interval(*found["win_rate"])),
        ("effect of length, logits", _interval(*found["length_effect"])),
    ]
    if not record["judge"]["fair"]:
        rows.append(("effect of being shown first, logits", _interval(*found["first_effect"])))
    spread = "–" if found["spread"] is None else f"{found['spread']:.1f}"
    return Shown(
        "Length-controlled win rate",
        ("of the logistic regression", "value"),
        rows,
        f"Lengths enter as tanh of their difference over its standard deviation, {spread} "
        f"{_unit(record)}.",
    )


def _lengths(record: Record) -> Shown:
    total = _total(record)
    rows = [
        (
            f"{role}: {record[role]}",
            _interval(*record["lengths"][side], digits=1),
            f"{record['empty'][side] / total:.1%}",
            "–" if record["cut"][role] is None else f"{record['cut'][role] / total:.1%}",
        )
        for side, role in SIDES.items()
    ]
    difference = _interval(*record["lengths"]["difference"], digits=1)
    rows.append(("policy less opponent", difference, "–", "–"))
    header = ("side", f"mean length [{_unit(record)}]", "empty", "cut at the limit")
    return Shown("Responses", header, rows, f"Lengths are in {record['unit']}.")


def _judge(record: Record) -> Shown:
    bias = record["position_bias"]
    rows = [("answers that could be read", str(bias["answers"]))]
    rows.append(("of them for one side", str(bias["decided"])))
    if record["judge"]["fair"]:
        note = "The order in which responses are shown is nothing to this judge."
        return Shown(f"Judge: {record['judge']['name']}", ("of the answers", "value"), rows, note)
    rows.append(("for what was shown first", _interval(*bias["first"])))
    if bias["asked_twice"]:
        rows += [
            ("comparisons read in both orders", str(bias["asked_twice"])),
            ("of them with the same winner", _interval(*bias["consistent"])),
            ("the first both times", str(bias["first_twice"])),
            ("the second both times", str(bias["second_twice"])),
        ]
    note = f"Position bias: {bias['in_words']}."
    return Shown(f"Judge: {record['judge']['name']}", ("of the answers", "value"), rows, note)


def _summary(record: Record) -> Markup:
    parts = [pages.problem(f"{said[0].upper()}{said[1:]}.") for said in remarks(record)]
    caption, every = "How comparisons ended, and win rates with 95% intervals", _tallies(record)
    if left_out := len(every) - len(_largest(record)):
        caption += f"; the {MOST_SUBSETS} largest subsets, {left_out} more are in the table"
    parts.append(pages.figure(draw(record), f"{caption}."))
    return Markup("\n").join([*parts, *map(tables.html, shown(record))])


def _pairs(rows: Sequence[Record], record: Record) -> Markup:
    left_out = len(rows) - MOST
    note = f"The first {MOST} of {len(rows)}; {left_out} more are in verdicts.jsonl."
    pairs = [_pair(row, record) for row in rows[:MOST]]
    return pages.macros("verdicts.html").pairs(note if left_out > 0 else "", pairs)


def _pair(row: Record, record: Record) -> Pair:
    cards = []
    for (side, role), length in zip(SIDES.items(), row["lengths"], strict=True):
        won = " · preferred" if row["winner"] == side else ""
        cards.append(Card(f"{role}{won}", row[side], f"{length} {_unit(record)}"))
    heading = f"{row['place']} · {row['subset']}" if row["subset"] else row["place"]
    said = [(_said(one), one["reason"]) for one in row["verdicts"]]
    return Pair(heading, row["prompt"], tail(row["prompt"], 80), cards, said)


def _said(one: Record) -> str:
    """A verdict in words: who was shown first (A, in most reasons), and who is preferred."""
    first, second = list(SIDES.values())[:: 1 if one["left_first"] else -1]
    words = {"first": f"prefers {first}", "second": f"prefers {second}", "tie": "prefers neither"}
    return f"{first} shown first: {words.get(one['preferred'], 'cannot be read')}"


def _tallies(record: Record) -> dict[str | None, Record]:
    """All comparisons, and those of each subset where there are subsets."""
    subsets = record["subsets"]
    return {None: record} | (subsets if any(subsets) else {})


def _largest(record: Record) -> dict[str | None, Record]:
    """All comparisons, and the subsets of which a figure has room, in their order."""
    tallies = _tallies(record)
    kept = sorted(tallies, key=lambda name: -_total(tallies[name]))[: MOST_SUBSETS + 1]
    return {name: one for name, one in tallies.items() if name in kept}


def _holds(estimate: Sequence[float | None], value: float) -> bool:
    _, low, high = estimate
    return low is not None and low <= value <= high


def _named(subset: str | None) -> str:
    return "all" if subset is None else visible(subset) or "(nothing)"


def _total(record: Record) -> int:
    return sum(record[name] for name in ("wins", "ties", "losses", "unread"))


def _unit(record: Record) -> str:
    return record["unit"].partition(" ")[0]


def _interval(value: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    text = lambda number: f"{round(number, digits) + 0.0:.{digits}f}"  # no -0.000
    return text(value) + ("" if low is None else f" [{text(low)}, {text(high)}]")


def _draw_ends(ax: Axes, rows: Sequence[Record]) -> None:
    """Stacked shares of wins, ties and losses."""
    reads = [max(sum(one[end] for end in COLOURS), 1) for one in rows]
    begin = [0.0] * len(rows)
    for end, colour in COLOURS.items():
        shares = [one[end] / read for one, read in zip(rows, reads, strict=True)]
        ax.barh(range(len(rows)), shares, left=begin, color=colour, height=0.6, label=end)
        begin = [at + share for at, share in zip(begin, shares, strict=True)]
    ax.set(xlim=(0, 1), xlabel="share of what was read")


def _dot(
    ax: Axes,
    place: float,
    value: float | None,
    ends: Sequence[float | None],
    colour: str,
) -> None:
    if value is None:
        return
    ax.plot([value], [place], "o", color=colour)
    if None not in ends:
        ax.plot(list(ends), [place, place], color=colour, linewidth=1.6)
