"""Log-probabilities of targets without all logits: a chunk of positions at a time, on any mesh.

Logits are the largest array of a step, V numbers for every scored position, and a position
needs of them two: its target's and their log-sum-exp. So they exist for one chunk of positions,
are forgotten, and are multiplied again in the backward pass; but where those of all positions
fit into the memory given, they are kept and not multiplied again.

On a mesh in context (`jax.set_mesh`, the axes of `sharding`) each device takes its own rows and
its own part of the vocabulary. The unembedding is gathered over `fsdp` once, in the dtype of the
products; the devices along `tensor` exchange three numbers a position and, in the backward pass,
sum the gradient of the hidden states; the gradient of the unembedding is summed over all chunks
before it is scattered over `fsdp` and summed over `data`. Without such a mesh, or where rows are
split by hand (`shard_map`), nothing is exchanged.

Left out: what the numbers mean (`qfunction`).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxdpo import InputError

_AXES = {"data", "fsdp", "tensor"}
_ROWS, _TABLE, _GATHERED = P(("data", "fsdp")), P("tensor", "fsdp"), P("tensor")
_LOGITS = P(("data", "fsdp"), "tensor")
_MULTIPLE = 16  # of positions in a chunk: rows of a tile


class _Plan(NamedTuple):
    """What is settled before anything is traced: where the work lies, and in what chunks."""

    mesh: Any  # None: one device, or XLA's own choice
    chunk: int  # positions whose logits exist at a time, on one device
    kept: bool  # for the backward pass; then there is one chunk


@functools.partial(jax.jit, static_argnames="logits_memory")
def target_logps(
    hidden: Float[Array, "B S D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    *,
    logits_memory: int,
) -> Float[Array, "B S"]:
    """What `qfunction.token_logps` says; the width must divide `fsdp`, the vocabulary `tensor`.

    >>> hidden, table = jnp.zeros((1, 2, 3)), jnp.ones((4, 3))
    >>> found = target_logps(hidden, table, jnp.array([[0, 4]]), logits_memory=1)
    >>> [f"{logp:.4f}" for logp in found[0]]  # -log 4; there is no token 4
    ['-1.3863', 'nan']
    """
    mesh, rows = jax.sharding.get_abstract_mesh(), targets.shape[0]
    mesh = mesh if _AXES <= set(mesh.auto_axes) and mesh.size > 1 else None
    parts = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
    vocabulary = unembedding.shape[0] // (mesh.shape["tensor"] if mesh else 1)
    positions = -(-rows // parts) * targets.shape[1]
    chunk = chunk_size(positions, vocabulary, logits_memory)
    # Rows that are no multiple of the devices (of an analysis, say) get empty ones beside them.
    hidden, targets = (
        jnp.pad(x, [(0, -rows % parts)] + [(0, 0)] * (x.ndim - 1)) for x in (hidden, targets)
    )
    plan = _Plan(mesh, chunk, chunk >= positions)
    return _target_logps(plan, hidden, unembedding, targets)[:rows]


def chunk_size(positions: int, vocab_size: int, logits_memory: int) -> int:
    """How many of the positions take their float32 logits into `logits_memory` MiB at a time.

    All of them if they fit, or else as many as make the fewest chunks of one size. Raises
    `InputError` where one position's do not fit.

    >>> chunk_size(2000, 2**18, 512), chunk_size(2000, 2**18, 2000)
    (512, 2000)
    """
    fitting = logits_memory * 2**20 // (4 * vocab_size)
    if not fitting:
        raise InputError(
            f"logits_memory={logits_memory} MiB: one position's logits of {vocab_size} tokens take "
            f"{4 * vocab_size / 2**20:.2f}; give at least {math.ceil(4 * vocab_size / 2**20)}"
        )
    if positions <= fitting:
        return positions
    multiple = min(_MULTIPLE, fitting)
    chunks = math.ceil(positions / (fitting // multiple * multiple))
    return math.ceil(positions / chunks / multiple) * multiple


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _target_logps(plan, hidden, unembedding, targets):
    return _forward(plan, hidden, unembedding, targets)[0]


def _forward(plan, hidden, unembedding, targets):
    local = functools.partial(_local_forward, plan, unembedding.shape[0])
    residuals = (_ROWS, _GATHERED, _LOGITS if plan.kept else None)
    run = _on(plan.mesh, local, (_ROWS, _TABLE, _ROWS), (_ROWS, residuals))
    logps, residuals = run(hidden, unembedding, targets)
    return logps, (hidden, unembedding, targets, *residuals)


def _backward(plan, residuals, cotangents):
    hidden, unembedding, targets, normalisers, table, logits = residuals
    rows = (hidden, targets, normalisers, cotangents)
    places = ((_ROWS,) * len(rows), _GATHERED, _LOGITS if plan.kept else None)
    run = _on(plan.mesh, functools.partial(_local_backward, plan), places, (_ROWS, _TABLE))
    of_hidden, of_unembedding = run(rows, table, logits)
    return of_hidden, of_unembedding.astype(unembedding.dtype), None


_target_logps.defvjp(_forward, _backward)


def _on(mesh, function, in_specs, out_specs):
    if mesh is None:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _local_forward(plan, vocab_size, hidden, unembedding, targets):
    """A device's log-probabilities, and its normalisers, gathered unembedding and kept logits."""
    table = unembedding.astype(hidden.dtype)
    if _split(plan, "fsdp"):
        table = jax.lax.all_gather(table, "fsdp", axis=1, tiled=True)
    if plan.kept:
        found, logits = _read(plan, table, _flat(hidden), _flat(targets))
    else:
        chunks = (_chunks(hidden, plan.chunk), _chunks(targets, plan.chunk))
        found, logits = jax.lax.map(lambda chunk: _read(plan, table, *chunk)[0], chunks), None
    top, total, chosen = (x.reshape(-1)[: targets.size].reshape(targets.shape) for x in found)
    if _split(plan, "tensor"):
        highest = jax.lax.pmax(top, "tensor")
        sums = jnp.stack([total * jnp.exp(top - highest), chosen])
        top, (total, chosen) = highest, jax.lax.psum(sums, "tensor")
    normalisers = top + jnp.log(total)
    known = (targets >= 0) & (targets < vocab_size)
    return jnp.where(known, chosen, jnp.nan) - normalisers, (normalisers, table, logits)


def _read(plan, table, hidden, targets):
    """Of a chunk's logits the largest, the sum of exponentials below it, and the target's."""
    z = _product(hidden, table, 1, 1)
    top = z.max(axis=-1)
    total = jnp.exp(z - top[:, None]).sum(axis=-1)
    here = z.at[jnp.arange(len(z)), targets - _first_token(plan, table)]
    chosen = here.get(mode="fill", fill_value=0.0, wrap_negative_indices=False)
    return (top, total, chosen), z


def _local_backward(plan, rows, table, logits):
    """A device's gradients of its hidden states and of its part of the unembedding."""
    hidden = rows[0]

    def add(of_table, chunk):
        of_hidden, more = _gradients(plan, table, *chunk, _product(chunk[0], table, 1, 1))
        return of_table + more, of_hidden

    if plan.kept:
        of_hidden, of_table = _gradients(plan, table, *map(_flat, rows), logits)
    else:
        nothing = jnp.zeros(table.shape, jnp.float32)
        of_table, of_hidden = jax.lax.scan(
            add, nothing, tuple(_chunks(x, plan.chunk) for x in rows)
        )
    of_hidden = of_hidden.reshape(-1, hidden.shape[-1])[: len(_flat(hidden))].reshape(hidden.shape)
    if _split(plan, "tensor"):
        of_hidden = jax.lax.psum(of_hidden, "tensor")
    if _split(plan, "fsdp"):
        # By its rows, which tiles of 128 columns would otherwise pad, several times over on a TPU.
        of_table = jax.lax.psum_scatter(of_table.T, "fsdp", scatter_dimension=0, tiled=True).T
    if _split(plan, "data"):
        of_table = jax.lax.psum(of_table, "data")
    return of_hidden.astype(hidden.dtype), of_table


def _gradients(plan, table, hidden, targets, normalisers, cotangents, z):
    """What a chunk's logits give to the gradients of hidden states and unembedding."""
    probabilities = jnp.exp(z - normalisers[:, None])
    tokens = jax.lax.broadcasted_iota(targets.dtype, z.shape, 1)
    chosen = tokens == (targets - _first_token(plan, table))[:, None]
    # In float32: near one, a probability in bfloat16 says little of what is left of it.
    of_logits = jnp.where(chosen, 1.0 - probabilities, -probabilities) * cotangents[:, None]
    of_logits = of_logits.astype(table.dtype)
    return _product(of_logits, table, 1, 0), _product(of_logits, hidden, 0, 0)


def _split(plan, axis):
    return plan.mesh is not None and plan.mesh.shape[axis] > 1  # XLA keeps exchanges with oneself


def _first_token(plan, table):
    """The first token of a device's part of the vocabulary."""
    return jax.lax.axis_index("tensor") * table.shape[0] if _split(plan, "tensor") else 0


def _product(x, y, x_axis, y_axis):
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _flat(x):
    return x.reshape(-1, *x.shape[2:])


def _chunks(x, chunk):
    """[B, S, ...] -> [chunks, chunk, ...], the last one filled up with zeros."""
    x = _flat(x)
    missing = -len(x) % chunk
    x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunk, *x.shape[1:])
