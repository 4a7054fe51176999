"""From tokenised examples to fixed-shape rows, in an order that is a function of the step.

A row is `[prompt | chosen | rejected]`: the prompt is computed once for both responses,
the rejected one's positions restart after the prompt, and a token sees earlier tokens of
its own pair that are prompt or of its own branch. The last prompt token predicts the
first token of *both* responses, so targets are no shift by one: a batch lists its scored
positions and their targets. The last token of a response predicts nothing and is not in
the row. `layout="separate"` is the plain twin: chosen and rejected in two adjacent rows.

Batch number `step` holds the examples `[step * batch_size, (step + 1) * batch_size)` of
the epochs' permutations laid end to end; there is no iterator state. Slots past the last
example are fillers that weigh nothing, so every example is seen exactly once an epoch.

Left out: first-fit packing over a window; here a row takes `pairs_per_row` consecutive
pairs.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import grain
import numpy as np

from jaxdpo import InputError
from jaxdpo.tokens import TokenStore

LAYOUTS = ("shared", "separate")
LENGTH_MULTIPLE = 16  # row lengths are rounded up to it: whole vector registers, few shapes


class Batch(NamedTuple):
    """A batch of B rows that hold G groups of P pairs (a group is one row, or two if the
    layout is "separate"). Integers are int32.

    >>> Batch._fields[:4]
    ('tokens', 'positions', 'segment_ids', 'branch_ids')
    """

    tokens: np.ndarray  # [B, T]
    positions: np.ndarray  # [B, T] place in its own sequence: prompt, then response
    segment_ids: np.ndarray  # [B, T] which pair of the row, from 1; 0 is padding
    branch_ids: np.ndarray  # [B, T] 0 prompt, 1 chosen, 2 rejected
    scored_positions: np.ndarray  # [B, S] the place in the row that predicts the target
    targets: np.ndarray  # [B, S]
    slots: np.ndarray  # [B, S] 2 * pair in the group + (0 chosen, 1 rejected); -1 unscored
    examples: np.ndarray  # [G, P] index in the token store; -1 is a filler
    reference_token_logps: np.ndarray | None = None  # [B, S] float32, for DPO


class RowShape(NamedTuple):
    """The static shape of a program: T positions and S scored positions to a row."""

    length: int
    scored: int


class Batches:
    """The global batches of a data set: `batches[step]` is this process's rows of one.

    `seed=None` keeps the order of the file (evaluation). `reference` is the flat array of
    the reference's token log-probabilities, in the order of `store.scored_offsets`.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        batch_size: int,
        epochs: int = 1,
        seed: int | None = None,
        pairs_per_row: int = 1,
        num_buckets: int = 1,
        layout: str = "shared",
        reference: np.ndarray | None = None,
        process: tuple[int, int] = (0, 1),
    ):
        if layout not in LAYOUTS:
            raise InputError(f"layout: {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
        for name, value in (("pairs_per_row", pairs_per_row), ("num_buckets", num_buckets)):
            if value < 1:
                raise InputError(f"{name}: must be at least 1, not {value}")
        if batch_size < 1 or batch_size % (pairs_per_row * process[1]):
            raise InputError(
                f"batch_size: {batch_size} is no multiple of pairs_per_row x processes = "
                f"{pairs_per_row} x {process[1]}"
            )
        self.store, self.batch_size, self.epochs, self.seed = (
            store,
            batch_size,
            epochs,
            seed,
        )
        self.pairs_per_row, self.layout, self.process = pairs_per_row, layout, process
        self.reference = reference
        self.shapes = row_shapes(store, pairs_per_row, num_buckets, layout)

    def __len__(self) -> int:
        return -(-len(self.store) * self.epochs // self.batch_size)

    @property
    def num_groups(self) -> int:
        """Groups of rows in a global batch: what a mesh divides."""
        return self.batch_size // self.pairs_per_row

    def indices(self, step: int) -> np.ndarray:
        """The examples of batch `step`, [batch_size]; -1 past the last epoch's end."""
        n, first = len(self.store), step * self.batch_size
        places = range(first, first + self.batch_size)
        if self.seed is None:
            examples = [place % n for place in places]
        else:
            examples = [epoch_order(self.seed, place // n, n)[place % n] for place in places]
        return np.where(np.array(places) < n * self.epochs, examples, -1)

    def __getitem__(self, step: int) -> Batch:
        groups = self.indices(step).reshape(self.num_groups, self.pairs_per_row)
        lengths, _ = _row_sizes(self.store, groups, self.layout)
        shape = next(shape for shape in self.shapes if lengths.max() <= shape.length)
        rank, world = self.process
        mine = groups[rank * len(groups) // world : (rank + 1) * len(groups) // world]
        return rows(self.store, mine, shape, layout=self.layout, reference=self.reference)


def prefetch(batches: Batches, start: int, stop: int) -> Iterator[Batch]:
    """Batches `start` to `stop - 1` in order, built ahead by two threads."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(batches)[start:stop].to_iter_dataset(options))


@lru_cache(maxsize=4)  # two threads may straddle the border of an epoch
def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The permutation of an epoch: a pure function of its arguments."""
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def row_shapes(
    store: TokenStore, pairs_per_row: int, num_buckets: int, layout: str = "shared"
) -> list[RowShape]:
    """At most `num_buckets` row shapes, ascending, the last of which holds any row.

    The lengths lie evenly between the shortest and the longest row; the scored positions
    of a bucket are what its longest admissible row needs.
    """
    lengths, scored = _row_sizes(store, np.arange(len(store))[:, None], layout)
    low, high = lengths.min() * pairs_per_row, lengths.max() * pairs_per_row
    edges = low + (high - low) * np.arange(1, num_buckets + 1) / num_buckets
    edges = np.unique(-(-edges // LENGTH_MULTIPLE).astype(int) * LENGTH_MULTIPLE)
    shapes = []
    for edge in edges:
        widest = scored[lengths <= edge].max(initial=1) * pairs_per_row
        shapes.append(RowShape(int(edge), int(-(-widest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)))
    return shapes


def rows(
    store: TokenStore,
    groups: np.ndarray | Sequence[Sequence[int]],
    shape: RowShape,
    *,
    layout: str = "shared",
    reference: np.ndarray | None = None,
) -> Batch:
    """The batch whose g-th group holds the examples `groups[g]` (-1: nothing).

    Any grouping is a valid packing. Raises `InputError` if a row does not fit `shape`.
    """
    groups = np.asarray(groups, np.int32)
    per_group = 2 if layout == "separate" and store.has_pairs else 1
    batch = _empty(len(groups) * per_group, shape, groups, reference is not None)
    offsets = store.scored_offsets
    for g, group in enumerate(groups):
        used = np.zeros((per_group, 2), int)  # positions and scored positions, each row
        for slot, index in enumerate(group.tolist()):
            if index < 0:
                continue
            logps = None if reference is None else reference[offsets[index] : offsets[index + 1]]
            for row, piece in enumerate(_pieces(store, index, slot, logps, per_group)):
                _place(batch, g * per_group + row, used[row], piece, shape)
    return batch


class _Piece(NamedTuple):
    """One pair's part of one row; positions are relative to where the piece starts."""

    tokens: np.ndarray
    positions: np.ndarray
    branch_ids: np.ndarray
    scored_positions: np.ndarray
    targets: np.ndarray
    slots: np.ndarray
    segment: int
    reference: np.ndarray | None


def _pieces(store, index, slot, reference, rows_per_group) -> list[_Piece]:
    """The one piece of a shared row, or the two of separate rows."""
    prompt, chosen, rejected = store[index]
    branches = [(1, chosen)] + ([(2, rejected)] if len(rejected) else [])
    split = len(chosen)
    if rows_per_group == 1:
        return [_piece(prompt, branches, slot, reference)]
    halves = (None, None) if reference is None else (reference[:split], reference[split:])
    return [_piece(prompt, [b], slot, half) for b, half in zip(branches, halves, strict=True)]


def _piece(prompt, branches, slot, reference) -> _Piece:
    start = len(prompt)
    tokens, positions = [prompt], [np.arange(start)]
    branch_ids, scored, targets, slots = [np.zeros(start, int)], [], [], []
    at = start  # where the branch's first token stands in the piece
    for branch, response in branches:
        inner = len(response) - 1  # the last token predicts nothing: it is a target only
        tokens.append(response[:-1])
        positions.append(np.arange(start, start + inner))
        branch_ids.append(np.full(inner, branch))
        scored.append(np.concatenate([[start - 1], np.arange(at, at + inner)]))
        targets.append(response)
        slots.append(np.full(len(response), 2 * slot + branch - 1))
        at += inner
    joined = map(np.concatenate, (tokens, positions, branch_ids, scored, targets, slots))
    return _Piece(*joined, segment=slot + 1, reference=reference)


def _place(batch: Batch, row: int, used: np.ndarray, piece: _Piece, shape: RowShape) -> None:
    (start, first), size, scored = used, len(piece.tokens), len(piece.targets)
    if start + size > shape.length or first + scored > shape.scored:
        raise InputError(
            f"a row needs {start + size} positions and {first + scored} scored ones, but the "
            f"shape has {shape.length} and {shape.scored}; put fewer pairs in a row"
        )
    at, to = slice(start, start + size), slice(first, first + scored)
    batch.tokens[row, at] = piece.tokens
    batch.positions[row, at] = piece.positions
    batch.segment_ids[row, at] = piece.segment
    batch.branch_ids[row, at] = piece.branch_ids
    batch.scored_positions[row, to] = piece.scored_positions + start
    batch.targets[row, to] = piece.targets
    batch.slots[row, to] = piece.slots
    if piece.reference is not None:
        batch.reference_token_logps[row, to] = piece.reference
    used += size, scored


def _empty(num_rows: int, shape: RowShape, groups: np.ndarray, has_reference: bool) -> Batch:
    positions = [np.zeros((num_rows, shape.length), np.int32) for _ in range(4)]
    scored = [np.zeros((num_rows, shape.scored), np.int32) for _ in range(3)]
    scored[2][:] = -1
    reference = np.zeros((num_rows, shape.scored), np.float32) if has_reference else None
    return Batch(*positions, *scored, groups, reference)


def _row_sizes(store: TokenStore, groups: np.ndarray, layout: str):
    """Positions and scored positions that the longest row of each group needs, [G] each."""
    prompt, chosen, rejected = store.lengths[groups].transpose(2, 0, 1) * (groups >= 0)
    inner_chosen, inner_rejected = np.maximum(chosen - 1, 0), np.maximum(rejected - 1, 0)
    if layout == "shared":
        return (prompt + inner_chosen + inner_rejected).sum(1), (chosen + rejected).sum(1)
    length = np.maximum((prompt + inner_chosen).sum(1), (prompt + inner_rejected).sum(1))
    return length, np.maximum(chosen.sum(1), rejected.sum(1))
