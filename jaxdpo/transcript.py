"""Completions in a file: a line a prompt, written as prompts finish, gone on with after a kill.

Beside the file stands what made it, `FILE.settings.json`; a file that was made otherwise is
not touched. A prompt's line does not depend on the others, so a file that was finished in
pieces says what one finished at once says, up to rounding: where two tokens are as good as
equal (as they often are in bfloat16), prompts decoded beside others may take the other one.
"""

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from jaxdpo import InputError, processes
from jaxdpo.completions import Decoder, completions, settings
from jaxdpo.metrics import ProgressLine, console
from jaxdpo.prompts import Prompt, tail
from jaxdpo.records import (
    Record,
    check_known,
    check_same,
    line,
    read_log,
    settings_file,
    write_json,
    write_log,
)

ROWS = 20  # of the table


def check(out: str | Path | None) -> None:
    """Raise `InputError` for a file that is another's, or cannot be written; makes its folder.

    It wants no model: whoever loads one calls this first.
    """
    if out is None:
        return
    file = Path(out)
    if not file.name:
        raise InputError(f"out={str(out)!r}: names no file")
    try:
        check_known(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise InputError(f"{file}: cannot be written to ({error.strerror})") from error


def decode(
    ready: Decoder, prompts: Sequence[Prompt], *, out: str | Path | None, label: str = "decoded"
) -> list[Record]:
    """The completions of all prompts, in `out` (None: in no file) as they finish.

    A record has the `index` of a prompt, its text as `prompt` (or `prompts`, one for each
    model) and its `completions`; see `completions.completions`. Progress is shown as that of the
    `label`. Raises `InputError`, before anything is written, where `out` is a file of something
    else or of other settings, or a prompt cannot be decoded.
    """
    file = None if out is None else Path(out)
    made_by = settings(ready, prompts)
    there: list[Record] = []
    if file is not None and processes.is_first():
        there = _there(file, made_by)
    done = set(processes.from_first(lambda: [record["index"] for record in there]))
    left = [index for index in range(len(prompts)) if index not in done]
    found = completions(ready, [prompts[index] for index in left], numbers=left)
    if not left:
        console.print(f"{file}: holds the completions of all {len(prompts)} prompts already")
    elif file is not None:
        if not there:
            write_json(settings_file(file), made_by)
        write_log(file, there)  # without half a line that a killed writer left
    with ProgressLine(label, len(prompts), start=len(done), unit="prompts") as progress:
        records = there + _written(found, prompts, left, file, progress)
    ordered = sorted(records, key=lambda record: record["index"])
    if file is not None and ordered != records:
        write_log(file, ordered)
    return ordered


def table(records: Sequence[Record]) -> Table:
    """The first completions for people: the end of each prompt, what was said, its numbers."""
    columns = {"score": "score", "logps": "logps", "length": "length", "ended": "ended"}
    said = [(record, one) for record in records for one in record["completions"]]
    if said and "implicit_reward" in said[0][1]:
        columns["implicit_reward"] = "reward"
    shown = Table("prompt", "completion")
    for name in columns.values():
        shown.add_column(name, justify="right", no_wrap=True)
    before = None
    for record, one in said[:ROWS]:
        if record is not before and before is not None:
            shown.add_section()
        prompt = record.get("prompt") or record["prompts"][0]
        prompt = "" if record is before else tail(prompt)
        shown.add_row(Text(prompt), Text(one["text"]), *(_cell(one[name]) for name in columns))
        before = record
    if len(said) > ROWS:
        shown.caption = f"the first {ROWS} of {len(said)} completions"
    return shown


def _written(
    found: Iterable[tuple[int, list[Record]]],
    prompts: Sequence[Prompt],
    left: list[int],
    file: Path | None,
    progress: ProgressLine,
) -> list[Record]:
    """The records of what is found for the prompts that are left, each appended at once."""
    records, done = [], len(prompts) - len(left)
    to = file if file and processes.is_first() else os.devnull
    with open(to, "a", encoding="utf-8") as log:
        for place, said in found:
            texts = prompts[left[place]].texts
            prompt = {"prompt": texts[0]} if len(texts) == 1 else {"prompts": list(texts)}
            records.append({"index": left[place]} | prompt | {"completions": said})
            log.write(line(records[-1]))
            log.flush()
            progress.update(done + len(records), seen=len(records))
    return records


def _there(file: Path, wanted: Record) -> list[Record]:
    """The records that the file holds already, each of another of the wanted prompts."""
    check(file)
    records = read_log(file)
    if not records:  # an attempt that came to nothing binds nobody
        return []
    check_same(file, wanted)
    left = set(range(wanted["prompts"]["number"]))
    for number, record in enumerate(records, 1):
        index = record.get("index")
        if type(index) is not int or index not in left:
            raise InputError(
                f"{file} line {number}: index {index} is of no prompt, or stands there before; "
                "delete the line"
            )
        left.remove(index)
    return records


def _cell(value: float | int | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
