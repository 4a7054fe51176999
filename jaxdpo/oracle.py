"""The judge of the built-in task, who knows the truth: it counts right, wrong and missing facts.

A post of the task (`synthetic`) tells the writer's facts, and a summary states some of them; both
are read by the task's own sentences and clauses, word for word. Nothing is guessed: what is none
of them counts as something else, and against a summary. Which facts a summary should state is
said by the data set's own right summary. Left out: texts of any other data set.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxdpo import InputError, synthetic
from jaxdpo.judge import FIRST, SECOND, TIE, Judge, Question, Verdict
from jaxdpo.prompts import tail

_VALUES = [(kind, value) for kind, one in synthetic.KINDS.items() for value in one.values]
_OWN = {
    sentence.format(value): (kind, value)
    for kind, value in _VALUES
    for sentence in synthetic.KINDS[kind].own
}
_OTHERS = {
    sentence.format(value, who=who)
    for kind, value in _VALUES
    for sentence in synthetic.KINDS[kind].others
    for who in synthetic.OTHERS
}
_CLAUSES = {
    clause.format(value)[0].upper() + clause.format(value)[1:]: (kind, value)
    for kind, value in _VALUES
    for clause in synthetic.KINDS[kind].summary
}
_POST = re.compile(re.escape(synthetic.PROMPT).replace(r"\{\}", "(.+)"))
_JOINTS = sorted({re.escape(joint.rstrip()) for each in synthetic.JOINTS for joint in each})
_JOINT = re.compile(rf"(?:{'|'.join(_JOINTS)})(?: |\Z)")


class Count(NamedTuple):
    """What a summary says of the facts that it should state, and what else it says.

    Of the wanted facts, `right` are stated with the writer's value, `missing` are not stated;
    `wrong` are the facts, wanted or not, that are stated with a value the post does not tell of
    the writer; `other` are the pieces that state no fact, or one that was stated before.
    """

    right: int
    wrong: int
    missing: int
    other: int

    @property
    def reward(self) -> int:
        """right - wrong - other: to leave a fact out costs what stating it would have given."""
        return self.right - self.wrong - self.other

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in self._asdict().items())


def facts(prompt: str) -> dict[str, str]:
    """Kind -> value of what a post of the task tells of its writer, in the post's order.

    What it tells of others, or of another time, is no fact of the writer. Raises `InputError` for
    a text that is no such post.

    >>> post = "I live in Oslo. My aunt owns a cat. Please be kind."
    >>> facts(synthetic.PROMPT.format("advice", "A strange week", post))
    {'city': 'Oslo'}
    """
    found = _POST.fullmatch(prompt)
    if not found:
        raise _stranger(prompt)
    told: dict[str, str] = {}
    for sentence in re.split(r"(?<=[.?]) ", found[3]):
        kind, value = _OWN.get(sentence, (None, ""))
        if kind in told or not (kind or sentence in _OTHERS or sentence in synthetic.FILLERS):
            raise _stranger(sentence)
        if kind:
            told[kind] = value
    return told


def kinds(summary: str) -> frozenset[str]:
    """The kinds of fact that a whole summary of the task states; `InputError` if it is none.

    >>> sorted(kinds(" My home is in Rome, I feel sad and I paid 45 dollars."))
    ['amount', 'city', 'feeling']
    """
    stated, other = _stated(summary)
    if other or not stated:
        raise InputError(f"{tail(summary)!r}: is no whole summary of the built-in task; name one")
    return frozenset(stated)


def count(prompt: str, summary: str, wanted: Collection[str]) -> Count:
    """How many facts a summary of a post has right, wrong and missing, of those of `wanted` kinds.

    Every piece between the task's joints counts: one that states a fact once, by its kind and
    value; any other, such as a last clause that was cut short, as something else. A true fact
    that is not wanted counts as nothing, a kind of which the post tells nothing as wrong; of a
    fact that is stated twice the first value counts, and the second is something else. Spaces
    around the summary, the case of a clause's first letter and a missing last stop are forgiven.
    Raises `InputError` for a text that is no post of the task, and where it tells nothing of a
    wanted kind.

    >>> post = synthetic.PROMPT.format("work", "A strange week", "I live in Oslo. I feel sad.")
    >>> count(post, " I live in Rome. I feel", {"city", "feeling"})
    Count(right=0, wrong=1, missing=1, other=1)
    """
    told = facts(prompt)
    if unknown := set(wanted) - told.keys():
        raise InputError(f"{tail(prompt)!r}: tells nothing of the wanted {min(unknown)}; mend it")
    stated, other = _stated(summary)
    right = {kind for kind, value in stated.items() if told.get(kind) == value}
    return Count(
        right=len(right & set(wanted)),
        wrong=len(stated) - len(right),
        missing=len(set(wanted) - stated.keys()),
        other=other,
    )


def oracle_judge(references: Mapping[str, str]) -> Judge:
    """The judge who prefers the summary of the higher `Count.reward`; equal ones are a tie.

    `references` maps each prompt to its data set's right summary, which says by its kinds which
    facts are wanted. Asked, it raises `InputError` for a prompt without one, and where prompt or
    reference is none of the task.

    >>> post = synthetic.PROMPT.format("work", "A strange week", "I live in Oslo. I feel sad.")
    >>> judge = oracle_judge({post: " I feel sad and I live in Oslo."})
    >>> dict(judge.ask([Question(post, " I live in Rome.", " I live in Oslo.")]))[0].preferred
    'second'
    """

    def ask(questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        for place, question in enumerate(questions):
            if question.prompt not in references:
                raise InputError(
                    f"{tail(question.prompt)!r}: has no right summary, without which the oracle "
                    "does not know which facts are wanted; give a data set that has one"
                )
            wanted = kinds(references[question.prompt])
            sides = (question.first, question.second)
            yield place, _verdict(*(count(question.prompt, side, wanted) for side in sides))

    return Judge("oracle", {"kind": "oracle"}, ask, fair=True)


def _stranger(text: str) -> InputError:
    return InputError(
        f"{tail(text)!r}: stands in no post of the built-in task, of which alone the oracle knows "
        "the facts; choose another judge"
    )


def _verdict(first: Count, second: Count) -> Verdict:
    ahead = first.reward - second.reward
    return Verdict(FIRST if ahead > 0 else SECOND if ahead else TIE, f"{first} | {second}")


def _stated(summary: str) -> tuple[dict[str, str], int]:
    """Kind -> value of the facts that a summary states, and how many pieces are something else."""
    text = summary.strip()
    pieces = _JOINT.split(text.removesuffix(".")) if text else []
    stated: dict[str, str] = {}
    for piece in pieces:
        kind, value = _CLAUSES.get(piece[:1].upper() + piece[1:], (None, ""))
        if kind and kind not in stated:
            stated[kind] = value
    return stated, len(pieces) - len(stated)
