"""How far a policy has left its reference: implicit rewards, measured while it trains.

On fixed held-out pairs, and on what the policy itself says to their prompts. Policy and
reference are asked for whole distributions, so that an expectation under the reference is
exact (2404.12358, Eq. 16). Left out: when a measurement is due (`train`), and what the
records say (`analysis.trajectories`).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdpo import InputError, decoding, pythia, qfunction, sharding
from jaxdpo.analysis.trajectories import PARTS, SIDES
from jaxdpo.batching import Batch, Batches, prefetch
from jaxdpo.completions import memory, rows_of
from jaxdpo.pythia_cache import decoding_params
from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.records import Record
from jaxdpo.scored_logps import chunk_size
from jaxdpo.tokens import TokenStore
from jaxdpo.train import put_batch

FIRST = 3  # tokens: how a response opens
ROWS = 8  # pairs whose whole distributions exist at a time


class States(NamedTuple):
    """What two models say at scored positions, in nats."""

    policy_logps: Any  # of the target
    reference_logps: Any
    expected: Any  # of log pi/pi_ref, under the reference
    kl: Any  # KL(pi_ref || pi), by another route


class Response(NamedTuple):
    """The implicit rewards of a response's tokens, and whether the last is an end token."""

    rewards: np.ndarray
    ended: bool


@dataclasses.dataclass(frozen=True)
class Drift:
    """What is measured: the pairs of `store`, and one sample of the policy for each prompt.

    The reference's parameters are needed while it measures, and only then.
    """

    model: PythiaConfig
    mesh: Mesh
    store: TokenStore
    constraints: decoding.Constraints  # of a sample
    beta: float
    seed: int
    batch_size: int  # prompts that are sampled from together, about

    def record(self, step: int, policy: Any, reference: Any) -> Record:
        """The numbers of one measurement; one that is not finite is None.

        For WHO of chosen, rejected and samples, means over the pairs: `rewards/WHO`, beta
        log pi/pi_ref of the response, its standard error `errors/WHO`, its parts
        `rewards/WHO/PART` (first three tokens, middle, end token), `lengths/WHO` in tokens.
        Of chosen and rejected also `logps/WHO`; at a state, on average, the expected log-ratio
        under the reference, `expected/WHO`, and `kl/WHO`, KL(reference || policy), of which
        Eq. 16 says that they sum to zero (`residual` is the largest sum); and
        `expected_rewards/WHO`, beta times the sum of the former over a response: what one that
        the reference itself had drawn would earn at these states. Of pairs, `rewards/margins`
        (and `margins_per_token`, each response divided by its length), `rewards/averages` of
        chosen and rejected, and `rewards/accuracies`. `ended/samples` is a share.
        """
        states = self._states(policy, reference)
        values = {"residual": np.abs(states.expected + states.kl).max()}
        said = {}
        for side, who in enumerate(SIDES):
            responses = States(*(self._of_responses(flat)[side] for flat in states))
            said[who] = self._rewarded(side, responses)
            values |= _of_states(who, responses, self.beta)
        said["samples"] = self._samples(step, policy, reference)
        for who, responses in said.items():
            values |= _of_rewards(who, responses)
        values |= _of_pairs(said["chosen"], said["rejected"])
        values["ended/samples"] = np.mean([response.ended for response in said["samples"]])
        finite = {name: float(x) if math.isfinite(x) else None for name, x in values.items()}
        return {"step": step, "pairs": len(self.store), "beta": self.beta} | finite

    def _states(self, policy: Any, reference: Any) -> States:
        """Values of every scored token, flat, as `store.scored_offsets` say."""
        parts = sharding.row_parts(self.mesh)
        batches = Batches(self.store, batch_size=rows_of(self.mesh, ROWS), parts=parts)
        found = []
        for batch in prefetch(batches, 0, len(batches)):
            placed = put_batch(batch, self.mesh)
            values = states(self.model, policy, reference, placed)
            values, slots = sharding.fetched((values, placed.slots))
            found.append([x[slots >= 0] for x in values])
        return States(*(np.concatenate(x).astype(np.float64) for x in zip(*found, strict=True)))

    def _of_responses(self, flat: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Values of scored tokens, split into those of each chosen and each rejected response."""
        starts, chosen = self.store.scored_offsets[:-1], self.store.lengths[:, 1]
        each = np.split(flat, np.column_stack([starts, starts + chosen]).ravel()[1:])
        return each[0::2], each[1::2]

    def _rewarded(self, side: int, responses: States) -> list[Response]:
        last = [self.store[index][1 + side][-1] for index in range(len(self.store))]
        ended = np.isin(last, self.constraints.eos_ids).tolist()
        logps = zip(responses.policy_logps, responses.reference_logps, strict=True)
        rewards = [self.beta * (policy - reference) for policy, reference in logps]
        return list(map(Response, rewards, ended))

    def _samples(self, step: int, policy: Any, reference: Any) -> list[Response]:
        models = (
            decoding.LM(*decoding_params(self.model, params, self.mesh))
            for params in (policy, reference)
        )
        found = decoding.sample(
            decoding.WithReference(*models),
            [self.store[index].prompt.tolist() for index in range(len(self.store))],
            self.constraints,
            key=jax.random.fold_in(jax.random.key(self.seed), step),
            batch_size=rows_of(self.mesh, self.batch_size),
            mesh=self.mesh,
            memory_limit=memory(self.mesh),
        )
        return [Response(one.implicit_rewards(self.beta), one.ended) for [one] in found]


@functools.partial(jax.jit, static_argnums=0)
def states(model: PythiaConfig, policy: Any, reference: Any, batch: Batch) -> States:
    """Both models at the scored positions of a batch, [B, S] each.

    Their logits exist for as many positions at a time as `model.logits_memory` holds of both.
    """
    parts, chunk = _chunks(model, batch)
    hidden = (_predicting(model, params, batch) for params in (policy, reference))
    tables = policy["unembedding"], reference["unembedding"]

    def of_chunk(chunk):
        *hidden, targets = chunk
        ours, theirs = map(qfunction.logits, hidden, tables)
        logps = (_taken(jax.nn.log_softmax(z), targets) for z in (ours, theirs))
        expected = qfunction.expected_log_ratios(ours, theirs)
        return States(*logps, expected, qfunction.kl_divergences(theirs, ours))

    chunks = tuple(_split(x, parts, chunk) for x in (*hidden, batch.targets))
    found = States(*(x.swapaxes(0, 1).reshape(parts, -1) for x in jax.lax.map(of_chunk, chunks)))
    shape = batch.targets.shape
    return States(*(x[:, : math.prod(shape) // parts].reshape(shape) for x in found))


def _predicting(model: PythiaConfig, params: Any, batch: Batch) -> jax.Array:
    hidden = pythia.hidden_states(
        model, params, batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids
    )
    return qfunction.scored_hidden(hidden, batch.scored_positions)


def _taken(values: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, targets[..., None], axis=-1)[..., 0]


def _chunks(model: PythiaConfig, batch: Batch) -> tuple[int, int]:
    """Into how many parts devices split the rows, and how many positions of each are a chunk."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.gcd(mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1), len(batch.targets))
    vocabulary = model.vocab_size // mesh.shape.get("tensor", 1)
    positions, both = batch.targets.size // parts, 2 * vocabulary
    return parts, chunk_size(positions, both, model.logits_memory)


def _split(x: jax.Array, parts: int, chunk: int) -> jax.Array:
    """[B, S, ...] -> [chunks, parts, chunk, ...]: a device keeps its rows."""
    x = x.reshape(parts, -1, *x.shape[2:])
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(parts, -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def first_pairs(store: TokenStore, count: int) -> TokenStore:
    """The first `count` examples of a store; `InputError` where it has fewer."""
    if count > len(store):
        raise InputError(f"{count} are more than the {len(store)} held-out pairs; give fewer")
    return dataclasses.replace(
        store,
        starts=store.starts[:count],
        lengths=store.lengths[:count],
        lines=store.lines[:count],
    )


def parts(response: Response) -> tuple[float, float, float]:
    """The sums of a response's rewards: its first three tokens, the middle, its end token.

    An end token belongs to the end alone; a response that was cut has none.

    >>> parts(Response(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), ended=True))
    (6.0, 9.0, 6.0)
    >>> parts(Response(np.array([1.0, 2.0]), ended=True))
    (1.0, 0.0, 2.0)
    """
    rewards = response.rewards.astype(np.float64)
    end = len(rewards) - response.ended
    first = min(FIRST, end)
    return tuple(float(part.sum()) for part in np.split(rewards, [first, end]))


def _of_rewards(who: str, responses: Sequence[Response]) -> dict[str, float]:
    sums = _sums([response.rewards for response in responses])
    split = np.mean([parts(response) for response in responses], axis=0)
    return {
        f"rewards/{who}": sums.mean(),
        f"errors/{who}": _standard_error(sums),
        **{f"rewards/{who}/{part}": x for part, x in zip(PARTS, split, strict=True)},
        f"lengths/{who}": np.mean([len(response.rewards) for response in responses]),
    }


def _of_pairs(chosen: Sequence[Response], rejected: Sequence[Response]) -> dict[str, float]:
    """Chosen minus rejected reward, whole and per token of each; how often above zero; average."""
    sums, means = (
        np.array([[x(r.rewards, dtype=np.float64) for r in side] for side in (chosen, rejected)])
        for x in (np.sum, np.mean)
    )
    margins, averages = sums[0] - sums[1], sums.mean(axis=0)
    return {
        "rewards/averages": averages.mean(),
        "errors/averages": _standard_error(averages),
        "rewards/margins": margins.mean(),
        "errors/margins": _standard_error(margins),
        "rewards/margins_per_token": (means[0] - means[1]).mean(),
        "rewards/accuracies": (margins > 0).mean(),
    }


def _of_states(who: str, responses: States, beta: float) -> dict[str, float]:
    return {
        f"logps/{who}": _sums(responses.policy_logps).mean(),
        f"expected/{who}": np.concatenate(responses.expected).mean(),
        f"kl/{who}": np.concatenate(responses.kl).mean(),
        f"expected_rewards/{who}": beta * _sums(responses.expected).mean(),
    }


def _sums(values: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([x.sum(dtype=np.float64) for x in values])


def _standard_error(values: np.ndarray) -> float:
    return values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf
