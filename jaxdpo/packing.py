"""Which examples of a batch share a row, and the few shapes that hold the batches of a run.

The number of rows is fixed and the examples of a batch are dealt to them; what counts is the
fullest row, for all are padded to it. So the longest example goes first, each to the row that
is emptiest, and then rows exchange examples until they are level: in positions, and then, as
far as the row's length allows, in scored positions. On TL;DR this leaves a third of the padding
of first-fit decreasing (`BUILD_NOTES.md`), because first-fit levels nothing.

Sizes are positions and scored positions, the last axis of length 2; N batches of B examples.
Left out: whose sizes they are, and what a row looks like (`batching`).
"""

import numpy as np
from jaxtyping import Int

POSITIONS, SCORED = 0, 1
WORTH = 0.01  # of the work: what one more shape must save, for each is a program to compile

Sizes = Int[np.ndarray, "N B 2"]
Places = Int[np.ndarray, "N B"]  # the row of each example


def packed(
    sizes: Sizes, rows: int, *, multiple: int, most: int
) -> tuple[Places, Int[np.ndarray, " K"], Int[np.ndarray, " N"]]:
    """The row of each example; `most` row lengths or fewer, ascending; which one a batch has.

    Lengths are multiples of `multiple`. With as many rows as examples each keeps its own.

    >>> places, lengths, which = packed(np.full((3, 4, 2), 9), 2, multiple=16, most=4)
    >>> places[0].tolist(), lengths.tolist(), which.tolist()
    ([0, 1, 0, 1], [32], [0, 0, 0])
    """
    few = rows < sizes.shape[1]
    places = np.tile(np.arange(sizes.shape[1]), (len(sizes), 1))
    if few:
        places = levelled(sizes, dealt(sizes, rows), rows, POSITIONS)
    lengths = -(-loads(sizes, places, rows)[..., POSITIONS].max(1) // multiple) * multiple
    # Scored positions once they are level: the mean of the rows, or a single long example.
    scored = sizes[..., SCORED]
    edges = bucket_edges(lengths, np.maximum(-(-scored.sum(1) // rows), scored.max(1)), most)
    which = np.searchsorted(edges, lengths)
    if few:
        places = levelled(sizes, places, rows, SCORED, limits=edges[which])
    return places, edges, which


def dealt(sizes: Sizes, rows: int) -> Places:
    """Longest first, each example to the row with the fewest positions.

    >>> dealt(np.array([[[3, 1], [9, 1], [4, 1], [5, 1]]]), 2).tolist()
    [[0, 0, 1, 1]]
    """
    every, filled = np.arange(len(sizes)), np.zeros((len(sizes), rows), int)
    places = np.zeros(sizes.shape[:2], int)
    for example in np.argsort(-sizes[..., POSITIONS], axis=1, kind="stable").T:
        row = filled.argmin(1)
        places[every, example] = row
        filled[every, row] += sizes[every, example, POSITIONS]
    return places


def loads(sizes: Sizes, places: Places, rows: int) -> Int[np.ndarray, "N R 2"]:
    """What each row holds.

    >>> loads(np.array([[[3, 1], [9, 2], [4, 1]]]), np.array([[1, 0, 1]]), 2).tolist()
    [[[9, 2], [7, 2]]]
    """
    filled = np.zeros((len(sizes), rows, 2), int)
    np.add.at(filled, (np.arange(len(sizes))[:, None], places), sizes)
    return filled


def levelled(
    sizes: Sizes, places: Places, rows: int, axis: int, limits: Int[np.ndarray, " N"] | None = None
) -> Places:
    """Exchange examples between rows so that the fullest row along `axis` has less.

    Each example in turn goes to another row, alone or in exchange for one that is there,
    wherever that lowers the fuller of the two rows most. Along the other axis no row passes
    the `limits` of its batch.

    >>> sizes, places = np.array([[[4, 1], [5, 1], [5, 1], [6, 1]]]), np.array([[0, 0, 1, 1]])
    >>> levelled(sizes, places, 2, POSITIONS).tolist()
    [[1, 0, 0, 1]]
    """
    every, count = np.arange(len(sizes)), sizes.shape[1]
    # Axis by axis in int32, and rows counted through all batches: of the time of a start, packing
    # is the part that grows with the batch.
    axes = [axis] if limits is None else [axis, 1 - axis]
    first = rows * every[:, None]
    filled = loads(sizes, places, rows).reshape(-1, 2).T[axes].astype(np.int32)
    # Each row has an example of no size: an exchange for it is a move.
    sizes = np.pad(sizes, ((0, 0), (0, rows), (0, 0)))
    sizes = np.ascontiguousarray(np.moveaxis(sizes, 2, 0)[axes], np.int32)
    places = np.concatenate([places, np.tile(np.arange(rows), (len(every), 1))], axis=1) + first
    for one in range(count if rows > 1 else 0):
        here = places[:, one]
        moved = sizes[:, :, one, None] - sizes
        ours, theirs = filled[:, here, None], filled.take(places, axis=1)
        fuller = np.maximum(ours - moved, theirs + moved)
        gain = np.maximum(ours[0], theirs[0]) - fuller[0]
        if limits is not None:
            gain[fuller[1] > limits[:, None]] = 0
        other = gain.argmax(1)
        better = np.flatnonzero(gain[every, other] > 0)
        other, here = other[better], here[better]
        there = places[better, other]
        filled[:, here] -= moved[:, better, other]
        filled[:, there] += moved[:, better, other]
        places[better, one] = there
        real = other < count
        places[better[real], other[real]] = here[real]
    return places[:, :count] - first


def bucket_edges(
    lengths: Int[np.ndarray, " N"], scored: Int[np.ndarray, " N"], most: int
) -> Int[np.ndarray, " K"]:
    """The lengths, `most` or fewer, to which batches are padded at the least work in all.

    A batch goes to the first length that holds it, and its work is that length plus the most
    scored positions of any batch there: exact for a model of some 100M parameters, where a
    scored position costs what a position does (0.1 in one of 2.8B, 5 in one of 14M). Exact
    dynamic programme over the lengths that occur.

    >>> bucket_edges(np.array([10, 11, 30, 31]), np.array([1, 1, 1, 1]), 2).tolist()
    [11, 31]
    """
    edges, which = np.unique(lengths, return_inverse=True)
    widest = np.zeros(len(edges), int)
    np.maximum.at(widest, which, scored)
    before = np.concatenate([[0], np.bincount(which).cumsum()])
    work = np.full((len(edges), len(edges)), np.inf)  # of the edges i to j in the shape of j
    for i in range(len(edges)):
        batches = before[i + 1 :] - before[i]
        work[i, i:] = batches * (edges[i:] + np.maximum.accumulate(widest[i:]))
    least, firsts = work[0], [np.zeros(len(edges), int)]
    while len(firsts) < most:
        totals = np.concatenate([[np.inf], least[:-1]])[:, None] + work
        if not totals[:, -1].min() < (1 - WORTH) * least[-1]:
            break
        least = totals.min(0)
        firsts.append(totals.argmin(0))
    chosen, last = [], len(edges) - 1
    for first in reversed(firsts):
        chosen.append(edges[last])
        last = first[last] - 1
    return np.array(chosen[::-1])
