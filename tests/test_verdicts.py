"""The page of an evaluation: its numbers, what they warn of, and every text as text."""

import copy
import json

import numpy as np
import pytest
from html_document import Document
from markupsafe import Markup
from test_page import HOSTILE
from test_win_rates import asked, judge, simulated

from jaxdpo.analysis import verdicts
from jaxdpo.analysis.win_rates import win_rates
from jaxdpo.judge import FIRST, NONE, SECOND, TIE, Verdict, judged, record


def evaluation(comparisons, who, both_orders=False, **changes):
    """The record and the verdicts that an evaluation would write."""
    said = judged(who, comparisons, seed=0, both_orders=both_orders)
    lengths = np.random.default_rng(0).integers(1, 9, (len(comparisons), 2))
    numbers = {
        "policy": "P",
        "opponent": "O",
        "judge": {"name": who.name, "fair": who.fair},
        "unit": "tokens of P",
        "asked": None,
        "cut": {"policy": 0, "opponent": None},
        "settings": {"both_orders": both_orders, "seed": 0},
        **win_rates(said, comparisons, lengths, seed=0).as_json(),
    }
    rows = [
        record(*each) | {"lengths": length}
        for *each, length in zip(comparisons, said, lengths.tolist(), strict=True)
    ]
    return json.loads(json.dumps([numbers | changes, rows]))


ENDS = [FIRST, SECOND, TIE, NONE]


@pytest.fixture(scope="module")
def mixed():
    mapped = {FIRST: SECOND, SECOND: FIRST}

    def answer(number, left_first):
        said = ENDS[number % 4]
        return said if left_first else mapped.get(said, said)

    return evaluation(asked(40, subset=lambda n: "ab"[n % 2]), judge(answer))


def everything(text):
    """A page with the text in every place that takes one."""
    one = asked(1)[0]._replace(prompt=text, left=text, right=text, place=text, subset=text)
    who = judge(lambda *_: FIRST)
    who = who._replace(name=text, ask=lambda questions: ((0, Verdict(FIRST, text)),))
    numbers, rows = evaluation([one], who, policy=text, opponent=text, unit=text)
    return verdicts.page(numbers, rows)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_text_wherever_it_stands(text):
    document = Document(everything(text))
    assert document.faults == [] and document.text.count(text) >= 12


def test_the_check_notices_text_that_was_taken_for_markup(monkeypatch):
    card = verdicts.Card
    careless = lambda heading, text, note: card(heading, Markup(text), note)
    monkeypatch.setattr(verdicts, "Card", careless)
    assert Document(everything("<script>alert(1)</script>")).faults


def test_pairs_stand_under_how_they_ended(mixed):
    html = verdicts.page(*mixed)
    document = Document(html)
    assert document.faults == [] and "<script" not in html
    headings = ["Wins (10)", "Losses (10)", "Ties (10)", "Not read (10)"]
    places = [html.index(f">{name}</h2>") for name in headings]
    assert places == sorted(places) and all(name in document.text for name in headings)
    assert len([anchor for anchor in document.anchors if anchor in document.ids]) >= 5
    won = html[places[0] : places[1]]
    for number in range(40):
        assert (f"<h3>line {number} ·" in won) == (number % 4 == 0)
    assert won.count("policy · preferred") == 10 and "opponent · preferred" not in won
    assert "shown first: prefers policy" in won and "cannot be read" in html[places[3] :]


def test_a_page_shows_so_many_pairs_and_says_how_many_it_leaves_out(monkeypatch, mixed):
    monkeypatch.setattr(verdicts, "MOST", 7)
    html = verdicts.page(*mixed)
    assert html.count("<article>") == 28
    assert html.count("The first 7 of 10; 3 more are in verdicts.jsonl.") == 4


def test_the_tables_hold_the_numbers(mixed):
    rates, controlled, lengths, judges = verdicts.shown(mixed[0])
    assert rates.rows[0][:5] == ("all", "10", "10", "10", "10")
    assert rates.rows[0][5].startswith("0.500 [0.33") and [r[0] for r in rates.rows[1:]] == [
        "a",
        "b",
    ]
    assert "40 prompts, judged by known, in an order drawn by seed" in rates.note
    assert [row[0] for row in controlled.rows][-1] == "effect of being shown first, logits"
    assert lengths.header[1] == "mean length [tokens]" and lengths.rows[1][3] == "–"
    assert judges.rows[0] == ("answers that could be read", "30")


def test_a_fair_judge_has_no_position_bias(mixed):
    numbers = copy.deepcopy(mixed[0])
    numbers["judge"]["fair"] = True
    numbers["position_bias"] |= {"first": [1.0, 0.9, 1.0], "in_words": "the judge preferred"}
    rates, controlled, _, judges = verdicts.shown(numbers)
    assert len(judges.rows) == len(controlled.rows) == 2 and "order" not in rates.note
    assert not [said for said in verdicts.remarks(numbers) if "judge" in said]


def test_what_a_reader_must_know_is_said_first():
    comparisons = [one._replace(left="", right=one.right) for one in asked(30)]
    comparisons[3] = comparisons[3]._replace(right="")
    numbers, rows = evaluation(comparisons, judge(lambda *_: FIRST), asked=50)
    numbers["cut"] = {"policy": 4, "opponent": 0}
    said = verdicts.remarks(numbers)
    assert said[0] == "50 prompts were asked for, but the data has 30"
    assert "first in 100% [89%, 100%]: its win rates say little" in said[1]
    assert said[2] == "policy: 30 of 30 responses are empty, and judged as they are"
    assert said[3] == "policy: 4 of 30 responses were cut at the limit of tokens"
    assert said[4] == "opponent: 1 of 30 responses are empty, and judged as they are"
    assert said[5] == "1 of 30 comparisons are of a text with itself"
    html = verdicts.page(numbers, rows)
    assert html.index("its win rates say little") < html.index("<svg")
    assert html.count("(nothing)") == 31
    none = evaluation(asked(4), judge(lambda *_: NONE))
    assert "4 of 4 comparisons have no answer that could be read" in verdicts.remarks(none[0])[1]
    assert Document(verdicts.page(*none)).faults == []


def test_nothing_is_remarked_where_nothing_is_wrong():
    better = np.random.default_rng(0).random(80) < 0.7
    who = simulated(0, bias=0.0, accuracy=0.9, better=better)
    assert verdicts.remarks(evaluation(asked(80), who)[0]) == []


def test_a_figure_has_room_for_the_largest_subsets():
    sizes = [n for n in range(1, 31) for _ in range(n)]
    comparisons = asked(len(sizes), subset=lambda n: f"s{sizes[n]:02d}")
    numbers, rows = evaluation(comparisons, judge(lambda n, _: ENDS[n % 2]))
    html = verdicts.page(numbers, rows)
    labels = [t.get_text() for t in verdicts.draw(numbers).axes[0].get_yticklabels()]
    assert labels == [f"s{n:02d}" for n in range(30, 10, -1)] + ["all"]
    assert "the 20 largest subsets, 10 more are in the table" in html
    assert len(verdicts.shown(numbers)[0].rows) == 31
