"""What a run's programs need on devices that are not here: memory, arithmetic, bytes moved.

The real training, reference and decoding steps are compiled for a TPU slice by the compiler that
the slice would use (`pip install -e '.[aot]'`, which needs no TPU), so that it fits or does not
before anything is paid for. Rows are described by the mean lengths of the data, not read. Left
out: times, which no compiler knows, and the loops around the programs (`train`, `decoding`).
"""

import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from rich.table import Table

from jaxdpo import InputError, accounting, attention, collectives, convert, recipe, runs, sharding
from jaxdpo.batching import Batch, RowShape
from jaxdpo.decoding import LM, Constraints, Samples, loop
from jaxdpo.pythia_cache import CachedPythia
from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.step import initial_state, make_train_step, state_shardings, token_logps

_NO_ROOM = re.compile(
    r"Used ([\d.]+\w) of ([\d.]+\w) hbm|\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)"
)


class Lengths(NamedTuple):
    """Mean lengths of the data in tokens; the defaults are those of TL;DR in Pythia's tokens."""

    prompt: int = 310
    response: int = 35
    longest: int = 560  # positions of the longest example in its row


class Report(NamedTuple):
    """A program on one device of the mesh.

    Memory is in bytes: what is given and kept (`arguments`), what comes out beside it
    (`outputs`), what is needed meanwhile (`temporary`), and the `peak` as the compiler plans it.
    `collectives` are how many of each kind run and the bytes that a device sends for them, None
    where the compiler's text cannot be read.
    `fault` says why it does not fit; then the rest is empty.
    """

    program: str
    seconds: float  # of compilation
    fault: str = ""
    arguments: int = 0
    outputs: int = 0
    temporary: int = 0
    peak: int = 0
    flops: int = 0  # of all devices, as `accounting.hardware_flops` counts
    model_flops: int = 0
    collectives: dict[str, tuple[int, int]] | None = None


def tpu_mesh(topology: str, **sizes: int) -> Mesh:
    """The mesh of a TPU slice by its name, as "v5e:4x4", "v5p:2x2x4", "v6e:4x4".

    Raises `InputError` where there is no such slice, or no compiler for it here.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU is asked what it is
    name = re.sub(r"^v5p:", "v5:", topology)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # of any class, by what is missing
        raise InputError(
            f"--topology {topology}: {str(error).splitlines()[0]}; a TPU's compiler is needed "
            "(pip install -e '.[aot]'), and a name like v5e:4x4, v5p:2x2x4 or v6e:4x4"
        ) from error
    return sharding.make_mesh(devices=found.devices, **sizes)


def model_of(config: ConfigDict) -> PythiaConfig:
    """The model that a recipe trains, by its name where its weights are a published size's."""
    settings = config.model.to_dict()
    weights, _, overrides = (settings.pop(key) for key in ("weights", "name", "overrides"))
    if not weights:
        return recipe.random_model(config)
    try:
        return PythiaConfig.from_name(weights.rpartition("/")[2], **overrides, **settings)
    except InputError:
        return convert.hf_config(weights, **overrides, **settings)


def row_shape(settings: ConfigDict, lengths: Lengths, divisor: int) -> RowShape:
    """The rows of a stage's batches for data of these lengths, as `batching` would pack them."""
    pair = lengths.prompt + 2 * (lengths.response - 1)
    rows, length = settings.batch_size, lengths.longest
    if rows < divisor or (not settings.row_length and rows % divisor):
        raise InputError(
            f"batch_size: {rows} pairs cannot fill rows that are a multiple of {divisor} "
            "(devices x micro-batches)"
        )
    if settings.row_length:
        wanted = rows * pair / settings.row_length
        rows = divisor * min(math.ceil(wanted / divisor), rows // divisor)
        length = max(lengths.longest, math.ceil(settings.batch_size * pair / rows))
    pairs = math.ceil(settings.batch_size / rows)
    rounded = lambda number, multiple: -(-number // multiple) * multiple
    return RowShape(rows, rounded(length, 128), rounded(2 * pairs * lengths.response, 16), pairs)


def reports(
    config: ConfigDict, stage: str, mesh: Mesh, lengths: Lengths, *, prompts: int, new_tokens: int
) -> Iterator[Report]:
    """Compile the stage's training step, the reference pass and decoding; a report of each."""
    settings, model = config[stage], model_of(config)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    shape = row_shape(settings, lengths, devices * settings.micro_batches)
    platform = mesh.devices.flat[0].platform
    how = attention.fastest(platform, dtype=model.dtype, head_width=model.head_width)
    model = dataclasses.replace(
        model, attention=how, attention_span=min(shape.length, lengths.longest)
    )
    sharding.check_divisible(
        mesh,
        batch_rows=shape.rows // settings.micro_batches,
        num_heads=model.num_heads,
        width=model.width,
        mlp_width=model.mlp_width,
        vocab_size=model.vocab_size,
    )
    yield _training(config, stage, model, mesh, shape, lengths)
    if stage == "dpo":
        yield _reference(model, mesh, shape)
    yield _decoding(model, mesh, lengths, prompts, new_tokens)


def largest_batch(config: ConfigDict, stage: str, mesh: Mesh, lengths: Lengths) -> Iterator[int]:
    """Yield ever larger numbers of pairs of a micro-batch that fit; the last is the largest.

    Twice as many as long as they fit, then halves of what is left between what fits and what
    does not, in whole rows for every device.
    """
    devices, config = mesh.shape["data"] * mesh.shape["fsdp"], ConfigDict(config.to_dict())
    config[stage].micro_batches, fits, too_many = 1, 0, None
    while too_many is None or too_many - fits > devices:
        tried = 2 * fits or devices
        if too_many is not None:
            tried = fits + (too_many - fits) // devices // 2 * devices
        config[stage].batch_size = tried
        if next(reports(config, stage, mesh, lengths, prompts=devices, new_tokens=1)).fault:
            too_many = tried
        else:
            fits = tried
            yield fits


def as_json(report: Report) -> dict[str, Any]:
    """A report as plain numbers."""
    moved = report.collectives and {
        kind: {"count": count, "bytes": sent} for kind, (count, sent) in report.collectives.items()
    }
    return report._asdict() | {"collectives": moved}


def table(found: list[Report], title: str) -> Table:
    """Reports side by side; memory in GiB of a device, and what a device sends."""
    shown = Table("", *(one.program for one in found), title=title)
    gib = lambda number: f"{number / 2**30:.2f}"
    count = lambda number: f"{number:.2e}" if number else ""
    shown.add_row("fits", *(one.fault or "yes" for one in found))
    for kind in ("arguments", "outputs", "temporary", "peak"):
        shown.add_row(kind, *("" if one.fault else gib(getattr(one, kind)) for one in found))
    for kind in collectives.KINDS:
        sent = [(one.collectives or {}).get(kind) for one in found]
        if any(sent):
            shown.add_row(kind, *(f"{each[0]} x, {gib(each[1])}" if each else "" for each in sent))
    unread = ["" if one.fault or one.collectives is not None else "unknown" for one in found]
    if any(unread):
        shown.add_row("collectives", *unread)
    shown.add_row("FLOPs", *(count(one.flops) for one in found))
    shown.add_row("of the model", *(count(one.model_flops) for one in found))
    shown.add_row("compiled in", *(f"{one.seconds:.0f} s" for one in found))
    return shown


def _training(config, stage, model, mesh, shape, lengths) -> Report:
    settings = config[stage]
    tx, _ = recipe.optimizer(stage, settings, 1000)
    objective, _ = recipe.objective(model, stage, settings)
    shapes = runs.param_shapes(model)
    places = state_shardings(shapes, tx, mesh)
    state = _placed(jax.eval_shape(functools.partial(initial_state, tx=tx), shapes), places)
    options = dict(max_grad_norm=settings.max_grad_norm, micro_batches=settings.micro_batches)
    step = make_train_step(objective, tx, shardings=places, **options)
    lower = lambda: step.lower(state, _batch(mesh, shape, reference=stage == "dpo"))
    found = _compiled(f"{stage} step", mesh, lower)
    row = np.repeat(np.arange(1, shape.pairs + 1), math.ceil(shape.length / shape.pairs))
    segments = np.tile(row[: shape.length], (shape.rows, 1))
    parts = mesh.size * settings.micro_batches
    flops = accounting.hardware_flops(model, segments, shape.scored, parts=parts)
    rejected = lengths.response if stage == "dpo" else 0
    example = np.array([[lengths.prompt, lengths.response, rejected]])
    needed = settings.batch_size * int(accounting.model_flops(model, example)[0])
    return found._replace(flops=flops, model_flops=needed)


def _reference(model, mesh, shape) -> Report:
    shapes = runs.param_shapes(model)
    params = _placed(shapes, sharding.param_shardings(shapes, mesh))
    rows = NamedSharding(mesh, sharding.batch_spec)
    logps = jax.jit(functools.partial(token_logps, model), out_shardings=rows)
    lower = lambda: logps.lower(params, _batch(mesh, shape, reference=False))
    return _compiled("reference pass", mesh, lower)


def _decoding(model, mesh, lengths, prompts, new_tokens) -> Report:
    """One segment of greedy decoding, with the room of all its tokens."""
    model = dataclasses.replace(model, param_dtype=model.dtype, scan_layers=False)
    shapes = runs.param_shapes(model)
    params = _placed(shapes, sharding.decoding_shardings(shapes, mesh))
    scorer, rule = LM(CachedPythia(model), params), Samples()
    limits, rows = Constraints(new_tokens, eos_ids=(0,)), NamedSharding(mesh, P(("data", "fsdp")))
    place = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tree
    )
    longest = -(-lengths.prompt // 16) * 16
    ids = place((jnp.zeros((prompts, longest), jnp.int32), jnp.zeros((prompts,), jnp.int32)))
    keys = place(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), prompts)))
    real = place(jax.ShapeDtypeStruct((prompts,), bool))
    sizes = dict(mesh=mesh, room=new_tokens, capacity=new_tokens)
    begun = lambda *given: loop.start(*given, **sizes)
    state = place(jax.eval_shape(begun, scorer, rule, limits, (ids,), keys, real))
    step = lambda: loop.segment.lower(
        scorer, rule, limits, 1, new_tokens, state, mesh=mesh, steps=new_tokens
    )
    return _compiled("decoding", mesh, step)


def _batch(mesh: Mesh, shape: RowShape, *, reference: bool) -> Batch:
    place = NamedSharding(mesh, sharding.batch_spec)
    of = lambda *size, dtype="int32": jax.ShapeDtypeStruct(size, dtype, sharding=place)
    positions = [of(shape.rows, shape.length) for _ in range(4)]
    scored = [of(shape.rows, shape.scored) for _ in range(3)]
    logps = of(shape.rows, shape.scored, dtype="float32") if reference else None
    return Batch(*positions, *scored, of(shape.rows, shape.pairs), logps)


def _placed(tree: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )


def _compiled(name: str, mesh: Mesh, lower) -> Report:
    began = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            program = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if not (found := _NO_ROOM.search(str(error))):
            raise
        needed, there = filter(None, found.groups())
        fault = f"needs {needed} of {there}"
        return Report(name, time.perf_counter() - began, fault)
    size = program.memory_analysis()
    return Report(
        name,
        time.perf_counter() - began,
        arguments=size.argument_size_in_bytes,
        outputs=size.output_size_in_bytes - size.alias_size_in_bytes,
        temporary=size.temp_size_in_bytes,
        peak=size.peak_memory_in_bytes,
        collectives=_sent(program),
    )


def _sent(program: Any) -> dict[str, tuple[int, int]] | None:
    try:
        return collectives.sent(program.as_text())
    except jax.errors.JaxRuntimeError:  # jaxlib cannot read every text that libtpu writes
        return None
