"""A table says the same on a console, in Markdown and on a page, and its text is text."""

import pytest
from html_document import Document
from rich.console import Console

from jaxdpo.analysis import page, tables
from jaxdpo.analysis.tables import Shown

SHOWN = Shown("Sides [of two]", ("who", "length [tokens]"), [("[red]a|b\n", "1.5")], "of [three]")


def test_a_console_takes_nothing_for_markup(capsys):
    Console(width=80).print(tables.rich_table(SHOWN))
    shown = capsys.readouterr().out
    for text in ("Sides [of two]", "length [tokens]", "[red]a|b", "of [three]", "1.5"):
        assert text in shown


def test_long_cells_are_folded_not_cut(capsys):
    Console(width=30).print(tables.rich_table(Shown("", ("a",), [("x" * 90,)])))
    assert capsys.readouterr().out.count("x") == 90


def test_markdown_keeps_a_row_on_a_line():
    text = tables.markdown([SHOWN, Shown("b", ("c",), [])])
    assert "| [red]a\\|b  | 1.5 |" in text.splitlines() and "\nof [three]\n" in text
    assert text.endswith("## b\n\n| c |\n| --- |\n")


@pytest.mark.parametrize("text", ["<b>x</b>", "a\u202eb"])
def test_a_page_shows_text_as_text(text):
    html = tables.html(Shown(text, (text,), [(text,)], text))
    document = Document(page.page("t", [page.Section("s", html)]))
    assert document.faults == [] and document.text.count(page.visible(text)) == 4
