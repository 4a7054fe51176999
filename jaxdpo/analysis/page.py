"""A self-contained HTML page: no script, nothing from elsewhere, every text shown as text.

Whatever is not `Markup` is escaped, in `page`, `table` and the templates alike, and characters
that a reader could not see, or that turn the text around them, are written out. Figures stand
in the page as SVG and follow its light and dark colours. Left out: what a page is about
(`report`, `credit`).
"""

import io
import itertools
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.ticker import Formatter, LogFormatter, LogitFormatter, ScalarFormatter

INK = "#000000"  # of a figure: becomes the colour of the page's text; all others stay
_ONE = r"[-+−]?(\d[\d,]*(\.\d*)?(e[-+]?\d+)?\s?%?|inf|nan)"
_NUMBER = re.compile(rf"{_ONE}( ± {_ONE}| \[{_ONE}, {_ONE}\])?|[-–—]?|not finite", re.IGNORECASE)
_JOINERS = re.compile("(?<=[^\x00-\x7f])[\u200c\u200d](?=[^\x00-\x7f])")  # of emoji, of Persian
_NUMBERS = (ScalarFormatter, LogFormatter, LogitFormatter)  # of ticks; some write mathematics
_figures = itertools.count(1)


class Section(NamedTuple):
    """A part of a page under a heading of its own."""

    title: str
    body: Markup


def page(title: str, sections: Sequence[Section]) -> str:
    """One HTML document with a list of contents; it can be sent, printed and read on a phone."""
    slug = lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    anchored = [(f"{n}-{slug(one.title)}", *one) for n, one in enumerate(sections, 1)]
    return _templates.get_template("page.html").render(title=title, sections=anchored) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Markup:
    """A table that scrolls in a box of its own where it is too wide; numbers stand to the right.

    >>> "<td>&lt;b&gt;</td>" in table(["said"], [["<b>"]])
    True
    """
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    numeric = list(map(_numeric, columns))
    rows = [list(zip(row, numeric, strict=True)) for row in rows]
    header = list(zip(header, numeric, strict=True))
    return macros("parts.html").table(header, rows, caption)


def figure(fig: Figure, caption: str = "") -> Markup:
    """A figure as inline SVG with its text as text, and nothing in it as mathematics.

    Backgrounds become transparent and exact black the colour of the page's text. Choose other
    colours to be read on white and on nearly black; letters over coloured areas need such a
    colour too, or any that is not exact black.
    """
    for legend in fig.findobj(Legend):
        legend.set_frame_on(False)
    _show_text(fig)
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxdpo"}):
        fig.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = ElementTree.fromstring(file.getvalue())
    title = caption or fig.get_suptitle() or "figure"
    _make_inline(drawn, visible(title), prefix=f"figure-{next(_figures)}-")
    svg = Markup(ElementTree.tostring(drawn, encoding="unicode"))
    return macros("parts.html").figure(svg, title, caption)


def missing(what: str, command: str) -> Markup:
    """That something is not there yet, and the command that makes it."""
    return macros("parts.html").missing(what, command)


def problem(message: str) -> Markup:
    """That something is there and cannot be shown, and why."""
    return macros("parts.html").problem(message)


def macros(template: str) -> Any:
    """The macros of a file in `templates/`, as functions that return `Markup`."""
    return _templates.get_template(template).module


def visible(text: Any) -> Any:
    """Text with each character written out that is invisible or turns the text around it.

    Line breaks and tabs stay; so does what is not text, or is Markup already.

    >>> visible("5\\u202eUSD\\x1b")
    '5⟨U+202E⟩USD⟨U+001B⟩'
    """
    if not isinstance(text, str) or isinstance(text, Markup) or text.isprintable():
        return text
    joining = {found.start() for found in _JOINERS.finditer(text)}
    keep = lambda place, one: one in "\n\t" or not _invisible(one) or place in joining
    return "".join(
        one if keep(place, one) else f"⟨U+{ord(one):04X}⟩" for place, one in enumerate(text)
    )


def _numeric(column: Sequence[str]) -> bool:
    """Whether all cells hold a number, with or without its error or interval, or say: none.

    >>> _numeric(["0.9 [0.8, 1.0]", "–"]), _numeric(["–"]), _numeric(["5 of 6"])
    (True, False, False)
    """
    return all(map(_NUMBER.fullmatch, column)) and any(map(str.isdigit, "".join(column)))


def _invisible(one: str) -> bool:
    """Controls, formats, lone surrogates, line separators, and what no XML may hold."""
    return unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp") or one in "\ufffe\uffff"


def _show_text(fig: Figure) -> None:
    """Make the text of a figure visible and plain, but for the numbers that an axis writes."""
    numbers = []
    for axis in fig.findobj(Axis):
        numbers.append(axis.offsetText)
        for minor, formatter in enumerate((axis.get_major_formatter(), axis.get_minor_formatter())):
            if isinstance(formatter, _NUMBERS):
                numbers += axis.get_ticklabels(minor=bool(minor))
            else:
                _show_ticks(formatter)
    for text in fig.findobj(Text):
        if text not in numbers:
            text.set(text=visible(text.get_text()), parse_math=False)


def _show_ticks(formatter: Formatter) -> None:
    """Labels of ticks are written anew whenever an axis is drawn: what writes them must change."""
    written = formatter.format_ticks
    formatter.format_ticks = lambda values: list(map(visible, written(values)))


def _make_inline(drawn: ElementTree.Element, title: str, *, prefix: str) -> None:
    """Make a parsed SVG file a part of a page: plain names, its own ids, the page's ink."""
    for parent in list(drawn.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # a style would apply to the page
                parent.remove(child)
    values = " ".join(value for element in drawn.iter() for value in element.attrib.values())
    used = set(re.findall(r"#([\w-]+)", values))
    for element in drawn.iter():
        element.tag = element.tag.rpartition("}")[2]
        named = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        own = named.pop("id", None)
        element.attrib.clear()
        element.attrib.update({name: _inlined(value, prefix) for name, value in named.items()})
        if own in used:
            element.set("id", prefix + own)
    width = float(drawn.get("viewBox").split()[2]) * 4 / 3  # a point is 4/3 pixels
    drawn.attrib = {"viewBox": drawn.get("viewBox"), "role": "img", "fill": "currentColor"}
    # At 0.6 of its size its letters can still be read; a narrower box scrolls.
    drawn.set("style", f"max-width: {width:.0f}px; min-width: {0.6 * width:.0f}px")
    heading = ElementTree.Element("title")
    heading.text = title
    drawn.insert(0, heading)


def _inlined(value: str, prefix: str) -> str:
    value = value.replace("url(#", f"url(#{prefix}").replace(INK, "currentColor")
    return f"#{prefix}{value[1:]}" if value.startswith("#") else value


_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=visible,
    trim_blocks=True,
    lstrip_blocks=True,
)
