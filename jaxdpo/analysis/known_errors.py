"""Responses whose errors are known, and which of their tokens are the wrong ones.

They come from rows that say where their errors are, as the built-in task's do, or are made
from the right responses of any pairs by rule (`corruption`). Left out: scores (`token_scores`)
and what they are worth (`credit_benchmark`).
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from jaxdpo import InputError, corruption, pairs
from jaxdpo.analysis.token_scores import Span, marked_tokens
from jaxdpo.pairs import END_OF_TEXT, DataReport, Pair
from jaxdpo.records import Record
from jaxdpo.synthetic import Error
from jaxdpo.tokens import TokenStore, text_ids

_KINDS = {str: "a string", int: "a whole number"}
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

    A rejected response with all its `errors` put right (`errors_of`) is compared with, not the
    row's own chosen one, which may be worded otherwise. Bad rows are counted by reason. Raises
    `InputError` for a row that is no bad one and whose errors cannot be read.
    """
    if not source.endswith(".jsonl"):
        raise InputError(f"{source}: errors are read from .jsonl files only; write it as one")
    read, report = pairs.read_pairs(source, format="pairs", limit=limit, max_bad_fraction=1.0)
    cases, perfect, units = [], 0, {}
    for pair, row in zip(read, _rows(source, [pair.line for pair in read]), strict=True):
        errors = errors_of(row, pair.rejected, f"{source} line {pair.line}")
        perfect += not errors
        if errors:
            pair = pair._replace(chosen=put_right(pair.rejected, errors)[0])
            cases.append(Case(pair, errors, units.setdefault(pair.prompt, len(units))))
    if not cases:
        raise InputError(f"{source}: no row has an error to find; give pairs whose rejected err")
    left_out = _bad_rows(report) | {"no error in it": perfect}
    return cases, {"rows": report.rows, "responses": len(cases), "left_out": left_out}


def errors_of(row: Record, rejected: str, place: str) -> tuple[Error, ...]:
    """The `errors` of a row, from left to right: where its `rejected` response is wrong.

    An error is {"kind", "start", "end", "right", "wrong"}: characters `start:end` of it are
    `wrong`, and `right` would be true there. Raises `InputError`, which begins with `place`,
    for a row without the field, or whose errors are not where it says, empty or overlapping.

    >>> row = {"errors": [{"kind": "pet", "start": 3, "end": 6, "right": "dog", "wrong": "cat"}]}
    >>> errors_of(row, " a cat", "line 1")
    (Error(kind='pet', start=3, end=6, right='dog', wrong='cat'),)
    """
    if "errors" not in row:
        raise InputError(f"{place}: has no field 'errors'; mark what is wrong, or use --corrupt")
    if not isinstance(row["errors"], list):
        raise InputError(f"{place}: field 'errors' must be a list")
    numbered = enumerate(row["errors"], 1)
    errors = [_error(error, rejected, f"{place}: error {number}") for number, error in numbered]
    errors.sort(key=lambda error: error.start)
    for one, two in itertools.pairwise(errors):
        if two.start < one.end:
            raise InputError(
                f"{place}: errors {one.start}:{one.end} and {two.start}:{two.end} overlap; mark a "
                "character once"
            )
    return tuple(errors)


def corrupted(
    source: str, *, format: str, split: str | None, limit: int | None, seed: int
) -> tuple[list[Case], Record]:
    """Cases made from the chosen response of each prompt (of its last pair), and counts.

    Each becomes a response with one error by each rule, and one with several by any rule; a
    response in which a rule finds too little to swap is counted by rule.
    """
    asked = dict(format=format, split=split or "train", limit=limit)
    read, report = pairs.read_pairs(source, **asked, max_bad_fraction=1.0)
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
    left_out |= {"prompt met again": len(read) - len(last)}
    left_out = _bad_rows(report) | left_out
    return cases, {"rows": report.rows, "responses": len(cases), "left_out": left_out}


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


def _rows(source: str, lines: Sequence[int]) -> Iterator[Record]:
    """The rows on these lines, which are known to hold one."""
    wanted = set(lines)
    with open(source, "rb") as file:
        for line, text in enumerate(file, 1):
            if line in wanted:
                yield json.loads(text.decode("utf-8-sig"))


def _bad_rows(report: DataReport) -> dict[str, int]:
    return {f"bad row: {reason}": len(lines) for reason, lines in report.skipped.items()}


def _error(error: Any, rejected: str, place: str) -> Error:
    """An error as a row holds it, checked; `InputError` begins with `place`."""
    kinds = Error.__annotations__
    if not isinstance(error, dict) or error.keys() != kinds.keys():
        raise InputError(f"{place} must be an object with {', '.join(kinds)}")
    for name, kind in kinds.items():
        if type(error[name]) is not kind:  # isinstance would take true for the integer 1
            raise InputError(f"{place}: {name!r} must be {_KINDS[kind]}")
    found = Error(**error)
    if END_OF_TEXT in found.right or re.search("[\ud800-\udfff]", found.kind + found.right):
        raise InputError(f"{place}: holds a lone surrogate or {END_OF_TEXT}; write plain text")
    if not 0 <= found.start < found.end <= len(rejected):
        raise InputError(
            f"{place} ({found.start}:{found.end}) is empty or outside 'rejected', which has "
            f"{len(rejected)} characters; count from 0, the end exclusive"
        )
    if rejected[found.start : found.end] != found.wrong:
        raise InputError(f"{place} is not where it says in 'rejected'; correct it")
    if not found.right.strip() or found.right == found.wrong:
        raise InputError(f"{place}: 'right' is empty or the same as 'wrong'; say what is true")
    return found


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
