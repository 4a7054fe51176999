"""A table as text, once for a console, once as Markdown, once for a page."""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup
from rich.table import Column, Table
from rich.text import Text

from jaxdpo.analysis import page
from jaxdpo.analysis.page import visible


class Shown(NamedTuple):
    """A table as text."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def rich_table(shown: Shown) -> Table:
    """For a console; long cells are folded, never cut, and nothing is taken for markup."""
    columns = [Column(Text(name), overflow="fold") for name in shown.header]
    title, note = (Text(visible(text)) if text else None for text in (shown.title, shown.note))
    table = Table(*columns, title=title, caption=note, title_justify="left")
    for row in shown.rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def markdown(tables: Sequence[Shown]) -> str:
    """As Markdown; a cell cannot break out of its table.

    >>> print(markdown([Shown("Sides", ("who", "n"), [("a|b", "1")])]), end="")
    ## Sides
    <BLANKLINE>
    | who | n |
    | --- | --- |
    | a\\|b | 1 |
    """
    parts = []
    for title, header, rows, note in tables:
        plain = [
            [visible(cell).replace("\n", " ").replace("|", "\\|") for cell in row] for row in rows
        ]
        lines = [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *plain)]
        parts.append("\n".join([f"## {title}\n", *lines, *([f"\n{note}"] if note else [])]))
    return "\n\n".join(parts) + "\n"


def html(shown: Shown) -> Markup:
    """For a page, with its title and note above it."""
    return page.table(shown.header, shown.rows, f"{shown.title}. {shown.note}".strip())
