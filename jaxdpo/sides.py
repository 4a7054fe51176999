"""The two sides of a comparison: what a model, a file of completions or the data set says.

All sides answer the same prompts, those of a data set. A model decodes into a file of its own
(`transcript`), which the next evaluation goes on with, and is let go before the next one is
loaded. Left out: who is better (`judge`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from jaxdpo import InputError, completions, transcript
from jaxdpo.metrics import console
from jaxdpo.pairs import DataReport, field_values, read_pairs
from jaxdpo.prompts import Prompt, tail
from jaxdpo.records import Record, read_json, read_log
from jaxdpo.tokens import text_ids

DATA = ("chosen", "rejected")
MAX_NEW_TOKENS = 128  # of a completion, where nothing else is said
LIMITS = ("max_new_tokens", "min_new_tokens", "no_repeat_ngram", "batch_size")


class Asked(NamedTuple):
    """A prompt of a data set, with the responses of its first row there."""

    prompt: Prompt
    chosen: str
    rejected: str | None
    subset: str


class Side(NamedTuple):
    """What somebody says to the prompts, in their order; and how one tells who it was.

    Of what was decoded it is known how long each response is in tokens, without the end token,
    of which `vocabulary` they are, and how many were cut short; None of the data's responses.
    """

    name: str
    texts: list[str]
    identity: Record
    lengths: list[int] | None = None
    cut: int | None = None
    vocabulary: str | None = None
    tokenizer: Tokenizer | None = None  # of a model


def asked(
    data: str,
    *,
    format: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    subset: str | None = None,
) -> tuple[list[Asked], DataReport]:
    """The first `limit` prompts of a data set (None: all), each once, with a report on its rows.

    Bad rows are left out, and counted in the report. `subset` is the field of a row that names
    what its prompt belongs to. Raises `InputError` for a data set without prompts.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: give a positive number of prompts, or none for all")
    split_of = {} if split is None else {"split": split}
    read, report = read_pairs(data, format=format or "pairs", **split_of, max_bad_fraction=1.0)
    first = {pair.prompt: pair for pair in reversed(read)}
    pairs = sorted(first.values(), key=lambda pair: pair.line)[:limit]
    names = [""] * len(pairs) if subset is None else field_values(data, subset, pairs, **split_of)
    return [
        Asked(Prompt((pair.prompt,), f"{data} line {pair.line}"), *pair[1:3], str(name))
        for pair, name in zip(pairs, names, strict=True)
    ], report


def decoding(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `completions.decoder` takes for a method, its options and the limits, all by name.

    What is None is not given. Raises `InputError` for an option that the method does not obey.

    >>> decoding({"method": "beam", "beam_size": 5})["max_new_tokens"]
    128
    """
    given = {name: value for name, value in given.items() if value is not None}
    limits = {name: given.pop(name) for name in LIMITS if name in given}
    method = completions.method(given.pop("method", "greedy"), given)
    return {"max_new_tokens": MAX_NEW_TOKENS} | method | limits


def kind(name: str) -> str:
    """What a side is: "chosen", "rejected", a "transcript", or a "model".

    >>> kind("rejected"), kind("runs/quickstart/decoded/greedy.jsonl"), kind("runs/quickstart:dpo")
    ('rejected', 'transcript', 'model')
    """
    if name in DATA:
        return name
    return "transcript" if name.endswith(".jsonl") else "model"


def side(
    name: str,
    asked: Sequence[Asked],
    *,
    decoding: Mapping[str, Any],
    dtype: str | None,
    out: Path,
) -> Side:
    """What a side says to the prompts; of a file or a model the first completion of each.

    A model decodes into `out`, as `decoding` (see there) says. Raises `InputError` for a side
    that has no response to a prompt, and names the prompt.
    """
    what = kind(name)
    if what == "model":
        return _model(name, asked, decoding, dtype, out)
    if what == "transcript":
        return _transcript(name, asked)
    for one in asked:
        if getattr(one, what) is None:
            raise InputError(f"{one.prompt.place}: has no {what} response; compare with another")
    texts = [getattr(one, what) for one in asked]
    return Side(name, texts, _identity(what, texts))


def lengths(sides: Sequence[Side]) -> tuple[np.ndarray, str]:
    """How long each side's responses are, [N, sides], and in what they are counted.

    In tokens without the end token, of the first side that is a model, or of the vocabulary
    that all sides were decoded with: what was decoded with it is as long as it came, other texts
    are as long as its tokenizer writes them. In characters where there is no such, or a text
    that it cannot write.

    >>> counted, unit = lengths([Side("chosen", ["abc"], {}), Side("rejected", [""], {})])
    >>> counted.tolist(), unit
    ([[3, 0]], 'characters')
    """
    known = next((one for one in sides if one.tokenizer is not None), sides[0])
    try:
        columns = [_lengths(one, known) for one in sides]
    except InputError as error:
        _tell(f"lengths are in characters: {error}")
        columns = [None]
    if None in columns:
        return np.array([[len(text) for text in one.texts] for one in sides]).T, "characters"
    return np.array(columns).T, f"tokens of {known.name}"


def _lengths(side: Side, known: Side) -> list[int] | None:
    if side.lengths is not None and side.vocabulary == known.vocabulary:
        return side.lengths
    if known.tokenizer is None:
        return None
    return [len(text_ids(text, known.tokenizer)) for text in side.texts]


def _decoded(name: str, said: Sequence[Record], identity: Record, **more: Any) -> Side:
    """A side of completions, the first of each prompt."""
    lengths = None
    if all(type(one.get("length")) is int for one in said):
        lengths = [one["length"] - bool(one.get("ended")) for one in said]
    cut = sum(one.get("ended") is False for one in said)
    return Side(name, [one["text"] for one in said], identity, lengths, cut, **more)


def _identity(kind: str, texts: Sequence[str]) -> Record:
    return {"kind": kind, "sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}


def _model(
    name: str,
    asked: Sequence[Asked],
    decoding: Mapping[str, Any],
    dtype: str | None,
    out: Path,
) -> Side:
    transcript.check(out)  # before a model is loaded
    scoring = completions.scoring(model=name, dtype=dtype)
    ready = completions.decoder(scoring, **decoding)
    prompts = [one.prompt for one in asked]
    said = [record["completions"][0] for record in transcript.decode(ready, prompts, out=out)]
    made_by = completions.settings(ready, prompts)
    del made_by["notes"]
    identity = {"kind": "model"} | json.loads(json.dumps(made_by))
    model = ready.models[0]
    more = {"vocabulary": model.identity["tokenizer"], "tokenizer": model.tokenizer}
    return _decoded(name, said, identity, **more)


def _transcript(name: str, asked: Sequence[Asked]) -> Side:
    """A file of completions, of which those of the prompts that are asked are taken."""
    said = _completions(Path(name))
    for one in asked:
        if one.prompt.texts[0] not in said:
            raise InputError(
                f"{name}: has no completion for {one.prompt.place}, "
                f"{tail(one.prompt.texts[0])!r}; decode the same prompts, or give a limit"
            )
    found = [said[one.prompt.texts[0]] for one in asked]
    if unused := sum(len(one) - 1 for one in found):
        _tell(f"{name}: the first completion of each prompt is compared; {unused} others are not")
    if len(said) > len(asked):
        _tell(f"{name}: {len(said) - len(asked)} of its {len(said)} prompts are not asked here")
    first = [one[0] for one in found]
    identity = _identity("transcript", [one["text"] for one in first])
    return _decoded(name, first, identity, vocabulary=_vocabulary(Path(name)))


def _completions(file: Path) -> dict[str, list[Record]]:
    """Prompt -> what was said to it, of a file that `transcript` has written."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; give one that launch/decode.py has written")
    said: dict[str, list[Record]] = {}
    for number, record in enumerate(read_log(file), 1):
        prompt, found = record.get("prompt"), record.get("completions")
        good = isinstance(prompt, str) and isinstance(found, list) and found
        texts = [one.get("text") if isinstance(one, dict) else None for one in found or []]
        if not good or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{file} line {number}: has no prompt with completions; restore it")
        if said.setdefault(prompt, found) is not found:
            raise InputError(f"{file} line {number}: its prompt stands there before; delete one")
    return said


def _vocabulary(file: Path) -> str | None:
    """Which tokenizer a file of completions was decoded with, if what made it is known."""
    sidecar = file.with_name(file.name + ".settings.json")
    models = read_json(sidecar).get("models", {}) if sidecar.is_file() else {}
    return models.get("model_0", {}).get("tokenizer")


def _tell(what: str) -> None:
    console.print(what, markup=False)
