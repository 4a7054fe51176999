"""Corrupted texts: where the errors are is known exactly, and nothing else has changed."""

import re

import pytest
from examples import SHARED

from jaxdpo import InputError, corruption, pairs
from jaxdpo.analysis.known_errors import put_right
from jaxdpo.analysis.token_scores import Span, marked_tokens
from jaxdpo.tokens import load_tokenizer

POST = "I moved to Boston. I paid 250 dollars, for 3 weeks. My sister Dana is nineteen."
TEXT = " Moved to Boston 3 weeks ago and paid 250 dollars, says Dana, who is nineteen."
NAMES = dict.fromkeys(["Dana", "Omar", "Lee"], "person") | dict.fromkeys(
    ["Boston", "Reno"], "place"
)


def corrupted(text=TEXT, post=POST, *, rules=corruption.RULES, errors=1, seed=0, index=0):
    asked = dict(rules=rules, errors=errors, names=NAMES, seed=seed, index=index)
    return corruption.corrupted(text, post, **asked)


def swaps(text, rule, *, post="", names=NAMES):
    """Everything that a rule can put where, over many draws."""
    found = set()
    for index in range(150):
        asked = dict(rules=[rule], errors=1, names=names, seed=0, index=index)
        if (made := corruption.corrupted(text, post, **asked)) is not None:
            found.add((made[1][0].right, made[1][0].wrong))
    return found


@pytest.mark.parametrize("errors", [1, 2, 5])
def test_spans_are_exact_and_the_rest_is_untouched(errors):
    for index in range(60):
        text, marked = corrupted(errors=errors, index=index)
        assert len(marked) == errors
        assert all(text[error.start : error.end] == error.wrong for error in marked)
        assert all(
            before.end < after.start for before, after in zip(marked, marked[1:], strict=False)
        )
        assert put_right(text, marked)[0] == TEXT


def test_a_wrong_value_differs_and_stands_nowhere_else():
    for index in range(150):
        text, marked = corrupted(errors=3, index=index)
        for error in marked:
            whole = rf"(?<!\w){re.escape(error.wrong)}(?!\w)"
            assert error.wrong != error.right
            assert not re.search(whole, f"{POST}\n{TEXT}", re.IGNORECASE)
            assert len(re.findall(whole, text)) == 1


def test_the_same_every_time_and_of_every_index_its_own():
    made = [corrupted(errors=2, index=index) for index in range(20)]
    assert made == [corrupted(errors=2, index=index) for index in range(20)]
    assert len(set(made)) > 10
    assert made != [corrupted(errors=2, index=index, seed=1) for index in range(20)]


def test_too_little_to_swap_is_none():
    assert corrupted(" Nothing to swap here.") is None
    assert corrupted(errors=9) is None
    assert corrupted(rules=["name"], errors=3) is None


def test_rules_are_known():
    with pytest.raises(InputError, match="'verb' is unknown; choose from number, name, unit"):
        corrupted(rules=["verb"])


def test_numbers_look_alike():
    found = swaps(" I paid 1,500 dollars and 22 of us waited 4 weeks, since 2015.", "number")
    wrong = {right: {w for r, w in found if r == right} for right, _ in found}
    assert set(wrong) == {"1,500", "22", "4", "2015"}
    assert all(re.fullmatch(r"\d,\d00", value) for value in wrong["1,500"])
    assert all(10 <= int(value) <= 44 for value in wrong["22"])
    assert all(2 <= int(value) <= 8 for value in wrong["4"])
    assert all(2005 <= int(value) <= 2025 for value in wrong["2015"])
    assert swaps(" Two cats", "number") == {
        ("Two", word) for word in "Three Four Five Six Seven Eight Nine Ten Eleven Twelve".split()
    }
    for round, ten in (("10", 1), ("100", 10), ("1,000", 100)):
        values = [int(wrong.replace(",", "")) for _, wrong in swaps(f" {round} men", "number")]
        assert sorted(values) == [10 * ten + ten * n for n in range(1, 11)]
    assert len(swaps(" call 5551234567 now", "number")) < 500  # no list of billions


@pytest.mark.parametrize(
    "text",
    [
        " the 1 week",  # what follows "1" and "one" is singular
        " one of us, no one",
        " on the 3rd or 4th of 10/12 at 7:30, 24/7",
        " my GTX970, B2B, r/2X, #1, 0 and 007",
        " version 1.2.3 or 10-12",
        " at 7 pm, 7am, 7 p.m., 5.30 am and 5.30, at 11 o'clock",
        " on March 15, Feb. 3, 15 June and 2 of May",
        " thirty two, twenty one, ninety two",
        " he is 6 foot 2, 5 feet, 6ft 3, 5'10, two thirds",
    ],
)
def test_what_is_no_plain_number_is_left_alone(text):
    assert swaps(text, "number") == set()


def test_ages_are_numbers():
    assert {right for right, _ in swaps(" I [22M] and my GF (21f) of 5yrs", "number")} == {
        "22",
        "21",
        "5",
    }


def test_a_number_in_words_stands_in_the_post_in_digits_too():
    assert "five" not in {wrong for _, wrong in swaps(" for three days", "number", post="on day 5")}
    assert "5" not in {wrong for _, wrong in swaps(" for 3 days", "number", post="five days")}


def test_units_keep_number_and_article():
    assert {wrong for _, wrong in swaps(" after 1 week", "unit")} == set(
        "minute hour day month year".split()
    )
    assert {wrong for _, wrong in swaps(" after two weeks", "unit")} == {
        "minutes", "hours", "days", "months", "years",
    }  # fmt: skip
    assert "hour" not in {wrong for _, wrong in swaps(" after a week", "unit")}
    assert swaps(" after an hour", "unit") == set()
    assert swaps(" 12 lbs", "unit") == {("lbs", "kg"), ("lbs", "oz")}
    assert swaps(" 3 miles", "unit", post="an inch, a yard, a meter") == {("miles", "kilometers")}


@pytest.mark.parametrize("start", [" an 8 hour shift", " a $17 fee", " An eight", " a twenty"])
def test_a_number_keeps_its_article(start):
    an = re.compile("8|11$|18$|eight|eleven")
    wrong = {value for _, value in swaps(start, "number")}
    assert {bool(an.match(value)) for value in wrong} <= {start.lower().startswith(" an")}
    assert wrong or start == " an 8 hour shift"  # no other digit needs "an"
    free = {value for _, value in swaps(re.sub("(?i)^ an? ", " the ", start), "number")}
    assert wrong < free


WAYS = [
    (" for 1,000", "about 1500", {"1,500"}),
    (" is 2.5", "2 or 3", {"3.0"}),
    (" owes 20k", "owes 30,000", {"30"}),
    (" owes 20,000", "thirty thousand, or 10k", {"30,000", "10,000"}),
    (" two hundred", "400 and 4", {"four"}),
    (" is 30", "twenty-two, 40 and fifty five", {"40", "50"}),
]


@pytest.mark.parametrize("text, post, equal", WAYS)
def test_no_equal_number_stands_in_the_post_in_another_notation(text, post, equal):
    without, held = ({wrong for _, wrong in swaps(text, "number", post=p)} for p in ("", post))
    assert held and equal <= without and equal.isdisjoint(held)


def test_no_equal_unit_stands_in_the_post_in_another_notation():
    held = {wrong for _, wrong in swaps(" for 3 days", "unit", post="72hrs, 5 mins, a yr, 2 mo")}
    assert held == {"weeks"}
    assert swaps(" 3 euros", "unit", post="$5") == {("euros", "pesos")}


def test_a_unit_needs_a_quantity():
    assert (
        swaps(
            " My day job these days, today, 5 feet, the year after, 3 pounds, last minute", "unit"
        )
        == set()
    )


def test_names_are_of_the_same_kind_and_of_other_examples():
    assert swaps(" She met Dana in Boston.", "name") == {
        ("Dana", "Omar"), ("Dana", "Lee"), ("Boston", "Reno"),
    }  # fmt: skip
    assert swaps(" She met Dana.", "name", post="LEE, and omar") == set()
    assert swaps(" She met Dana's mom.", "name") == {("Dana", "Omar"), ("Dana", "Lee")}


NO_NAMES = [" Dana left.", " I left. Dana stayed", ' so: "Dana', " My Dana Saw Lee Run"]
NO_NAMES += [" so DANA did", " the McDana", " so Dana-like"]


@pytest.mark.parametrize("text", NO_NAMES)
def test_where_a_capital_may_be_no_name_it_is_left_alone(text):
    assert swaps(text, "name") == set()


def test_a_name_is_kept_where_the_texts_say_what_it_names():
    texts = [
        "so my brother Rob and I was on Monday in May, at Walmart in Spanish with Mom. We saw Thai",
        "a dog named Rex, but Sue and I are in Rome. my mom lived in Rome with Rob, she may",
        "we moved to South Korea from Peru, and in Mike's car to Rome for Netflix on a monday",
    ]
    expected = dict.fromkeys(["Rex", "Rob", "Sue"], "person")
    expected |= {"Monday": "day", "Rome": "place", "South Korea": "place"}
    assert corruption.names(texts) == expected


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the TL;DR comparisons of ../shared/data")
def test_on_real_summaries_spans_fall_on_tokens_of_pythias_tokenizer():
    read, _ = pairs.read_pairs(str(SHARED / "data/tldr/comparisons_test.jsonl"), format="pairs")
    tokenizer = load_tokenizer(SHARED / "data/tokenizer/20B_tokenizer.json")
    names = corruption.names(text for pair in read for text in (pair.prompt, pair.chosen))
    found = dict.fromkeys(corruption.RULES, 0)
    for pair in read:
        for rule in corruption.RULES:
            asked = dict(rules=[rule], errors=1, names=names, seed=0, index=pair.line)
            made = corruption.corrupted(pair.chosen, pair.prompt, **asked)
            if made is not None:
                text, (error,) = made
                marked = marked_tokens(text, [Span(error.start, error.end)], tokenizer)
                assert (marked == 0).any() and put_right(text, [error])[0] == pair.chosen
                found[rule] += 1
    assert found["number"] > 30 and found["unit"] > 30 and found["name"] > 5
