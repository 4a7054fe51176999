"""A heat map of token rewards: a token a cell, one colour scale, its zero in the middle.

The cells serve the page (`credit.section`) and are drawn here as a picture. Reads a record of
`credit.credit` and nothing else.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxdpo.analysis.page import visible
from jaxdpo.analysis.row_table import SPACES
from jaxdpo.prompts import tail
from jaxdpo.records import Record

MOST = 16  # prompts of a picture
NEGATIVE, POSITIVE = "#eb8c34", "#62a4e6"  # as in credit.css: told apart by colour-blind eyes
COLOURS = LinearSegmentedColormap.from_list("credit", [NEGATIVE, "#ffffff", POSITIVE])
INK, MUTED, LINE = "#1c2024", "#59636e", "#c4cbd2"
_DPI = 144
_FONT = font_manager.FontProperties(family="DejaVu Sans", size=9)
# In points: the header, a column of text, a line of it, a cell on the line.
_HEADER, _COLUMN, _MARGIN, _GUTTER = 78.0, 410.0, 24.0, 28.0
_LINE, _CELL, _PAD, _GAP = 20.0, 15.0, 3.0, 1.5


class Cell(NamedTuple):
    """A token as it is drawn."""

    text: str
    part: str  # "1/2" of the first of two tokens that spell a character
    token: Record
    strength: float  # from -1 to 1: the colour; 0 below the noise
    noise: bool  # whether rounding alone could have made the reward
    end: bool  # the end token
    opens: bool  # the first token of a marked span
    closes: bool  # the last one
    breaks: bool  # a line ends after it


class _Box(NamedTuple):
    """A cell in its place on a line of a column."""

    left: float
    width: float
    text: str
    cell: Cell


class _Band(NamedTuple):
    """Responses that stand side by side, each in its lines."""

    prompt: str  # above the first of a prompt's bands
    responses: list[Record]
    lines: list[list[list[_Box]]]


def scale(record: Record) -> float:
    """Where the colours end: the largest reward of any token by its size, or the noise floor.

    1 where both are zero.
    """
    rewards = (
        abs(token["reward"])
        for item in record["items"]
        for response in item["responses"]
        for token in response["tokens"]
    )
    return max(max(rewards), record["noise_floor"]) or 1.0


def cells(response: Record, *, top: float, noise_floor: float) -> list[Cell]:
    """The cells of a response of a record, of which the last is the end token.

    `top` is what `scale` says of the record.
    """
    tokens = response["tokens"]
    spans = [token["span"] for token in tokens]
    beside = zip(tokens, [None, *spans], spans, [*spans[1:], None], strict=False)
    found = []
    for token, before, span, after in beside:
        noise, marked = abs(token["reward"]) <= noise_floor, span is not None
        cell = Cell(
            shown(token),
            "{number}/{count}".format(**token["part"]) if token["part"] else "",
            token,
            strength=0.0 if noise else token["reward"] / top,
            noise=noise,
            end=False,
            opens=marked and span != before,
            closes=marked and span != after,
            breaks="\n" in token["piece"],
        )
        found.append(cell)
    return [*found[:-1], found[-1]._replace(text="EOS", end=True)]


def sums(response: Record) -> str:
    """What the rewards of a response, and of its marked tokens, add up to; in words."""
    tokens = response["tokens"]
    said = f"{signed(response['reward'])} ({len(tokens)} tokens)"
    if not response["spans"]:
        return said
    inside = sum(token["span"] is not None for token in tokens)
    return f"{said}, marked {signed(response['marked_reward'])} ({inside})"


def signed(reward: float) -> str:
    """A reward in three digits with its sign.

    >>> signed(-0.12345)
    '−0.123'
    """
    return f"{reward:+#.3g}".rstrip(".").replace("-", "−")


def shown(token: Record) -> str:
    """The piece of a token of a record, with all that is invisible made visible.

    Bytes of a character are shown as that character; `Cell.part` says which of its tokens.

    >>> shown({"piece": " Oslo", "part": None})
    '·Oslo'
    >>> shown({"piece": " \\ufffd", "part": {"number": 1, "count": 2, "of": "é"}})
    '·é'
    """
    piece = token["piece"]
    if token["part"]:
        piece = re.sub("\ufffd+", lambda _: token["part"]["of"], piece, count=1)
    return visible(piece).translate(SPACES)


def draw(record: Record, file: str | Path) -> int:
    """Write the heat maps as a picture; returns how many prompts it has no room for.

    Responses to one prompt stand side by side, two to a line.
    """
    items = record["items"][:MOST]
    bands = [band for number, item in enumerate(items, 1) for band in _bands(number, item, record)]
    width, height = 2 * (_COLUMN + _MARGIN) + _GUTTER, _HEADER + sum(map(_height, bands))
    figure = Figure(figsize=(width / 72, height / 72), dpi=_DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    _draw_header(figure, axes, record, width, height)
    top = _HEADER
    for band in bands:
        _draw_band(axes, band, top)
        top += _height(band)
    figure.savefig(file, dpi=min(_DPI, 65_000 * 72 / height))  # an image has at most 2^16 lines
    return len(record["items"]) - len(items)


def _bands(number: int, item: Record, record: Record) -> Iterator[_Band]:
    end, noise = scale(record), record["noise_floor"]
    for first in range(0, len(item["responses"]), 2):
        pair = item["responses"][first : first + 2]
        lines = [_lines(cells(one, top=end, noise_floor=noise)) for one in pair]
        yield _Band(f"{number}.  {tail(item['prompt'], 100)}" if first == 0 else "", pair, lines)


def _lines(cells: Sequence[Cell]) -> list[list[_Box]]:
    """The cells in lines of a column's width, broken where the text breaks, too."""
    lines, left = [[]], 0.0
    for cell in cells:
        text = _drawable(f"{cell.text} {cell.part}".rstrip())
        wide = _width(text) + 2 * _PAD
        if left + wide > _COLUMN and lines[-1]:
            lines, left = [*lines, []], 0.0
        lines[-1].append(_Box(left, wide, text, cell))
        left += wide + _GAP
        if cell.breaks:
            lines, left = [*lines, []], 0.0
    return lines


def _height(band: _Band) -> float:
    return (_LINE if band.prompt else 0.0) + _LINE + max(map(len, band.lines)) * _LINE + 12


def _draw_header(figure: Figure, axes: Axes, record: Record, width: float, height: float) -> None:
    names = [record["models"][role]["name"] for role in ("policy", "reference")]
    title = f"policy {names[0]}    reference {names[1]}    beta {record['beta']:g}"
    _write(axes, _MARGIN, 20.0, title, weight="bold")
    end = scale(record)
    place = figure.add_axes((_MARGIN / width, 1 - 44 / height, 240 / width, 10 / height))
    scalar = ScalarMappable(Normalize(-end, end), COLOURS)
    bar = figure.colorbar(scalar, cax=place, orientation="horizontal")
    bar.set_ticks([-end, 0, end], labels=[signed(-end), "0", signed(end)], fontsize=8)
    place.axvline(0, color=INK, linewidth=1.2)
    _draw_legend(axes, _MARGIN + 290, record["noise_floor"])


def _draw_legend(axes: Axes, left: float, noise_floor: float) -> None:
    _write(axes, left, 38.0, "reward of a token, beta log(policy / reference)", color=MUTED)
    blank = Cell("", "", {"span": None}, 0.0, False, False, False, False, False)
    noise = f"within ±{noise_floor:.2g}: below the noise (same weights, another batch shape)"
    marked = blank._replace(token={"span": 0}, opens=True, closes=True)
    for at, cell, said in (
        (left, blank._replace(noise=True), noise),
        (left + 400, marked, "marked span"),
    ):
        _draw_box(axes, at, 60.0, _Box(0.0, 22.0, "", cell))
        _write(axes, at + 28, 60.0, said, color=MUTED)


def _draw_band(axes: Axes, band: _Band, top: float) -> None:
    if band.prompt:
        _write(axes, _MARGIN, top + _LINE / 2, band.prompt, color=MUTED)
        top += _LINE
    for column, (response, lines) in enumerate(zip(band.responses, band.lines, strict=True)):
        left = _MARGIN + column * (_COLUMN + _GUTTER)
        _write(axes, left, top + _LINE / 2, f"{response['name']}: {sums(response)}", weight="bold")
        for number, line in enumerate(lines, 1):
            for box in line:
                _draw_box(axes, left, top + (number + 0.5) * _LINE, box)


def _draw_box(axes: Axes, left: float, middle: float, box: _Box) -> None:
    cell, left = box.cell, left + box.left
    low, high, right = middle - _CELL / 2, middle + _CELL / 2, left + box.width
    style = {"facecolor": COLOURS(0.5 + cell.strength / 2), "edgecolor": LINE, "linewidth": 0.5}
    hatch = "/////" if cell.noise else None
    axes.add_patch(Rectangle((left, low), box.width, _CELL, hatch=hatch, **style))
    _write(axes, left + _PAD, middle, box.text, style="italic" if cell.end else "normal")
    if cell.token["span"] is None:
        return
    edges = [((left, right), (low, low)), ((left, right), (high, high))]
    edges += [((left, left), (low, high))] * cell.opens + [
        ((right, right), (low, high))
    ] * cell.closes
    for across, down in edges:
        axes.plot(across, down, color=INK, linewidth=1.6, solid_capstyle="projecting")


def _write(axes: Axes, left: float, middle: float, text: str, **style: Any) -> None:
    options = {"color": INK, "va": "center_baseline", "fontproperties": _FONT, "parse_math": False}
    axes.text(left, middle, _drawable(visible(text)), **options | style)


def _width(text: str) -> float:
    """Of a text as it will be drawn, in points: letters stand on whole pixels."""
    pixels, _, _ = RendererAgg(1, 1, _DPI).get_text_width_height_descent(text, _FONT, ismath=False)
    return pixels * 72 / _DPI


def _drawable(text: str) -> str:
    """The text with each character that the picture's font does not have written out."""
    return "".join(one if ord(one) in _glyphs() else f"⟨U+{ord(one):04X}⟩" for one in text)


@functools.cache
def _glyphs() -> dict[int, int]:
    return font_manager.get_font(font_manager.findfont(_FONT)).get_charmap()
