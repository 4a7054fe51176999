"""What the folder of a run holds, for whoever did not train it: a stage's model, exported too.

Reads the configuration that the run saved; executes nothing. Left out: making a run
(`stages`), and what its curves say (`analysis.report`).
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxdpo import InputError, convert, pythia, recipe, sharding
from jaxdpo.checkpoint import Checkpoints, abstract
from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.records import read_json
from jaxdpo.tokens import eos_id, load_tokenizer

WHICH = ("last", "best")


class Stored(NamedTuple):
    """A model on disk: what it is, what it speaks, and how its parameters are loaded."""

    model: PythiaConfig
    tokenizer: Path  # a file, or the folder that holds it
    eos_ids: tuple[int, ...]
    load: Callable[[], Any]
    step: int | None  # of a checkpoint of a run


def is_run(workdir: str | Path) -> bool:
    """Whether a run has been made in the folder.

    >>> is_run("no/such/folder")
    False
    """
    return (Path(workdir) / "config.json").is_file() and (Path(workdir) / "versions.json").is_file()


def trained(workdir: str | Path, stage: str, *, mesh: Mesh, which: str = "last") -> Stored:
    """The last or best checkpoint of a stage; `InputError` without such a run or stage."""
    workdir = Path(os.path.abspath(workdir))
    if not is_run(workdir):
        raise InputError(f"{workdir}: no run there (it has no config.json and versions.json)")
    config = ConfigDict(read_json(workdir / "config.json"))
    if which not in WHICH:
        raise InputError(f"{workdir}: which={which!r} is unknown; {' or '.join(WHICH)}")
    there = [name for name in config.stages if (workdir / name / "checkpoints").exists()]
    if stage not in there:
        raise InputError(
            f"{workdir}: has no checkpoints of a stage {stage!r}; its stages with checkpoints: "
            f"{', '.join(there) or 'none yet'}"
        )
    model, _ = recipe.model(config, workdir, mesh)
    tokenizer = recipe.tokenizer_file(config, workdir)
    eos = eos_id(load_tokenizer(tokenizer), config.eos_token)
    step, load = checkpointed(workdir / stage, model, mesh, which)
    return Stored(model, tokenizer, (eos,), load, step)


def checkpointed(
    stage: Path, model: PythiaConfig, mesh: Mesh, which: str
) -> tuple[int, Callable[[], Any]]:
    """The step that is last or best in a stage's folder, and a function that loads its parameters.

    Raises `InputError` where there is no such checkpoint.
    """
    folder = stage / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.best_step if which == "best" else checkpoints.latest_step
    if step is None:
        raise InputError(f"{folder}: holds no {which} checkpoint")

    def load():
        shapes = param_shapes(model)
        placed = abstract(shapes, sharding.param_shardings(shapes, mesh))
        with Checkpoints(folder) as checkpoints:
            return checkpoints.restore_params(step, placed)

    return step, load


def param_shapes(model: PythiaConfig) -> Any:
    """The tree of a model's parameters as shapes and dtypes."""
    return jax.eval_shape(functools.partial(pythia.init_params, model), jax.random.key(0))


def export(workdir: str | Path, stage: str, to: str | Path, *, which: str = "last") -> None:
    """Write a stage's last or best parameters, with the tokenizer, as a Hugging Face folder.

    Raises `InputError` where there is no such run or stage, or `to` holds anything already.
    """
    found = trained(workdir, stage, mesh=sharding.make_mesh(), which=which)
    convert.save_hf(
        to, found.model, found.load(), tokenizer_from=found.tokenizer, eos_id=found.eos_ids[0]
    )
