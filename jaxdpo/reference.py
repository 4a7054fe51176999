"""The reference policy as data: its token log-probabilities, computed once.

The reference never changes, so it is no part of the update: one forward pass over each
data set before training gives a flat float32 array with a number for each scored token,
and its parameters can go. The array is kept beside the run with a manifest of what made
it; one that was made from something else is refused by name.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdpo import InputError
from jaxdpo.batching import Batch, Batches, prefetch
from jaxdpo.tokens import TokenStore


def reference_token_logps(
    token_logps: Callable[[Batch], jax.Array],
    store: TokenStore,
    *,
    batch_size: int,
    num_buckets: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """The log-probability of every scored token of a data set, flat, float32.

    `token_logps` maps a batch to [B, S]. The result is in the order of
    `store.scored_offsets`, whatever the layout and packing of the batches it will go into.
    """
    # One pair to a shared row: read row by row, the scored tokens are in the store's order.
    batches = Batches(store, batch_size=batch_size, num_buckets=num_buckets)
    parts = []
    for done, batch in enumerate(prefetch(batches, 0, len(batches)), 1):
        parts.append(jax.device_get(token_logps(batch))[batch.slots >= 0])
        progress(min(done * batch_size, len(store)))
    return np.concatenate(parts)


def kept(
    file: str | Path, manifest: dict[str, Any], compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """The array in `file`, computed and written if there is none yet.

    Raises `InputError` naming each entry of `manifest` that differs from the one the file
    was written with.
    """
    file = Path(file)
    beside = file.with_suffix(".json")
    if file.exists() and beside.exists():
        found = json.loads(beside.read_text())
        names = sorted(set(found) | set(manifest))
        differ = [name for name in names if found.get(name) != manifest.get(name)]
        if differ:
            raise InputError(
                f"{file}: these reference log-probabilities were made from another "
                f"{', '.join(differ)}; choose another --workdir, or delete the stage's folder"
            )
        return np.load(file, mmap_mode="r")
    file.parent.mkdir(parents=True, exist_ok=True)
    values = compute()
    with open(f"{file}.writing", "wb") as stream:
        np.save(stream, values)
    beside.write_text(json.dumps(manifest))
    os.replace(f"{file}.writing", file)  # last: a file that is there is whole
    return values
