"""Stopping a run without loss: a signal asks, the loop answers at the end of a step.

SIGTERM is what a scheduler sends before it takes the machine away, SIGINT is Ctrl-C. The first one
lets the step end and be saved, the same step on every process, whichever of them was asked; a
second one ends the process where it stands, which loses the steps since the last checkpoint. A
process whose step does not end at all writes down where each of its threads stands, and ends.
Outside the loop a signal ends the process at once, as ever: what is done there is either on disk or
done again.
"""

import faulthandler
import itertools
import os
import signal
import sys
import threading
import time

import jax

from jaxdpo import processes

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_loops = itertools.count()  # every process enters the same loops in the same order


class Stopped(Exception):
    """A run that was asked to stop and has saved what it did; the same command goes on."""


class Stop:
    """Listens to signals while it is entered; `hang_seconds` is how long a step may take (0: for
    ever)."""

    def __init__(self, hang_seconds: float | int = 0):
        self._hang_seconds = hang_seconds
        self._asked = False
        self._step = 0  # the last one that was asked about
        self._last: int | None = None  # the one that all processes stop after
        self._agreeing, self._left = threading.Lock(), threading.Event()
        self._key = f"jaxdpo/stop/{next(_loops)}"

    def alive(self) -> None:
        """Say that the loop goes on; unless it is said again in time, the process ends."""
        if self._hang_seconds:
            faulthandler.dump_traceback_later(self._hang_seconds, exit=True, file=sys.__stderr__)

    def after(self, step: int) -> bool:
        """Whether to stop after this step; to be asked once at each, for it may change."""
        if not processes.several():
            return self._asked
        with self._agreeing:  # while the step to stop after is found, no process takes another
            self._step = step
            return step == self._last

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # others cannot be asked
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        else:
            self._before = {}
        if processes.several():
            self._listening = threading.Thread(target=self._listen, daemon=True)
            self._listening.start()
        self.alive()
        return self

    def __exit__(self, *_) -> None:
        if self._hang_seconds:
            faulthandler.cancel_dump_traceback_later()
        self._left.set()
        if processes.several():
            self._listening.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _) -> None:
        if self._asked:
            os._exit(130)
        self._asked = True
        # Not through a console, which may be in the middle of a line.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: stopping once this step is saved; again: at once\n".encode())

    def _listen(self) -> None:
        """Pass on that this process was asked; find, with the others, the step to stop after."""
        store = processes.store()
        while not (self._left.is_set() or processes.found(self._key)):
            if self._asked:
                store.key_value_set(self._key, "asked", allow_overwrite=True)
            time.sleep(processes.POLL)
        with self._agreeing:
            # One that has left the loop says so too: the others may still be in it.
            store.key_value_set(f"{self._key}/steps/{jax.process_index()}", str(self._step))
            while not self._left.is_set():
                steps = store.key_value_dir_get(f"{self._key}/steps")
                if len(steps) == jax.process_count():
                    self._last = 1 + max(int(step) for _, step in steps)
                    return
                time.sleep(processes.POLL / 10)
