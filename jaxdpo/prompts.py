"""Where prompts come from: the command line, a file, or the examples of a data set.

A prompt keeps the place where it stood, so that whatever is wrong with it later can be told
by file and line. Left out: token ids (`tokens`), and what is said to a prompt (`completions`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxdpo import InputError
from jaxdpo.pairs import DataReport, read_pairs

SUFFIXES = (".txt", ".jsonl")


class Prompt(NamedTuple):
    """One text for all models, or one for each; and where it stands."""

    texts: tuple[str, ...]
    place: str

    def for_each(self, num_models: int) -> tuple[str, ...]:
        """A text for each model; `InputError` where there are several, but not so many."""
        if len(self.texts) not in (1, num_models):
            raise InputError(
                f"{self.place}: {len(self.texts)} prompts, but {num_models} models; give one for "
                "all of them, or one for each (the reference last)"
            )
        return self.texts if len(self.texts) == num_models else self.texts * num_models


def collected(
    *,
    prompt: Sequence[str] = (),
    prompts: str | Path | None = None,
    data: str | None = None,
    format: str | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> tuple[list[Prompt], DataReport | None]:
    """The prompts of one source: given one by one, in a file, or those of a data set.

    `format` ("pairs"), `split` ("train") and `limit` are the data set's, and go to
    `pairs.read_pairs`; each of its prompts is taken once, bad rows are counted in the report
    that comes with them. Raises `InputError` for what is no source, several, or without effect.
    """
    if sum(map(bool, (prompt, prompts, data))) != 1:
        raise InputError("give one of prompt (once or more), prompts (a file), data (a data set)")
    given = {"format": format, "split": split, "limit": limit}
    given = {name: value for name, value in given.items() if value is not None}
    if not data:
        for name in given:
            raise InputError(f"{name}: has no effect without data; leave it out")
        return (typed(prompt) if prompt else from_file(prompts)), None
    pairs, report = read_pairs(data, **{"format": "pairs"} | given, max_bad_fraction=1.0)
    first = {pair.prompt: pair.line for pair in reversed(pairs)}
    lines = sorted(first.items(), key=lambda item: item[1])
    return [Prompt((text,), f"{data} line {line}") for text, line in lines], report


def typed(texts: Sequence[str]) -> list[Prompt]:
    """Prompts given one by one, as on the command line; `InputError` for an empty one.

    >>> typed(["1+1="])
    [Prompt(texts=('1+1=',), place='prompt 1')]
    """
    return [_prompt([text], f"prompt {number}") for number, text in enumerate(texts, 1)]


def from_file(file: str | Path) -> list[Prompt]:
    """The prompts of a `.txt` file, one to a line as it stands, or of a `.jsonl` file.

    An object of the latter has `prompt`, or `prompts` with one for each model. Raises
    `InputError` that names the first line with no prompt.
    """
    path = Path(file)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{file}: prompts stand in a {' or '.join(SUFFIXES)} file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a readable text file ({error})") from error
    if lines[-1] == "":
        lines.pop()  # what follows the last line's end is no line
    if not lines:
        raise InputError(f"{file}: is empty; give a line for each prompt")
    places = [f"{file} line {number}" for number in range(1, len(lines) + 1)]
    texts = _texts if path.suffix == ".jsonl" else lambda line, place: [line]
    return [_prompt(texts(*each), each[1]) for each in zip(lines, places, strict=True)]


def tail(text: str, most: int = 60) -> str:
    """The end of a text, on one line.

    >>> tail("one\\ntwo", 5)
    '…e⏎two'
    """
    return ("…" if len(text) > most else "") + text[-most:].replace("\n", "⏎")


def _texts(line: str, place: str) -> list[str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON; one object to a line") from error
    if not isinstance(row, dict) or ("prompt" in row) == ("prompts" in row):
        raise InputError(f"{place}: must be an object with either prompt or prompts")
    texts = row.get("prompts", [row.get("prompt")])
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise InputError(f"{place}: prompt must be a string, prompts a list of strings")
    return texts


def _prompt(texts: Sequence[str], place: str) -> Prompt:
    if not all(text.strip() for text in texts):
        raise InputError(f"{place}: is empty; give it some text")
    return Prompt(tuple(texts), place)
