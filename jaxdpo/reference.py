"""The reference policy as data: its token log-probabilities, computed once.

The reference never changes, so it is no part of the update: one forward pass over each data
set before training gives a flat float32 array with a number for each scored token, and its
parameters can go. The array is written as it is computed and memory-mapped when it is read. A
manifest beside it says what it was made from, how far it has come and what the bytes so far
add up to: one of something else, or spoilt, is refused by name, and one that was interrupted
is gone on with. Left out: whose parameters they are (`stages`).
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxdpo import InputError, processes, sharding
from jaxdpo.batching import Batch, Batches, prefetch, times_before
from jaxdpo.records import Record, differing, read_json, write_json
from jaxdpo.tokens import TokenStore
from jaxdpo.train import one_ahead

TokenLogps = Callable[[Batch], jax.Array]  # a batch -> [B, S], of the same rows or of all
Progress = Callable[[int, int], None]  # how many examples are done, and how many of them now

VERSION = 2  # part of every manifest: raise it when the numbers would differ
RECORD_SECONDS = 5.0  # what a kill can cost
# How far a token's log-probability may lie from the same weights' in a batch of another shape, in
# nats. Each of the 2 L sums of a residual stream rounds its numbers by 2^-9 of their size in
# bfloat16, by 2^-12 in float16; with L = 32 that moves a logit of size 20 by 20 * 8 * 2^-9 = 0.3,
# or 0.04, and the largest of thousands may be three times that (seen with L = 24: 0.1 in bfloat16,
# 7e-6 in float32). Accelerators multiply float32 in as many bits as float16 unless told otherwise;
# a CPU does not. Another token's number is off by nats, or by less where a model knows little.
TOLERANCE = {"float32": 0.1, "bfloat16": 1.0, "float16": 0.1}
TOLERANCE_OF_A_CPU = TOLERANCE | {"float32": 1e-3}


def reference_token_logps(
    token_logps: TokenLogps,
    batches: Batches,
    *,
    progress: Progress = lambda done, now: None,
) -> np.ndarray:
    """The log-probability of every scored token of a data set in nats, flat, float32.

    The result is in the order of `batches.store.scored_offsets`, whatever the layout and packing
    of the batches. Raises `ValueError` unless they hold every example once, in that order.
    """
    values = np.zeros(batches.store.scored_offsets[-1], np.float32)
    for done in _filled(values, token_logps, batches, 0):
        progress(done, done)
    return values


def begun(file: str | Path, manifest: Record, store: TokenStore) -> int:
    """How many of the store's examples a file of `kept` has; at 0 there is room for all of them.

    Raises `InputError` naming each entry of `manifest` that differs from the one the file was
    begun with, for a file that is spoilt, and where there is no room.
    """
    return processes.from_first(lambda: _begun(Path(file), manifest | {"code": VERSION}, store))


def _begun(file: Path, manifest: Record, store: TokenStore) -> int:
    done, beside = 0, file.with_suffix(".json")
    if beside.exists():
        done = _done(file, manifest, store)
    elif file.exists():
        raise InputError(
            f"{file}: {beside.name}, which says what it was made from, is missing; delete "
            f"{file.name} to have it computed again"
        )
    if done == 0:
        _make_room(file, manifest, int(store.scored_offsets[-1]))
    return done


def kept(
    file: str | Path,
    manifest: Record,
    token_logps: TokenLogps,
    batches: Batches,
    *,
    progress: Progress = lambda done, now: None,
) -> np.ndarray:
    """`reference_token_logps` as a memory-mapped file, computed only as far as it is not there.

    All processes must call; the first one writes the file, which all of them see. Raises
    `ValueError` and `InputError` as that and `begun` do, and `InputError` for numbers that are not
    finite.
    """
    file, store = Path(file), batches.store
    done = begun(file, manifest, store)
    progress(done, 0)
    if done < len(store):
        told = lambda so_far: progress(so_far, so_far - done)
        _compute(file, manifest | {"code": VERSION}, token_logps, batches, done, told)
    processes.from_first(lambda: done)  # the file is whole
    values = np.load(file, mmap_mode="r")
    if not np.isfinite(values).all():
        raise InputError(
            f"{file}: some log-probabilities are not finite; look at the weights they are of, then "
            f"{_again(file)}"
        )
    return values


def drawn(batches: Batches, *, seed: int | Sequence[int], micro_batches: int = 1) -> Batch:
    """A batch to `check`, drawn by `seed`: of its rows as many as training runs at a time."""
    batch = batches[int(np.random.default_rng(seed).integers(len(batches)))]
    # The first rows: in the last batch of all, others may hold nothing.
    return jax.tree.map(lambda rows: rows[: len(rows) // micro_batches], batch)


def check(token_logps: TokenLogps, batch: Batch, *, dtype: str, platform: str) -> float:
    """How far the reference's weights are from its stored numbers, in nats of a token at most.

    In a batch of the shape that training runs: what rounding alone can do there. Raises
    `InputError` where it is more than rounding in `dtype` explains on a `platform` such as "cpu".
    """
    allowed = (TOLERANCE_OF_A_CPU if platform == "cpu" else TOLERANCE)[dtype]
    off = np.abs(sharding.own_rows(token_logps(batch)) - batch.reference_token_logps)
    mine = off.max(where=batch.slots >= 0, initial=0, keepdims=True)
    largest = float(processes.of_each(mine).max())
    if not largest <= allowed:
        raise InputError(
            f"the stored log-probabilities of the reference are off by {largest:.2g} nats a token "
            f"from what its weights say, where {dtype} allows {allowed}"
        )
    return largest


def _done(file: Path, manifest: Record, store: TokenStore) -> int:
    """What `begun` says of a file that is there."""
    beside = file.with_suffix(".json")
    try:
        found = read_json(beside)
    except InputError as error:
        raise InputError(f"{error}, or {_again(file)}") from error
    if "manifest" not in found:
        raise InputError(f"{file}: {beside.name} is of an older version; {_again(file)}")
    if differ := differing(found["manifest"], manifest):
        raise InputError(
            f"{file}: these reference log-probabilities were made from another "
            f"{', '.join(differ)}; choose another --workdir, or set that back, or else delete "
            f"{file.parent}"
        )
    if problem := _spoilt(file, found, store.scored_offsets):
        raise InputError(f"{file}: {problem}; {_again(file)}")
    return found["examples"]


def _again(file: Path) -> str:
    return f"delete {file.name} and {file.stem}.json there to have them computed again"


def _make_room(file: Path, manifest: Record, size: int) -> None:
    """Begin a file of so many numbers; a disk that is full must say so now.

    Where a page of a file has no block on the disk, writing to it through memory kills the process.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _record(file, manifest, 0, hashlib.sha256())
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(size,))
        with open(file, "r+b") as stream:
            if hasattr(os, "posix_fallocate"):  # not on a Mac
                os.posix_fallocate(stream.fileno(), 0, os.path.getsize(file))
    except OSError as error:
        raise InputError(
            f"{file}: {4 * size / 2**20:.1f} MiB of log-probabilities cannot be written there "
            f"({error.strerror or error}); make room, or choose another --workdir"
        ) from error


def _spoilt(file: Path, found: Record, offsets: np.ndarray) -> str | None:
    done, count = found.get("examples"), len(offsets) - 1
    if not isinstance(done, int) or not 0 <= done <= count:
        return f"{file.stem}.json is spoilt: it says that {done} of {count} examples are done"
    if done == 0:  # it is begun anew, whatever it holds
        return None
    try:
        values = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        return f"is missing or cut short ({error})"
    if values.shape != (offsets[-1],) or values.dtype != np.float32:
        return f"holds {values.dtype} {list(values.shape)}, not float32 [{offsets[-1]}]"
    if hashlib.sha256(values[: offsets[done]]).hexdigest() != found.get("checksum"):
        return "its bytes have changed since they were written"
    return None


def _compute(file, manifest, token_logps, batches, done, progress) -> None:
    """The rest of a file of which `done` examples are there."""
    offsets, first = batches.store.scored_offsets, done // batches.batch_size
    if not processes.is_first():
        for now in _filled(None, token_logps, batches, first):
            progress(now)
        return
    values, done = np.load(file, mmap_mode="r+"), first * batches.batch_size
    digest = hashlib.sha256(values[: offsets[done]])
    recorded = time.monotonic()
    try:
        for now in _filled(values, token_logps, batches, first):
            longer = digest.copy()
            longer.update(values[offsets[done] : offsets[now]])
            done, digest = now, longer
            if time.monotonic() - recorded > RECORD_SECONDS:
                values.flush()
                _record(file, manifest, done, digest)
                recorded = time.monotonic()
            progress(done)
    finally:  # also when interrupted: what is done is done
        values.flush()
        _record(file, manifest, done, digest)


def _record(file: Path, manifest: Record, examples: int, digest) -> None:
    """Say how far the file has come, after its bytes are on disk."""
    record = {"manifest": manifest, "examples": examples, "checksum": digest.hexdigest()}
    write_json(file.with_suffix(".json"), record)


def _filled(
    values: np.ndarray | None, token_logps: TokenLogps, batches: Batches, first: int
) -> Iterator[int]:
    """Write the values of each batch from `first` on (None: only help computing them).

    Yields how many examples are done.
    """
    count = len(batches.store)
    order = np.concatenate([batches.indices(step) for step in range(len(batches))])
    if not np.array_equal(order[order >= 0], np.arange(count)):
        raise ValueError("the batches must hold every example of the store once, in its order")
    ahead = prefetch(batches, first, len(batches))
    results = one_ahead((batch, token_logps(batch)) for batch in ahead)
    for step, (batch, found) in enumerate(results, first + 1):
        places = processes.of_each(_places(batch, batches.store))
        found = processes.of_each(sharding.own_rows(found))
        if values is not None:
            values[places[places >= 0]] = found[places >= 0]
        yield min(step * batches.batch_size, count)


def place(values: np.ndarray, found: np.ndarray, batch: Batch, store: TokenStore) -> None:
    """Write what was found at a batch's scored positions, [B, S], to where `values`, flat as
    `store.scored_offsets` say, has them."""
    places = _places(batch, store)
    values[places[places >= 0]] = found[places >= 0]


def _places(batch: Batch, store: TokenStore) -> np.ndarray:
    """The place of each scored token in a flat array, [B, S]; -1 where none is."""
    row, at = np.nonzero(batch.slots >= 0)
    group = row * len(batch.examples) // len(batch.slots)
    example = batch.examples[group, batch.slots[row, at] // 2]
    places = np.full(batch.slots.shape, -1)
    # An example's scored tokens stand in their order, but others' may stand between.
    places[row, at] = store.scored_offsets[example] + times_before(example)
    return places
