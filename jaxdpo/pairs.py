"""Where preference pairs come from: files and hubs -> validated `Pair`s, for every format.

A row is good or it has one reason why not; bad rows are counted by reason and line number,
and too many of them stop the run. Text of a row never enters a message. Tokenisation and
lengths are left to `tokens`, order and shuffling to `batching`.

The TL;DR formats come out in one canonical form: the prompt ends "\\n\\nTL;DR:", a response
has one leading space and no trailing whitespace. Inside a post nothing is changed.
"""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from jaxdpo import InputError

END_OF_TEXT = "<|endoftext|>"
_Texts = tuple[str, str, str | None]  # prompt, chosen, rejected
_TLDR = "TL;DR:"
_ASSISTANT = "\n\nAssistant:"
_KINDS = {str: "a string", int: "an integer", list: "a list", dict: "an object"}
_KINDS |= {float: "a number", bool: "a boolean"}
_SCALARS = (str, int, float, bool)


class Pair(NamedTuple):
    """A prompt with its chosen and rejected response, or an SFT example (rejected None)."""

    prompt: str
    chosen: str
    rejected: str | None
    line: int  # 1-based line or row of the source, so that later stages can name it


class DataReport(NamedTuple):
    """What was read from a source and what was not: numbers only, never text.

    `skipped` maps each reason to the line numbers of all its rows. `duplicates` counts
    pairs that repeat an earlier one exactly, `contradictions` counts comparisons (a prompt
    and two responses) that stand there with both labels; both kinds are kept.
    """

    source: str
    format: str
    limit: int | None
    rows: int
    kept: int
    skipped: dict[str, list[int]]
    duplicates: int
    contradictions: int

    def as_json(self) -> dict:
        """The report as a JSON object, with the first 20 line numbers of each reason."""
        skipped = {
            reason: {"count": len(lines), "lines": lines[:20]}
            for reason, lines in self.skipped.items()
        }
        return self._asdict() | {"skipped": skipped}

    def __str__(self) -> str:
        first = "" if self.limit is None else f", the first {self.limit} rows only"
        table = [
            f"{self.source} ({self.format}{first}): {self.rows} rows, {self.kept} kept, "
            f"{self.duplicates} duplicates, {self.contradictions} contradictions"
        ]
        for reason, lines in sorted(self.skipped.items(), key=lambda item: -len(item[1])):
            numbers = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
            table.append(f"{len(lines):8d} skipped: {reason} (line {numbers})")
        return "\n".join(table)


class _BadRow(Exception):
    """The reason why a row is not a pair."""


def _field(row: dict, path: str, *kinds: type):
    kinds = kinds or (str,)
    value = row
    for key in path.split("."):
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value)}
        if not isinstance(value, dict) or key not in value:
            raise _BadRow(f"missing field {path!r}")
        value = value[key]
    if value is None:
        raise _BadRow(f"null field {path!r}")
    if type(value) not in kinds:  # isinstance would take true for the integer 1
        raise _BadRow(f"field {path!r} is not {' or '.join(map(_KINDS.get, kinds))}")
    return value


def _canonical_tldr(post: str, *responses: str) -> tuple[str, ...]:
    if not post.strip():
        raise _BadRow("empty prompt")
    return f"{post.rstrip()}\n\n{_TLDR}", *(" " + text.strip() for text in responses)


def _pairs(row: dict) -> _Texts:
    return _field(row, "prompt"), _field(row, "chosen"), _field(row, "rejected")


def _completions(row: dict) -> _Texts:
    return _field(row, "prompt"), _field(row, "completion"), None


def _openai_comparisons(row: dict) -> _Texts:
    info = _field(row, "info", dict)  # the CNN/DM rows hold an article in place of a post
    if info.get("post") is None and info.get("article") is not None:
        raise _BadRow("a CNN/DM article, not a Reddit post")
    names = ("info.subreddit", "info.title", "info.post")
    subreddit, title, post = (_field(row, name) for name in names)
    choice = _field(row, "choice", int)
    if choice not in (0, 1) or len(_field(row, "summaries", list)) != 2:
        raise _BadRow("'choice' is not 0 or 1 of two 'summaries'")
    chosen, rejected = (_field(row, f"summaries.{i}.text") for i in (choice, 1 - choice))
    header = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: "
    return _canonical_tldr(header + post, chosen, rejected)


def _carper_comparisons(row: dict) -> _Texts:
    prompt, *responses = _pairs(row)
    if not all(text.startswith(_TLDR) for text in responses):
        raise _BadRow(f"a response does not begin with {_TLDR!r}")
    return _canonical_tldr(prompt, *(text.removeprefix(_TLDR) for text in responses))


def _carper_tldr(row: dict) -> _Texts:
    prompt = _field(row, "prompt").rstrip()
    if not prompt.endswith(_TLDR):
        raise _BadRow(f"the prompt does not end with {_TLDR!r}")
    return *_canonical_tldr(prompt.removesuffix(_TLDR), _field(row, "label")), None


def _hh(row: dict) -> _Texts:
    sides = [_field(row, side).rpartition(_ASSISTANT) for side in ("chosen", "rejected")]
    (prompt, marker, chosen), (other_prompt, other_marker, rejected) = sides
    if not (marker and other_marker):
        raise _BadRow(f"no {_ASSISTANT!r} in a side")
    if prompt != other_prompt:
        raise _BadRow("sides disagree on the prompt")
    return prompt + marker, chosen, rejected


RESPONSES: dict[str, Callable[[Pair], list[str]]] = {
    "chosen": lambda pair: [pair.chosen],
    "rejected": lambda pair: [pair.rejected],
    "all": lambda pair: [pair.chosen, pair.rejected],
}
FORMATS: dict[str, Callable[[dict], _Texts]] = {
    "pairs": _pairs,
    "completions": _completions,
    "openai_comparisons": _openai_comparisons,
    "carper_comparisons": _carper_comparisons,
    "carper_tldr": _carper_tldr,
    "hh": _hh,
}


def _json_lines(path: str, opened=open) -> Iterator[bytes]:
    with opened(path, "rb") as file:
        yield from file


def _json_list(path: str) -> Iterator[object]:
    with open(path, encoding="utf-8-sig") as file:
        rows = json.load(file)
    if not isinstance(rows, list):
        raise ValueError("it holds no list; one object per line is .jsonl")
    yield from rows


def _parquet_rows(path: str) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from (batch.slice(i, 1) for i in range(batch.num_rows))


_READERS = {
    ".jsonl": _json_lines,
    ".jsonl.gz": partial(_json_lines, opened=gzip.open),
    ".json": _json_list,
    ".parquet": _parquet_rows,
}


def _file_rows(path: str, suffix: str) -> Iterator[object]:
    try:
        yield from _READERS[suffix](path)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        cause = str(error).partition("\n")[0]
        raise InputError(
            f"{path}: not a readable {suffix} file ({cause}); "
            "fetch it again, or correct its name if it is of another kind"
        ) from error


def _hub_rows(name: str, split: str) -> Iterator[dict]:
    import datasets  # slow to import, and only a hub needs it

    try:
        yield from datasets.load_dataset(name, split=split)
    except Exception as error:  # the library, its client and the network raise their own
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(
            f"{name}: no such file here, and split {split!r} of a hub data set of that "
            f"name cannot be read ({cause}); check the name, or download it and give a file"
        ) from error


def _rows(source: str, split: str) -> Iterator[object]:
    suffix = next((suffix for suffix in _READERS if source.endswith(suffix)), None)
    hub_name = suffix is None and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)
    if hub_name and not os.path.exists(source):
        return _hub_rows(source, split)
    if suffix is None or not os.path.isfile(source):
        raise InputError(
            f"{source}: {'not a data file' if os.path.exists(source) else 'no such file'}; "
            f"give a file ({', '.join(_READERS)}) or a hub name (owner/name)"
        )
    if split != "train":
        raise InputError(
            f"{source}: split={split!r} has no effect on a file; give that split's file"
        )
    return _file_rows(source, suffix)


def _parsed(row: object) -> dict:
    try:
        if isinstance(row, bytes):
            if not row.strip():
                raise _BadRow("blank line")
            row = json.loads(row.decode("utf-8-sig"))
        elif isinstance(row, pyarrow.RecordBatch):
            (row,) = row.to_pylist()
    except UnicodeDecodeError:
        raise _BadRow("not UTF-8") from None
    except (ValueError, RecursionError):
        raise _BadRow("not JSON") from None
    if not isinstance(row, dict):
        raise _BadRow("not an object")
    return row


def _check_texts(prompt: str, chosen: str, rejected: str | None):
    for response in [chosen] if rejected is None else [chosen, rejected]:
        if re.search("[\ud800-\udfff]", prompt + response):
            raise _BadRow("a lone surrogate")  # tokenizers crash on it
        if END_OF_TEXT in prompt + response:
            raise _BadRow(f"a literal {END_OF_TEXT}")  # it must never become a real EOS
        if not prompt.strip():
            raise _BadRow("empty prompt")  # nothing would predict the first response token
        if not response.strip():
            raise _BadRow("empty response")
    if chosen == rejected:
        raise _BadRow("chosen equals rejected")


def read_pairs(
    source: str,
    *,
    format: str,
    split: str = "train",
    max_bad_fraction: float = 0.01,
    limit: int | None = None,
) -> tuple[list[Pair], DataReport]:
    """The validated pairs of a file or hub data set, with a report of what was skipped.

    `source` is a `.jsonl`, `.jsonl.gz`, `.json` (a list of objects) or `.parquet` file, or
    a hub name `owner/name`, of which `split` is taken. `format` is a name in `FORMATS`.
    With `limit`, only the first `limit` rows of the source are read.

    Raises `InputError` where the source cannot be read, an option is wrong, no pair is
    left, or bad rows are more than the fraction `max_bad_fraction` of the rows read.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "one.jsonl")
    ...     _ = file.write_text('{"prompt": "1+1=", "completion": " 2"}\\n')
    ...     pairs, report = read_pairs(str(file), format="completions")
    >>> pairs
    [Pair(prompt='1+1=', chosen=' 2', rejected=None, line=1)]
    >>> report.rows, report.kept, report.skipped
    (1, 1, {})
    """
    if format not in FORMATS:
        raise InputError(f"format={format!r} is unknown; choose from {', '.join(FORMATS)}")
    if not 0 <= max_bad_fraction <= 1:
        raise InputError(f"max_bad_fraction={max_bad_fraction}: give a number from 0 to 1")
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: give a positive number of rows, or None for all")
    pairs, skipped = [], {}
    for line, row in enumerate(islice(_rows(source, split), limit), start=1):
        try:
            texts = FORMATS[format](_parsed(row))
            _check_texts(*texts)
            pairs.append(Pair(*texts, line))
        except _BadRow as reason:
            skipped.setdefault(str(reason), []).append(line)
    report = _report(source, format, limit, pairs, skipped)
    _refuse_bad_data(report, max_bad_fraction)
    return pairs, report


def field_values(
    source: str, path: str, pairs: Iterable[Pair], *, split: str = "train"
) -> list[str | int | float | bool]:
    """What a field (dotted where nested) holds in the row of each pair that `read_pairs` gave.

    Raises `InputError` that names the first row in which it is missing, null, a list or an object.
    """
    lines, values = {pair.line for pair in pairs}, []
    for line, row in enumerate(islice(_rows(source, split), max(lines, default=0)), start=1):
        if line in lines:
            try:
                values.append(_field(_parsed(row), path, *_SCALARS))
            except _BadRow as reason:
                raise InputError(
                    f"{source} line {line}: {reason}; name a field that every row has"
                ) from None
    return values


def _report(
    source: str, format: str, limit: int | None, pairs: list[Pair], skipped: dict
) -> DataReport:
    labels = {pair[:3] for pair in pairs}
    swapped = sum((prompt, worse, better) in labels for prompt, better, worse in labels)
    return DataReport(
        source,
        format,
        limit,
        rows=len(pairs) + sum(map(len, skipped.values())),
        kept=len(pairs),
        skipped=skipped,
        duplicates=len(pairs) - len(labels),
        contradictions=swapped // 2,  # a contradiction is found from either of its sides
    )


def _refuse_bad_data(report: DataReport, max_bad_fraction: float):
    bad = report.rows - report.kept
    if report.rows == 0:
        raise InputError(f"{report.source}: holds no rows; give a source with data")
    if bad / report.rows > max_bad_fraction:
        raise InputError(
            f"{report}\n{bad} of {report.rows} rows are bad, more than "
            f"max_bad_fraction={max_bad_fraction}; mend the rows, name the format that "
            "they have, or raise max_bad_fraction"
        )
    if report.kept == 0:
        raise InputError(f"{report}\nno row is left; mend the rows or name another format")


def sft_examples(pairs: Iterable[Pair], responses: str) -> list[Pair]:
    """SFT examples from comparisons: for each prompt the `responses` of its last pair.

    `responses` is "chosen", "rejected", or "all" for both. With the chosen ones this is the
    official DPO code's rule for Anthropic HH. Prompts stand in the order of their first pair.
    SFT examples among `pairs` are kept as they are, never merged; without a rejected response,
    they are an `InputError` unless it is the chosen ones that are asked for.

    >>> two = [Pair("p", " a", " b", 1), Pair("p", " c", " a", 2)]
    >>> sft_examples(two, "chosen")
    [Pair(prompt='p', chosen=' c', rejected=None, line=2)]
    >>> [example.chosen for example in sft_examples(two, "all")]
    [' c', ' a']
    """
    last = {}
    for index, pair in enumerate(pairs):
        if pair.rejected is None and responses != "chosen":
            raise InputError(
                f"line {pair.line}: has no rejected response; train on the chosen ones"
            )
        last[index if pair.rejected is None else pair.prompt] = pair
    return [
        pair._replace(chosen=response, rejected=None)
        for pair in last.values()
        for response in RESPONSES[responses](pair)
    ]


def split_by_prompt(
    pairs: Iterable[Pair], *, test_fraction: float, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Train and test pairs, no prompt on both sides: test where hash(seed, prompt) is low.

    A prompt's side depends on nothing else, neither on order nor on other rows, and a
    larger `test_fraction` (0 to 1, of the prompts) only adds to the test side.

    >>> pairs = [Pair(prompt, " a", " b", i) for i, prompt in enumerate("uvwxuvwx", 1)]
    >>> train, test = split_by_prompt(pairs, test_fraction=0.5, seed=0)
    >>> [pair.line for pair in train], [pair.line for pair in test]
    ([2, 3, 4, 6, 7, 8], [1, 5])
    """
    if not 0 <= test_fraction <= 1:
        raise InputError(f"test_fraction={test_fraction}: give a number from 0 to 1")
    train, test = [], []
    for pair in pairs:
        digest = hashlib.sha256(f"{seed}:{pair.prompt}".encode()).digest()
        low = int.from_bytes(digest[:8]) < test_fraction * 2**64
        (test if low else train).append(pair)
    return train, test
