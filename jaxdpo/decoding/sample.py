"""Greedy decoding and sampling: K continuations of a prompt that share its cache."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxdpo import InputError
from jaxdpo.decoding.hypotheses import Constraints, State, appended
from jaxdpo.decoding.scorers import Scores
from jaxdpo.decoding.top_k import top_k

_BLOCK = 128


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p"],
    meta_fields=["top_k"],
)
@dataclasses.dataclass(frozen=True)
class Warp:
    """The distribution that is drawn from: sharpened by `temperature`, then cut off.

    `top_k` keeps the k most probable tokens and their ties; of these, `top_p` keeps the
    fewest that hold that share of the probability (None: all). transformers' order and
    rules; its default of `top_k` is 50.
    """

    temperature: Any = 1.0
    top_k: int | None = None
    top_p: Any = None

    def check(self) -> None:
        """Raise `InputError` for what is out of range."""
        if not 0 < self.temperature < math.inf:
            raise InputError(
                f"temperature={self.temperature}: must be above 0 and finite; or decode greedily"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k}: must be at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: must be in (0, 1], or None for all tokens")

    def __call__(self, logps: Float[Array, "B K V"], *, keep: int = 1) -> Float[Array, "B K V"]:
        """log p / temperature with -inf for the tokens cut off; at least `keep` are left."""
        logps = logps / self.temperature
        if self.top_k is None and self.top_p is None:
            return logps
        count = logps.shape[-1] if self.top_k is None else max(self.top_k, keep)
        values, _ = top_k(logps, min(count, logps.shape[-1]))
        floor = values[..., -1:]
        if self.top_p is not None:
            kept = jnp.where(logps >= floor, logps, -jnp.inf)
            total = jax.nn.logsumexp(kept, axis=-1, keepdims=True)
            share = jnp.exp(values - total)
            enough = jnp.cumsum(share, axis=-1) - share >= self.top_p
            enough &= (jnp.arange(values.shape[-1]) >= keep)[None, None]
            floor = jnp.where(enough, jnp.inf, values).min(axis=-1, keepdims=True)
        return jnp.where(logps >= floor, logps, -jnp.inf)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["warp"], meta_fields=["num_samples"]
)
@dataclasses.dataclass(frozen=True)
class Samples:
    """Draw each token of each continuation; without a `warp`, take the most probable one.

    The score is the sum of the scorer's log-probabilities, whatever the warp. A draw depends
    on the key, the prompt's number, the sample's number and the step, and on no neighbour.
    """

    num_samples: int = 1
    warp: Warp | None = None

    @property
    def width(self) -> int:
        return self.num_samples

    def check(self, vocab_size: int) -> None:
        """Raise `InputError` for what cannot be drawn."""
        if self.num_samples < 1:
            raise InputError(f"num_samples={self.num_samples}: must be at least 1")
        if self.warp:
            self.warp.check()

    def first_scores(self, rows: int) -> Float[Array, "B K"]:
        """Nothing is decoded yet."""
        return jnp.zeros((rows, self.num_samples), jnp.float32)

    def advance(
        self,
        state: State,
        given: Scores,
        logps: Float[Array, "B K V"],
        step: Any,
        constraints: Constraints,
    ) -> tuple[State, None]:
        """One more token of each: the new state; each goes on from itself."""
        if self.warp is None:
            tokens = logps.argmax(axis=-1)
        else:
            tokens = drawn(_keys(state.keys, step, self.num_samples), self.warp(logps))
        parents = jnp.arange(self.num_samples)[None]
        choices = parents * logps.shape[-1] + tokens
        chosen = jnp.take_along_axis(given.logps, tokens[..., None], axis=-1)[..., 0]
        scores = state.running.scores + chosen
        grown = appended(state.running, choices, scores, given, step, constraints)
        last = step + 1 == constraints.max_new_tokens
        finished = jax.tree.map(
            lambda old, new: jnp.where(_like(state.finished.done, old), old, new),
            state.finished,
            grown._replace(done=grown.ended | last),
        )
        still = state.open & ~finished.done.all(axis=1)
        return state._replace(running=grown, finished=finished, open=still), None


def drawn(keys: Key[Array, "B K"], logps: Float[Array, "B K V"]) -> Int[Array, "B K"]:
    """One token of each distribution, given up to its normaliser.

    The inverse of the distribution function at one uniform number, found in two levels: an
    exponential a token instead of a random number a token. A token of weight zero is never
    drawn.
    """
    weights = jnp.exp(logps - logps.max(axis=-1, keepdims=True))
    weights = jnp.pad(weights, [(0, 0), (0, 0), (0, -weights.shape[-1] % _BLOCK)])
    blocks = weights.reshape(*keys.shape, -1, _BLOCK)
    sums = blocks.sum(axis=-1)
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(keys)
    block, left = _reached(sums, uniform * sums.sum(axis=-1))
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * _BLOCK + _reached(inside, left)[0]


def _reached(
    weights: Float[Array, "B K N"], target: Float[Array, "B K"]
) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
    """The first place where the weights so far exceed the target, and the rest of it there.

    Running sums are rounded, and need not even rise: a place must have weight of its own,
    and where rounding leaves none the heaviest is taken.
    """
    sums = jnp.cumsum(weights, axis=-1)
    reached = (sums > target[..., None]) & (weights > 0)
    place = jnp.where(reached.any(axis=-1), reached.argmax(axis=-1), weights.argmax(axis=-1))
    before = jnp.take_along_axis(sums - weights, place[..., None], axis=-1)[..., 0]
    return place, target - before


def _keys(keys: Key[Array, " B"], step: Any, count: int) -> Key[Array, "B K"]:
    of_step = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    of_sample = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(of_sample, (0, None))(of_step, jnp.arange(count))


def _like(mask, leaf):
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))
