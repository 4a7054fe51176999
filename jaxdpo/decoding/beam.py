"""Beam search, token for token as `transformers` does it; and beam sampling.

Candidates are scored per prompt: nothing here looks across the batch.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdpo import InputError
from jaxdpo.decoding.hypotheses import (
    NEVER,
    Constraints,
    Hypotheses,
    State,
    appended,
    best,
    joined,
)
from jaxdpo.decoding.sample import Warp
from jaxdpo.decoding.scorers import Scores
from jaxdpo.decoding.top_k import top_k


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["length_penalty", "warp"],
    meta_fields=["size", "early_stopping", "length_norm"],
)
@dataclasses.dataclass(frozen=True)
class Beams:
    """Keep the `size` best continuations; a finished one scores sum of logps / length^penalty.

    `length_norm` says what a length is, and whose bookkeeping is followed:

    - "generated": transformers since 4.50. The tokens of the continuation, its end token
      among them.
    - "total": transformers 4.29.2, which the paper's code pinned. The prompt counts, the end
      token does not; a search ends by the best candidate instead of the best that goes on;
      at the limit the surviving beams enter the finished ones.

    Under "total" a long prompt makes the penalty nearly constant: whether more beams give
    longer or shorter text (Fig. 2) depends on this choice. With `length_penalty=0` both
    rank by the sum, as Eq. 13 of 2404.12358 wants.

    `early_stopping`: True ends a prompt when `size` continuations are finished; False when
    no running one could do better at its present length, a heuristic; "never" when none can
    do better at any length up to the limit.

    With a `warp` the candidates are drawn without replacement instead of taken from the
    top: transformers' beam sampling, today's under either `length_norm`. One beam is greedy
    decoding, or with a `warp` sampling, as in transformers.
    """

    size: int
    length_penalty: Any = 1.0
    early_stopping: bool | str = False
    length_norm: str = "generated"
    warp: Warp | None = None

    @property
    def width(self) -> int:
        return self.size

    def check(self, vocab_size: int) -> None:
        """Raise `InputError` for what cannot be searched."""
        if not 1 <= self.size <= vocab_size:
            raise InputError(
                f"beam_size={self.size}: must be between 1 and the {vocab_size} tokens that may "
                "be chosen"
            )
        if not math.isfinite(self.length_penalty):
            raise InputError(f"length_penalty={self.length_penalty}: must be finite")
        if self.early_stopping not in (True, False, "never"):
            raise InputError(f"early_stopping={self.early_stopping!r}: True, False or 'never'")
        if self.length_norm not in ("generated", "total"):
            raise InputError(f"length_norm={self.length_norm!r}: 'generated' or 'total'")
        if self.warp:
            self.warp.check()

    def first_scores(self, rows: int) -> Float[Array, "B K"]:
        """All beams but the first are copies of the prompt, and must not be chosen."""
        return jnp.where(jnp.arange(self.size) > 0, NEVER, 0.0)[None].repeat(rows, axis=0)

    def advance(
        self,
        state: State,
        given: Scores,
        logps: Float[Array, "B K V"],
        step: Any,
        constraints: Constraints,
    ) -> tuple[State, Int[Array, "B K"]]:
        """One more token: the new state, and the beam that each beam goes on from."""
        scores, choices = self._candidates(state, logps, step, constraints)
        grown = appended(state.running, choices, scores, given, step, constraints)
        last = step + 1 == constraints.max_new_tokens
        older = self.length_norm == "total"
        stops = grown.ended if older else grown.ended | last
        running, places = best(grown._replace(scores=scores + NEVER * stops), self.size)
        # An end that is not among the best `size` candidates is thrown away.
        enters = stops & (jnp.arange(scores.shape[1]) < self.size)[None]
        finished = self._merged(state, grown, enters)
        bound = scores.max(axis=1) if older else running.scores[:, 0]
        closed = self._closed(state, finished, bound, step, constraints)
        if older:
            left = jnp.broadcast_to((last & ~closed)[:, None], running.done.shape)
            finished = self._merged(state._replace(finished=finished), running, left)
        parents = jnp.take_along_axis(choices // logps.shape[-1], places, axis=1)
        still = state.open & ~closed & ~last
        return state._replace(running=running, finished=finished, open=still), parents

    def _candidates(self, state, logps, step, constraints):
        """(scores, parent * V + token): more than `size`, so that as many go on as must."""
        count = _num_candidates(self.size, constraints)
        if self.warp:
            logps = self.warp(logps, keep=len(constraints.eos_ids) + 1)
        totals = (state.running.scores[..., None] + logps).reshape(logps.shape[0], -1)
        if self.warp is None:
            return top_k(totals, count)
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, step)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, totals.shape[1:]))(keys)
        choices = top_k(totals + noise, count)[1]  # in the order in which they are drawn
        return jnp.take_along_axis(totals, choices, axis=1), choices

    def _merged(self, state: State, new: Hypotheses, enters: Bool[Array, "B C"]) -> Hypotheses:
        """The best finished continuations, those that enter now among them; a closed prompt's
        are fixed."""
        enters &= state.open[:, None]
        length = new.lengths
        if self.length_norm == "total":
            length = state.prompt_lengths[:, None] + length - new.ended
        scores = new.scores / length.astype(jnp.float32) ** self.length_penalty
        new = new._replace(scores=jnp.where(enters, scores, NEVER), done=enters)
        return best(joined(state.finished, new), self.size)[0]

    def _closed(self, state, finished, bound, step, constraints) -> Bool[Array, " B"]:
        """Whether no running continuation can reach the finished ones any more."""
        penalty = jnp.asarray(self.length_penalty, jnp.float32)
        length = jnp.asarray(step + 1, jnp.float32)
        if self.early_stopping == "never":
            length = jnp.where(penalty > 0, constraints.max_new_tokens, length)
        if self.length_norm == "total":
            length = length + state.prompt_lengths
        full = finished.done.all(axis=1)
        worst = jnp.where(full, finished.scores.min(axis=1), NEVER)
        closed = ~(bound / length**penalty > worst)
        return closed | full if self.early_stopping is True or self.size == 1 else closed


def _num_candidates(size: int, constraints: Constraints) -> int:
    """So many that `size` are left when every end token of every beam is among them.

    One beam keeps one, which makes it greedy decoding (or sampling): it stops at an end.
    """
    return 1 if size == 1 else max(2, 1 + len(constraints.eos_ids)) * size
