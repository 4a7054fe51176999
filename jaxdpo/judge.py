"""Which of two responses is better, and why: what a judge is, and how it is asked.

A judge answers questions (a prompt and two responses, one shown first) in any order, as it
comes to them. Which response is shown first is drawn by seed, so that a judge who likes what
comes first likes neither side; or both orders are asked, and a judge who changes its mind has
called a tie. Left out: the judges themselves (`oracle`, `scored_judges`, `judge_server`), and
what many verdicts come to (`analysis.win_rates`).

A file of verdicts, one comparison to a line, can be asked again: `record` writes what
`replay_judge` reads.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdpo import InputError
from jaxdpo.prompts import tail
from jaxdpo.records import Record, read_log

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


def record(comparison: Comparison, judged: Judged) -> Record:
    """A comparison and what was said of it, as a line of a file of verdicts.

    >>> one = Comparison("p", "aa", "b", "line 1")
    >>> said = record(one, Judged("left", ((True, Verdict(FIRST, "longer")),)))
    >>> said["winner"], said["verdicts"]
    ('left', [{'left_first': True, 'preferred': 'first', 'reason': 'longer'}])
    """
    verdicts = [
        {"left_first": left_first} | verdict._asdict() for left_first, verdict in judged.verdicts
    ]
    return comparison._asdict() | {"winner": judged.winner, "verdicts": verdicts}


def remembering(judge: Judge) -> Judge:
    """The same judge, to whom no question is put twice: for sides that often say the same."""
    known: dict[Question, Verdict] = {}

    def ask(questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        new = [one for one in dict.fromkeys(questions) if one not in known]
        if new:
            known.update((new[place], verdict) for place, verdict in judge.ask(new))
        yield from ((place, known[one]) for place, one in enumerate(questions))

    return judge._replace(ask=ask)


def replay_judge(file: str | Path) -> Judge:
    """The judge who repeats the verdicts of a file, word by word; asks nobody.

    A question is a prompt and two responses in their order; one that was put several times is
    answered as it was each time. Raises `InputError` for a file without verdicts, and, asked,
    for a question that it does not answer (so often).
    """
    recorded = _recorded(Path(file))
    digest = hashlib.sha256(repr(sorted(recorded.items())).encode()).hexdigest()

    def ask(questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        left = {question: iter(verdicts) for question, verdicts in recorded.items()}
        for place, question in enumerate(questions):
            verdict = next(left.get(question, iter(())), None)
            if verdict is None:
                raise InputError(
                    f"{file}: holds no verdict on question {place + 1}, prompt "
                    f"{tail(question.prompt)!r}, with these responses in this order; give the "
                    "data, sides, orders and seed that it was made with, or ask a judge"
                )
            yield place, verdict

    return Judge(f"replay of {file}", {"kind": "replay", "sha256": digest}, ask, fair=False)


def _recorded(file: Path) -> dict[Question, list[Verdict]]:
    """What a file of verdicts says to each question, in the order in which it was put."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; give the verdicts.jsonl of an evaluation")
    recorded: dict[Question, list[Verdict]] = {}
    for number, line in enumerate(read_log(file), 1):
        try:
            for question, verdict in _answers(line):
                recorded.setdefault(question, []).append(verdict)
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(f"{file} line {number}: is no verdict; restore the line") from error
    if not recorded:
        raise InputError(f"{file}: holds no verdicts; give the verdicts.jsonl of an evaluation")
    return recorded


def _answers(line: Record) -> Iterator[tuple[Question, Verdict]]:
    for said in line["verdicts"]:
        left_first, verdict = said["left_first"], Verdict(said["preferred"], said["reason"])
        sides = [line["left"], line["right"]][:: 1 if left_first else -1]
        question = Question(line["prompt"], *sides)
        texts = all(isinstance(text, str) for text in (*question, *verdict))
        if not (texts and isinstance(left_first, bool)):
            raise TypeError
        if verdict.preferred not in (FIRST, SECOND, TIE, NONE):
            raise ValueError
        yield question, verdict


def _orders(seed: int, number: int, both: bool) -> tuple[bool, ...]:
    left_first = bool(np.random.default_rng([seed, number]).integers(2))
    return (left_first, not left_first) if both else (left_first,)


def _question(comparison: Comparison, left_first: bool) -> Question:
    sides = comparison.left, comparison.right
    return Question(comparison.prompt, *(sides if left_first else sides[::-1]))


def _winner(verdicts: Sequence[tuple[bool, Verdict]]) -> str:
    sides = {side(*one) for one in verdicts} - {NONE}
    if not sides:
        return NONE
    return sides.pop() if len(sides) == 1 else TIE


def side(left_first: bool, verdict: Verdict) -> str:
    """Which side a verdict is for: "left" or "right", or as it stands TIE or NONE."""
    if verdict.preferred in (TIE, NONE):
        return verdict.preferred
    return "left" if (verdict.preferred == FIRST) == left_first else "right"
