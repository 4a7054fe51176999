"""Two runs never share a work directory; one that is gone leaves it free."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxdpo import InputError, lock
from jaxdpo.lock import locked

HOLD = """
import sys, time
from jaxdpo.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_by_name_and_a_killed_one_is_not_waited_for(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"is in use: process {holder.pid} on \S+ has it since"):
        with locked(tmp_path):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / lock.FILE).read_text()  # it had no time to clear it
    with locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_within_one_process_too(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} on"):
        with locked(tmp_path):
            pass


@pytest.mark.parametrize("age, free", [(5, False), (lock.DEAD + 5, True)])
def test_a_run_on_another_host_is_known_by_its_heart(tmp_path, age, free):
    file = tmp_path / lock.FILE
    file.write_text('{"host": "elsewhere", "pid": 7, "since": "noon"}')
    os.utime(file, (time.time() - age,) * 2)
    if free:
        with locked(tmp_path):
            assert "elsewhere" not in file.read_text()
    else:
        with pytest.raises(InputError, match="process 7 on elsewhere .* alive 5 s ago"):
            with locked(tmp_path):
                pass
        assert "elsewhere" in file.read_text()


def test_the_heart_beats_while_the_block_runs_and_stops_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    file = tmp_path / lock.FILE
    with locked(tmp_path):
        os.utime(file, (0, 0))
        for _ in range(500):
            time.sleep(0.01)
            if file.stat().st_mtime:
                break
        assert file.stat().st_mtime
    os.utime(file, (0, 0))
    time.sleep(0.05)
    assert file.stat().st_mtime == 0


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": "elsewhere"'])
def test_half_a_file_holds_nobody(tmp_path, content):
    file = tmp_path / lock.FILE
    file.write_text(content)
    with locked(tmp_path):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.read_text()
