"""Responses whose errors are known, and which of their tokens are the wrong ones.

They come from rows that say where their errors are, as the built-in task's do, or are made
from the right responses of any pairs by rule (`corruption`). Left out: scores (`token_scores`)
and what they are worth (`credit_benchmark`).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from jaxdpo import InputError, corruption, pairs
from jaxdpo.analysis.token_scores import Span, marked_tokens
from jaxdpo.pairs import Pair
from jaxdpo.records import Record, read_log
from jaxdpo.synthetic import Error
from jaxdpo.tokens import TokenStore, text_ids

SEVERAL = 2  # errors in the corrupted responses that have more than one


class Case(NamedTuple):
    """A response with errors, and the same with the right values in their places."""

    pair: Pair  # `rejected` and `chosen`
    errors: tuple[Error, ...]  # of the rejected response, from left to right
    unit: int  # cases of one prompt have the same: they are not independent


class Response(NamedTuple):
    """The tokens of a case's wrong response and of its right one, EOS included.

    `places` are where they stand among all scored tokens. `error` is the number of the error
    that a token of the wrong response belongs to, -1 if it is right; `chosen_error` of which
    a token of the right response is the right value, or None where the tokenizer splits what
    is the same in the two responses differently.
    """

    case: Case
    places: np.ndarray  # [T]
    error: np.ndarray  # [T]
    chosen_places: np.ndarray  # [T of the right response]
    chosen_error: np.ndarray | None


def labelled(source: str, *, limit: int | None) -> tuple[list[Case], Record]:
    """The cases of a .jsonl file of pairs with `errors`, and what was read and left out.

    An error is {"kind", "start", "end", "right", "wrong"}: characters `start:end` of the
    rejected response are `wrong`, and `right` would be true there. That response with all put
    right is compared with, not the row's own chosen one, which may be worded otherwise.
    Raises `InputError` for a row without the field, or whose errors are not where it says.
    """
    if not source.endswith(".jsonl"):
        raise InputError(f"{source}: errors are read from .jsonl files only; write it as one")
    read, report = pairs.read_pairs(source, format="pairs", limit=limit)
    rows, cases, perfect = read_log(Path(source)), [], 0
    units: dict[str, int] = {}
    for pair in read:
        errors = _errors(pair, rows[pair.line - 1], f"{source} line {pair.line}")
        perfect += not errors
        if errors:
            pair = pair._replace(chosen=put_right(pair.rejected, errors)[0])
            cases.append(Case(pair, errors, units.setdefault(pair.prompt, len(units))))
    if not cases:
        raise InputError(f"{source}: no row has an error to find; give pairs whose rejected err")
    left_out = {"bad row": report.rows - report.kept, "no error in it": perfect}
    return cases, {"rows": report.rows, "responses": len(cases), "left_out": left_out}


def corrupted(
    source: str, *, format: str, split: str | None, limit: int | None, seed: int
) -> tuple[list[Case], Record]:
    """Cases made from the chosen response of each prompt (of its last pair), and counts.

    Each becomes a response with one error by each rule, and one with several by any rule; a
    response in which a rule finds too little to swap is counted by rule.
    """
    read, report = pairs.read_pairs(source, format=format, split=split or "train", limit=limit)
    last = {pair.prompt: pair for pair in read}
    names = corruption.names(text for pair in last.values() for text in (pair.prompt, pair.chosen))
    ways = {rule: ([rule], 1) for rule in corruption.RULES}
    ways[f"{SEVERAL} errors"] = (corruption.RULES, SEVERAL)
    cases, left_out = [], Counter()
    for unit, pair in enumerate(last.values()):
        for way, (rules, errors) in ways.items():
            how = dict(rules=rules, errors=errors, names=names, seed=seed, index=pair.line)
            found = corruption.corrupted(pair.chosen, pair.prompt, **how)
            if found is None:
                left_out[f"too little to swap: {way}"] += 1
            else:
                cases.append(Case(pair._replace(rejected=found[0]), found[1], unit))
    if not cases:
        raise InputError(f"{source}: no chosen response holds a number, name or unit to swap")
    left_out |= {"bad row": report.rows - report.kept, "prompt met again": len(read) - len(last)}
    return cases, {"rows": report.rows, "responses": len(cases), "left_out": dict(left_out)}


def first_put_right(case: Case) -> Case:
    """The case with its first error mended in the rejected response, the others as they are."""
    first, *others = case.errors
    shift = len(first.right) - len(first.wrong)
    moved = [e._replace(start=e.start + shift, end=e.end + shift) for e in others]
    text, _ = put_right(case.pair.rejected, case.errors[:1])
    return case._replace(pair=case.pair._replace(rejected=text), errors=tuple(moved))


def put_right(text: str, errors: Sequence[Error]) -> tuple[str, list[Span]]:
    """The text with the right values in place of the wrong ones, and where they then stand.

    >>> put_right(" a cat, a dog", [Error("pet", 3, 6, "mouse", "cat")])
    (' a mouse, a dog', [Span(start=3, end=8, label='')])
    """
    pieces, spans, at = [], [], 0
    for error in errors:
        pieces += [text[at : error.start], error.right]
        end, at = sum(map(len, pieces)), error.end
        spans.append(Span(end - len(error.right), end))
    return "".join([*pieces, text[at:]]), spans


def responses(cases: Sequence[Case], store: TokenStore, tokenizer: Tokenizer) -> list[Response]:
    """Which scored tokens of the store are wrong; its i-th example is the i-th case's pair.

    Raises `InputError` that names the line whose errors cut a token.
    """
    found = []
    for case, start, (_, chosen, rejected) in zip(
        cases, store.scored_offsets[:-1], store.lengths, strict=True
    ):
        chosen_places = start + np.arange(chosen)
        places = start + chosen + np.arange(rejected)
        try:
            error = _labels(case.pair.rejected, case.errors, tokenizer)
        except InputError as cause:
            raise InputError(f"line {case.pair.line}: {cause}") from cause
        beside = _chosen_labels(case, error, tokenizer)
        found.append(Response(case, places, error, chosen_places, beside))
    return found


def _errors(pair: Pair, row: Record, place: str) -> tuple[Error, ...]:
    if "errors" not in row:
        raise InputError(f"{place}: has no field 'errors'; mark what is wrong, or use --corrupt")
    malformed = InputError(f"{place}: an error must have kind, start, end, right and wrong")
    try:
        errors = tuple(Error(**error) for error in row["errors"])
        inside = [pair.rejected[error.start : error.end] == error.wrong for error in errors]
    except TypeError:
        raise malformed from None
    if not all(isinstance(text, str) for error in errors for text in (error.kind, error.right)):
        raise malformed
    if not all(inside):
        number = inside.index(False) + 1
        raise InputError(f"{place}: error {number} is not where it says in 'rejected'; correct it")
    return tuple(sorted(errors, key=lambda error: error.start))


def _labels(text: str, spans: Sequence[Error | Span], tokenizer: Tokenizer) -> np.ndarray:
    spans = [Span(span.start, span.end) for span in spans]
    return np.append(marked_tokens(text, spans, tokenizer), -1)  # EOS


def _chosen_labels(case: Case, error: np.ndarray, tokenizer: Tokenizer) -> np.ndarray | None:
    text, spans = put_right(case.pair.rejected, case.errors)
    try:
        beside = _labels(text, spans, tokenizer)
    except InputError:  # a right value shares a token with what stands beside it
        return None
    wrong_ids, right_ids = (
        np.array([*text_ids(side, tokenizer), -1]) for side in (case.pair.rejected, text)
    )
    return beside if np.array_equal(wrong_ids[error < 0], right_ids[beside < 0]) else None
