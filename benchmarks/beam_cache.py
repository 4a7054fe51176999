"""Three ways to keep the keys and values of beams, for one layer and one step of decoding.

    GLIBC_TUNABLES=... python benchmarks/beam_cache.py [--beams 5 20] [--batch 4] [--rounds 7]

    copies    K copies of the prompt, all of it gathered by parent at every step (the usual way)
    gathered  the prompt once; each beam's generated part gathered by parent at every step
    pool      every entry once, never moved; a mask of ancestors (what `pythia_cache` does)

`pool` is measured as decoding runs it, with the dead nodes of half a segment beside the live
ones; `pool, no compaction` with every node that was ever written. All see prompts of 256
tokens and 48 generated ones, in the shape of a Pythia-70m layer (8 heads of 64), float32, and
all give the same numbers, which is checked. Medians, and XLA's count of temporary bytes.

Prediction: per step and layer `gathered` reads and writes 2 x B K G N H floats, 63 MB at K = 20
and batch 4, 3 ms at 20 GB/s; `pool` multiplies K queries with K times the rows, 2 x 2 x B K (K G)
N H = 0.16 GFLOP more without compaction and a quarter of it with.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.pythia_cache import _attended

PROMPT, STEP, LAST, HEADS, WIDTH = 256, 48, 64, 8, 64


def softmax(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights, weights.sum(axis=-1)[..., None]


def copies(q, keys, values, parents, new_k, new_v):
    """keys [B, K, N, H, P + G], values [B, K, N, P + G, H]."""
    keys = jnp.take_along_axis(keys, parents[:, :, None, None, None], axis=1)
    values = jnp.take_along_axis(values, parents[:, :, None, None, None], axis=1)
    keys = jax.lax.dynamic_update_slice(keys, new_k[..., None], (0, 0, 0, 0, PROMPT + STEP - 1))
    values = jax.lax.dynamic_update_slice(
        values, new_v[..., None, :], (0, 0, 0, PROMPT + STEP - 1, 0)
    )
    scores = jnp.einsum("bknh,bknhs->bkns", q, keys) / WIDTH**0.5
    seen = (jnp.arange(PROMPT + LAST) < PROMPT + STEP)[None, None, None]
    weights, total = softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("bkns,bknsh->bknh", weights, values) / total, (keys, values)


def gathered(q, keys, values, parents, new_k, new_v, prompt_k, prompt_v):
    """keys [B, K, N, H, G], values [B, K, N, G, H]; the prompt's [BN, H, P] and [BN, P, H]."""
    batch, beams = parents.shape
    keys = jnp.take_along_axis(keys, parents[:, :, None, None, None], axis=1)
    values = jnp.take_along_axis(values, parents[:, :, None, None, None], axis=1)
    keys = jax.lax.dynamic_update_slice(keys, new_k[..., None], (0, 0, 0, 0, STEP - 1))
    values = jax.lax.dynamic_update_slice(values, new_v[..., None, :], (0, 0, 0, STEP - 1, 0))
    flat = jnp.moveaxis(q, 2, 1).reshape(-1, beams, WIDTH)
    first = jnp.einsum("xkh,xhs->xks", flat, prompt_k).reshape(batch, HEADS, beams, -1)
    second = jnp.moveaxis(jnp.einsum("bknh,bknhs->bkns", q, keys), 1, 2)
    seen = (jnp.arange(LAST) < STEP)[None, None, None]
    second = jnp.where(seen, second, -jnp.inf)
    weights, total = softmax(jnp.concatenate([first, second], axis=-1) / WIDTH**0.5)
    own = weights[..., :PROMPT].reshape(-1, beams, PROMPT)
    own = jnp.einsum("xks,xsh->xkh", own, prompt_v).reshape(batch, HEADS, beams, WIDTH)
    rest = jnp.einsum("bkns,bknsh->bknh", jnp.moveaxis(weights[..., PROMPT:], 1, 2), values)
    mixed = (own + jnp.moveaxis(rest, 1, 2)) / total
    return jnp.moveaxis(mixed, 1, 2), (keys, values)


def pool(q, keys, values, parents, new_k, new_v, visible, first):
    """keys [BN, H, R], values [BN, R, H], visible [B, K, R]; new nodes go to `first`."""
    beams = parents.shape[1]
    visible = jnp.take_along_axis(visible, parents[..., None], axis=1)
    own = jnp.eye(beams, dtype=bool)[None].repeat(len(parents), axis=0)
    visible = jax.lax.dynamic_update_slice(visible, own, (0, 0, first))
    rows = jnp.moveaxis(new_v, 2, 1).reshape(-1, beams, WIDTH)
    columns = jnp.moveaxis(new_k, 1, 3).reshape(-1, WIDTH, beams)
    keys = jax.lax.dynamic_update_slice(keys, columns, (0, 0, first))
    values = jax.lax.dynamic_update_slice(values, rows, (0, first, 0))
    return _attended(q, keys, values, visible), (keys, values)


def histories(rng, batch: int, beams: int) -> np.ndarray:
    """Which slot each beam's ancestor had at each step: beams that part a few steps ago."""
    slots = rng.integers(0, beams, (batch, 1, STEP - 1)).repeat(beams, axis=1)
    recent = rng.integers(0, beams, (batch, beams, 12))
    slots[:, :, -12:] = recent
    return slots


def variants(batch: int, beams: int):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    prompt = normal(2, batch, HEADS, PROMPT, WIDTH)
    nodes = normal(2, batch, HEADS, LAST, beams, WIDTH)  # what slot k wrote at step g
    slots = histories(rng, batch, beams)
    own = np.zeros((2, batch, beams, HEADS, LAST, WIDTH), np.float32)
    for b, k, g in np.ndindex(batch, beams, STEP - 1):
        own[:, b, k, :, g] = nodes[:, b, :, g, slots[b, k, g]]
    q, new_k, new_v = normal(3, batch, beams, HEADS, WIDTH)
    parents = rng.integers(0, beams, (batch, beams))
    shared = (q, parents, new_k, new_v)
    columns = lambda x: np.swapaxes(x, -1, -2)
    whole = np.concatenate([prompt[:, :, None].repeat(beams, 2), own], axis=4)
    yield "copies", copies, (columns(whole[0]), whole[1]), shared, ()
    flat = prompt.reshape(2, -1, PROMPT, WIDTH)
    yield "gathered", gathered, (columns(own[0]), own[1]), shared, (columns(flat[0]), flat[1])
    every = np.zeros((batch, beams, LAST, beams), bool)
    b, k, g = np.ogrid[:batch, :beams, : STEP - 1]
    every[b, k, g, slots] = True
    every = every.reshape(batch, beams, -1)
    written = nodes.reshape(2, batch, HEADS, -1, WIDTH)
    segment = min(max(320 // beams, 8), 32)
    for name, first_kept in (("pool", (STEP - 1 - segment // 2) * beams), ("no compaction", 0)):
        old = every[:, :, :first_kept].any(axis=1)
        count = -(-int(old.sum(-1).max(initial=0)) // 16) * 16
        live = np.argsort(~old, axis=-1, kind="stable")[:, :count]
        until = min(first_kept + segment * beams, LAST * beams) if first_kept else LAST * beams
        recent = np.arange(first_kept, until)[None].repeat(batch, 0)
        at = np.concatenate([live, recent], axis=1)
        seen = np.take_along_axis(every, at[:, None], axis=2)
        kept = np.take_along_axis(written, at[None, :, None, :, None], axis=3)
        kept = np.concatenate([prompt, kept], axis=3).reshape(2, batch * HEADS, -1, WIDTH)
        seen = np.concatenate([np.ones((batch, beams, PROMPT), bool), seen], axis=2)
        first = PROMPT + count + (STEP - 1) * beams - first_kept
        rest = (seen, np.int32(first))
        yield (
            name if name == "pool" else f"pool, {name}",
            pool,
            (columns(kept[0]), kept[1]),
            shared,
            rest,
        )


def main(options: argparse.Namespace) -> None:
    print(f"batch {options.batch}, prompt {PROMPT}, step {STEP}: one layer, one step")
    for beams in options.beams:
        results = {}
        for name, function, caches, (q, *shared), rest in variants(options.batch, beams):
            step = jax.jit(
                lambda caches, q, shared, rest, f=function: f(q, *caches, *shared, *rest),
                donate_argnums=0,
            )
            put = partial(jax.tree.map, lambda x: jnp.array(np.array(x, order="C")))
            caches, arguments = put(tuple(caches)), put((q, tuple(shared), rest))
            compiled = step.lower(caches, *arguments).compile()
            temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
            out, caches = compiled(caches, *arguments)
            results[name] = np.asarray(out)
            times = []
            for _ in range(options.rounds):
                began = time.perf_counter()
                for _ in range(10):
                    out, caches = compiled(caches, *arguments)
                jax.block_until_ready(out)
                times.append((time.perf_counter() - began) / 10)
            median = 1e3 * statistics.median(times)
            print(f"K={beams:2}  {name:20} {median:7.2f} ms  {temporary:6.1f} MiB temporary")
        for name, out in results.items():
            np.testing.assert_allclose(out, results["copies"], atol=1e-5, err_msg=name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beams", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args())
