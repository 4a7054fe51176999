"""Attention over rows of several pairs with branches: who sees whom, and what computes it.

A row may hold several segments, and a segment a prompt with several responses. Three programs
compute the same, none of which keeps a `[B, N, T, T]` array for the backward pass:

- "blocks", on any backend: blocks of queries against the keys that they can see, forward and
  backward by hand. The mask of a block is compared together from the ids when it is needed, and
  scores are computed again in the backward pass. Keys after a block are never multiplied, nor, but
  for a rest, those before its first query's segment: the program has the block with a few
  widths, and takes at run time the least that will do.
- "cudnn", on GPUs, in bfloat16 and float16: cuDNN's flash kernel, behind
  `jax.nn.dot_product_attention`. It knows no branches, so it is given the mask, one number for
  all heads, and is told that it is causal as well, or it would multiply all keys. (Of `span` it
  is not told: beside a mask it takes a window from version 9.10.2 on only.)
- "splash", on TPUs: JAX's Pallas kernel. It compares segment ids, which cannot say that a
  prompt is seen by both branches, so it runs twice, once for the rows without their rejected
  responses and once without the chosen ones: the time of its sequences apart, in attention
  only. Blocks of keys beyond `span` are skipped.

Left out: attention to a cache (`pythia_cache`).
"""

import functools
import math

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
_BLOCK = 256  # queries, at most
_WIDTHS = 8  # how many numbers of keys a block is compiled for
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
    whole = (segment_ids, branch_ids, np.arange(segment_ids.shape[1]))
    return _visible(whole, whole)


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
    beginning. What padding gets is finite, and differs between implementations.

    >>> row, ids = jnp.ones((1, 3, 1, 2)), jnp.array([[1, 1, 1]])
    >>> attend(row, row, row, ids, ids * 0).shape
    (1, 3, 1, 2)
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r}: must be one of {IMPLEMENTATIONS}")
    span = min(span or q.shape[1], q.shape[1])
    if implementation == "cudnn":
        mask = attention_mask(segment_ids, branch_ids)[:, None]
        how = {"is_causal": True, "implementation": "cudnn"}
        return jax.nn.dot_product_attention(q, k, v, mask=mask, **how)
    # Heads before positions, as both of the others multiply them.
    by_head = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    of_rows = {"splash": _splash, "blocks": _blocks}[implementation]
    on_devices = _on_each_device(functools.partial(of_rows, span=span), q.shape[0])
    return jnp.moveaxis(on_devices(*by_head, segment_ids, branch_ids), 1, 2)


def _on_each_device(of_rows, count: int):
    """The function on each device's own rows and heads: XLA cannot split a kernel itself, and of a
    loop over rows it would make one over everybody's."""
    mesh = jax.sharding.get_abstract_mesh()
    if not {"data", "fsdp", "tensor"} <= set(mesh.auto_axes):
        return of_rows
    if count % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return of_rows  # a row to try a model with
    rows, heads = P(("data", "fsdp")), P(("data", "fsdp"), "tensor")
    places = dict(in_specs=(heads, heads, heads, rows, rows), out_specs=heads)
    # Kernels and loops say nothing about which axes their results vary over.
    return jax.shard_map(of_rows, **places, check_vma=False)


def _visible(queries: tuple, keys: tuple) -> Array:
    """The mask [B, queries, keys]; each by its segments [B, n], branches [B, n] and places [n]."""
    (of_query, branch, place), (segments, branches, places) = queries, keys
    same_branch = (branch[..., None] == branches[:, None]) | (branches == 0)[:, None]
    earlier = place[:, None] >= places[None]
    return (of_query[..., None] == segments[:, None]) & same_branch & earlier[None]


def keys_per_row(
    segment_ids: Int[np.ndarray, "B T"], span: int | None = None
) -> Int[np.ndarray, " B"]:
    """How many products of a query with a key "blocks" makes of each row, on a CPU.

    >>> keys_per_row(np.repeat([[1, 2]], 256, axis=1))  # 2 x 256 x 256, not 512 x 512
    array([131072])
    """
    block, widths = _tiling(segment_ids.shape[1], span)
    return block * np.asarray(widths)[_narrowest(segment_ids, block, widths)].sum(1)


def _tiling(length: int, span: int | None) -> tuple[int, list[int]]:
    """How many queries a block has, and how many keys it may be given, all up to its last query."""
    count = -(-length // _BLOCK)
    block = length if count == 1 else _rounded(-(-length // count))
    most = min(count * block, min(span or length, length) - 1 + block)
    steps = np.linspace(block, most, _WIDTHS).astype(int).tolist()
    return block, sorted({min(_rounded(width), count * block) for width in steps})


def _rounded(number: int) -> int:
    return -(-number // 16) * 16  # whole vectors


def _narrowest(segment_ids, block: int, widths: list[int]):
    """Which of the widths reaches back to the segment of each block's first query, [B, blocks]."""
    first = segment_ids[:, ::block]
    begins = (segment_ids[:, None, :] == first[..., None]).argmax(-1)
    needed = block * np.arange(1, first.shape[1] + 1)[None] - begins
    needed = needed * (first > 0)  # padding may see whatever it gets
    return (needed[..., None] > np.asarray(widths[:-1], int)[None, None]).sum(-1)


def _blocks(q, k, v, segment_ids, branch_ids, span):
    """Over whole blocks: positions are padded with segment 0."""
    block, _ = _tiling(q.shape[2], span)
    padding = [(0, 0), (0, -q.shape[2] % block)]
    ids = (jnp.pad(ids, padding) for ids in (segment_ids, branch_ids))
    heads = (jnp.pad(x, [(0, 0), *padding, (0, 0)]) for x in (q, k, v))
    return _whole_blocks(*heads, *ids, span)[:, :, : q.shape[2]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _whole_blocks(q, k, v, segment_ids, branch_ids, span):
    return _blocks_forward(q, k, v, segment_ids, branch_ids, span)[0]


def _blocks_forward(q, k, v, segment_ids, branch_ids, span):
    def tile(mask, q, k, v):
        scores = jnp.where(mask[:, None], _product("bnqh,bnkh->bnqk", q, k), _NEVER)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        # Normalised after the product, which is H numbers wide and not T.
        mixed = _product("bnqk,bnkh->bnqh", weights.astype(v.dtype), v) / total
        return (mixed.astype(v.dtype), highest + jnp.log(total)), ()

    results, _ = _over_tiles(tile, segment_ids, branch_ids, (_scaled(q),), (k, v), span)
    out, normaliser = (checkpoint_name(x, SAVED) for x in results)
    return out, (q, k, v, segment_ids, branch_ids, out, normaliser)


def _blocks_backward(span, residuals, g):
    q, k, v, segment_ids, branch_ids, out, normaliser = residuals
    scale = 1 / math.sqrt(q.shape[-1])
    # What the softmax's own normalisation takes off every score's gradient.
    off = jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)

    def tile(mask, q, g, normaliser, off, k, v):
        mask, normaliser, off = (x.swapaxes(-2, -1) for x in (mask, normaliser, off))
        # Keys before queries: as three of four products want it; and what looked like the forward
        # pass's own scores XLA would take from there, and keep them.
        scores = jnp.where(mask[:, None], _product("bnkh,bnqh->bnkq", k, q), _NEVER)
        weights = jnp.exp(scores - normaliser)
        to_scores = weights * (_product("bnkh,bnqh->bnkq", v, g) - off)
        weights, to_scores = weights.astype(v.dtype), to_scores.astype(q.dtype)
        dq = _product("bnkh,bnkq->bnhq", k, to_scores).swapaxes(2, 3) * scale
        dk, dv = (_product("bnkq,bnqh->bnkh", *xs) for xs in ((to_scores, q), (weights, g)))
        return (dq.astype(q.dtype),), (dk, dv)

    of_queries = (_scaled(q), g, normaliser, off)
    (dq,), (dk, dv) = _over_tiles(tile, segment_ids, branch_ids, of_queries, (k, v), span)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


def _over_tiles(tile, segment_ids, branch_ids, of_queries, of_keys, span):
    """`tile(mask, *of_queries, *of_keys)` of each block of queries and the keys that it needs.

    All are [B, N, T, ...]. Of what it returns, the first are laid along T as the queries are, the
    second are of the keys, and summed. A block is compiled with a few widths and takes the least
    that will do, row by row; where the start of a kernel costs more than that saves, which is
    not on a CPU, the rows of a block are taken together.
    """
    rows, length = segment_ids.shape
    block, widths = _tiling(length, span)
    count, widest = length // block, widths[-1]
    together = 1 if jax.default_backend() == "cpu" else rows
    which = _narrowest(segment_ids, block, widths).reshape(-1, together, count).max(1)
    # So that every block has as many keys before it; those are of no segment.
    before = functools.partial(_padded_before, number=widest - block)
    of_keys, ids = [*map(before, of_keys)], (segment_ids, branch_ids)
    ids_of_keys = before(segment_ids, fill=-1), before(branch_ids)

    def at(width, row, start):
        query = functools.partial(_cut, row=row, rows=together, start=start, width=block)
        first = start + block - width
        key = functools.partial(query, start=start + widest - width, width=width)
        queries = *map(query, ids), start + jnp.arange(block)
        keys = *map(key, ids_of_keys), first + jnp.arange(width)
        mask = _visible(queries, keys)
        results, sums = tile(mask, *map(query, of_queries), *map(key, of_keys))
        return results, tuple(_padded_before(x, widest - width) for x in sums)

    programs = [functools.partial(at, width) for width in widths]

    def one(i, carry):
        row, start = i // count * together, i % count * block
        results, sums = jax.lax.switch(which[i // count, i % count], programs, row, start)
        so_far = (_cut(x, row, together, start, widest) for x in carry[1])
        sums = tuple(x + y for x, y in zip(so_far, sums, strict=True))
        put = lambda x, new: jax.lax.dynamic_update_slice(x, new, (row, 0, start, 0))
        return jax.tree.map(put, carry, (results, sums))

    shapes = jax.eval_shape(programs[-1], 0, 0)
    empty = lambda number: lambda x: jnp.zeros((rows, x.shape[1], number, x.shape[3]), x.dtype)
    sizes = (length, length + widest - block)
    carry = tuple(jax.tree.map(empty(size), x) for size, x in zip(sizes, shapes, strict=True))
    tiles = count * (rows // together)
    results, sums = one(0, carry) if tiles == 1 else jax.lax.fori_loop(0, tiles, one, carry)
    return results, tuple(x[:, :, widest - block :] for x in sums)


def _padded_before(x, number, fill=0):
    """More positions of [B, N, T, H] or [B, T] in front."""
    widths = [(0, 0)] * x.ndim
    widths[-1 if x.ndim == 2 else 2] = (number, 0)
    return jnp.pad(x, widths, constant_values=fill)


def _cut(x, row, rows, start, width):
    """Some rows and positions of [B, N, T, H] or [B, T]."""
    if x.ndim == 2:
        return jax.lax.dynamic_slice(x, (row, start), (rows, width))
    sizes = (rows, x.shape[1], width, x.shape[3])
    return jax.lax.dynamic_slice(x, (row, 0, start, 0), sizes)


def _scaled(q):
    # The scale itself would be rounded in bfloat16; and both passes must have the same scores.
    return (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype)


def _product(axes, a, b):
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


_whole_blocks.defvjp(_blocks_forward, _blocks_backward)


def splash_tiling(length: int) -> tuple[int, int]:
    """How many positions a block of "splash" has, and how many blocks a row, padding included.

    In small blocks a kernel spends its time on starting them, and keeps a gradient of the queries
    for each block of keys; so short rows are padded to whole lanes, and long ones to blocks of 512.

    >>> [splash_tiling(length) for length in (368, 1000, 1152)]
    [(128, 3), (512, 2), (512, 3)]
    """
    multiple = _LANES if length < 8 * _LANES else 4 * _LANES
    padded = -(-length // multiple) * multiple
    block = math.gcd(padded, 4 * _LANES)
    return block, padded // block


def _splash(q, k, v, segment_ids, branch_ids, span):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, whole = q.shape[1], q.shape[2]
    block, count = splash_tiling(whole)
    padding = [(0, 0), (0, block * count - whole)]  # of segment 0
    segment_ids, branch_ids = (jnp.pad(ids, padding) for ids in (segment_ids, branch_ids))
    q, k, v = (jnp.pad(x, [(0, 0), *padding, (0, 0)]) for x in (_scaled(q), k, v))
    length = q.shape[2]
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
