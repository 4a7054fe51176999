"""How a judge is asked: orders are drawn and mapped back, and a file of verdicts answers again."""

import json

import numpy as np
import pytest

from jaxdpo import InputError, judge
from jaxdpo.judge import (
    FIRST,
    NONE,
    SECOND,
    TIE,
    Comparison,
    Judge,
    Judged,
    Verdict,
    judged,
    record,
    replay_judge,
)
from jaxdpo.records import write_log

ASKED = [Comparison(f"p{n}", f"L{n}", f"R{n}", f"line {n}") for n in range(40)]


def answering(answer):
    """A judge that answers by a question, and remembers what it was asked."""
    seen = []

    def ask(questions):
        seen.extend(questions)
        found = [(place, Verdict(*answer(one))) for place, one in enumerate(questions)]
        yield from found[::-1]  # answers come in any order

    return Judge("known", {"kind": "known"}, ask, fair=False), seen


def likes_left(question):
    return FIRST if question.first.startswith("L") else SECOND, f"of {question.prompt}"


def test_whoever_is_shown_first_the_winner_is_the_same():
    who, seen = answering(likes_left)
    said = judged(who, ASKED, seed=0)
    assert {one.winner for one in said} == {"left"}
    assert {question.first[0] for question in seen} == {"L", "R"}
    for one, question, asked in zip(said, seen, ASKED, strict=True):
        ((left_first, verdict),) = one.verdicts
        assert question.prompt == asked.prompt and left_first == (question.first == asked.left)
        assert verdict.reason == f"of {asked.prompt}"  # though answers came backwards


def test_an_order_that_is_not_mapped_back_shows(monkeypatch):
    whose = judge.side
    monkeypatch.setattr(judge, "side", lambda _, verdict: whose(True, verdict))
    said = judged(answering(likes_left)[0], ASKED, seed=0)
    assert {one.winner for one in said} == {"left", "right"}


def test_an_order_is_a_function_of_the_seed_and_the_number():
    orders = lambda count, seed: [
        one.verdicts[0][0] for one in judged(answering(likes_left)[0], ASKED[:count], seed=seed)
    ]
    assert orders(40, 0)[:10] == orders(10, 0) and orders(40, 0) != orders(40, 1)
    assert 10 < np.sum(orders(40, 0)) < 30


def test_both_orders_are_asked_and_what_contradicts_itself_is_a_tie():
    said = judged(answering(likes_left)[0], ASKED, seed=0, both_orders=True)
    assert all({left_first for left_first, _ in one.verdicts} == {True, False} for one in said)
    assert {one.winner for one in said} == {"left"}
    said = judged(answering(lambda _: (FIRST,))[0], ASKED, seed=0, both_orders=True)
    assert {one.winner for one in said} == {"tie"}


@pytest.mark.parametrize(
    "left_first, right_first, winner",
    [
        (FIRST, SECOND, "left"),
        (SECOND, FIRST, "right"),
        (FIRST, NONE, "left"),  # what cannot be read leaves it to the other
        (NONE, FIRST, "right"),
        (TIE, NONE, "tie"),
        (TIE, FIRST, "tie"),
        (TIE, TIE, "tie"),
        (NONE, NONE, "none"),
    ],
)
def test_two_verdicts_are_one_winner(left_first, right_first, winner):
    answer = lambda one: (left_first if one.first.startswith("L") else right_first,)
    (one,) = judged(answering(answer)[0], ASKED[:1], seed=0, both_orders=True)
    assert one.winner == winner


@pytest.fixture
def file(tmp_path):
    def write(said, asked=ASKED):
        lines = [record(*each) for each in zip(asked, said, strict=True)]
        write_log(tmp_path / "verdicts.jsonl", lines)
        return tmp_path / "verdicts.jsonl"

    return write


def drawn(question):
    draws = np.random.default_rng(len(question.prompt) + sum(map(ord, question.first)))
    preferred = [FIRST, SECOND, TIE, NONE][draws.integers(4)]
    return preferred, f"because\n\u2028of {question.first} ✓"


@pytest.mark.parametrize("both_orders", [False, True])
def test_a_replay_says_what_the_original_said(file, both_orders):
    said = judged(answering(drawn)[0], ASKED, seed=3, both_orders=both_orders)
    assert len({one.winner for one in said}) >= 3
    again = judged(replay_judge(file(said)), ASKED, seed=3, both_orders=both_orders)
    assert again == said
    few = judged(replay_judge(file(said)), ASKED[:7], seed=3, both_orders=both_orders)
    assert few == said[:7]


def test_a_question_put_twice_is_answered_as_it_was_each_time(file):
    same = [Comparison("p", "a", "a", "line 1")] * 3
    said = [Judged("left", ((True, Verdict(FIRST, str(n))),)) for n in range(3)]
    asked = [judge.Question("p", "a", "a")] * 3
    replay = replay_judge(file(said, same))
    for _ in range(2):  # and each time that it is asked anew
        assert [verdict.reason for _, verdict in replay.ask(asked)] == ["0", "1", "2"]
    with pytest.raises(InputError, match="verdicts.jsonl: holds no verdict on question 4"):
        list(replay.ask(asked + asked[:1]))


def test_a_replay_of_other_orders_or_texts_names_the_question(file):
    said = judged(answering(likes_left)[0], ASKED, seed=3)
    replay = replay_judge(file(said))
    with pytest.raises(InputError, match=r"no verdict on question \d+, prompt 'p\d+', with these"):
        judged(replay, ASKED, seed=4)
    other = [ASKED[0], ASKED[1]._replace(left="L")]
    with pytest.raises(InputError, match="no verdict on question 2, prompt 'p1'"):
        judged(replay, other, seed=3)


def test_a_replay_is_told_by_its_content_not_by_its_name(file, tmp_path):
    said = judged(answering(likes_left)[0], ASKED, seed=3)
    one = replay_judge(file(said)).identity
    (tmp_path / "moved.jsonl").write_bytes(file(said).read_bytes())
    assert replay_judge(tmp_path / "moved.jsonl").identity == one
    said[5] = said[5]._replace(verdicts=((said[5].verdicts[0][0], Verdict(TIE, "")),))
    assert replay_judge(file(said)).identity != one


LINE = {"prompt": "p", "left": "a", "right": "b", "verdicts": [
    {"left_first": True, "preferred": "first", "reason": ""}
]}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": None},
        {"left": 3},
        {"verdicts": None},
        {"verdicts": [{}]},
        {"verdicts": ["first"]},
        {"verdicts": [LINE["verdicts"][0] | {"preferred": "A"}]},
        {"verdicts": [LINE["verdicts"][0] | {"reason": None}]},
        {"verdicts": [LINE["verdicts"][0] | {"left_first": "yes"}]},
    ],
)
def test_a_line_that_is_no_verdict_is_named(tmp_path, change):
    (tmp_path / "said.jsonl").write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | change))
    with pytest.raises(InputError, match="said.jsonl line 2: is no verdict; restore the line"):
        replay_judge(tmp_path / "said.jsonl")


def test_a_file_without_verdicts_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere.jsonl: no such file; give the verdicts.jsonl"):
        replay_judge(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="empty.jsonl: holds no verdicts; give the verdicts.jsonl"):
        replay_judge(tmp_path / "empty.jsonl")
