"""From a configuration to trained checkpoints: the work directory, the stages, their data.

A recipe runs its stages (`sft`, `dpo`) in order in one work directory, each in a folder of
its own; a stage starts from the last or best checkpoint of the one before it, goes on
from its own latest checkpoint if it has one, and is not run again once it is finished.
Only this module and the loop read the configuration. Left out: the loop (`train`), what one
update does (`step`).
"""

import dataclasses
import functools
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from jaxdpo import InputError, convert, losses, pairs, pythia, reference, sharding, synthetic
from jaxdpo.analysis import report
from jaxdpo.batching import Batches
from jaxdpo.checkpoint import Checkpoints, abstract
from jaxdpo.metrics import ProgressLine
from jaxdpo.pythia import PythiaConfig
from jaxdpo.step import (
    initial_state,
    make_train_step,
    preference_objective,
    rmsprop,
    sft_objective,
    state_shardings,
    token_logps,
    warmup,
)
from jaxdpo.tokens import Limits, TokenStore, eos_id, load_tokenizer, tokenize
from jaxdpo.train import Loop, console, put_batch, train_loop

STAGES = ("sft", "dpo")
# How far rounding alone can move a loss that must be log 2 at the first step.
NOISE_FLOOR = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}


class Run(NamedTuple):
    """What the stages of a run share."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    tokenizer: Tokenizer
    model: PythiaConfig
    load_params: Callable[[], Any]  # the parameters before the first stage


class Start(NamedTuple):
    """Where a stage's parameters come from: a name for people, and how to load them."""

    source: str
    load: Callable[[], Any]


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Run the stages of a configuration in `workdir`, going on from whatever is there.

    Raises `InputError` for every mistake in the configuration, the data or the folder.
    """
    workdir = Path(os.path.abspath(workdir))
    _check_config(config)
    _claim(config, workdir)
    if config.synthetic:
        _write_synthetic(config, workdir)
    tokenizer = load_tokenizer(_path(config.tokenizer, config, workdir))
    mesh = sharding.make_mesh(**config.mesh)
    model, load_params = _model(config, workdir, mesh)
    if tokenizer.get_vocab_size() > model.vocab_size:
        raise InputError(
            f"tokenizer: {config.tokenizer} has {tokenizer.get_vocab_size()} ids, but the model's "
            f"vocabulary holds {model.vocab_size}; use the tokenizer the model was made with"
        )
    this = Run(config, workdir, mesh, tokenizer, model, load_params)
    start = Start(f"{config.model.weights or 'random weights'}", load_params)
    with jax.set_mesh(mesh):  # the model keeps activations split by rows on it
        for name in config.stages:
            start = _run_stage(this, name, start)
    for line in report.write(workdir, config.stages):
        console.print(line)


# --- the configuration and the work directory ----------------------------------------------


def _check_config(config: ConfigDict) -> None:
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
        if stage.checkpoint_every < 1:
            raise InputError(f"{name}.checkpoint_every: must be at least 1")
    if bool(config.model.weights) == bool(config.model.name):
        raise InputError(
            "model: give either weights (a folder or hub name) or name (a size, random weights)"
        )


def _claim(config: ConfigDict, workdir: Path) -> None:
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
    _write_json(file, wanted)
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers")
    versions = {name: version(name) for name in packages}
    devices = {"devices": jax.device_count(), "kind": jax.devices()[0].device_kind}
    system = {"python": sys.version.split()[0], "platform": platform.platform()}
    _write_json(workdir / "versions.json", versions | system | devices)


def _flat(tree: dict, prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: json.dumps(value)}
    return flat


def _write_json(file: Path, value: Any) -> None:
    writing = file.with_name(file.name + ".writing")
    writing.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(writing, file)


def _path(text: str, config: ConfigDict, workdir: Path) -> str:
    """A path of the configuration with {workdir} and {data} filled in."""
    return text.replace("{data}", config.data).replace("{workdir}", str(workdir))


def _write_synthetic(config: ConfigDict, workdir: Path) -> None:
    if (workdir / "data" / "tokenizer.json").exists():  # written last, so all is there
        return
    sizes = ("seed", "sft_train", "sft_test", "pairs_train", "pairs_test")
    knobs = config.synthetic.to_dict()
    sizes = {name: knobs.pop(name) for name in sizes}
    synthetic.write(workdir / "data", synthetic.Task(**knobs), **sizes)


def _model(config: ConfigDict, workdir: Path, mesh: Mesh) -> tuple[PythiaConfig, Callable]:
    """The model's shape, and a function that makes its parameters on the mesh."""
    settings = config.model.to_dict()
    weights, name, overrides = (settings.pop(key) for key in ("weights", "name", "overrides"))
    if weights:
        source = _path(weights, config, workdir)
        model = convert.hf_config(source, **overrides, **settings)
        return model, lambda: convert.load_hf(source, mesh=mesh, **overrides, **settings)[1]
    model = PythiaConfig.from_name(name, **overrides, **settings)
    init = functools.partial(pythia.init_params, model)
    shapes = jax.eval_shape(init, jax.random.key(0))
    init = jax.jit(init, out_shardings=sharding.param_shardings(shapes, mesh))
    return model, lambda: init(jax.random.key(config.seed))


# --- one stage -----------------------------------------------------------------------------


def _run_stage(this: Run, name: str, start: Start) -> Start:
    """Run a stage to its end, unless it is finished; returns where the next one starts."""
    settings, folder = this.config[name], this.workdir / name
    done = folder / "done.json"
    checkpoints = Checkpoints(folder / "checkpoints", keep=settings.keep_checkpoints)
    if done.exists():
        console.print(f"{name}: finished at step {json.loads(done.read_text())['step']}")
    else:
        final = _train(this, name, start, checkpoints)
        checkpoints.wait()
        _write_json(done, final)
    best = settings.hand_on == "best"
    step = checkpoints.best_step if best else checkpoints.latest_step
    shapes = jax.eval_shape(functools.partial(pythia.init_params, this.model), jax.random.key(0))
    placed = abstract(shapes, sharding.param_shardings(shapes, this.mesh))
    return Start(f"{name} step {step}", lambda: checkpoints.restore_params(step, placed))


def _train(this: Run, name: str, start: Start, checkpoints: Checkpoints) -> dict[str, Any]:
    settings, folder = this.config[name], this.workdir / name
    stores = _stores(this, name)
    batches = _batches(this, name, stores)
    sharding.check_divisible(
        this.mesh,
        batch_rows=math.gcd(
            batches["train"].num_groups // settings.micro_batches, batches["eval"].num_groups
        ),
        num_heads=this.model.num_heads,
        width=this.model.width,
        mlp_width=this.model.mlp_width,
        vocab_size=this.model.vocab_size,
    )
    params = None
    if name == "dpo":
        params = _add_reference(this, start, batches, folder)
    tx, schedule = _optimizer(name, settings)
    objective, expected = _objective(this.model, name, settings)
    state, first = _state(this, start, params, tx, checkpoints)
    del params  # donated with the state; the reference is data from here on
    step = make_train_step(
        objective,
        tx,
        max_grad_norm=settings.max_grad_norm,
        micro_batches=settings.micro_batches,
        shardings=jax.tree.map(lambda x: x.sharding, state),
    )
    loop = Loop(
        name=name,
        train_step=step,
        eval_step=jax.jit(lambda params, batch: objective(params, batch)[2]),
        schedule=schedule,
        put=functools.partial(put_batch, mesh=this.mesh),
        settings=settings,
        expected_first_loss=expected,
        noise_floor=NOISE_FLOOR[this.model.dtype],
    )
    return train_loop(loop, state, first, batches, checkpoints, folder)


def _stores(this: Run, name: str) -> dict[str, TokenStore]:
    """The tokenised training and evaluation data of a stage, read, counted and reported."""
    settings, folder = this.config[name], this.workdir / name
    data = settings.data
    read = functools.partial(
        pairs.read_pairs, format=data.format, max_bad_fraction=data.max_bad_fraction
    )
    sources = {"train": (data.train, data.limit), "eval": (data.eval, data.eval_limit)}
    found, reports = {}, {}
    for split, (source, limit) in sources.items():
        if source:
            path = _path(source, this.config, this.workdir)
            found[split], reports[split] = read(path, limit=limit)
    if name == "sft":
        found = {split: pairs.chosen_only(rows) for split, rows in found.items()}
    elif any(pair.rejected is None for rows in found.values() for pair in rows):
        raise InputError(f"dpo.data.format: {data.format!r} has no rejected responses")
    if data.test_fraction:
        found["train"], found["eval"] = pairs.split_by_prompt(
            found["train"], test_fraction=data.test_fraction, seed=this.config.seed
        )
    limits = Limits(settings.max_length, settings.max_prompt_length, settings.truncation)
    eos = eos_id(this.tokenizer, this.config.eos_token)
    stores = {
        split: tokenize(
            rows, this.tokenizer, eos=eos, limits=limits, folder=this.workdir / "tokens"
        )
        for split, rows in found.items()
    }
    _report_data(folder, name, reports, stores)
    return stores


def _report_data(folder: Path, name: str, reports: dict, stores: dict[str, TokenStore]) -> None:
    """Say and keep what the data is; refuse a stage whose data has changed under it."""
    for split, data_report in reports.items():
        console.print(f"{name} {split}: {data_report}", highlight=False)
    for split, store in stores.items():
        console.print(f"{name} {split}: {store.report}", highlight=False)
    file = folder / "data_report.json"
    keys = {split: store.key for split, store in stores.items()}
    if file.exists() and json.loads(file.read_text())["tokens"] != keys:
        raise InputError(
            f"{folder}: the data or the tokenizer has changed since this stage began; "
            "set it back, or choose another --workdir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    rows = {split: data_report.as_json() for split, data_report in reports.items()}
    tokens = {split: dataclasses.asdict(store.report) for split, store in stores.items()}
    _write_json(file, {"rows": rows, "truncation": tokens, "tokens": keys})


def _batches(this: Run, name: str, stores: dict[str, TokenStore]) -> dict[str, Batches]:
    settings = this.config[name]
    shared = dict(
        pairs_per_row=settings.pairs_per_row,
        num_buckets=settings.num_buckets,
        layout=settings.layout,
        process=(jax.process_index(), jax.process_count()),
    )
    train = Batches(
        stores["train"],
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        seed=this.config.seed,
        **shared,
    )
    if train.num_groups % settings.micro_batches:
        raise InputError(
            f"{name}.micro_batches: {settings.micro_batches} does not divide the batch's "
            f"{train.num_groups} rows of pairs"
        )
    evaluation = Batches(stores["eval"], batch_size=settings.eval_batch_size, **shared)
    return {"train": train, "eval": evaluation}


def _add_reference(this: Run, start: Start, batches: dict[str, Batches], folder: Path) -> Any:
    """Give the batches the reference's log-probabilities; returns its parameters if loaded.

    They are the parameters that training starts from, and are loaded at most once.
    """
    load = functools.cache(start.load)
    logps = jax.jit(functools.partial(token_logps, this.model))
    put = functools.partial(put_batch, mesh=this.mesh)
    for split, data in batches.items():
        in_order = Batches(
            data.store,
            batch_size=this.config.dpo.eval_batch_size,
            pairs_per_row=data.pairs_per_row,
            num_buckets=len(data.shapes),
            layout=data.layout,
            process=data.process,
        )

        def compute(data=in_order, split=split):
            params = load()
            with ProgressLine(f"reference {split}", len(data), console=console) as line:
                return reference.reference_token_logps(
                    lambda batch: logps(params, put(batch)),
                    data,
                    progress=lambda done: line.update(done, pairs=done * data.batch_size),
                )

        manifest = {"weights": start.source, "tokens": data.store.key, "dtype": this.model.dtype}
        data.reference = reference.kept(folder / "reference" / f"{split}.npy", manifest, compute)
    return load() if load.cache_info().currsize else None


def _optimizer(name: str, settings: ConfigDict):
    schedule = warmup(settings.learning_rate, settings.warmup_steps)
    if settings.optimizer == "rmsprop":
        return rmsprop(schedule), schedule
    if settings.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=settings.weight_decay), schedule
    raise InputError(f"{name}.optimizer: {settings.optimizer!r} is unknown; rmsprop or adamw")


def _objective(model: PythiaConfig, name: str, settings: ConfigDict):
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


def _state(this: Run, start: Start, params: Any, tx, checkpoints: Checkpoints):
    """The state to go on from, and the number of steps it has seen."""
    shapes = jax.eval_shape(functools.partial(pythia.init_params, this.model), jax.random.key(0))
    shardings = state_shardings(shapes, tx, this.mesh)
    init = functools.partial(initial_state, tx=tx)
    latest = checkpoints.latest_step
    if latest is not None:
        state = checkpoints.restore(latest, abstract(jax.eval_shape(init, shapes), shardings))
        console.print(f"resumed from step {latest}")
        return state, latest
    params = start.load() if params is None else params
    return jax.jit(init, donate_argnums=0, out_shardings=shardings)(params), 0
