"""The reference policy as data: its token log-probabilities, computed once.

The reference never changes, so it is no part of the update: one forward pass over each data
set before training gives a flat float32 array with a number for each scored token, and its
parameters can go. The array is written as it is computed and memory-mapped when it is read. A
manifest beside it says what it was made from, how far it has come and what the bytes so far
add up to: one of something else, or spoilt, is refused by name, and one that was interrupted
is gone on with. Left out: whose parameters they are (`stages`).
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdpo import InputError
from jaxdpo.batching import Batch, Batches, prefetch, times_before
from jaxdpo.records import Record, differing, read_json, write_json

TokenLogps = Callable[[Batch], jax.Array]  # a batch -> [B, S]
Progress = Callable[[int, int], None]  # how many examples are done, and how many of them now

VERSION = 1  # part of every manifest: raise it when the numbers would differ
RECORD_SECONDS = 5.0  # what a kill can cost
# How far a token's log-probability may lie from the same weights' in a batch of another shape, in
# nats. Each of the 2 L sums of a residual stream rounds its numbers by 2^-9 of their size in
# bfloat16, by 2^-12 in float16; with L = 32 that moves a logit of size 20 by 20 * 8 * 2^-9 = 0.3,
# or 0.04, and the largest of thousands may be three times that (seen with L = 24: 0.1 in bfloat16,
# 7e-6 in float32). Accelerators multiply float32 in as many bits as float16 unless told otherwise.
# Another token's number is off by nats.
TOLERANCE = {"float32": 0.1, "bfloat16": 1.0, "float16": 0.1}


def fingerprint(params: Any) -> str:
    """A hash of every parameter's path, shape, dtype and bytes; the same on any mesh.

    >>> fingerprint({"a": jax.numpy.array([1.0, 2.0])})
    'c75fff69f5813ab9'
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} ".encode())
        host = jax.device_get(leaf.copy())  # an array would keep what it once gave to the host
        digest.update(host.reshape(-1).view("uint8"))
    return digest.hexdigest()[:16]


def reference_token_logps(
    token_logps: TokenLogps,
    batches: Batches,
    *,
    progress: Progress = lambda done, now: None,
) -> np.ndarray:
    """The log-probability of every scored token of a data set in nats, flat, float32.

    The result is in the order of `batches.store.scored_offsets`, whatever the order, layout and
    packing of the batches.
    """
    values = np.zeros(batches.store.scored_offsets[-1], np.float32)
    for done in _filled(values, token_logps, batches, 0):
        progress(done, done)
    return values


def kept(
    file: str | Path,
    manifest: Record,
    token_logps: TokenLogps,
    batches: Batches,
    *,
    progress: Progress = lambda done, now: None,
) -> np.ndarray:
    """`reference_token_logps` as a memory-mapped file, computed only as far as it is not there.

    `batches` are in the order of the file. Raises `InputError` naming each entry of `manifest`
    that differs from the one the file was begun with, and for a file that is spoilt.
    """
    file, store = Path(file), batches.store
    manifest = manifest | {"code": VERSION}
    done = _begun(file, manifest, store.scored_offsets)
    progress(done, 0)
    if done < len(store):
        told = lambda so_far: progress(so_far, so_far - done)
        _compute(file, manifest, token_logps, batches, done, told)
    values = np.load(file, mmap_mode="r")
    if not np.isfinite(values).all():
        raise InputError(
            f"{file}: some log-probabilities are not finite; look at the weights they are of, then "
            f"delete {file.parent}"
        )
    return values


def check(token_logps: TokenLogps, batches: Batches, *, dtype: str, seed: int) -> float:
    """How far the reference's weights are from its stored numbers, in nats of a token at most.

    On one batch, drawn by `seed`, in the shape in which it will be trained on; what rounding
    alone can do there. Raises `InputError` where it is more than rounding in `dtype` explains.
    """
    step = int(np.random.default_rng(seed).integers(len(batches)))
    batch = batches[step]
    again = jax.device_get(token_logps(batch))
    off = np.abs(again - batch.reference_token_logps)[batch.slots >= 0]
    largest = float(off.max())
    if not largest <= TOLERANCE[dtype]:
        raise InputError(
            f"the stored log-probabilities of the reference are off by {largest:.2g} nats a token "
            f"from what its weights say in batch {step}, where {dtype} allows {TOLERANCE[dtype]}"
        )
    return largest


def _begun(file: Path, manifest: Record, offsets: np.ndarray) -> int:
    """How many examples of the file are there; the file itself too, if only begun."""
    beside = file.with_suffix(".json")
    if not beside.exists():
        if file.exists():
            raise InputError(
                f"{file}: {beside.name}, which says what it was made from, is missing; delete "
                f"{file.parent} to have it computed again"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        _record(file, manifest, 0, hashlib.sha256())
    found = read_json(beside)
    if "manifest" not in found:
        raise InputError(
            f"{file}: {beside.name} is of an older version; delete {file.parent} to have it "
            "computed again"
        )
    if differ := differing(found["manifest"], manifest):
        raise InputError(
            f"{file}: these reference log-probabilities were made from another "
            f"{', '.join(differ)}; choose another --workdir, or set that back, or else delete "
            f"{file.parent}"
        )
    done = found["examples"]
    if done == 0:
        shape = (int(offsets[-1]),)
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    elif problem := _spoilt(file, found["checksum"], offsets, done):
        raise InputError(f"{file}: {problem}; delete {file.parent} to have it computed again")
    return done


def _spoilt(file: Path, checksum: str, offsets: np.ndarray, done: int) -> str | None:
    try:
        values = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        return f"is missing or cut short ({error})"
    if values.shape != (offsets[-1],) or values.dtype != np.float32:
        return f"holds {values.dtype} {list(values.shape)}, not float32 [{offsets[-1]}]"
    if hashlib.sha256(values[: offsets[done]]).hexdigest() != checksum:
        return "its bytes have changed since they were written"
    return None


def _compute(file, manifest, token_logps, batches, done, progress) -> None:
    """The rest of a file of which `done` examples are there."""
    offsets, values = batches.store.scored_offsets, np.load(file, mmap_mode="r+")
    first = done // batches.batch_size
    done = first * batches.batch_size
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
    values: np.ndarray, token_logps: TokenLogps, batches: Batches, first: int
) -> Iterator[int]:
    """Write the values of each batch from `first` on; yields how many examples are done."""
    offsets = batches.store.scored_offsets
    for step, batch in enumerate(prefetch(batches, first, len(batches)), first + 1):
        found = jax.device_get(token_logps(batch))
        row, place = np.nonzero(batch.slots >= 0)
        group = row * len(batch.examples) // len(batch.slots)
        example = batch.examples[group, batch.slots[row, place] // 2]
        # An example's scored tokens stand in their order, but others' may stand between.
        values[offsets[example] + times_before(example)] = found[row, place]
        yield min(step * batches.batch_size, len(batches.store))
