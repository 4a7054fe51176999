"""What a configuration asks for: checked, tied to its work directory, and made into objects.

A configuration is a locked `ConfigDict` from a file in `configs/`; every mistake in it is an
`InputError` that names the key. Left out: reading data and running stages (`stages`).
"""

import functools
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxdpo import InputError, convert, losses, pythia, sharding
from jaxdpo.pythia import PythiaConfig
from jaxdpo.step import Objective, preference_objective, rmsprop, sft_objective, warmup

STAGES = ("sft", "dpo")


def check(config: ConfigDict) -> None:
    """Refuse keys that contradict each other, have no effect, or name what does not exist."""
    unknown = [name for name in config.stages if name not in STAGES]
    if unknown or not config.stages or len(set(config.stages)) < len(config.stages):
        raise InputError(f"stages: {config.stages} must be some of {STAGES}, each once")
    for name in config.stages:
        stage = config[name]
        if bool(stage.data.eval) == bool(stage.data.test_fraction):
            raise InputError(
                f"{name}.data: give either eval (a file) or test_fraction (a share of the prompts)"
            )
        if stage.optimizer == "rmsprop" and stage.weight_decay:
            raise InputError(f"{name}.weight_decay: has no effect with rmsprop; set it to 0")
        for key in ("checkpoint_every", "epochs", "micro_batches", "keep_checkpoints"):
            if stage[key] < 1:
                raise InputError(f"{name}.{key}: must be at least 1, not {stage[key]}")
        if stage.hand_on not in ("last", "best"):
            raise InputError(f"{name}.hand_on: {stage.hand_on!r} is unknown; last or best")
    if bool(config.model.weights) == bool(config.model.name):
        raise InputError(
            "model: give either weights (a folder or hub name) or name (a size, random weights)"
        )


def claim(config: ConfigDict, workdir: Path) -> None:
    """Make the folder this configuration's, or refuse it if it is another's."""
    file = workdir / "config.json"
    wanted = json.loads(config.to_json_best_effort())
    if file.exists():
        # The mesh may change: a run goes on, to rounding, on other devices.
        found = json.loads(file.read_text())
        before, now = ({k: v for k, v in c.items() if k != "mesh"} for c in (found, wanted))
        differ = sorted(_flat(before).items() ^ _flat(now).items())
        if differ:
            keys = ", ".join(sorted({key for key, _ in differ}))
            raise InputError(
                f"{workdir}: belongs to another configuration; these keys differ: {keys}. "
                "Choose another --workdir, or set them back"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(file, wanted)
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers")
    versions = {name: version(name) for name in packages}
    devices = {"devices": jax.device_count(), "kind": jax.devices()[0].device_kind}
    system = {"python": sys.version.split()[0], "platform": platform.platform()}
    write_json(workdir / "versions.json", versions | system | devices)


def _flat(tree: dict, prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: json.dumps(value)}
    return flat


def write_json(file: Path, value: Any) -> None:
    """Write a whole file or none: a reader never sees half of it."""
    writing = file.with_name(file.name + ".writing")
    writing.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(writing, file)


def path_of(text: str, config: ConfigDict, workdir: Path) -> str:
    """A path of the configuration with {workdir} and {data} filled in."""
    return text.replace("{data}", config.data).replace("{workdir}", str(workdir))


def model(config: ConfigDict, workdir: Path, mesh: Mesh) -> tuple[PythiaConfig, Callable]:
    """The model's shape, and a function that makes its parameters on the mesh."""
    settings = config.model.to_dict()
    weights, name, overrides = (settings.pop(key) for key in ("weights", "name", "overrides"))
    if weights:
        source = path_of(weights, config, workdir)
        model = convert.hf_config(source, **overrides, **settings)
        return model, lambda: convert.load_hf(source, mesh=mesh, **overrides, **settings)[1]
    model = PythiaConfig.from_name(name, **overrides, **settings)
    init = functools.partial(pythia.init_params, model)
    shapes = jax.eval_shape(init, jax.random.key(0))
    init = jax.jit(init, out_shardings=sharding.param_shardings(shapes, mesh))
    return model, lambda: init(jax.random.key(config.seed))


def optimizer(
    name: str, settings: ConfigDict
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The stage's optimizer and its learning rate."""
    schedule = warmup(settings.learning_rate, settings.warmup_steps)
    if settings.optimizer == "rmsprop":
        return rmsprop(schedule), schedule
    if settings.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=settings.weight_decay), schedule
    raise InputError(f"{name}.optimizer: {settings.optimizer!r} is unknown; rmsprop or adamw")


def objective(
    model: PythiaConfig, name: str, settings: ConfigDict
) -> tuple[Objective, float | None]:
    """The stage's objective, and the loss it must begin with (None: any)."""
    if name == "sft":
        return sft_objective(model), None
    if settings.loss == "dpo":
        smoothing = settings.label_smoothing
        pair_loss = functools.partial(
            losses.dpo_loss, beta=settings.beta, label_smoothing=smoothing
        )
        expected = math.log(2)
    elif settings.loss == "ipo":
        if settings.label_smoothing:
            raise InputError("dpo.label_smoothing: has no effect on ipo; set it to 0")
        pair_loss = functools.partial(losses.ipo_loss, beta=settings.beta)
        expected = 1 / (2 * settings.beta) ** 2
    else:
        raise InputError(f"dpo.loss: {settings.loss!r} is unknown; dpo or ipo")
    return preference_objective(model, pair_loss, beta=settings.beta), expected
