"""The jitted loop under every search: extend the caches, score, let the rule choose, repeat.

Three programs, each compiled once per shape: `start` runs the prompts and chooses the first
token, `segment` goes on for a number of steps with the room that the caches have, `compacted`
keeps the prompts that are not finished and makes new room. Left out: which shapes there are,
and when a prompt leaves (`schedule`); what is chosen (`beam`, `sample`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, Key

from jaxdpo.decoding import scorers
from jaxdpo.decoding.beam import Beams
from jaxdpo.decoding.hypotheses import NEVER, Constraints, State, allowed, empty
from jaxdpo.decoding.sample import Samples
from jaxdpo.decoding.scorers import Scorer, Scores

Rule = Beams | Samples
Prompts = tuple[tuple[Int[Array, "B _"], Int[Array, " B"]], ...]


def _by_rows(function, mesh: Mesh | None, *, whole: int, split: int):
    """Run a function on each device's rows by itself: the first arguments whole, the rest split.

    Prompts have nothing to say to each other, so no device waits for another; parameters
    stay split over `tensor` as they are.
    """
    if mesh is None:
        return function
    rows = P(("data", "fsdp"))
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(P(),) * whole + (rows,) * split,
        out_specs=rows,
        axis_names={"data", "fsdp"},
        check_vma=False,
    )


@functools.partial(jax.jit, static_argnames=("mesh", "room", "capacity"))
def start(
    scorer: Scorer,
    rule: Rule,
    constraints: Constraints,
    prompts: Prompts,
    keys: Key[Array, " B"],
    real: Bool[Array, " B"],
    *,
    mesh: Mesh | None,
    room: int,
    capacity: int,
) -> State:
    """Run the prompts, one for each model of the scorer, and choose the first token.

    Rows that are not `real` are padding. `room` is the number of nodes the caches can grow
    by, `capacity` that of tokens a continuation can have.
    """

    def begun(scorer, rule, constraints, prompts, keys, real):
        given, caches = scorers.prefill(scorer, prompts, num_beams=rule.width, room=room)
        scores, parts = rule.first_scores(len(keys)), 1 + len(given.parts)
        none = empty(scores, parts=parts, capacity=capacity)
        finished = none._replace(scores=jnp.full_like(scores, NEVER))
        state = State(none, finished, real, keys, *prompts[0], caches)
        return _advanced(scorer, rule, constraints, state, given, 0)

    run = _by_rows(begun, mesh, whole=3, split=3)
    return run(scorer, rule, constraints, prompts, keys, real)


@functools.partial(jax.jit, static_argnames=("mesh", "steps"), donate_argnames="state")
def segment(
    scorer: Scorer,
    rule: Rule,
    constraints: Constraints,
    begin: Any,
    until: Any,
    state: State,
    *,
    mesh: Mesh | None,
    steps: int,
) -> State:
    """Go on from `begin` tokens to `until`, at most `steps` more, or to where all is closed.

    The caches must have room for `steps` tokens of every beam.
    """

    def run(scorer, rule, constraints, begin, until, state):
        def goes_on(carry):
            step, state = carry
            return (step < until) & state.open.any()

        def body(carry):
            step, state = carry
            tokens = jax.lax.dynamic_index_in_dim(state.running.tokens, step - 1, 2, False)
            room = (begin + steps - step) * rule.width
            given, caches = scorers.extend(scorer, state.caches, tokens, room=room)
            state = state._replace(caches=caches)
            return step + 1, _advanced(scorer, rule, constraints, state, given, step)

        return jax.lax.while_loop(goes_on, body, (jnp.asarray(begin, jnp.int32), state))[1]

    run = _by_rows(run, mesh, whole=5, split=1)
    return run(scorer, rule, constraints, begin, until, state)


def _advanced(
    scorer: Scorer, rule: Rule, constraints: Constraints, state: State, given: Scores, step: Any
) -> State:
    logps = allowed(given.logps, state, step, constraints)
    state, parents = rule.advance(state, given, logps, step, constraints)
    if parents is None:
        return state
    caches = tuple(
        lm.model.reorder(cache, parents)
        for lm, cache in zip(scorer.models, state.caches, strict=True)
    )
    return state._replace(caches=caches)


@functools.partial(jax.jit, static_argnames=("mesh", "num_nodes", "room"))
def compacted(
    scorer: Scorer,
    state: State,
    keep: Int[Array, " C"],
    real: Bool[Array, " C"],
    *,
    mesh: Mesh | None,
    num_nodes: tuple[int, ...],
    room: int,
) -> State:
    """The prompts at `keep` alone, their caches without dead nodes and with new room.

    `num_nodes` bounds the nodes that a prompt keeps in each cache. Rows that are not `real`
    are padding, and closed.
    """
    caches = tuple(
        lm.model.compact(cache, keep, num_nodes=nodes, room=room)
        for lm, cache, nodes in zip(scorer.models, state.caches, num_nodes, strict=True)
    )
    rest = jax.tree.map(lambda leaf: leaf[keep], state._replace(caches=()))
    state = rest._replace(open=rest.open & real, caches=caches)
    if mesh is None:
        return state
    rows = jax.sharding.NamedSharding(mesh, P(("data", "fsdp")))
    return jax.lax.with_sharding_constraint(state, jax.tree.map(lambda _: rows, state))


@jax.jit
def num_nodes(scorer: Scorer, caches: tuple[Any, ...]) -> tuple[Int[Array, " B"], ...]:
    """How many nodes of each prompt are alive, in each cache."""
    return tuple(lm.model.num_nodes(cache) for lm, cache in zip(scorer.models, caches, strict=True))
