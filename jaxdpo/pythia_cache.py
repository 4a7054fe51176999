"""The model one token at a time: a prompt is run once, then K beams grow out of it.

Every key and value is stored once, as a node of a pool, where it stays: a beam is a row that
says which nodes are its ancestors, and choosing beams anew moves these rows of booleans and
nothing else. The prompt's nodes serve all beams. Left out: what is chosen (`decoding`).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxdpo import sharding
from jaxdpo.attention import attention_mask
from jaxdpo.pythia import Pythia, rotary_angles, unembed, unstack_layers
from jaxdpo.pythia_config import PythiaConfig


class Pool(NamedTuple):
    """Keys and values of R nodes for each of B prompts, one array per layer.

    Each of the BN heads of prompts is a matrix, which is how the products read them: in any
    other order, or with a batch axis of its own, XLA copies the pool at every step. Which node
    stands where says nothing: the rotary position went into the key when it was written.
    """

    keys: tuple[Float[Array, "BN H R"], ...]
    values: tuple[Float[Array, "BN R H"], ...]
    visible: Bool[Array, "B K R"]  # the nodes that are a beam's prompt or its own tokens
    positions: Int[Array, " B"]  # of the next token


@dataclasses.dataclass(frozen=True)
class CachedPythia:
    """The model as decoding sees it: `prefill`, then `extend` and `reorder` in turns.

    It is static: equal configurations share compiled programs. Parameters are those that
    `decoding_params` returns. `room` is the number of free nodes at the end of the pool.

    >>> config = PythiaConfig(vocab_size=7, num_layers=1, num_heads=1, width=8, mlp_width=8)
    >>> from jaxdpo.pythia import init_params
    >>> model, params = CachedPythia(config), init_params(config, jax.random.key(0))
    >>> prompt, length = jnp.array([[3, 1, 0]]), jnp.array([2])  # right-padded
    >>> logits, pool = model.prefill(params, prompt, length, num_beams=2, room=4)
    >>> logits.shape, pool.keys[0].shape
    ((1, 7), (1, 8, 7))
    >>> logits, pool = model.extend(params, pool, jnp.array([[5, 6]]), room=4)
    >>> logits.shape
    (1, 2, 7)
    """

    config: PythiaConfig

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        return self.config.max_positions

    def prefill(
        self,
        params: dict[str, Any],
        tokens: Int[Array, "B P"],
        lengths: Int[Array, " B"],
        *,
        num_beams: int,
        room: int,
    ) -> tuple[Float[Array, "B V"], Pool]:
        """Logits after each prompt, in float32, and the pool that holds it.

        Prompts are padded on the right, so that neither a position nor a mask depends on
        the other prompts of the batch.
        """
        model, (rows, width) = self._bound(params), tokens.shape
        at = jnp.arange(width)[None]
        real = at < lengths[:, None]
        mask = attention_mask(real.astype(jnp.int32), jnp.zeros_like(tokens))[:, None]
        angles = rotary_angles(at, self.config.rotary_width, self.config.rotary_base)
        x, keys, values = model.embed(tokens), [], []
        for layer in model.layers:
            q, k, v = layer.queries_keys_values(x, *angles)
            x = layer.after_attention(x, jax.nn.dot_product_attention(q, k, v, mask=mask))
            keys.append(jnp.pad(_as_keys(k), [(0, 0), (0, 0), (0, room)]))
            values.append(jnp.pad(_as_rows(v), [(0, 0), (0, room), (0, 0)]))
        visible = jnp.pad(real, [(0, 0), (0, room)])[:, None]
        visible = jnp.broadcast_to(visible, (rows, num_beams, width + room))
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        logits = unembed(model.final_norm(last), params["unembedding"])
        return logits, Pool(tuple(keys), tuple(values), visible, lengths)

    def extend(
        self, params: dict[str, Any], pool: Pool, tokens: Int[Array, "B K"], *, room: Any
    ) -> tuple[Float[Array, "B K V"], Pool]:
        """Logits after one more token of every beam, in float32, and the grown pool.

        The K new nodes take the first K of the `room` free ones.
        """
        model, (_, num_beams) = self._bound(params), tokens.shape
        first = pool.visible.shape[-1] - jnp.asarray(room, jnp.int32)
        own = jnp.broadcast_to(
            jnp.eye(num_beams, dtype=bool), pool.visible.shape[:2] + (num_beams,)
        )
        visible = _written(pool.visible, own, first, axis=2)
        angles = rotary_angles(
            pool.positions[:, None], self.config.rotary_width, self.config.rotary_base
        )
        x, keys, values = model.embed(tokens), [], []
        for layer, k_old, v_old in zip(model.layers, pool.keys, pool.values, strict=True):
            q, k, v = layer.queries_keys_values(x, *angles)
            keys.append(_written(k_old, _as_keys(k), first, axis=2))
            values.append(_written(v_old, _as_rows(v), first, axis=1))
            x = layer.after_attention(x, _attended(q, keys[-1], values[-1], visible))
        logits = unembed(model.final_norm(x), params["unembedding"])
        return logits, Pool(tuple(keys), tuple(values), visible, pool.positions + 1)

    def reorder(self, pool: Pool, parents: Int[Array, "B K"]) -> Pool:
        """Beam k goes on from where beam `parents[k]` was."""
        return pool._replace(visible=jnp.take_along_axis(pool.visible, parents[..., None], axis=1))

    def num_nodes(self, pool: Pool) -> Int[Array, " B"]:
        """How many nodes of each prompt any beam still goes through."""
        return pool.visible.any(axis=1).sum(axis=-1, dtype=jnp.int32)

    def compact(self, pool: Pool, prompts: Int[Array, " C"], *, num_nodes: int, room: int) -> Pool:
        """The pool of these prompts alone, without the nodes that no beam goes through.

        `num_nodes` must be at least what `num_nodes(pool)` says of each of them.
        """
        visible = pool.visible[prompts]
        dead = ~visible.any(axis=1)
        nodes = jnp.argsort(dead, axis=-1, stable=True)[:, :num_nodes]
        room += num_nodes - nodes.shape[1]  # the pool may also grow

        def taken(whole, axis):
            whole = whole.reshape(len(pool.positions), -1, *whole.shape[1:])[prompts]
            index = nodes[:, None, None] if axis == 3 else nodes[:, None, :, None]
            whole = jnp.take_along_axis(whole, index, axis=axis)
            whole = jnp.pad(whole, [(0, room if i == axis else 0) for i in range(4)])
            return whole.reshape(-1, *whole.shape[2:])

        visible = jnp.take_along_axis(visible, nodes[:, None], axis=2)
        return Pool(
            tuple(taken(k, 3) for k in pool.keys),
            tuple(taken(v, 2) for v in pool.values),
            jnp.pad(visible, [(0, 0), (0, 0), (0, room)]),
            pool.positions[prompts],
        )

    def _bound(self, params: dict[str, Any]) -> Pythia:
        return Pythia(self.config).bind({"params": params})


def _written(whole: Array, part: Array, first: Array, *, axis: int) -> Array:
    starts = [jnp.zeros((), jnp.int32)] * whole.ndim
    starts[axis] = first
    return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), tuple(starts))


def _as_rows(x: Float[Array, "B T N H"]) -> Float[Array, "BN T H"]:
    return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], x.shape[3])


def _as_keys(x: Float[Array, "B T N H"]) -> Float[Array, "BN H T"]:
    return jnp.moveaxis(x, 1, 3).reshape(-1, x.shape[3], x.shape[1])


def _attended(
    q: Float[Array, "B K N H"],
    keys: Float[Array, "BN H R"],
    values: Float[Array, "BN R H"],
    visible: Bool[Array, "B K R"],
) -> Float[Array, "B K N H"]:
    """Attention of every beam to its ancestors among the nodes; softmax in float32.

    A dense product with all nodes, those of other beams masked: K times the arithmetic of
    gathered rows and none of their traffic.
    """
    rows, _, heads, width = q.shape
    q = _as_rows(q) / math.sqrt(width)
    scores = jnp.einsum("xkh,xhr->xkr", q, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, heads, *visible.shape[1:])
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    # Normalised after the product, which is H numbers wide and not R. Left to itself, XLA on
    # a CPU would also multiply in the order that saves the transposition, four times as slow.
    flat = weights.reshape(-1, *weights.shape[2:]).astype(values.dtype)
    mixed = jnp.einsum("xkr,xrh->xkh", flat, values).reshape(*weights.shape[:3], width)
    mixed = mixed / weights.sum(axis=-1, keepdims=True).astype(values.dtype)
    return jnp.moveaxis(mixed, 1, 2)


def decoding_params(
    config: PythiaConfig, params: dict[str, Any], mesh: Mesh | None = None
) -> tuple[CachedPythia, dict[str, Any]]:
    """The model and its parameters as decoding wants them: unstacked, cast, resharded, once.

    Layers are unrolled, because a scan over them copies each layer's part of the pool at
    every step. Parameters are cast to `config.dtype`, split over the mesh's `tensor` axis and
    repeated over the others: gathering them over `fsdp` would cost their size every token.
    What is as it should be is not copied.
    """
    config = dataclasses.replace(config, scan_layers=False, param_dtype=config.dtype, remat="none")
    params = unstack_layers(params) if "layers" in params else params
    params = jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)
    if mesh is not None:
        params = jax.device_put(params, sharding.decoding_shardings(params, mesh))
    return CachedPythia(config), params
