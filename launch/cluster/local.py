"""Run one command as several processes of one JAX program, on this machine or on several.

    python launch/cluster/local.py --processes 2 -- python launch/train.py --config C --workdir W

Each process is told JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; where there are
several on a machine, the i-th gets its i-th GPU (JAX_LOCAL_DEVICE_IDS). On several machines, start
this on each, with --nodes, --node and --coordinator.

SIGTERM and SIGINT are passed on to every process; a terminal that closes counts as SIGTERM. When
one process fails, the others cannot go on: they get half a minute to say why, and are killed. Exit
status: 2 if a process ended with 2 (a mistake in what was given), else that of a failure, else 143
if they were stopped (the same command goes on), else 0.
"""

import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import time

STOPPED = 128 + signal.SIGTERM
MISTAKE = 2
LAST_WORDS = 30.0  # seconds: a process notices the loss of another in one, and prints a traceback


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True, help="on this machine; one per GPU")
    parser.add_argument("--nodes", type=int, default=1, help="how many machines run this")
    parser.add_argument("--node", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--coordinator", help="HOST:PORT of machine 0; a free port of this one")
    parser.add_argument("command", nargs="+", help="after --")
    given = parser.parse_args(words)
    if given.processes < 1 or not 0 <= given.node < given.nodes:
        parser.error("--processes is at least 1, and --node from 0 to --nodes - 1")
    if given.nodes > 1 and not given.coordinator:
        parser.error("--nodes above 1 needs --coordinator HOST:PORT, the same on every machine")
    given.coordinator = given.coordinator or f"127.0.0.1:{free_port()}"
    return given


def contract(given: argparse.Namespace, local: int) -> dict[str, str]:
    """What the `local`-th process of this machine finds in its environment."""
    told = {
        "JAX_COORDINATOR_ADDRESS": given.coordinator,
        "JAX_NUM_PROCESSES": str(given.nodes * given.processes),
        "JAX_PROCESS_ID": str(given.node * given.processes + local),
    }
    # Where there is one process, it has all the machine's GPUs.
    return told | ({"JAX_LOCAL_DEVICE_IDS": str(local)} if given.processes > 1 else {})


def start(given: argparse.Namespace) -> list[subprocess.Popen]:
    """All processes, each in a group of its own, so that Ctrl-C reaches it once: from here."""
    return [
        subprocess.Popen(given.command, env=os.environ | contract(given, local), process_group=0)
        for local in range(given.processes)
    ]


def status(process: subprocess.Popen) -> int | None:
    """As a shell has it: 128 + the signal's number for one that a signal ended."""
    ended = process.poll()
    return ended if ended is None or ended >= 0 else 128 - ended


def wait(processes: list[subprocess.Popen], signals: list[int]) -> list[int]:
    """The exit statuses, once all have ended; `signals` grows while this waits."""
    deadline = math.inf
    while running := [process for process in processes if status(process) is None]:
        while signals:
            number = signals.pop(0)
            for process in running:
                process.send_signal(number)
        # One that SIGTERM found before it could listen has stopped, but told nobody.
        if any(process.returncode not in (None, 0, STOPPED) for process in processes):
            deadline = min(deadline, time.monotonic() + LAST_WORDS)
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(0.05)
    return [status(process) for process in processes]


def verdict(statuses: list[int]) -> int:
    if MISTAKE in statuses:
        return MISTAKE
    # The smallest: a process that failed by itself ends with 1, one killed for it with 137.
    return min((s for s in statuses if s not in (0, STOPPED)), default=max(statuses))


def main() -> None:
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))
    signal.signal(signal.SIGHUP, lambda number, frame: signals.append(signal.SIGTERM))
    given = arguments(sys.argv[1:])
    try:
        processes = start(given)
    except OSError as error:
        print(f"error: {given.command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(MISTAKE)
    sys.exit(verdict(wait(processes, signals)))


if __name__ == "__main__":
    main()
