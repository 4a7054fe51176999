"""A signal ends a run once a step is saved; a second one, or a step that hangs, at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jaxdpo.stopping import Stop

HANGS = """
import time
from jaxdpo.stopping import Stop

def a_step_that_never_ends():
    time.sleep(60)

with Stop(0.3) as stop:
    for _ in range(4):  # longer than a step may take, but each step says that it lives
        time.sleep(0.15)
        stop.alive()
    print("alive", flush=True)
    a_step_that_never_ends()
"""
LISTENS = """
import time
from jaxdpo.stopping import Stop
with Stop() as stop:
    print("listening", flush=True)
    while not stop.after(1):
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


def started(script):
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_step_that_hangs_says_where_and_ends_the_process():
    process = started(HANGS)
    out, err = process.communicate(timeout=50)
    assert (process.returncode, out) == (1, "alive\n")
    assert "Timeout" in err and "a_step_that_never_ends" in err


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_ends_at_once(first):
    process = started(LISTENS)
    assert process.stdout.readline() == "listening\n"
    process.send_signal(first)
    assert process.stdout.readline() == "asked\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=50)
    assert process.returncode == 130 and time.monotonic() - began < 10
    assert f"{first.name}: stopping once this step is saved" in err


def test_outside_the_loop_signals_are_what_they_were():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.after(1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
