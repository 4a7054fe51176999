"""Stopping a run without loss: a signal asks, the loop answers at the end of a step.

SIGTERM is what a scheduler sends before it takes the machine away, SIGINT is Ctrl-C. The first one
lets the step end and be saved; a second one ends the process where it stands, which loses the
steps since the last checkpoint. A process whose step does not end at all writes down where each
of its threads stands, and ends. Outside the loop a signal ends the process at once, as ever: what
is done there is either on disk or done again.
"""

import faulthandler
import os
import signal
import sys
import threading

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run that was asked to stop and has saved what it did; the same command goes on."""


class Stop:
    """Listens to signals while it is entered; `hang_seconds` is how long a step may take (0: for
    ever)."""

    def __init__(self, hang_seconds: float | int = 0):
        self.asked = False
        self._hang_seconds = hang_seconds

    def alive(self) -> None:
        """Say that the loop goes on; unless it is said again in time, the process ends."""
        if self._hang_seconds:
            faulthandler.dump_traceback_later(self._hang_seconds, exit=True, file=sys.__stderr__)

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # others cannot be asked
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        else:
            self._before = {}
        self.alive()
        return self

    def __exit__(self, *_) -> None:
        if self._hang_seconds:
            faulthandler.cancel_dump_traceback_later()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _) -> None:
        if self.asked:
            os._exit(130)
        self.asked = True
        # Not through a console, which may be in the middle of a line.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: stopping once this step is saved; again: at once\n".encode())
