"""What the folder of a run holds, for whoever did not train it: a stage's model, exported too.

Reads the configuration that the run saved; executes nothing. Left out: making a run
(`stages`), and what its curves say (`analysis.curves`).
"""

import dataclasses
import functools
import os
import re
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
# A folder's name may have colons: a last word is a checkpoint only after the name of a stage.
_NAME = re.compile(r"(?P<workdir>.+?):(?P<stage>\w+)((?<=:sft|:dpo):(?P<which>\w*))?")


class Stored(NamedTuple):
    """A model on disk: what it is, what it speaks, and how its parameters are loaded."""

    model: PythiaConfig
    tokenizer: Path  # a file, or the folder that holds it
    eos_ids: tuple[int, ...]
    load: Callable[[], Any]
    step: int | None  # of a checkpoint of a run
    source: str = ""  # what the parameters are, for people


class Roles(NamedTuple):
    """The names of a preference run's models, and the held-out pairs they are looked at on."""

    policy: str
    reference: str  # what DPO began from
    base: str  # what the run began from
    beta: float
    data: str | None  # none: the run kept a share of its training file
    format: str


def is_run(workdir: str | Path) -> bool:
    """Whether a run has been made in the folder.

    >>> is_run("no/such/folder")
    False
    """
    return (Path(workdir) / "config.json").is_file() and (Path(workdir) / "versions.json").is_file()


def named(name: str) -> tuple[str, str, str] | None:
    """The run's folder, the stage and the checkpoint that a name means; None: it means no run.

    `WORKDIR:STAGE` is a stage's last checkpoint, `WORKDIR:STAGE:best` its best one, and
    `WORKDIR:start` the model that the run began from.

    >>> named("runs/a:dpo"), named("runs/a:sft:best"), named("EleutherAI/pythia-70m")
    (('runs/a', 'dpo', 'last'), ('runs/a', 'sft', 'best'), None)
    """
    found = None if Path(name).is_dir() else _NAME.fullmatch(name)
    return found and (found["workdir"], found["stage"], found["which"] or "last")


def trained(workdir: str | Path, stage: str, *, mesh: Mesh, which: str = "last") -> Stored:
    """The last or best checkpoint of a stage; `InputError` without such a run or stage.

    The stage "start" is the model that the run began from.
    """
    workdir, config = _config(workdir)
    if which not in WHICH:
        raise InputError(f"{workdir}: which={which!r} is unknown; {' or '.join(WHICH)}")
    there = [name for name in config.stages if (workdir / name / "checkpoints").exists()]
    if stage not in (*there, "start"):
        raise InputError(
            f"{workdir}: has no checkpoints of a stage {stage!r}; its stages with checkpoints: "
            f"{', '.join(there) or 'none yet'}"
        )
    began = _began(config, workdir, mesh)
    if stage == "start":
        return began
    step, load = checkpointed(workdir / stage, began.model, mesh, which)
    return began._replace(step=step, load=load, source=f"{stage} step {step}")


def roles(workdir: str | Path) -> Roles:
    """Which of a run's models is the policy, the reference and the base, and with what beta.

    Raises `InputError` where there is no run, or it has no dpo stage.
    """
    workdir, config = _config(workdir)
    if "dpo" not in config.stages:
        raise InputError(f"{workdir}: has no dpo stage; its stages: {', '.join(config.stages)}")
    before = list(config.stages)[: list(config.stages).index("dpo")]
    data = config.dpo.data
    return Roles(
        policy=f"{workdir}:dpo",
        reference=f"{workdir}:{before[-1]}:{config[before[-1]].hand_on}"
        if before
        else f"{workdir}:start",
        base=f"{workdir}:start",
        beta=config.dpo.beta,
        data=recipe.path_of(data.eval, config, workdir) if data.eval else None,
        format=data.format,
    )


def initial(config: ConfigDict, workdir: Path, mesh: Mesh) -> Stored:
    """The model that a configuration begins from: random, of Hugging Face, or another run's.

    Raises `InputError` where there is no such model, or no tokenizer for it, or the other run's
    stage is not finished: its parameters are still to change.
    """
    began, other = _began(config, workdir, mesh), named(_weights(config, workdir))
    if other and other[1] != "start" and not Path(other[0], other[1], "done.json").exists():
        raise InputError(
            f"model.weights: stage {other[1]} of {other[0]} is not finished; finish it"
        )
    return began


def _weights(config: ConfigDict, workdir: Path) -> str:
    return recipe.path_of(config.model.weights, config, workdir)


def _began(config: ConfigDict, workdir: Path, mesh: Mesh) -> Stored:
    settings = config.model.to_dict()
    weights, _, overrides = (settings.pop(key) for key in ("weights", "name", "overrides"))
    path = _weights(config, workdir)
    if other := named(path):
        found = _of_another_run(other, workdir, overrides, settings, mesh)
        beside, model, load = found.tokenizer, found.model, found.load
        source = f"{weights}: {found.source}"
    elif weights:
        model = convert.hf_config(path, **overrides, **settings)
        load = lambda: convert.load_hf(path, mesh=mesh, **overrides, **settings)[1]
        beside, source = convert.local_folder(path), weights
    else:
        model, beside = recipe.random_model(config), None
        source = f"random weights, seed {config.seed}"
        shapes = param_shapes(model)
        init = functools.partial(pythia.init_params, model)
        init = jax.jit(init, out_shardings=sharding.param_shardings(shapes, mesh))
        load = lambda: init(jax.random.key(config.seed))
    given = config.tokenizer and Path(recipe.path_of(config.tokenizer, config, workdir))
    if not (tokenizer := given or beside):
        raise InputError("tokenizer: give a tokenizer.json; random weights come without one")
    eos = eos_id(load_tokenizer(tokenizer), config.eos_token)
    return Stored(model, tokenizer, (eos,), load, None, source)


def _of_another_run(other, workdir: Path, overrides: dict, settings: dict, mesh: Mesh) -> Stored:
    folder, stage, which = other
    if os.path.abspath(folder) == os.path.abspath(workdir):
        raise InputError(f"model.weights: {folder}:{stage} is of this run itself; name another one")
    if overrides:
        raise InputError(f"model.overrides: {', '.join(sorted(overrides))} are those of {folder}")
    found = trained(folder, stage, mesh=mesh, which=which)
    for key in ("param_dtype", "scan_layers"):  # how the parameters are stored
        if settings[key] != getattr(found.model, key):
            raise InputError(f"model.{key}: is {getattr(found.model, key)} in {folder}; set it so")
    return found._replace(model=dataclasses.replace(found.model, **settings))


def _config(workdir: str | Path) -> tuple[Path, ConfigDict]:
    workdir = Path(os.path.abspath(workdir))
    if not is_run(workdir):
        raise InputError(f"{workdir}: no run there (it has no config.json and versions.json)")
    return workdir, ConfigDict(read_json(workdir / "config.json"))


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
