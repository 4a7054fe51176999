"""Which of two responses is better, and why: what a judge is, and how it is asked.

A judge answers questions (a prompt and two responses, one shown first) in any order, as it
comes to them. Which response is shown first is drawn by seed, so that a judge who likes what
comes first likes neither side; or both orders are asked, and a judge who changes its mind has
called a tie. Left out: the judges themselves (`oracle`, `scored_judges`, `judge_server`), and
what many verdicts come to (`analysis.win_rates`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxdpo.records import Record

FIRST, SECOND, TIE, NONE = "first", "second", "tie", "none"  # NONE: no answer could be read


class Question(NamedTuple):
    """A prompt with two responses, in the order in which the judge sees them."""

    prompt: str
    first: str
    second: str


class Verdict(NamedTuple):
    """Which response a judge prefers (FIRST, SECOND, TIE; NONE: nobody knows), and why."""

    preferred: str
    reason: str = ""


class Judge(NamedTuple):
    """Someone to ask: `ask` yields (place of a question, its verdict), each place once.

    `identity` is JSON and decides all verdicts; `fair` means that the order in which responses
    are shown cannot matter.
    """

    name: str
    identity: Record
    ask: Callable[[Sequence[Question]], Iterator[tuple[int, Verdict]]]
    fair: bool


class Comparison(NamedTuple):
    """Two responses to a prompt, the left one of the policy that is looked at."""

    prompt: str
    left: str
    right: str
    place: str  # where the prompt stands, for people
    subset: str = ""


class Judged(NamedTuple):
    """What a judge said of a comparison: `winner` is "left", "right", "tie" or "none".

    `verdicts` are (whether left was shown first, verdict), one for each order that was asked.
    """

    winner: str
    verdicts: tuple[tuple[bool, Verdict], ...]


def judged(
    judge: Judge, comparisons: Sequence[Comparison], *, seed: int, both_orders: bool = False
) -> list[Judged]:
    """What the judge says of every comparison, in their order.

    A comparison's order is a pure function of the seed and its number. With `both_orders`
    each is asked twice, and verdicts that contradict each other are a tie; one that cannot be
    read leaves the comparison to the other one.

    >>> longer = lambda asked: (
    ...     (n, Verdict(FIRST if len(one.first) > len(one.second) else SECOND))
    ...     for n, one in enumerate(asked)
    ... )
    >>> judge = Judge("longer", {"kind": "longer"}, longer, fair=True)
    >>> [one.winner for one in judged(judge, [Comparison("p", "aa", "b", "line 1")], seed=0)]
    ['left']
    """
    orders = [_orders(seed, number, both_orders) for number in range(len(comparisons))]
    asked = [(number, left) for number, each in enumerate(orders) for left in each]
    questions = [_question(comparisons[number], left) for number, left in asked]
    verdicts = dict(judge.ask(questions))
    found: list[list[tuple[bool, Verdict]]] = [[] for _ in comparisons]
    for place, (number, left) in enumerate(asked):
        found[number].append((left, verdicts[place]))
    return [Judged(_winner(each), tuple(each)) for each in found]


def _orders(seed: int, number: int, both: bool) -> tuple[bool, ...]:
    left_first = bool(np.random.default_rng([seed, number]).integers(2))
    return (left_first, not left_first) if both else (left_first,)


def _question(comparison: Comparison, left_first: bool) -> Question:
    sides = comparison.left, comparison.right
    return Question(comparison.prompt, *(sides if left_first else sides[::-1]))


def _winner(verdicts: Sequence[tuple[bool, Verdict]]) -> str:
    sides = {_side(*one) for one in verdicts} - {NONE}
    if not sides:
        return NONE
    return sides.pop() if len(sides) == 1 else TIE


def _side(left_first: bool, verdict: Verdict) -> str:
    if verdict.preferred in (TIE, NONE):
        return verdict.preferred
    return "left" if (verdict.preferred == FIRST) == left_first else "right"
