"""What a search carries: partial and finished continuations, and what they must obey."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdpo import InputError
from jaxdpo.decoding.scorers import Cache, Scores

NEVER = -1.0e9
"""The score of what must not be chosen; transformers' number, kept because ties depend on it."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["max_new_tokens", "eos_ids", "min_new_tokens", "num_tokens"],
    meta_fields=["no_repeat_ngram"],
)
@dataclasses.dataclass(frozen=True)
class Constraints:
    """What every continuation obeys, however it is chosen.

    It ends with the first of `eos_ids`, which counts as one of its tokens, or after
    `max_new_tokens`. Before `min_new_tokens` no end is chosen; a token that would repeat
    `no_repeat_ngram` tokens of the prompt or the continuation never is (0: no such rule);
    nor is one whose id is not below `num_tokens`, such as a padded row of the vocabulary
    (None: all may be). Forbidden tokens lose their probability; the others keep theirs.
    """

    max_new_tokens: Any  # int, as all of these; traced
    eos_ids: tuple[Any, ...]  # traced; their number is static
    min_new_tokens: Any = 0
    num_tokens: Any = None
    no_repeat_ngram: int = 0

    def check(self, vocab_size: int) -> None:
        """Raise `InputError` for what no continuation can obey."""
        most = self.num_tokens if self.num_tokens is not None else vocab_size
        if not 1 <= most <= vocab_size:
            raise InputError(f"num_tokens={most}: the models share {vocab_size} ids")
        for eos in self.eos_ids:
            if not 0 <= eos < most:
                raise InputError(f"eos_ids: {eos} is outside the vocabulary of {most} tokens")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise InputError(
                f"min_new_tokens={self.min_new_tokens}: must be between 0 and "
                f"max_new_tokens={self.max_new_tokens}"
            )
        if self.no_repeat_ngram < 0:
            raise InputError(f"no_repeat_ngram={self.no_repeat_ngram}: must be 0 or more")


class Hypotheses(NamedTuple):
    """C continuations for each of B prompts, in rows of G places, filled up to `lengths`."""

    scores: Float[Array, "B C"]
    tokens: Int[Array, "B C G"]
    logps: Float[Array, "B C M G"]  # of each token: the scorer's, then its parts
    lengths: Int[Array, "B C"]
    ended: Bool[Array, "B C"]  # by an end token
    done: Bool[Array, "B C"]  # whether this place holds a finished continuation


class State(NamedTuple):
    """A batch of prompts under way; every array has one row for each prompt."""

    running: Hypotheses
    finished: Hypotheses
    open: Bool[Array, " B"]  # whether anything can still change
    keys: Key[Array, " B"]
    prompt_tokens: Int[Array, "B P"]  # of the scorer's first model
    prompt_lengths: Int[Array, " B"]
    caches: tuple[Cache, ...]


class Hypothesis(NamedTuple):
    """One continuation, on the host.

    `logps[i]` is log pi(token i | what precedes) under the scorer, in nats, before anything
    a rule does to it; `parts` are the log-probabilities that the scorer names beside it.
    `score` is what the rule ranks by, and `ended` says whether the last token is an end.
    """

    tokens: np.ndarray
    logps: np.ndarray
    parts: dict[str, np.ndarray]
    score: float
    ended: bool

    def implicit_rewards(self, beta: float) -> np.ndarray:
        """beta log pi/pi_ref of each token (2404.12358, Eq. 10); wants a `WithReference`."""
        if "reference" not in self.parts:
            raise InputError("implicit rewards: decode with a WithReference scorer")
        return beta * (self.logps - self.parts["reference"])


def empty(scores: Float[Array, "B C"], *, parts: int, capacity: int) -> Hypotheses:
    """Continuations of no tokens yet."""
    shape = scores.shape
    return Hypotheses(
        scores,
        jnp.zeros((*shape, capacity), jnp.int32),
        jnp.zeros((*shape, parts, capacity), jnp.float32),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, bool),
        jnp.zeros(shape, bool),
    )


def taken(hypotheses: Hypotheses, places: Int[Array, "B D"]) -> Hypotheses:
    """Those at `places` of each prompt."""

    def take(leaf):
        index = places.reshape(places.shape + (1,) * (leaf.ndim - 2))
        return jnp.take_along_axis(leaf, index, axis=1)

    return jax.tree.map(take, hypotheses)


def best(hypotheses: Hypotheses, count: int) -> tuple[Hypotheses, Int[Array, "B D"]]:
    """The `count` highest scores in descending order, of equal ones the first; their places."""
    _, places = jax.lax.top_k(hypotheses.scores, count)
    return taken(hypotheses, places), places


def joined(first: Hypotheses, second: Hypotheses) -> Hypotheses:
    """Both, side by side."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)


def appended(
    running: Hypotheses,
    choices: Int[Array, "B C"],
    scores: Float[Array, "B C"],
    given: Scores,
    step: Any,
    constraints: Constraints,
) -> Hypotheses:
    """The continuations that each choice makes; a choice is parent * V + token.

    `step` is the number of tokens there were.
    """
    rows, _, vocab_size = given.logps.shape
    tokens = choices % vocab_size
    grown = taken(running, choices // vocab_size)
    flat = [x.reshape(rows, -1) for x in (given.logps, *given.parts)]
    logps = jnp.stack([jnp.take_along_axis(x, choices, axis=1) for x in flat], axis=2)
    here = (jnp.arange(running.tokens.shape[-1]) == step)[None, None]
    return Hypotheses(
        scores,
        jnp.where(here, tokens[..., None], grown.tokens),
        jnp.where(here[:, :, None], logps[..., None], grown.logps),
        grown.lengths + 1,
        is_end(tokens, constraints),
        grown.done,
    )


def is_end(tokens: Int[Array, "..."], constraints: Constraints) -> Bool[Array, "..."]:
    """Whether each token is one of the end tokens."""
    ends = [tokens == eos for eos in constraints.eos_ids]
    return functools.reduce(jnp.logical_or, ends, jnp.zeros(tokens.shape, bool))


def allowed(
    logps: Float[Array, "B K V"], state: State, step: Any, constraints: Constraints
) -> Float[Array, "B K V"]:
    """The log-probabilities with -inf where a token is forbidden, the rest as it was."""
    ids = jnp.arange(logps.shape[-1])[None, None]
    forbidden = is_end(ids, constraints) & (step < constraints.min_new_tokens)
    if constraints.num_tokens is not None:
        forbidden |= ids >= constraints.num_tokens
    logps = jnp.where(forbidden, -jnp.inf, logps)
    if constraints.no_repeat_ngram:
        logps = _without_repeats(logps, state, step, constraints.no_repeat_ngram)
    return logps


def _without_repeats(
    logps: Float[Array, "B K V"], state: State, step: Any, size: int
) -> Float[Array, "B K V"]:
    tokens = state.running.tokens
    rows, beams, capacity = tokens.shape
    width = state.prompt_tokens.shape[1]
    # Prompt and continuation without the padding between them; then size - 1 places more.
    prompt = jnp.broadcast_to(state.prompt_tokens[:, None], (rows, beams, width))
    places = jnp.arange(width + capacity)[None, None]
    length = state.prompt_lengths[:, None, None]
    source = jnp.where(places < length, places, places - length + width)
    source = jnp.broadcast_to(source, (rows, beams, width + capacity))
    text = jnp.concatenate([prompt, tokens], axis=2)
    text = jnp.take_along_axis(text, jnp.minimum(source, width + capacity - 1), axis=2)
    end = length + step
    starts = jnp.arange(width + capacity - size + 1)
    repeats = starts[None, None] + size <= end
    for i in range(size - 1):
        last = jnp.take_along_axis(
            text, jnp.maximum(end - size + 1 + i, 0) + 0 * tokens[..., :1], 2
        )
        repeats &= text[..., i : i + len(starts)] == last
    banned = jnp.where(repeats, text[..., size - 1 :], logps.shape[-1])  # the last: dropped
    row, beam = jnp.ogrid[:rows, :beams]
    return logps.at[row[..., None], beam[..., None], banned].set(-jnp.inf, mode="drop")
