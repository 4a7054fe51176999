"""Several processes, one run: what they are told, what they agree on, and how they end together.

Every process runs the same program over its share of one mesh. The first one alone writes what
people read; where that decides what the others do, it tells them. None outlives another: what
raises on one ends all within seconds, where they would wait for it for ever. Messages go through
the store that JAX's coordinator keeps, so waiting for one takes no device. Left out: which rows are
whose (`sharding.row_parts`), and stopping at the same step (`stopping`).
"""

import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdpo import InputError

T = TypeVar("T")

TOLD = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HEARTBEAT = 60  # seconds without a sign of life after which JAX ends what is left
POLL = 0.5  # seconds between two looks at whether another process has failed
LAST_WORDS = 4 * POLL
_END = "jaxdpo/end"
_ending = threading.Lock()
_over = threading.Event()
_listening: list[threading.Thread] = []
_values = itertools.count()  # every process asks for the same values in the same order


def begin() -> None:
    """Meet the other processes, if there are any; to be called before JAX looks for devices.

    They are those of JAX_COORDINATOR_ADDRESS (HOST:PORT of the first), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID (from 0), or else of the Slurm step, Open MPI job or TPU slice that this one is
    part of. Raises `InputError` where the three are incomplete or wrong.
    """
    told = [os.environ.get(name) for name in TOLD]
    if any(told):
        _begin_as_told(told)
    elif _is_part_of_a_job():
        _initialize()
    if several():
        _listening.append(threading.Thread(target=_listen, daemon=True))
        _listening[0].start()


def several() -> bool:
    """Whether this is one of several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return not several() or jax.process_index() == 0


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on the first process, which alone calls it, on all: JSON values.

    As the first calls it alone, `make` must not ask all processes for anything itself.

    >>> from_first(lambda: [1, "a"])
    [1, 'a']
    """
    if not several():
        return make()
    key = f"jaxdpo/value/{next(_values)}"
    if is_first():
        store().key_value_set(key, json.dumps(make()))
    return json.loads(_awaited(key))


def first_then_others(make: Callable[[], T]) -> T:
    """What `make` returns here; the others call it once the first has left on disk what it reads.

    >>> first_then_others(lambda: 3)
    3
    """
    made = make() if is_first() else None
    from_first(lambda: None)
    return made if is_first() else make()


def of_each(numbers: np.ndarray) -> np.ndarray:
    """The numbers of every process, one process to a row. All processes must call."""
    if not several():
        return numbers[None]
    # As bytes: JAX would make 32 bits of each number.
    found = multihost_utils.process_allgather(np.frombuffer(numbers.tobytes(), np.uint8))
    return np.frombuffer(np.asarray(found).tobytes(), numbers.dtype).reshape(-1, *numbers.shape)


def finish() -> None:
    """Wait until every process has come to its end: one that leaves early hears of no failure."""
    if several():
        store().wait_at_barrier("jaxdpo/finish", 24 * 3600 * 1000)
        # A thread that comes back from JAX to an interpreter that is ending aborts the process.
        _over.set()
        for thread in _listening:
            thread.join()


def end_all(status: int, said: str) -> None:
    """End every process with this status, now; each says which one failed, and with what words."""
    if not is_first():  # which may be about to say the same
        time.sleep(POLL)
    if not found(_END):
        me = {"process": jax.process_index(), "host": socket.gethostname()}
        try:
            store().key_value_set(_END, json.dumps(me | {"status": status, "said": said}))
        except jax.errors.JaxRuntimeError:
            if not found(_END):  # the store is gone, or else another one was quicker
                print(said, file=sys.stderr)
                _exit(status)
    _end()


def store() -> Any:
    """What the processes tell each other: strings by key, of JAX's coordination service."""
    from jax._src import distributed  # Orbax reaches it there too: JAX shows it nowhere else

    return distributed.global_state.client


def found(key: str) -> str | None:
    """The value of a key in the store, or None while there is none."""
    try:
        return store().key_value_try_get(key)
    except jax.errors.JaxRuntimeError:
        return None


def _begin_as_told(told: list[str | None]) -> None:
    if missing := [name for name, value in zip(TOLD, told, strict=True) if not value]:
        raise InputError(
            f"environment: {', '.join(missing)} is not set, which {' and '.join(TOLD)} need; set "
            "all three, or none"
        )
    address, *numbers = told
    try:
        count, index = map(int, numbers)
    except ValueError:
        count, index = 0, 0
    if not 0 <= index < count:
        raise InputError(
            f"environment: JAX_NUM_PROCESSES={numbers[0]} and JAX_PROCESS_ID={numbers[1]} must be "
            "numbers, the latter from 0 and less than the former"
        )
    if ":" not in address:
        raise InputError(f"environment: JAX_COORDINATOR_ADDRESS={address} is not HOST:PORT")
    if count > 1:
        _initialize(address, count, index)


def _is_part_of_a_job() -> bool:
    """Whether a scheduler says so in a way that JAX reads."""
    counts = [os.environ.get("OMPI_COMM_WORLD_SIZE")]
    if "SLURM_STEP_NODELIST" in os.environ:  # not so in a shell that srun has not started
        counts.append(os.environ.get("SLURM_NTASKS"))
    several = any(count not in (None, "1") for count in counts)
    return several or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def _initialize(*told: Any) -> None:
    try:
        jax.distributed.initialize(*told, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"environment: this process cannot meet the others ({error}); look at "
            f"{', '.join(TOLD)} and whether all of them have been started"
        ) from error
    # JAX has begun to listen to SIGTERM, for a service that nobody uses here: it would be lost.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _awaited(key: str) -> str:
    while True:
        try:
            return store().blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _listen() -> None:
    """End this process when another one says that it has failed."""
    while not _over.wait(POLL):
        if found(_END):
            _end()


def _end() -> None:
    """End this process as the one that failed first has said."""
    _ending.acquire()  # never released: one thread ends the process, any other waits for that
    failed = json.loads(found(_END))
    who = f"process {failed['process']} on {failed['host']}: " if failed["process"] else ""
    if is_first() or failed["process"]:  # what the first says needs no other to repeat it
        print(f"{who}{failed['said']}", file=sys.stderr)
    if is_first():  # with which the store ends: the others must have read it
        time.sleep(LAST_WORDS)
    _exit(failed["status"])


def _exit(status: int) -> None:
    """Without the wait for the others that an orderly end begins with."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
