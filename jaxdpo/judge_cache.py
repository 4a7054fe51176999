"""All that a judge was asked and answered, in a file: nothing that was paid for is asked again.

A line for each request, appended as its answer comes; beside the file stands what decides the
answers, `FILE.settings.json`. Left out: what an answer means (`judge_server`).
"""

import fcntl
import math
import tempfile
import threading
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TextIO

from jaxdpo import InputError
from jaxdpo.records import (
    Record,
    check_known,
    check_same,
    line,
    read_json,
    read_log,
    settings_file,
    write_json,
)


class Answer(NamedTuple):
    """A request and its answer: a line of the file.

    `key` is the question's, `attempt` counts from 1, `prompt` is the text that was sent; tokens are
    None where the server did not count them.
    """

    key: str
    attempt: int
    prompt: str
    reply: str
    finish_reason: str
    model: str
    input_tokens: int | None
    output_tokens: int | None
    seconds: float

    @property
    def tokens(self) -> tuple[int, int]:
        """Input and output tokens, or four characters to a token where nobody counted."""
        given, taken = self.input_tokens, self.output_tokens
        return (
            math.ceil(len(self.prompt) / 4) if given is None else given,
            math.ceil(len(self.reply) / 4) if taken is None else taken,
        )


class JudgeCache:
    """The answers in a file; used as a context manager, in which the file is this one's alone.

    `settings` decide the answers, `notes` do not. Raises `InputError`, before the file is touched,
    where it is something else, was made with other settings, cannot be written, holds a line
    that is no answer, or is in use.
    """

    def __init__(self, file: str | Path, settings: Record, notes: Record):
        self.file, self._settings, self._notes = Path(file), settings, notes
        self._lock = threading.Lock()
        if not self.file.name:
            raise InputError(f"cache={str(file)!r}: names no file")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.file.parent).close()
            self._read()
        except OSError as error:
            raise self._unwritable(error) from error

    @property
    def notes(self) -> Record:
        """Those of whoever began the file."""
        notes = read_json(settings_file(self.file)).get("notes")
        return notes if isinstance(notes, dict) else {}

    def __enter__(self) -> "JudgeCache":
        try:
            with ExitStack() as opened:
                self._log = opened.enter_context(open(self.file, "a", encoding="utf-8"))
                fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._found = self._read()
                self._end_line(self._log)
                if not self._found:
                    write_json(settings_file(self.file), self._settings | {"notes": self._notes})
                opened.pop_all()
        except BlockingIOError as error:
            raise InputError(
                f"{self.file}: another process adds to it; wait for it, or name another file"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def __exit__(self, *_) -> None:
        self._log.close()

    def answers(self, key: str) -> list[Answer]:
        """All answers to a question, attempt 1 first."""
        return self._found.get(key, [])

    def add(self, answer: Answer) -> None:
        """Append an answer; a kill from here on cannot lose it."""
        with self._lock:
            try:
                self._log.write(line(answer._asdict()))
                self._log.flush()
            except OSError as error:
                raise self._unwritable(error) from error
            self._found.setdefault(answer.key, []).append(answer)

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"{self.file}: cannot be written to ({error.strerror})")

    def _read(self) -> dict[str, list[Answer]]:
        """The answers that are there, by question, once they are known to be of these settings."""
        records = read_log(self.file)
        if self.file.exists() and self.file.stat().st_size:
            check_known(self.file)
        if not records:  # an attempt that came to nothing binds nobody
            return {}
        check_same(self.file, self._settings)
        found: dict[str, list[Answer]] = defaultdict(list)
        for number, record in enumerate(records, 1):
            answer = _answer(record, f"{self.file} line {number}")
            if answer.attempt != len(found[answer.key]) + 1:
                raise InputError(
                    f"{self.file} line {number}: attempt {answer.attempt} at its question does not "
                    f"come after {len(found[answer.key])}; restore the line"
                )
            found[answer.key].append(answer)
        return dict(found)

    def _end_line(self, log: TextIO) -> None:
        """Cut off half a line that a killed writer left; a whole one lacks only its end."""
        text = self.file.read_bytes()
        whole = text.rfind(b"\n") + 1
        if len(read_log(self.file)) > text.count(b"\n"):
            log.write("\n")
            log.flush()
        else:
            log.truncate(whole)


def _answer(record: Record, place: str) -> Answer:
    """A line's answer; `InputError` for fields that are missing, unknown or of another type."""
    if differ := sorted(record.keys() ^ set(Answer._fields)):
        raise InputError(f"{place}: is no answer: look at {', '.join(differ)}; restore the line")
    answer = Answer(**record)
    for name, value in record.items():
        kind = Answer.__annotations__[name]
        good = isinstance(value, kind) and not isinstance(value, bool)
        if not good or (isinstance(value, int | float) and not value >= 0):
            raise InputError(f"{place}: {name} cannot be {value!r}; restore the line")
    return answer
