"""A page shows every text as text, asks nothing of anybody, and its parts do not collide."""

import re
from pathlib import Path

import pytest
from html_document import Document
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

from jaxdpo.analysis import page
from jaxdpo.analysis.page import Section
from jaxdpo.analysis.side_by_side import Card
from jaxdpo.analysis.trajectories import COLOURS

PAGE_CSS = (Path(page.__file__).parent / "templates/page.css").read_text()
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
HOSTILE = [
    "<script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "</style></title><img src=x onerror=alert(1)>",
    "<!-- --><svg/onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    '<a href="https://example.org">&amp;&lt;</a>',
    "]]></td></table><h1>",
]


def drawing(title: str) -> Figure:
    figure = Figure(figsize=(4, 3))
    ax = figure.subplots()
    ax.plot([0, 1, 2], [0, 1, 0], color="black", marker="o", label=title)
    ax.plot([0, 1, 2], [1, 0, 1], color="#1f6fb4")
    ax.imshow([[0.0, 1.0]], cmap="RdBu")
    ax.legend()
    ax.set_title(title)
    return figure


def everything(text: str) -> str:
    """A page with the text in every place that takes one."""
    body = [
        page.table([text, "n"], [[text, "1.5"], [text, "-2e-3"]], text),
        page.missing(text, text),
        page.problem(text),
        page.table([text], []),
        page.macros("side_by_side.html").groups(text, [(text, [Card(text, text, text)])]),
    ]
    return page.page(text, [Section(text, Markup("").join(body)), Section(text, Markup())])


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_text_wherever_it_stands(text):
    document = Document(everything(text))
    assert document.faults == []
    assert document.text.count(text) >= 12
    if "<" in text:  # the check notices text that was taken for markup
        assert Document(everything(Markup(text))).faults


def test_text_in_attributes_and_drawings_is_text():
    figures = [page.figure(drawing("a < b & c"), text) for text in HOSTILE]
    document = Document(page.page("figures", [Section("one", Markup("").join(figures))]))
    assert document.faults == []  # among them: ids that stand twice, references to no id
    assert all(document.text.count(text) == 2 for text in HOSTILE)  # caption, title of the SVG
    assert document.text.count("a < b & c") == 2 * len(HOSTILE)  # its letters are letters


def test_page_asks_nothing_of_anybody():
    html = page.page("a", [Section("b", page.figure(drawing("c")))])
    document = Document(html)
    assert document.policy.startswith(POLICY)
    assert "<script" not in html and "http://" not in html and "https://" not in html
    assert document.faults == []
    linked = Markup('<a href="https://example.org">')  # the check notices one that does
    assert Document(page.page("a", [Section("b", linked)])).faults


def test_colours_are_there_for_light_dark_and_paper():
    styles = Document(page.page("a", [Section("b", Markup())])).styles
    blocks = re.findall(r":root\s*{([^}]*)}", styles)
    light, dark, paper = (dict(re.findall(r"(--[\w-]+):\s*([^;]+);", one)) for one in blocks[:3])
    assert light.keys() == dark.keys() == paper.keys() and light["--paper"] != dark["--paper"]
    assert set(re.findall(r"var\((--[\w-]+)", PAGE_CSS)) == light.keys()
    assert "prefers-color-scheme: dark" in styles and "print-color-adjust: exact" in styles
    for scheme in (light, dark, paper):  # as WCAG asks of text, and of graphics
        for colour in ("ink", "muted", "link", "warn"):
            assert contrast(scheme[f"--{colour}"], scheme["--paper"]) >= 4.5, colour
        for colour in COLOURS.values():
            assert contrast(colour, scheme["--paper"]) >= 3.0, colour


def contrast(*colours: str) -> float:
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def test_figure_takes_the_ink_of_the_page():
    svg = page.figure(drawing("curve"))
    assert "currentColor" in svg and "#000000" not in svg
    assert "#1f6fb4" in svg
    assert "<style" not in svg and "#ffffff" not in svg  # which would apply to the whole page
    assert 'role="img"' in svg and "<title>figure</title>" in svg
    assert re.search(r"<text[^>]*>curve</text>", svg)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("\x1b[31m\x00", "⟨U+001B⟩[31m⟨U+0000⟩"),  # which no XML may hold
        ("\ufffe", "⟨U+FFFE⟩"),
        ("\ud83d", "⟨U+D83D⟩"),
        ("$x$", "$x$"),  # mathematics, elsewhere
        ("$\\frac$", "$\\frac$"),  # and no such
        ("costs 5$", "costs 5$"),
    ],
)
def test_text_in_drawings_is_visible_and_no_mathematics(text, shown):
    figure = Figure()
    one, two = figure.subplots(1, 2)
    one.plot([1, 2], [1, 1e5], label=text)
    one.set(yscale="log", title=text, xlabel=text, ylabel=text)
    one.set_xticks([1, 2], [text, "b"])
    one.set_xticks([1.5], [text], minor=True)
    one.annotate(text, (1, 1))
    one.legend(title=text)
    two.barh([text, "b"], [1, 2])  # a place for each text
    figure.suptitle(text)
    places = 10
    assert Document(page.figure(figure, "c")).text.count(shown) == places
    svg = page.figure(figure, "c")  # and once more
    assert Document(svg).text.count(shown) == places
    assert "10" in svg and "mathdefault" not in svg  # powers of ten are drawn, not spelt


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\u202eb", "a⟨U+202E⟩b"),  # turns what follows around
        ("\u2066x\u2069", "⟨U+2066⟩x⟨U+2069⟩"),
        ("a\u200bb\ufeff", "a⟨U+200B⟩b⟨U+FEFF⟩"),  # cannot be seen
        ("\U000e0041", "⟨U+E0041⟩"),  # a tag character, which models read and people do not
        ("\ud83d", "⟨U+D83D⟩"),  # half a character, which no file can hold
        ("\x00\x1b[31m\r", "⟨U+0000⟩⟨U+001B⟩[31m⟨U+000D⟩"),
        ("a\u200db", "a⟨U+200D⟩b"),
        ("👩\u200d👧 می\u200cخواهم", "👩\u200d👧 می\u200cخواهم"),  # they join what can be seen
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text, shown):
    assert page.visible(text) == shown
    assert page.visible(shown) == shown
    html = page.page(text, [Section(text, page.table([text], [[text]]))])
    assert Document(html).text.count(shown) == 5
    html.encode()


def test_markup_is_left_alone_and_numbers_stand_to_the_right():
    bold = Markup("<b>x</b>")
    html = page.table(["word", "n"], [[bold, "1,204"], ["y", "−0.5"], ["z", "–"]])
    assert bold in html and page.visible(bold) is bold
    assert html.count('class="number"') == 4  # of the header and its three cells
    with pytest.raises(ValueError):
        page.table(["a"], [["1", "2"]])


def test_a_long_number_is_told_in_no_time():
    numbers = ["1" * 100_000, "1,204.5e-3 %", "1.", "inf", "not finite", "0.9 [0.8, 1.0]"]
    assert page._numeric(numbers)
    assert not page._numeric([numbers[0] + "x"])


def test_templates_name_no_variable_that_is_not_given():
    assert isinstance(page._templates, Environment)
    with pytest.raises(Exception, match="undefined"):
        page._templates.from_string("{{ nothing }}").render()
