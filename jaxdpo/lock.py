"""One run to a work directory: a second one, on this host or another, is refused by name.

On one host the kernel holds the lock and lets go of it when the process ends, however it ends.
Other hosts, to whom a network's file system may not pass that on, see a heartbeat: the file's
time, which a live run renews. A file whose heart has stopped is taken over.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from jaxdpo import InputError, processes

FILE = "run.lock"
BEAT = 15.0  # seconds between two renewals
DEAD = 8 * BEAT  # without one, so long, a run on another host is taken for dead


@contextlib.contextmanager
def locked(workdir: str | Path) -> Iterator[None]:
    """Hold a work directory for as long as the block runs.

    Raises `InputError` that names the host, the process and its beginning where another run
    holds it, and where nothing can be written. Of a run's processes the first one holds it.
    """
    if not processes.is_first():
        yield
        return
    file = Path(workdir) / FILE
    with _opened(file) as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(file, _holder(file)) from None
        holder, age = _holder(file), time.time() - file.stat().st_mtime
        if holder.get("host", socket.gethostname()) != socket.gethostname() and age < DEAD:
            raise _taken(file, holder, f", and was alive {max(age, 0):.0f} s ago")
        me = {"host": socket.gethostname(), "pid": os.getpid()}
        opened.truncate(0)
        opened.write(json.dumps(me | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        opened.flush()
        ended = threading.Event()
        beating = threading.Thread(target=_beat, args=(file, ended), daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            opened.truncate(0)


def _opened(file: Path) -> TextIO:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return open(file, "a+", encoding="utf-8")  # not emptied before it is known to be free
    except OSError as error:
        raise InputError(
            f"--workdir {file.parent}: cannot be written to ({error.strerror})"
        ) from error


def _beat(file: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):  # the next beat may find the disk again
            os.utime(file)


def _holder(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _taken(file: Path, holder: dict, more: str = "") -> InputError:
    who = (
        f"process {holder['pid']} on {holder['host']} has it since {holder['since']}"
        if {"pid", "host", "since"} <= holder.keys()
        else "another process has it"
    )
    return InputError(
        f"{file.parent}: is in use: {who}{more}; wait for it, stop it, or choose another --workdir"
    )
