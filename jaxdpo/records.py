"""JSON on disk that a kill cannot spoil: whole files, and logs of one record to a line.

Of several processes the first one writes; for the others, what would write does nothing.

A log is appended to as things happen. The last line of a log whose writer was killed may be
half a line; it is left out by whoever reads the log, and cut off by whoever goes on with it.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from jaxdpo import InputError, processes

Record = dict[str, Any]


def write_json(file: Path, value: Any) -> None:
    """Write a whole file or none: a reader never sees half of it."""
    _replace(file, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(file: Path) -> Record:
    """The object that a whole file holds; `InputError` that names the file where it is none."""
    value = _parsed(file.read_bytes())
    if value is None:
        raise InputError(f"{file}: does not hold a whole JSON object; restore it")
    return value


def read_log(file: Path) -> list[Record]:
    """The whole lines of a log, in order; none where there is no file.

    Raises `InputError` for a line, other than half a last one, that is no record.
    """
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    records = [_parsed(text) for text in lines]
    if None in records[:-1]:
        raise InputError(f"{file} line {records.index(None) + 1}: is no record; restore the line")
    return records if records[-1] else records[:-1]


def write_log(file: Path, records: Iterable[Record]) -> None:
    """Write a whole log or none."""
    _replace(file, "".join(line(record) for record in records))


def append_log(file: Path, records: Iterable[Record]) -> None:
    """Append all of the records; a kill leaves half a line at most."""
    text = "".join(map(line, records))
    if processes.is_first():
        with open(file, "a", encoding="utf-8") as log:
            log.write(text)


def cut_log(file: Path, keep: Callable[[Record], bool]) -> list[Record]:
    """Leave only the whole lines that `keep` says; returns them."""
    kept = [record for record in read_log(file) if keep(record)]
    write_log(file, kept)
    return kept


def line(record: Record) -> str:
    """A record as a line of a log.

    >>> line({"step": 3, "text": " naïve"})
    '{"step": 3, "text": " naïve"}\\n'
    """
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def differing(found: Record, wanted: Record, prefix: str = "") -> list[str]:
    """The keys whose values are not the same, in order; those of nested records with dots.

    >>> differing({"a": 1, "b": {"c": [2], "d": 3}}, {"b": {"c": [4], "d": 3}, "e": 5})
    ['a', 'b.c', 'e']
    """
    keys = []
    for key in sorted(found.keys() | wanted.keys()):
        sides = found.get(key), wanted.get(key)
        if all(isinstance(side, dict) for side in sides):
            keys += differing(*sides, f"{prefix}{key}.")
        elif key not in found or key not in wanted or json.dumps(sides[0]) != json.dumps(sides[1]):
            keys.append(prefix + key)
    return keys


def settings_file(file: Path) -> Path:
    """Where the settings stand that a file was made with."""
    return file.with_name(file.name + ".settings.json")


def check_known(file: Path) -> None:
    """Raise `InputError` for a file of which nothing says what made it: it is somebody else's."""
    if file.exists() and not settings_file(file).is_file():
        raise InputError(
            f"{file}: exists, and no {settings_file(file).name} says what made it; "
            "name another file, or move that one away"
        )


def check_same(file: Path, wanted: Record, *, but: Collection[str] = ("notes",)) -> None:
    """Raise `InputError`, naming the keys, for a file of other settings in all `but` some keys."""
    of = lambda settings: {key: value for key, value in settings.items() if key not in but}
    if differ := differing(of(read_json(settings_file(file))), of(wanted)):
        raise InputError(
            f"{file}: was made with other settings; these differ: {', '.join(differ)}. "
            "Name another file, or set them back"
        )


def _parsed(text: bytes) -> Record | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):  # the latter: objects in objects, without an end
        return None
    return record if isinstance(record, dict) else None


def _replace(file: Path, text: str) -> None:
    if not processes.is_first():
        return
    writing = file.with_name(file.name + ".writing")
    writing.write_text(text, encoding="utf-8")
    os.replace(writing, file)
