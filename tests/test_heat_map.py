"""A cell shows what its token is and what it got; a picture and a page show every cell."""

import re
from pathlib import Path

import numpy as np
import pytest
from html_document import Document
from matplotlib import colors, image

from jaxdpo.analysis import credit, heat_map, page

CSS = (Path(page.__file__).parent / "templates/credit.css").read_text()
PAGE_CSS = (Path(page.__file__).parent / "templates/page.css").read_text()
HOSTILE = "<script>alert(1)</script>\" onfocus='x' &amp; $x^2$ [red] \u200b\u202e\x1b 語"


def token(piece=" a", reward=0.0, span=None, part=None, **more):
    known = {"piece": piece, "id": 7, "part": part, "reward": reward, "span": span}
    return known | {"logp": -1.0, "reference_logp": -1.5} | more


def record(*responses, noise_floor=0.01, prompt="Where?"):
    """Responses to one prompt; each a list of tokens, the end token among them."""
    told = [
        {
            "name": f"response {number}",
            "text": "".join(one["piece"] for one in tokens[:-1]),
            "tokens": tokens,
            "reward": sum(one["reward"] for one in tokens),
            "marked_reward": sum(one["reward"] for one in tokens if one["span"] is not None),
            "spans": [{"start": 0, "end": 1, "label": HOSTILE, "reward": 0.5}]
            * any(one["span"] is not None for one in tokens),
        }
        for number, tokens in enumerate(responses, 1)
    ]
    models = {role: {"name": f"runs/{HOSTILE}:{role}"} for role in ("policy", "reference")}
    item = {"name": "item 1", "prompt": prompt, "responses": told}
    return {"source": "a.json", "models": models, "beta": 0.1, "noise_floor": noise_floor} | {
        "items": [item]
    }


def cells(*tokens, top=2.0, noise_floor=0.01):
    return heat_map.cells(
        {"tokens": [*tokens, token("<|endoftext|>")]}, top=top, noise_floor=noise_floor
    )


def test_colours_of_hand_worked_rewards():
    """Half of the largest reward is half of the colour; up to the noise floor there is none."""
    found = cells(token(reward=-2.0), token(reward=1.0), token(reward=0.01), token(reward=-0.011))
    assert [cell.strength for cell in found] == [-1.0, 0.5, 0.0, -0.0055, 0.0]
    assert [cell.noise for cell in found] == [False, False, True, False, True]
    assert [cell.end for cell in found] == [False, False, False, False, True]


def test_the_scale_is_that_of_the_largest_reward_of_all_responses():
    two = record([token(reward=0.5), token()], [token(reward=-3.0), token()])
    assert heat_map.scale(two) == 3.0
    assert heat_map.scale(record([token(), token()])) == 0.01  # all are zero: the noise floor
    assert heat_map.scale(record([token(), token()], noise_floor=0.0)) == 1.0
    assert [cell.strength for cell in cells(token(), top=1.0, noise_floor=0.0)] == [0.0, 0.0]


def test_spans_open_and_close_where_they_begin_and_end():
    found = cells(*(token(span=span) for span in (None, 0, 0, 1, None, 2)))
    assert [cell.opens for cell in found] == [False, True, False, True, False, True, False]
    assert [cell.closes for cell in found] == [False, False, True, True, False, True, False]


def test_pieces_are_shown_as_they_are():
    part = {"number": 2, "count": 3, "of": "語"}
    found = cells(
        token("  a"), token(".\n\n"), token("\t"), token("\u200b"), token("\ufffd", part=part)
    )
    assert [cell.text for cell in found] == ["··a", ".⏎⏎", "⇥", "⟨U+200B⟩", "語", "EOS"]
    assert [cell.part for cell in found] == ["", "", "", "", "2/3", ""]
    assert [cell.breaks for cell in found] == [False, True, False, False, False, False]


def test_sums_are_said_of_all_and_of_the_marked():
    one, two = record(
        [token(reward=-1.25, span=0), token(reward=0.25)], [token(reward=12345.0), token()]
    )["items"][0]["responses"]
    assert heat_map.sums(one) == "−1.00 (2 tokens), marked −1.25 (1)"
    assert heat_map.sums(two) == "+1.23e+04 (2 tokens)"


def test_a_page_shows_every_text_as_text():
    part = {"number": 1, "count": 2, "of": HOSTILE}
    hostile = [token(HOSTILE, -1.0, 0), token(" \ufffd", part=part), token("\n"), token("<eos>")]
    made = page.page(
        "credit", [page.Section("maps", credit.section(record(hostile, prompt=HOSTILE)))]
    )
    document = Document(made)
    assert document.faults == []
    shown = "<script>alert(1)</script>\" onfocus='x' &amp; $x^2$ [red] ⟨U+200B⟩⟨U+202E⟩⟨U+001B⟩ 語"
    assert document.text.count(shown) == 6  # models 2, prompt, its end, span's label, part
    assert document.text.count(shown.replace(" ", "·")) == 4  # pieces, in the map and its numbers
    assert "reward −1.00" in document.text and "log π −1.000" in document.text
    assert "part 1 of 2 of " in document.text and "⏎" in document.text
    assert made.count('tabindex="0"') == 4  # every token can be reached
    assert "within ±0.01, below the noise" in document.text


def test_marked_tokens_stand_in_one_frame_and_lines_break():
    html = str(credit.section(record([token(span=0), token("\n", span=0), token(), token()])))
    first, second, third, _ = re.findall(r'<span class="(credit-cell[^"]*)" style', html)
    assert first == "credit-cell credit-noise credit-marked credit-opens"
    assert second == "credit-cell credit-noise credit-marked credit-closes"
    assert third == "credit-cell credit-noise"
    assert len(re.findall(r"</span></span>\s*<br>", html)) == 1


def luminance(colour) -> float:
    parts = np.array(colour)
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one, other) -> float:
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def test_text_is_readable_on_the_strongest_colours_in_light_and_dark():
    """At least 4.5 to 1 (WCAG 2.1, AA); the picture has the colours of the light page."""
    triples = re.findall(r"--credit-(?:negative|positive): (\d+) (\d+) (\d+)", CSS)
    ends = [tuple(int(part) / 255 for part in triple) for triple in triples]
    inks = [colors.to_rgb(ink) for ink in re.findall(r"--ink: (#\w{6})", PAGE_CSS)]
    light, dark, print_ink = inks
    for ink, pair in ((light, ends[:2]), (dark, ends[2:4]), (print_ink, ends[4:])):
        assert all(contrast(ink, end) >= 4.5 for end in pair)
    assert (
        ends[:2] == ends[4:] == [colors.to_rgb(c) for c in (heat_map.NEGATIVE, heat_map.POSITIVE)]
    )


def test_a_picture_of_anything_is_drawn(tmp_path):
    """No letter is missing, no dollar is mathematics: both would be warnings, which are errors."""
    part = {"number": 1, "count": 2, "of": "😀"}
    tokens = [token(HOSTILE, -1.0, 0), token("\ufffd", 1.0, part=part), token("$\n"), token("$")]
    many = record(tokens * 12, tokens, tokens[:1])
    assert heat_map.draw(many, tmp_path / "one.png") == 0
    pixels = image.imread(tmp_path / "one.png")
    for end in (heat_map.NEGATIVE, heat_map.POSITIVE):
        close = np.abs(pixels[..., :3] - colors.to_rgb(end)).max(-1) < 0.01
        assert close.sum() > 500  # the cells of the strongest rewards, not the legend alone
    many["items"] *= heat_map.MOST + 3
    many["items"] = [item | {"responses": item["responses"][2:]} for item in many["items"]]
    assert heat_map.draw(many, tmp_path / "many.png") == 3
    points = heat_map._HEADER + heat_map.MOST * (3 * heat_map._LINE + 12)  # prompt, sums, one line
    assert image.imread(tmp_path / "many.png").shape[0] == 2 * points


@pytest.mark.parametrize("count", [1, 40])
def test_cells_wrap_within_their_column(count):
    lines = heat_map._lines(cells(*[token(" word")] * count, token("\n"), token("x" * 300)))
    assert sum(map(len, lines)) == count + 3
    for line in lines:
        assert len(line) == 1 or line[-1].left + line[-1].width <= heat_map._COLUMN
        for one, following in zip(line, line[1:], strict=False):
            assert following.left > one.left + one.width  # cells do not touch
