"""Responses to look at token by token, with the spans that somebody marked in them.

They come from a data set, where chosen and rejected stand side by side, or from a JSON file: a
list, or an object with a list as "items", of

    {"prompt": "...", "responses": [{"name": "...", "text": "...", "spans": [SPAN, ...]}, ...]}

or, for two responses, {"prompt", "base", "corrupted", "base_spans", "corrupted_spans"}. A SPAN
marks characters `char_start` to `char_end` (exclusive, from 0); spans may be left out. It may
have a "label", and may say what it marks, which is then checked: "text", "tokens" (the pieces),
"token_start" and "token_end".

Texts are taken as they stand, and only the end token is added: a response whose model learnt it
with a space in front needs that space here. In rows of the built-in task the wrong values of
`rejected` ("errors") are the marked spans. Left out: what the models say of them (`credit`).
"""

import json
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdpo import InputError
from jaxdpo.analysis.known_errors import errors_of
from jaxdpo.analysis.token_scores import Span
from jaxdpo.pairs import DataReport, Pair, read_pairs
from jaxdpo.synthetic import Error

_CHECKED = {"text": str, "tokens": list, "token_start": int, "token_end": int}
_KINDS = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}
_ABOUT = ("subreddit", "title", "post", "edits", "paper_tokens_base", "paper_tokens_corrupted")


class Mark(NamedTuple):
    """A marked span, and what its source says that it holds."""

    span: Span
    says: dict[str, Any]  # of "text", "tokens", "token_start", "token_end"


class Response(NamedTuple):
    """One response to a prompt, and what is marked in it."""

    name: str
    text: str
    marks: tuple[Mark, ...]
    place: str


class Item(NamedTuple):
    """A prompt with the responses that are compared."""

    name: str  # its number in the source, for people
    prompt: str
    responses: tuple[Response, ...]


def from_file(file: str | Path) -> list[Item]:
    """The items of a JSON file; `InputError` that names the first item and field that is wrong."""
    try:
        held = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a readable JSON file ({error})") from error
    if isinstance(held, dict):
        held = _fields(held, str(file), {"items": list}, {"source": str, "note": str})["items"]
    if not isinstance(held, list) or not held:
        raise InputError(f"{file}: holds no items; give a list of them, or an object with items")
    return [_item(item, str(file), f"item {number}") for number, item in enumerate(held, 1)]


def from_data(
    data: str, *, format: str = "pairs", split: str | None = None, limit: int | None = None
) -> tuple[list[Item], DataReport]:
    """The examples of a data set, and what was skipped; see `pairs.read_pairs`."""
    split = {} if split is None else {"split": split}
    examples, report = read_pairs(data, format=format, max_bad_fraction=1.0, limit=limit, **split)
    errors = _errors(data, examples) if format == "pairs" and data.endswith(".jsonl") else {}
    items = []
    for prompt, chosen, rejected, line in examples:
        place = f"{data} line {line}"
        if rejected is None:
            sides = (Response("completion", chosen, (), place),)
        else:
            marks = tuple(map(_mistake, errors.get(line, ())))
            sides = (
                Response("chosen", chosen, (), f"{place}, chosen"),
                Response("rejected", rejected, marks, f"{place}, rejected"),
            )
        items.append(Item(f"line {line}", prompt, sides))
    return items, report


def check(response: Response, marked: np.ndarray, pieces: Sequence[str]) -> None:
    """Raise `InputError` where the marked tokens are not what the source says of them.

    `marked` is what `token_scores.marked_tokens` gave, `pieces` are the text's tokens.
    """
    for number, (span, says) in enumerate(response.marks):
        (at,) = np.nonzero(marked == number)
        found = {
            "text": response.text[span.start : span.end],
            "tokens": [pieces[token] for token in at],
            "token_start": int(at[0]),
            "token_end": int(at[-1]) + 1,
        }
        for field, expected in says.items():
            if found[field] != expected:
                raise InputError(
                    f"{response.place}, span {number + 1}: {field} should be {expected!r}, but the "
                    f"span holds {found[field]!r}; mark it again, with this model's tokenizer"
                )


def _item(item: Any, file: str, name: str) -> Item:
    place = f"{file} {name}"
    if isinstance(item, dict) and "responses" not in item:
        needed = {"prompt": str, "base": str, "corrupted": str}
        needed |= {"base_spans": list, "corrupted_spans": list}
        item = _fields(item, place, needed, dict.fromkeys(_ABOUT, object))
        sides = [
            {"name": name, "text": item[name], "spans": item[f"{name}_spans"]}
            for name in ("base", "corrupted")
        ]
        item = {"prompt": item["prompt"], "responses": sides}
    item = _fields(item, place, {"prompt": str, "responses": list}, {})
    if not item["prompt"] or not item["responses"]:
        raise InputError(f"{place}: prompt or responses is empty; give at least one response")
    responses = [
        _response(response, f"{place}, response {number}")
        for number, response in enumerate(item["responses"], 1)
    ]
    return Item(name, item["prompt"], tuple(responses))


def _response(response: Any, place: str) -> Response:
    response = _fields(response, place, {"name": str, "text": str}, {"spans": list})
    if not response["text"]:
        raise InputError(f"{place}: its text is empty; give it some")
    marks = [
        _mark(mark, f"{place}, span {number}")
        for number, mark in enumerate(response.get("spans", []), 1)
    ]
    return Response(response["name"], response["text"], tuple(marks), place)


def _mark(mark: Any, place: str) -> Mark:
    mark = _fields(mark, place, {"char_start": int, "char_end": int}, {"label": str} | _CHECKED)
    says = {field: mark[field] for field in _CHECKED if field in mark}
    return Mark(Span(mark["char_start"], mark["char_end"], mark.get("label", "")), says)


def _fields(row: Any, place: str, needed: dict[str, type], optional: dict[str, type]) -> dict:
    """The row, if it is an object with the needed fields and no unknown ones, all of their kind."""
    if not isinstance(row, dict):
        raise InputError(f"{place}: must be an object with {', '.join(needed)}")
    if missing := [name for name in needed if name not in row]:
        raise InputError(f"{place}: has no field {missing[0]!r}; give it {', '.join(needed)}")
    known = needed | optional
    if unknown := [name for name in row if name not in known]:
        raise InputError(f"{place}: field {unknown[0]!r} is unknown; there are {', '.join(known)}")
    for name, kind in known.items():
        if name in row and kind is not object and type(row[name]) is not kind:  # true is no 1
            raise InputError(f"{place}: field {name!r} must be {_KINDS[kind]}")
        if kind is str and re.search("[\ud800-\udfff]", row.get(name, "")):
            raise InputError(f"{place}: field {name!r} holds a lone surrogate; write the character")
    return row


def _errors(data: str, examples: Sequence[Pair]) -> dict[int, tuple[Error, ...]]:
    """Line -> the errors of its rejected response, where the row says which there are."""
    with open(data, "rb") as file:
        lines = dict(enumerate(islice(file, examples[-1].line), 1))
    rows = {pair: json.loads(lines[pair.line].decode("utf-8-sig")) for pair in examples}
    return {
        pair.line: errors_of(row, pair.rejected, f"{data} line {pair.line}")
        for pair, row in rows.items()
        if "errors" in row
    }


def _mistake(error: Error) -> Mark:
    span = Span(error.start, error.end, f"{error.kind}: {error.right} is right")
    return Mark(span, {"text": error.wrong})
