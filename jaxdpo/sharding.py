"""Where arrays live: the device mesh, and the table parameter -> PartitionSpec.

The axes of the mesh are `data` (rows), `fsdp` (rows, and a slice of every matrix) and
`tensor` (heads, MLP width, vocabulary). XLA places the collectives; nothing here moves an
array or knows the model beyond the names of its parameters.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdpo import InputError

AXES = ("data", "fsdp", "tensor")

batch_spec = P(("data", "fsdp"))
"""Rows, the first axis of every array of a batch, are split over these axes."""

# The first pattern found in "path/to/leaf" decides. A path under "layers/" is stacked: its
# leading layer axis stays whole.
_RULES = (
    (r"(^|/)(un)?embedding$", P("tensor", "fsdp")),
    (r"/qkv/kernel$", P("fsdp", "tensor", None, None)),
    (r"/qkv/bias$", P("tensor", None, None)),
    (r"/out/kernel$", P("tensor", None, "fsdp")),
    (r"/up/kernel$", P("fsdp", "tensor")),
    (r"/down/kernel$", P("tensor", "fsdp")),
    (r"norm/(scale|bias)$", P()),
    (r"/(out|up|down)/bias$", P()),
)


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh with axes `data`, `fsdp` and `tensor`, over all devices unless some are given.

    One size may be -1: the devices that the others leave. Raises `InputError` where the
    sizes do not multiply to the number of devices.

    >>> dict(make_mesh(fsdp=1, devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise InputError(f"mesh {asked}: sizes must be at least 1, one of them may be -1")
    if free:
        fixed = math.prod(size for size in sizes.values() if size != -1)
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise InputError(
            f"mesh {asked}: does not divide {len(devices)} devices; "
            "change the sizes so that their product is that number"
        )
    # Under the default, explicit axes, every gather and product must name its sharding.
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto, devices=devices)


def param_specs(params: Any) -> Any:
    """The tree of `PartitionSpec`s of a tree of parameters (arrays or their shapes).

    Raises `InputError` that names a parameter for which the table has no rule.

    >>> param_specs({"embedding": jax.ShapeDtypeStruct((8, 4), "float32")})
    {'embedding': P('tensor', 'fsdp')}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _spec(path), params)


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """The tree of `NamedSharding`s of a tree of parameters on a mesh; see `param_specs`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(params))


def row_parts(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """Which parts of a batch's rows this process's devices hold, and how many parts there are.

    >>> row_parts(make_mesh(fsdp=1, devices=jax.devices()[:1]))
    ((0,), 1)
    """
    parts = mesh.devices.reshape(-1, mesh.shape["tensor"])
    mine = [any(device.process_index == jax.process_index() for device in part) for part in parts]
    return tuple(part for part, is_mine in enumerate(mine) if is_mine), len(parts)


def put_rows(rows: Any, mesh: Mesh) -> Any:
    """Arrays of this process's rows, in the order of `row_parts`, as global ones on the mesh."""
    place, (mine, count) = NamedSharding(mesh, batch_spec), row_parts(mesh)
    if len(mine) == count:
        return jax.device_put(rows, place)
    holders = mesh.devices.reshape(count, -1)

    def put(x):
        held = [
            jax.device_put(part, device)
            for number, part in zip(mine, np.split(x, len(mine)), strict=True)
            for device in holders[number]
            if device.process_index == jax.process_index()
        ]
        shape = (len(x) // len(mine) * count, *x.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, place, held)

    return jax.tree.map(put, rows)


def own_rows(x: Any) -> np.ndarray:
    """The rows of `put_rows` back on the host: of an array split by rows those of this process."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return jax.device_get(x)
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([jax.device_get(parts[start]) for start in sorted(parts)])


def fetched(tree: Any) -> Any:
    """Host copies of arrays, whole on every process, whichever devices hold their parts.

    All processes must call.
    """

    def whole(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(whole, tree)


def decoding_shardings(params: Any, mesh: Mesh) -> Any:
    """As `param_shardings`, but whole over `fsdp`: one token is too little work to gather for.

    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> decoding_shardings({"embedding": jax.ShapeDtypeStruct((8, 4), "float32")}, mesh)[
    ...     "embedding"
    ... ].spec
    P('tensor', None)
    """
    keep = lambda axis: axis if axis == "tensor" else None
    whole = lambda spec: NamedSharding(mesh, P(*(keep(axis) for axis in spec)))
    return jax.tree.map(whole, param_specs(params))


def check_divisible(
    mesh: Mesh,
    *,
    batch_rows: int,
    num_heads: int,
    width: int,
    mlp_width: int,
    vocab_size: int,
) -> None:
    """Refuse, before anything is compiled, what does not split evenly over the mesh.

    Raises one `InputError` with every number that its mesh axes do not divide.

    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> numbers = dict(num_heads=2, width=8, mlp_width=32, vocab_size=64)
    >>> check_divisible(mesh, batch_rows=3, **numbers)
    """
    split = (
        ("batch rows", batch_rows, ("data", "fsdp")),
        ("width", width, ("fsdp",)),
        ("num_heads", num_heads, ("tensor",)),
        ("mlp_width", mlp_width, ("tensor",)),
        ("vocab_size", vocab_size, ("tensor",)),
    )
    problems = []
    for name, number, axes in split:
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if number % parts:
            over = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            problems.append(f"{name}={number} is no multiple of {over}")
    if problems:
        raise InputError(f"mesh: {'; '.join(problems)}; change the mesh or these numbers")


def _spec(path: tuple[Any, ...]) -> P:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, spec in _RULES:
        if re.search(pattern, name):
            stacked = re.search(r"(^|/)layers/", name)
            return P(None, *spec) if stacked and spec else spec
    raise InputError(f"parameter {name}: no rule in sharding.py says how it is split")
