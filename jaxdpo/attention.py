"""Attention over rows of several pairs with branches: who sees whom, and what computes it.

A row may hold several segments, and a segment a prompt with several responses. Three programs
compute the same, none of which keeps a `[B, N, T, T]` array for the backward pass:

- "blocks", on any backend: blocks of queries against the keys that they can see, forward and
  backward by hand. The mask of a block is compared together from the ids when it is needed,
  scores are computed again in the backward pass, and keys after a block, or more than `span`
  before it, are never multiplied. On a CPU it takes half the time of
  `jax.nn.dot_product_attention`, which multiplies all of T x T.
- "cudnn", on GPUs, in bfloat16 and float16: cuDNN's flash kernel, behind
  `jax.nn.dot_product_attention`. It knows no branches, so it is given the mask, one boolean for
  all heads.
- "splash", on TPUs: JAX's Pallas kernel. It compares segment ids, which cannot say that a
  prompt is seen by both branches, so it runs twice, once for the rows without their rejected
  responses and once without the chosen ones: the time of its sequences apart, in attention
  only. Blocks of keys beyond `span` are skipped.

Left out: attention to a cache (`pythia_cache`).
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

IMPLEMENTATIONS = ("blocks", "cudnn", "splash")
SAVED = "attention"
"""The name under which a rematerialisation policy finds what attention's backward pass needs."""

_LANES = 128  # of a TPU: positions come in multiples of it there
_BLOCK = 128  # queries
_NEVER = -1e30  # a score whose exponential is zero


def fastest(platform: str, *, dtype: str, head_width: int) -> str:
    """The implementation to take on a platform ("cpu", "gpu", "tpu").

    cuDNN wants half precision and heads of at most 128 numbers, a multiple of 8.

    >>> [fastest(on, dtype="bfloat16", head_width=80) for on in ("cpu", "gpu", "tpu")]
    ['blocks', 'cudnn', 'splash']
    """
    if platform == "tpu":
        return "splash"
    fits = dtype in ("bfloat16", "float16") and head_width <= 128 and head_width % 8 == 0
    return "cudnn" if platform in ("gpu", "cuda") and fits else "blocks"


def fault(
    implementation: str, *, dtype: str, num_heads: int, head_width: int, num_rows: int = 1
) -> str:
    """What is wrong with an implementation on the devices at hand; empty: nothing.

    It may be missing, or not take these shapes, or give another result than "blocks" does for
    random rows of three pairs: output and gradients may differ by 1e-5 of the largest number in
    float32, and by 3e-2 in half precision.

    >>> fault("blocks", dtype="float32", num_heads=1, head_width=8)
    ''
    """
    # Three blocks of a TPU's kernel, one of which is out of sight of another.
    segments, branches = np.zeros((2, num_rows, 384), np.int32)
    for segment, (start, end) in enumerate(((0, 120), (120, 230), (230, 350)), 1):
        segments[:, start:end] = segment
        branches[:, end - 50 : end] = np.repeat([1, 2], 25)
    real, ids = (segments > 0)[:, :, None, None], (jnp.asarray(segments), jnp.asarray(branches))
    shape = (4, num_rows, 384, num_heads, head_width)
    *heads, weights = jax.random.normal(jax.random.key(0), shape, dtype)

    def results(how, heads):
        of = lambda *heads: attend(*heads, *ids, span=128, implementation=how) * real
        out, pull_back = jax.vjp(of, *heads)
        return out, *pull_back(weights)

    run = jax.jit(results, static_argnums=0)
    try:
        with jax.default_matmul_precision("highest"):
            found, expected = run(implementation, heads), run("blocks", heads)
        errors = [_relative(x, y) for x, y in zip(found, expected, strict=True)]
    except Exception as error:  # a kernel's complaints are of any class
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    allowed = 1e-5 if dtype == "float32" else 3e-2
    return "" if max(errors) <= allowed else f"differs by {max(errors):.1e} of the largest number"


def _relative(x: Array, y: Array) -> float:
    x, y = (np.asarray(z, np.float32) for z in (x, y))
    return float(np.abs(x - y).max() / np.abs(y).max())


def attention_mask(
    segment_ids: Int[Array, "B T"], branch_ids: Int[Array, "B T"]
) -> Bool[Array, "B T T"]:
    """Whether query q (second axis) may attend to key k (last axis).

    True where k <= q, both are of one segment, and k is prompt or of q's branch. A token
    always sees itself, so no row of the softmax is empty, padding included.

    >>> branches = jnp.array([[0, 1, 2]])  # prompt, chosen, rejected
    >>> attention_mask(jnp.ones((1, 3), int), branches)[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    whole = slice(0, segment_ids.shape[1])
    return _visible(segment_ids, branch_ids, whole, whole)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    segment_ids: Int[Array, "B T"],
    branch_ids: Int[Array, "B T"],
    *,
    span: int | None = None,
    implementation: str = "blocks",
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v over the keys that `attention_mask` admits, softmax in float32.

    No segment may be longer than `span` (None: than the row), or its tokens lose sight of its
    beginning. What padding gets is finite, and differs between implementations. "splash" pads
    rows to a multiple of 128 positions.

    >>> row, ids = jnp.ones((1, 3, 1, 2)), jnp.array([[1, 1, 1]])
    >>> attend(row, row, row, ids, ids * 0).shape
    (1, 3, 1, 2)
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r}: must be one of {IMPLEMENTATIONS}")
    span = min(span or q.shape[1], q.shape[1])
    if implementation == "cudnn":
        mask = attention_mask(segment_ids, branch_ids)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    # Heads before positions, as both of the others multiply them.
    by_head = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    attended = _splash if implementation == "splash" else _blocks
    return jnp.moveaxis(attended(*by_head, segment_ids, branch_ids, span), 1, 2)


def _visible(segment_ids: Array, branch_ids: Array, queries: slice, keys: slice) -> Array:
    """The part of the mask [B, queries, keys] of these positions."""
    segments, branches = segment_ids[:, keys][:, None], branch_ids[:, keys][:, None]
    same_segment = segment_ids[:, queries][..., None] == segments
    same_branch = branch_ids[:, queries][..., None] == branches
    earlier = np.arange(queries.start, queries.stop)[:, None] >= np.arange(keys.start, keys.stop)
    return same_segment & (same_branch | (branches == 0)) & earlier[None]


def _tiles(length: int, span: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that it can see; keys start at whole vectors."""
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        first = max(0, start - span + 1)
        yield slice(start, stop), slice(first - first % 16, stop)


def keys_per_row(length: int, span: int | None = None) -> int:
    """How many products of a query with a key "blocks" makes for a row of so many positions.

    >>> keys_per_row(512), keys_per_row(512, span=100)  # 128 x (128 + 256 + 384 + 512); a part
    (163840, 108544)
    """
    tiles = _tiles(length, min(span or length, length))
    return sum((q.stop - q.start) * (k.stop - k.start) for q, k in tiles)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocks(q, k, v, segment_ids, branch_ids, span):
    return _blocks_forward(q, k, v, segment_ids, branch_ids, span)[0]


def _blocks_forward(q, k, v, segment_ids, branch_ids, span):
    scaled, outs, normalisers = _scaled(q), [], []
    for queries, keys in _tiles(q.shape[2], span):
        mask = _visible(segment_ids, branch_ids, queries, keys)
        scores = _product("bnqh,bnkh->bnqk", scaled[:, :, queries], k[:, :, keys])
        scores = jnp.where(mask[:, None], scores, _NEVER)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        # Normalised after the product, which is H numbers wide and not T.
        mixed = _product("bnqk,bnkh->bnqh", weights.astype(v.dtype), v[:, :, keys]) / total
        outs.append(mixed.astype(v.dtype))
        normalisers.append(highest + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outs, axis=2), SAVED)
    normaliser = checkpoint_name(jnp.concatenate(normalisers, axis=2), SAVED)
    return out, (q, k, v, segment_ids, branch_ids, out, normaliser)


def _blocks_backward(span, residuals, g):
    q, k, v, segment_ids, branch_ids, out, normaliser = residuals
    scale, scaled, dq = 1 / math.sqrt(q.shape[-1]), _scaled(q), []
    dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    # What the softmax's own normalisation takes off every score's gradient.
    off = jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)
    for queries, keys in _tiles(q.shape[2], span):
        mask = _visible(segment_ids, branch_ids, queries, keys).swapaxes(1, 2)
        block, given, turned = scaled[:, :, queries], g[:, :, queries], (*range(2), 3, 2)
        # Keys before queries: as two of three products want it; and what looked like the forward
        # pass's own scores XLA would take from there, and keep them.
        scores = jnp.where(mask[:, None], _product("bnkh,bnqh->bnkq", k[:, :, keys], block), _NEVER)
        weights = jnp.exp(scores - normaliser[:, :, queries].transpose(turned))
        to_weights = _product("bnkh,bnqh->bnkq", v[:, :, keys], given)
        to_scores = weights * (to_weights - off[:, :, queries].transpose(turned))
        weights, to_scores = weights.astype(v.dtype), to_scores.astype(q.dtype)
        dq.append(_product("bnkq,bnkh->bnqh", to_scores, k[:, :, keys]) * scale)
        dk = dk.at[:, :, keys].add(_product("bnkq,bnqh->bnkh", to_scores, block))
        dv = dv.at[:, :, keys].add(_product("bnkq,bnqh->bnkh", weights, given))
    gradients = (jnp.concatenate(dq, axis=2), dk, dv)
    return *(x.astype(q.dtype) for x in gradients), None, None


def _scaled(q):
    # The scale itself would be rounded in bfloat16; and both passes must have the same scores.
    return (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype)


def _product(axes, a, b):
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _splash(q, k, v, segment_ids, branch_ids, span):
    """The Pallas kernel on each device's rows and heads: XLA cannot split a kernel itself."""
    if not {"data", "fsdp", "tensor"} <= set(jax.sharding.get_abstract_mesh().auto_axes):
        return _splash_of_rows(q, k, v, segment_ids, branch_ids, span)
    rows = P(("data", "fsdp"))
    heads = P(("data", "fsdp"), "tensor")
    local = functools.partial(_splash_of_rows, span=span)
    places = dict(in_specs=(heads, heads, heads, rows, rows), out_specs=heads)
    # Kernels say nothing about which axes their results vary over.
    return jax.shard_map(local, **places, check_vma=False)(q, k, v, segment_ids, branch_ids)


def _splash_of_rows(q, k, v, segment_ids, branch_ids, span):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, whole = q.shape[1], q.shape[2]
    padding = [(0, 0), (0, -whole % _LANES)]  # of segment 0
    segment_ids, branch_ids = (jnp.pad(ids, padding) for ids in (segment_ids, branch_ids))
    q, k, v = (jnp.pad(x, [(0, 0), *padding, (0, 0)]) for x in (_scaled(q), k, v))
    length = q.shape[2]
    block = math.gcd(length, 4 * _LANES)
    sizes = splash.BlockSizes(*[block] * 6, use_fused_bwd_kernel=True)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.LocalMask((length, length), (span - 1, 0), 0)] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
    )

    def without(branch):  # what is of that branch is a segment of its own
        ids = 2 * segment_ids + (branch_ids == branch)
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(ids, ids))

    rejected = (branch_ids == 2)[:, None, :, None]
    return jnp.where(rejected, without(1), without(2))[:, :, :whole]
