"""From tokenised examples to fixed-shape rows, in an order that is a function of the step.

A row is `[prompt | chosen | rejected]`, several pairs one after the other: the prompt is
computed once for both responses, the rejected one's positions restart after the prompt, and
a token sees earlier tokens of its own pair that are prompt or of its own branch. The last
prompt token predicts the first token of *both* responses, so targets are no shift by one: a
batch lists its scored positions and their targets. The last token of a response predicts
nothing and is not in the row. `layout="separate"` is the plain twin: chosen and rejected in
two adjacent rows.

Batch number `step` holds the examples `[step * batch_size, (step + 1) * batch_size)` of
the epochs' permutations laid end to end; there is no iterator state. Slots past the last
example are fillers that weigh nothing, so every example is seen exactly once an epoch.
Pairs change rows within their batch only, so packing changes nothing but time. Left out: how
they are packed (`packing`).
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import grain
import numpy as np

from jaxdpo import InputError, packing
from jaxdpo.tokens import TokenStore

LAYOUTS = ("shared", "separate")
LENGTH_MULTIPLE = 16  # row lengths are rounded up to it: whole vector registers, few shapes
SCORED_MULTIPLE = 16  # and the scored positions of a row to this


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
    """The static shape of a program: groups of rows in a global batch; positions T and scored
    positions S of a row; pairs P of a group, at most."""

    rows: int
    length: int
    scored: int
    pairs: int


class Padding(NamedTuple):
    """How much of all rows of a run is real, and in how many shapes they come.

    >>> str(Padding(970, 1000, 88, 100, shapes=3))
    '97.0% of positions and 88.0% of scored positions are real; 3 row shapes'
    """

    positions: int
    all_positions: int
    scored: int
    all_scored: int
    shapes: int

    def __str__(self) -> str:
        real = self.positions / self.all_positions, self.scored / self.all_scored
        return (
            f"{real[0]:.1%} of positions and {real[1]:.1%} of scored positions are real; "
            f"{self.shapes} row shape{'s' * (self.shapes > 1)}"
        )


class Batches:
    """The global batches of a data set: `batches[step]` is this process's rows of one.

    `seed=None` keeps the order of the file (evaluation). The rows are the same number in every
    batch, a multiple of `divisor` and at most `batch_size`: as few as make the mean row no longer
    than `row_length` positions (0: a pair to a row). `num_buckets` bounds `shapes`, ascending,
    which hold every batch at the least padding; lengths are multiples of `length_multiple`. `span`
    is the positions of the longest example, rounded up likewise. `reference` is the flat array of
    the reference's token log-probabilities, in the order of `store.scored_offsets`. `parts` says
    which parts of every batch's rows are this process's, of how many equal ones. Raises
    `InputError` for options that contradict each other or the data.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        batch_size: int,
        epochs: int = 1,
        seed: int | None = None,
        row_length: int = 0,
        num_buckets: int = 1,
        layout: str = "shared",
        length_multiple: int = LENGTH_MULTIPLE,
        divisor: int = 1,
        reference: np.ndarray | None = None,
        parts: tuple[Sequence[int], int] = ((0,), 1),
    ):
        divisor = math.lcm(divisor, parts[1])
        _check(layout, batch_size, row_length, num_buckets, divisor)
        self.store, self.batch_size, self.layout = store, batch_size, layout
        self.reference, self.parts, self._multiple = reference, parts, length_multiple
        self._order = _order(len(store), batch_size, epochs, seed)
        self._sizes = _sizes(store, layout)
        longest = self._sizes[..., packing.POSITIONS].max(1)
        self.span = _rounded(int(longest.max()), length_multiple)
        if 0 < row_length < longest.max():
            raise InputError(
                f"row_length: {row_length} is less than the {longest.max()} positions of the "
                f"example of line {store.lines[longest.argmax()]}; give at least that, or lower "
                "max_length"
            )
        self.num_rows = batch_size
        if row_length:
            wanted = longest.mean() * min(batch_size, len(store) * epochs) / row_length
            self.num_rows = divisor * min(math.ceil(wanted / divisor), batch_size // divisor)
        self.shapes, self._bucket, self._places = self._packed(num_buckets)

    def __len__(self) -> int:
        return len(self._order)

    def indices(self, step: int) -> np.ndarray:
        """The examples of batch `step`, [batch_size]; -1 past the last epoch's end."""
        return self._order[step]

    def __getitem__(self, step: int) -> Batch:
        shape, real = self.shapes[self._bucket[step]], self._order[step] >= 0
        places = self._places[step][real]
        groups = np.full((shape.rows, shape.pairs), -1, np.int32)
        groups[places, times_before(places)] = self._order[step][real]
        parts, count = self.parts
        mine = groups.reshape(count, -1, shape.pairs)[list(parts)].reshape(-1, shape.pairs)
        return rows(self.store, mine, shape, layout=self.layout, reference=self.reference)

    @cached_property
    def padding(self) -> Padding:
        """Real and all positions, and scored positions, over all batches."""
        real = self._sizes[self._order[self._order >= 0]].sum((0, 1)).tolist()
        count = np.bincount(self._bucket, minlength=len(self.shapes)) * self._sizes.shape[1]
        every = [
            int((count * [shape.rows * size(shape) for shape in self.shapes]).sum())
            for size in (lambda shape: shape.length, lambda shape: shape.scored)
        ]
        return Padding(real[0], every[0], real[1], every[1], len(self.shapes))

    def _packed(self, num_buckets: int) -> tuple[list[RowShape], np.ndarray, np.ndarray]:
        """The shapes, and for each batch which of them, and the row of each example."""
        # The fuller row of a group counts; a filler, -1, finds the empty size at the end.
        sizes = np.pad(self._sizes.max(1), ((0, 1), (0, 0)))[self._order]
        places, lengths, which = packing.packed(
            sizes, self.num_rows, multiple=self._multiple, most=num_buckets
        )
        scored = packing.loads(sizes, places, self.num_rows)[..., packing.SCORED].max(1)
        pairs = np.zeros((len(self), self.num_rows), int)
        np.add.at(pairs, (np.arange(len(self))[:, None], places), self._order >= 0)
        shapes = []
        for one, length in enumerate(lengths):
            widest = _rounded(int(scored[which == one].max()), SCORED_MULTIPLE)
            shapes.append(RowShape(self.num_rows, int(length), widest, int(pairs.max())))
        return shapes, which, places


def _check(layout: str, batch_size: int, row_length: int, num_buckets: int, divisor: int) -> None:
    """Raise `InputError` for options that cannot be, whatever the data."""
    if layout not in LAYOUTS:
        raise InputError(f"layout: {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    for name, value, least in (("row_length", row_length, 0), ("num_buckets", num_buckets, 1)):
        if value < least:
            raise InputError(f"{name}: must be at least {least}, not {value}")
    if layout == "separate" and row_length:
        raise InputError(
            f"row_length: {row_length} has no effect with layout 'separate', which holds a pair in "
            "two rows; set it to 0"
        )
    if batch_size < divisor or (not row_length and batch_size % divisor):
        raise InputError(
            f"batch_size: {batch_size} pairs cannot fill rows that are a multiple of {divisor} "
            "(devices x micro-batches); give "
            + (
                "at least that"
                if row_length
                else "a multiple of it, for with row_length 0 each has a row"
            )
        )


def _order(num_examples: int, batch_size: int, epochs: int, seed: int | None) -> np.ndarray:
    """The examples of every batch, [steps, batch_size]; -1 past the end of the last epoch."""
    orders = [
        np.arange(num_examples)
        if seed is None
        else np.random.default_rng((seed, epoch)).permutation(num_examples)
        for epoch in range(epochs)
    ]
    fillers = -num_examples * epochs % batch_size
    order = np.pad(np.concatenate(orders), (0, fillers), constant_values=-1)
    return order.reshape(-1, batch_size)


def times_before(places: np.ndarray) -> np.ndarray:
    """How many places before each one are the same.

    >>> times_before(np.array([3, 5, 3])).tolist()
    [0, 0, 1]
    """
    order = np.argsort(places, kind="stable")
    rank = np.empty(len(places), int)
    rank[order] = np.arange(len(places))
    return rank - np.searchsorted(places[order], places)


def _rounded(number, multiple: int):
    return -(-number // multiple) * multiple


def prefetch(batches: Batches, start: int, stop: int) -> Iterator[Batch]:
    """Batches `start` to `stop - 1` in order, built ahead by two threads."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(batches)[start:stop].to_iter_dataset(options))


def row_shape(
    store: TokenStore, groups: np.ndarray | Sequence[Sequence[int]], *, layout: str = "shared"
) -> RowShape:
    """The smallest shape that holds the groups (see `rows`), rounded up to whole registers."""
    groups = np.asarray(groups)
    sizes = np.pad(_sizes(store, layout), ((0, 1), (0, 0), (0, 0)))[groups]
    length, scored = (int(x) for x in sizes.sum(1).max((0, 1)))
    length, scored = _rounded(length, LENGTH_MULTIPLE), _rounded(scored, SCORED_MULTIPLE)
    return RowShape(len(groups), length, scored, groups.shape[1])


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


def _sizes(store: TokenStore, layout: str) -> np.ndarray:
    """Positions and scored positions of each example in each row of its group, [n, 1 or 2, 2]."""
    prompt, responses = store.lengths[:, :1], store.lengths[:, 1:]
    inner = np.maximum(responses - 1, 0)
    if layout == "separate" and store.has_pairs:
        return np.stack([prompt + inner, responses], axis=-1)
    both = np.stack([inner, responses], axis=-1).sum(1, keepdims=True)
    both[..., packing.POSITIONS] += prompt
    return both
