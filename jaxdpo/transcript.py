"""Completions in a file: a line a prompt, written as prompts finish, gone on with after a kill.

Beside the file stands what made it, `FILE.settings.json`; a file that was made otherwise is
not touched. A prompt's line does not depend on the others, so a file that was finished in
pieces says what one finished at once says.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from jaxdpo import InputError
from jaxdpo.completions import Decoder, Request, completions, decoder, settings
from jaxdpo.metrics import ProgressLine, console
from jaxdpo.prompts import Prompt
from jaxdpo.records import Record, differing, line, read_log, write_json, write_log

ROWS = 20  # of the table
TAIL = 48  # characters of a prompt


def decode(
    request: Request, prompts: Sequence[Prompt], *, out: str | Path | None, batch_size: int = 8
) -> list[Record]:
    """The completions of all prompts, in `out` (None: in no file) as they finish.

    A record has the `index` of a prompt, its text as `prompt` (or `prompts`, one for each
    model) and its `completions`; see `completions.completions`. Raises `InputError` where
    `out` is a file of something else, or was made with other settings.
    """
    file = None if out is None else Path(out)
    if file is not None:
        _refuse_foreign(file)  # before a model is loaded
    ready = decoder(request, batch_size=batch_size)
    records = [] if file is None else _begun(file, settings(ready, prompts))
    if len(records) == len(prompts):
        console.print(f"{file}: holds the completions of all {len(prompts)} prompts already")
    else:
        records += _written(ready, prompts, records, file)
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
        prompt = "" if record is before else _tail(record)
        shown.add_row(Text(prompt), Text(one["text"]), *(_cell(one[name]) for name in columns))
        before = record
    if len(said) > ROWS:
        shown.caption = f"the first {ROWS} of {len(said)} completions"
    return shown


def _written(
    ready: Decoder, prompts: Sequence[Prompt], there: list[Record], file: Path | None
) -> list[Record]:
    """The records that are not there yet, each appended to the file once it is done."""
    done = {record["index"] for record in there}
    left = [index for index in range(len(prompts)) if index not in done]
    asked, records = [prompts[index] for index in left], []
    if file is not None:
        write_log(file, there)  # without half a line that a killed writer left
    with (
        open(file or os.devnull, "a", encoding="utf-8") as log,
        ProgressLine("decoded", len(prompts), start=len(done), unit="prompts") as progress,
    ):
        for place, found in completions(ready, asked, numbers=left):
            texts = asked[place].texts
            prompt = {"prompt": texts[0]} if len(texts) == 1 else {"prompts": list(texts)}
            records.append({"index": left[place]} | prompt | {"completions": found})
            log.write(line(records[-1]))
            log.flush()
            progress.update(len(done) + len(records), seen=len(records))
    return records


def _sidecar(file: Path) -> Path:
    return file.with_name(file.name + ".settings.json")


def _refuse_foreign(file: Path) -> None:
    if file.exists() and not _sidecar(file).is_file():
        raise InputError(
            f"{file}: exists, and no {_sidecar(file).name} says what made it; "
            "name another file, or move that one away"
        )


def _begun(file: Path, wanted: Record) -> list[Record]:
    """The whole lines that the file holds already; the file is this request's from here on."""
    wanted = json.loads(json.dumps(wanted))
    if file.exists():
        differ = differing(json.loads(_sidecar(file).read_text()), wanted)
        if differ:
            raise InputError(
                f"{file}: was made with other settings; these differ: {', '.join(differ)}. "
                "Name another file, or set them back"
            )
        return read_log(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(_sidecar(file), wanted)
    except OSError as error:
        raise InputError(f"{file}: cannot be written to ({error.strerror})") from error
    return []


def _tail(record: Record) -> str:
    prompt = record.get("prompt") or record["prompts"][0]
    tail = prompt if len(prompt) <= TAIL else f"…{prompt[-TAIL:]}"
    return tail.replace("\n", "⏎")


def _cell(value: float | int | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
