"""Prompts in, hypotheses out: batches, buckets of shapes, and prompts that leave when finished.

The host's part of a search: it sorts prompts by length, runs the loop in segments, and looks
at the device once a segment. Left out: text (`completions`), the loop itself (`loop`).
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdpo import InputError, sharding
from jaxdpo.decoding import loop
from jaxdpo.decoding.hypotheses import Constraints, Hypotheses, Hypothesis, State
from jaxdpo.decoding.loop import Rule
from jaxdpo.decoding.scorers import Scorer

Prompt = Sequence[int] | Sequence[Sequence[int]]


class Memory(NamedTuple):
    """Bytes that a search takes on one device at its largest, by what holds them."""

    parameters: int
    caches: int  # and the copy that is made when they are compacted
    logits: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Search:
    """What stays the same over the prompts of one call.

    `batch_size` prompts run together; on a mesh, a multiple of its rows (`data` x `fsdp`),
    and the parameters must lie on it. Over `memory_limit` bytes on a device nothing is
    compiled. `key` is for draws. Every `segment` steps finished prompts and dead nodes leave;
    until then a step sees the dead ones (None: as often as keeps room for about 320 nodes).
    """

    scorer: Scorer
    rule: Rule
    constraints: Constraints
    batch_size: int = 8
    mesh: Mesh | None = None
    memory_limit: int | None = None
    key: Any = None
    segment: int | None = None

    def run(
        self, prompts: Sequence[Prompt], *, numbers: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[Hypothesis]]]:
        """Yield (place of a prompt, its hypotheses, best first) as prompts finish.

        A prompt is its token ids; for a scorer of several models it may be a list of ids for
        each, in their order. Draws are keyed by `numbers` (None: by place), so that a prompt
        gives the same whatever it is decoded with. Longest prompts come first: what does
        not fit into memory fails at once.
        """
        self.check()
        prompts = [self._checked(place, prompt) for place, prompt in enumerate(prompts)]
        order = sorted(range(len(prompts)), key=lambda i: [-len(ids) for ids in prompts[i]])
        numbers = range(len(prompts)) if numbers is None else numbers
        for at in range(0, len(order), self.batch_size):
            places = order[at : at + self.batch_size]
            yield from self._run_batch(places, prompts, numbers)

    def check(self) -> None:
        """Raise `InputError` for what cannot be searched, whatever the prompts."""
        scorer, limits = self.scorer, self.constraints
        if self.batch_size < 1 or self.batch_size % self._rows():
            raise InputError(
                f"batch_size={self.batch_size}: must be a multiple of the mesh's {self._rows()} "
                "rows (data x fsdp)"
            )
        scorer.check(draws=self.rule.warp is not None)
        sizes = sorted({lm.vocab_size for lm in scorer.models})
        if limits.num_tokens is None and len(sizes) > 1:
            raise InputError(
                f"the models' vocabularies have {' and '.join(map(str, sizes))} ids: say how many "
                "the tokenizer has (num_tokens), the rest being padding"
            )
        limits.check(scorer.vocab_size)
        self.rule.check(limits.num_tokens or scorer.vocab_size)

    def checked(self, prompt: Prompt) -> tuple[np.ndarray, ...]:
        """A prompt's ids for each model; `InputError` where it cannot be decoded."""
        models = self.scorer.models
        several = len(prompt) and not isinstance(prompt[0], int | np.integer)
        each = tuple(prompt) if several else (prompt,) * len(models)
        if len(each) != len(models):
            raise InputError(f"{len(each)} lists of ids for {len(models)} models")
        for lm, ids in zip(models, each, strict=True):
            if len(ids) == 0:
                raise InputError("is empty; give it at least one token")
            if not 0 <= min(ids) <= max(ids) < lm.vocab_size:
                raise InputError(f"has ids outside 0 to {lm.vocab_size - 1}")
            new = self.constraints.max_new_tokens
            if len(ids) > (longest := lm.model.max_length - new):
                raise InputError(
                    f"has {len(ids)} tokens; the model's {lm.model.max_length} positions leave "
                    f"{longest} before max_new_tokens={new}"
                )
        return tuple(np.asarray(ids, np.int32) for ids in each)

    def memory(self, num_prompts: int, prompt_lengths: Sequence[int]) -> Memory:
        """What `num_prompts` of these lengths (one for each model) take together.

        As if no node ever died, which is the worst case.
        """
        steps = self.constraints.max_new_tokens
        prompts = tuple(
            (
                jax.ShapeDtypeStruct((num_prompts, length), jnp.int32),
                jax.ShapeDtypeStruct((num_prompts,), jnp.int32),
            )
            for length in prompt_lengths
        )
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_prompts))
        real = jax.ShapeDtypeStruct((num_prompts,), bool)
        sizes = dict(mesh=None, room=steps * self.rule.width, capacity=_bucket(steps))
        args = (self.scorer, self.rule, self.constraints, prompts, keys, real)
        state = jax.eval_shape(lambda *a: loop.start(*a, **sizes), *args)
        rows, tensor = self._rows(), self.mesh.shape["tensor"] if self.mesh else 1
        vocabularies = sum(lm.vocab_size for lm in self.scorer.models) + self.scorer.vocab_size
        return Memory(
            _num_bytes(list({id(lm.params): lm.params for lm in self.scorer.models}.values()))
            // tensor,
            2 * _num_bytes(state.caches) // rows,
            4 * num_prompts * self.rule.width * vocabularies // rows,
        )

    @property
    def _steps(self) -> int:
        return self.segment or min(max(320 // self.rule.width, 8), 32)

    def _rows(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"] if self.mesh else 1

    def _run_batch(self, places, prompts, numbers) -> Iterator[tuple[int, list[Hypothesis]]]:
        limit = self.constraints.max_new_tokens
        longest = [max(len(prompts[i][m]) for i in places) for m in range(len(prompts[0]))]
        lengths = tuple(_bucket(length) for length in longest)
        self._check_memory(len(places), lengths)
        size = self._batch_bucket(len(places))
        places = np.array(places + [-1] * (size - len(places)))  # -1: a row of padding
        state = self._started(places, prompts, numbers, lengths)
        step = 1
        while True:
            still = np.array(sharding.fetched(state.open))
            yield from self._left(state, places, still)
            if not still.any():
                return
            places = np.where(still, places, -1)
            if step > 1 or self._batch_bucket(int(still.sum())) < len(places):
                state, places = self._compacted(state, places)
            until = min(step + self._steps, limit)
            state = loop.segment(
                self.scorer,
                self.rule,
                self.constraints,
                step,
                until,
                state,
                mesh=self.mesh,
                steps=self._steps,
            )
            step = until

    def _started(self, places, prompts, numbers, lengths) -> State:
        padded = []
        for m, width in enumerate(lengths):
            tokens = np.zeros((len(places), width), np.int32)
            sizes = np.ones(len(places), np.int32)
            for row, place in enumerate(places):
                if place >= 0:
                    sizes[row] = len(prompts[place][m])
                    tokens[row, : sizes[row]] = prompts[place][m]
            padded.append((self._put(tokens), self._put(sizes)))
        key = jax.random.key(0) if self.key is None else self.key
        drawn_by = np.array([numbers[place] if place >= 0 else 0 for place in places])
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, drawn_by)
        return loop.start(
            self.scorer,
            self.rule,
            self.constraints,
            tuple(padded),
            jax.random.wrap_key_data(self._put(np.array(jax.random.key_data(keys)))),
            self._put(places >= 0),
            mesh=self.mesh,
            room=self._steps * self.rule.width,
            capacity=_bucket(self.constraints.max_new_tokens),
        )

    def _compacted(self, state: State, places: np.ndarray) -> tuple[State, np.ndarray]:
        """The prompts that are still open, in the smallest batch and caches that hold them."""
        still = np.flatnonzero(places >= 0)
        nodes = sharding.fetched(loop.num_nodes(self.scorer, state.caches))
        keep = np.resize(still, self._batch_bucket(len(still)))
        real = np.arange(len(keep)) < len(still)
        state = loop.compacted(
            self.scorer,
            state,
            keep,
            real,
            mesh=self.mesh,
            num_nodes=tuple(_bucket(int(alive[still].max())) for alive in nodes),
            room=self._steps * self.rule.width,
        )
        return state, np.where(real, places[keep], -1)

    def _left(self, state: State, places, still) -> Iterator[tuple[int, list[Hypothesis]]]:
        leaving = np.flatnonzero(~still & (places >= 0))
        if len(leaving):
            finished = sharding.fetched(state.finished)
        for row in leaving.tolist():
            found = _hypotheses(finished, row, self.scorer.part_names)
            if not found:
                raise InputError(
                    f"prompt {places[row]}: no continuation obeys the constraints; loosen "
                    "no_repeat_ngram, num_tokens or min_new_tokens"
                )
            yield int(places[row]), found

    def _put(self, array: np.ndarray) -> jax.Array:
        if self.mesh is None:
            return jax.device_put(array)
        place = NamedSharding(self.mesh, P(("data", "fsdp")))
        # Every process has all prompts; each places those of its own devices.
        return jax.make_array_from_callback(array.shape, place, array.__getitem__)

    def _batch_bucket(self, count: int) -> int:
        """The rows of the mesh times a power of two, or all of the batch."""
        rows = self._rows()
        return min(rows * 2 ** math.ceil(math.log2(max(count / rows, 1))), self.batch_size)

    def _check_memory(self, num_prompts: int, lengths: tuple[int, ...]) -> None:
        if self.memory_limit is None:
            return
        needed = self.memory(self._batch_bucket(num_prompts), lengths)
        if needed.total > self.memory_limit:
            held = ", ".join(
                f"{name} {size / 2**30:.2f}" for name, size in needed._asdict().items()
            )
            raise InputError(
                f"decoding {num_prompts} prompts of up to {max(lengths)} tokens with "
                f"{self.rule.width} beams or samples each may take {needed.total / 2**30:.2f} GiB "
                f"({held}), but the device has {self.memory_limit / 2**30:.2f}; lower "
                "batch_size, beams or max_new_tokens"
            )

    def _checked(self, place: int, prompt: Prompt) -> tuple[np.ndarray, ...]:
        try:
            return self.checked(prompt)
        except InputError as error:
            raise InputError(f"prompt {place}: {error}") from error


def _hypotheses(finished: Hypotheses, row: int, names: tuple[str, ...]) -> list[Hypothesis]:
    each = []
    for place in np.flatnonzero(finished.done[row]):
        size = finished.lengths[row, place]
        own, *parts = finished.logps[row, place, :, :size]
        each.append(
            Hypothesis(
                finished.tokens[row, place, :size],
                own,
                dict(zip(names, parts, strict=True)),
                float(finished.scores[row, place]),
                bool(finished.ended[row, place]),
            )
        )
    return each


def _bucket(size: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few shapes, and at most a third is padding.

    >>> [_bucket(size) for size in (1, 17, 25, 48, 300)]
    [16, 24, 32, 48, 384]
    """
    power = 16
    while power < size:
        if size <= power + power // 2:
            return power + power // 2
        power *= 2
    return power


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
