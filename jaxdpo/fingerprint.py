"""Whether arrays are still what they were: one number per array, the same on any mesh.

A file system or a cable that changes a bit says nothing, and neither does a checkpoint that is
read back: what was counted before it was written, counted again, does. A checksum against
accidents, not against people. Left out: what is done about it (`checkpoint`).
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt

_ODD = 2654435761, 2246822519  # of xxHash: what is multiplied by them can be told from any other


def fingerprints(tree: Any) -> dict[str, str]:
    """Of every array, by its path, the dtype, the shape and a number made of all of its bits.

    The number is sum_i c (b_i xor b_i >> 16) w_i modulo 2^32, where b_i is an element's bits, c and
    w_i are odd, and w_i is made of its place. Integers sum to the same in any order, so no sharding
    changes it; one element that differs always does, more of them but for one time in 2^32.

    >>> fingerprints({"a": jnp.array([1.0, 2.0])})
    {'a': 'float32[2] d179c480'}
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    numbers = jax.device_get(_all(leaves))
    return {path: f"{kind(leaf)} {int(numbers[path]):08x}" for path, leaf in leaves.items()}


def identity(tree: Any) -> str:
    """A hash of every array's path, dtype, shape and number; the same on any mesh.

    >>> identity({"a": jnp.array([1.0, 2.0])})
    'ab3087be34db1500'
    """
    return hashlib.sha256(json.dumps(fingerprints(tree), sort_keys=True).encode()).hexdigest()[:16]


def kind(leaf: Any) -> str:
    """An array's dtype and shape, which are the first of its fingerprint's two words."""
    return f"{leaf.dtype}{list(leaf.shape)}".replace(", ", ",")


@jax.jit
def _all(leaves: dict[str, Array]) -> dict[str, UInt[Array, ""]]:
    return jax.tree.map(_number, leaves)


def _number(x: Array) -> UInt[Array, ""]:
    if x.dtype != jnp.bool_:
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    bits, place = x.astype(jnp.uint32), jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place * jnp.uint32(x.shape[axis]) + along
    weights = 2 * place * jnp.uint32(_ODD[0]) + 1
    return jnp.sum((bits ^ (bits >> 16)) * jnp.uint32(_ODD[1]) * weights, dtype=jnp.uint32)
