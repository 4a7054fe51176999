"""From a recipe to trained checkpoints: the stages in their order, their data and reference.

A recipe runs its stages (`sft`, `dpo`) in order in one work directory, each in a folder of
its own; a stage starts from the last or best checkpoint of the one before it, goes on
from its own latest checkpoint if it has one, and is not run again once it is finished.
Left out: what a configuration may say (`recipe`), a stage's data (`stage_data`), the loop
(`train`), what one update does (`step`).
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from jaxdpo import (
    InputError,
    attention,
    compilation,
    fingerprint,
    processes,
    recipe,
    reference,
    runs,
    sharding,
    synthetic,
)
from jaxdpo.accounting import Accounts
from jaxdpo.analysis import report, trajectories
from jaxdpo.batching import Batch, Batches
from jaxdpo.checkpoint import Checkpoints, abstract
from jaxdpo.compilation import Programs
from jaxdpo.decoding import Constraints
from jaxdpo.drift import Drift, first_pairs
from jaxdpo.lock import locked
from jaxdpo.metrics import ProgressLine, SpeedLog, console, read_metrics
from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.records import read_json, write_json
from jaxdpo.samples import Hearing, check_room, first_prompts
from jaxdpo.stage_data import in_rows, stage_batches
from jaxdpo.step import (
    Objective,
    TrainState,
    initial_state,
    make_train_step,
    state_shardings,
    token_logps,
)
from jaxdpo.tokens import (
    TokenStore,
    check_vocabulary,
    eos_id,
    load_tokenizer,
    num_tokens,
)
from jaxdpo.train import (
    Loop,
    Observer,
    abstract_batches,
    compiled,
    compiled_ahead,
    put_batch,
    train_loop,
)

# How far rounding alone can move a loss that must be log 2 at the first step.
NOISE_FLOOR = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}


class Run(NamedTuple):
    """What the stages of a run share."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    tokenizer: Tokenizer
    model: PythiaConfig


class Stage(NamedTuple):
    """A stage made ready: its data read and counted, its parts built."""

    name: str
    settings: ConfigDict
    folder: Path
    model: PythiaConfig  # its attention_span is that of the longest example of both sides
    batches: dict[str, Batches]  # train, eval
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    objective: Objective
    expected_first_loss: float | None
    samples: Hearing | None
    drift: Drift | None


class Start(NamedTuple):
    """Where a stage's parameters come from: a name for people, and how to load them."""

    source: str
    load: Callable[[], Any]


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Run the stages of a configuration in `workdir`, going on from whatever is there.

    Raises `InputError` for every mistake in the configuration, the data or the folder.
    """
    workdir = Path(os.path.abspath(workdir))
    recipe.check(config)
    compilation.check_dtype(config.model.dtype)
    with locked(workdir):
        _run(config, workdir)


def _run(config: ConfigDict, workdir: Path) -> None:
    recipe.check_alike(config)
    processes.from_first(lambda: _begin(config, workdir))
    mesh = sharding.make_mesh(**config.mesh)
    initial = runs.initial(config, workdir, mesh)
    tokenizer, model = load_tokenizer(initial.tokenizer), initial.model
    check_vocabulary(tokenizer, model.vocab_size, initial.tokenizer)
    with jax.set_mesh(mesh):
        model = _with_fastest_attention(model, mesh)
    this = Run(config, workdir, mesh, tokenizer, model)
    # All stages are made ready first: a mistake in the last one must not cost the others.
    todo = processes.from_first(lambda: [n for n in config.stages if not _done(workdir / n)])
    prepared = {name: _prepared(this, name) for name in todo}
    start = Start(initial.source, initial.load)
    with jax.set_mesh(mesh):  # the model keeps activations split by rows on it
        for name in config.stages:
            start = _run_stage(this, name, prepared.get(name), start)
    processes.from_first(lambda: _say(report.write(workdir)))


def _say(lines: Iterable[Any]) -> None:
    for line in lines:
        console.print(line, markup=False)


def _done(folder: Path) -> bool:
    return (folder / "done.json").exists()


def _with_fastest_attention(model: PythiaConfig, mesh: Mesh) -> PythiaConfig:
    """The model with the attention that is fastest on the mesh's devices, if it is right there."""
    device = mesh.devices.flat[0]
    heads = {"dtype": model.dtype, "head_width": model.head_width}
    found, fault = attention.fastest(device.platform, **heads), ""
    if found != "blocks":
        rows, parts = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
        fault = attention.fault(found, **heads, num_heads=parts, num_rows=rows)
    if fault:
        console.print(f"warning: attention: no {found} on {device.device_kind}: {fault}")
        found = "blocks"
    console.print(f"attention: {found}, on {device.device_kind} in {model.dtype}")
    return dataclasses.replace(model, attention=found)


def _begin(config: ConfigDict, workdir: Path) -> None:
    if differ := recipe.claim(config, workdir):
        console.print(
            f"warning: {', '.join(differ)} changed since this run was last gone on with (see "
            "versions.json): it goes on from the same examples, but not bit for bit"
        )
    # In a run that has begun the data is there, and is what this configuration makes.
    if config.synthetic and not recipe.begun(workdir):
        task, sizes = recipe.synthetic_data(config)
        synthetic.write(workdir / "data", task, **sizes)


def _prepared(this: Run, name: str) -> Stage:
    settings = this.config[name]
    batches = stage_batches(this.config, this.workdir, name, this.tokenizer, this.mesh)
    span = max(data.span for data in batches.values())
    this = this._replace(model=dataclasses.replace(this.model, attention_span=span))
    for key, data in (("batch_size", batches["train"]), ("eval_batch_size", batches["eval"])):
        micro_batches = settings.micro_batches if key == "batch_size" else 1
        try:
            sharding.check_divisible(
                this.mesh,
                batch_rows=data.num_rows // micro_batches,
                num_heads=this.model.num_heads,
                width=this.model.width,
                mlp_width=this.model.mlp_width,
                vocab_size=this.model.vocab_size,
            )
        except InputError as error:
            raise InputError(f"{name} ({key}={settings[key]}): {error}") from error
    tx, schedule = recipe.optimizer(name, settings, len(batches["train"]))
    objective, expected = recipe.objective(this.model, name, settings)
    return Stage(
        name=name,
        settings=settings,
        folder=this.workdir / name,
        model=this.model,
        batches=batches,
        tx=tx,
        schedule=schedule,
        objective=objective,
        expected_first_loss=expected,
        samples=_samples(this, name, batches["eval"].store),
        drift=_drift(this, name, batches["eval"].store),
    )


def _samples(this: Run, name: str, store: TokenStore) -> Hearing | None:
    settings = this.config[name]
    if not settings.samples:
        return None
    check_room(f"{name}.sample_tokens", settings.sample_tokens, store, this.model)
    prompts, ending = first_prompts(store, settings.samples), _ending(this, settings.sample_tokens)
    return Hearing(name, this.model, this.mesh, this.tokenizer, prompts, ending)


def _drift(this: Run, name: str, store: TokenStore) -> Drift | None:
    settings = this.config[name]
    if not settings.get("trajectories"):
        return None
    try:
        measured = first_pairs(store, settings.trajectories)
    except InputError as error:
        raise InputError(f"{name}.trajectories: {error}") from error
    check_room(f"{name}.sample_tokens", settings.sample_tokens, measured, this.model)
    return Drift(
        this.model,
        this.mesh,
        measured,
        _ending(this, settings.sample_tokens),
        beta=settings.beta,
        seed=this.config.seed,
        batch_size=settings.eval_batch_size,
    )


def _ending(this: Run, most: int) -> Constraints:
    """How a sample ends: by the end token, or after so many tokens."""
    eos = eos_id(this.tokenizer, this.config.eos_token)
    return Constraints(most, eos_ids=(eos,), num_tokens=num_tokens(this.tokenizer))


def _run_stage(this: Run, name: str, stage: Stage | None, start: Start) -> Start:
    """Run a stage to its end, unless it is finished (None); returns where the next one starts."""
    settings, folder = this.config[name], this.workdir / name
    if stage is not None:
        keep = settings.keep_checkpoints
        say = functools.partial(console.print, markup=False)
        with Checkpoints(folder / "checkpoints", keep=keep, clean=True, say=say) as checkpoints:
            _train(this, stage, start, checkpoints)
            checkpoints.wait()
        processes.from_first(lambda: write_json(folder / "done.json", read_metrics(folder)[-1]))
    final = read_json(folder / "done.json")
    console.print(f"{name}: finished at step {final['step']}")
    step, load = runs.checkpointed(folder, this.model, this.mesh, settings.hand_on)
    return Start(f"{name} step {step}", load)


def _train(this: Run, stage: Stage, start: Start, checkpoints: Checkpoints) -> None:
    latest, batches, is_dpo = checkpoints.latest_step, stage.batches, stage.name == "dpo"
    init = functools.partial(initial_state, tx=stage.tx)
    like = _abstract_state(this, stage, init)
    parts = jax.device_count() * stage.settings.micro_batches
    accounts = Accounts(stage.model, batches["train"].store.lengths, parts=parts)
    mine, rows = sharding.row_parts(this.mesh)
    copies = len(mine) * jax.process_count() // rows
    with SpeedLog(stage.folder, accounts, copies=copies) as speed:
        # A step that does not fit must say so before the reference is computed.
        loop = compiled_ahead(_loop(this, stage, start, like), like, batches, logps=is_dpo)
        params = None
        if is_dpo:
            with speed.on("reference"):
                params = _add_reference(this, stage, start, seed=(this.config.seed, latest or 0))
        if latest is not None:
            params = None  # they go before the checkpoint's come
        # Also where no step is left: it may be that none could be trusted.
        if found := checkpoints.restore_latest(like):
            latest, state = found
            console.print(f"resumed from step {latest}")
        else:
            params = start.load() if params is None else params
            places = jax.tree.map(lambda x: x.sharding, like)
            state = jax.jit(init, donate_argnums=0, out_shardings=places)(params)
        del params  # donated with the state; the reference is data from here on
        train_loop(loop, state, latest or 0, batches, checkpoints, stage.folder, speed)


def _abstract_state(this: Run, stage: Stage, init: Callable[[Any], TrainState]) -> TrainState:
    """The state of a stage without its numbers, placed on the mesh."""
    params = runs.param_shapes(stage.model)
    return abstract(jax.eval_shape(init, params), state_shardings(params, stage.tx, this.mesh))


def _loop(this: Run, stage: Stage, start: Start, like: TrainState) -> Loop:
    settings = stage.settings
    step = make_train_step(
        stage.objective,
        stage.tx,
        max_grad_norm=settings.max_grad_norm,
        micro_batches=settings.micro_batches,
        shardings=jax.tree.map(lambda x: x.sharding, like),
    )
    return Loop(
        name=stage.name,
        train_step=step,
        eval_step=jax.jit(lambda params, batch: stage.objective(params, batch)[2]),
        schedule=stage.schedule,
        put=functools.partial(put_batch, mesh=this.mesh),
        source=settings.data.train,
        eval_every=settings.eval_every,
        checkpoint_every=settings.checkpoint_every,
        max_skipped_in_a_row=settings.max_skipped_in_a_row,
        hang_seconds=settings.hang_seconds,
        expected_first_loss=stage.expected_first_loss,
        noise_floor=NOISE_FLOOR[this.model.dtype],
        observers=_observers(stage, start),
    )


def _observers(stage: Stage, start: Start) -> list[Observer]:
    found = []
    if stage.samples is not None:
        log, every = stage.folder / "samples.jsonl", stage.settings.eval_every
        found.append(Observer(log, every, stage.samples.records))
    if stage.drift is not None:
        log, every = stage.folder / trajectories.FILE, stage.settings.trajectories_every
        # The reference is loaded for each measurement, and let go again.
        record = lambda step, params: [stage.drift.record(step, params, start.load())]
        found.append(Observer(log, every, record))
    return found


def _add_reference(this: Run, stage: Stage, start: Start, *, seed: tuple[int, int]) -> Any:
    """Give the batches the reference's log-probabilities; returns its parameters.

    They are the parameters that training starts from. Also where the numbers are there already
    some, drawn by `seed`, are computed again: that they are of these weights is seen, not believed.
    """
    params, sides, noise = start.load(), stage.batches.items(), 0.0
    made_from = _made_from(this, stage.settings, params)
    files = {
        side: (stage.folder / f"reference/{side}.npy", made_from | {"tokens": data.store.key})
        for side, data in sides
    }
    in_order = {
        side: _in_order(this, stage, side)
        for side, data in sides
        if reference.begun(*files[side], data.store) < len(data.store)
    }
    micro_batches = {"train": stage.settings.micro_batches, "eval": 1}
    draw = lambda side: reference.drawn(
        stage.batches[side], seed=seed, micro_batches=micro_batches[side]
    )
    logps = _forward(this, stage, params, in_order, [draw(side) for side, _ in sides])
    for side, data in sides:
        with ProgressLine(f"reference {side}", len(data.store)) as line:
            told = lambda done, seen: line.update(done, seen=seen)  # noqa: B023
            passed = in_order.get(side, data)
            data.reference = reference.kept(*files[side], logps, passed, progress=told)
        noise = max(noise, _checked(this, files[side][0], logps, draw(side)))
    console.print(
        f"{stage.name}: reference {start.source}: noise floor of a token's log-probability: "
        f"{noise:.1e} nats ({this.model.dtype}); of its reward: {stage.settings.beta * noise:.1e}"
    )
    return params


def _in_order(this: Run, stage: Stage, side: str) -> Batches:
    """The examples of one side as the file has them; evaluation's batches are so already."""
    data = stage.batches[side]
    if side == "eval":
        return data
    return in_rows(this.config, stage.name, data.store, this.mesh, "eval_batch_size")


def _forward(
    this: Run, stage: Stage, params: Any, in_order: dict[str, Batches], drawn: list[Batch]
) -> reference.TokenLogps:
    """The reference's log-probabilities, compiled for every batch that it will be asked for."""
    put = functools.partial(put_batch, mesh=this.mesh)
    bare = lambda batch: put(batch._replace(reference_token_logps=None))
    shapes = [abstract(x, jax.tree.map(lambda leaf: leaf.sharding, x)) for x in map(bare, drawn)]
    for data in in_order.values():
        shapes += abstract_batches(data, put, logps=False)
    rows = NamedSharding(this.mesh, sharding.batch_spec)
    function = jax.jit(functools.partial(token_logps, stage.model), out_shardings=rows)
    programs = Programs(function, params, dict.fromkeys(shapes))
    compiled(f"{stage.name} reference", [programs])
    return lambda batch: programs(params, bare(batch))


def _checked(this: Run, file: Path, logps: reference.TokenLogps, batch: Batch) -> float:
    platform = this.mesh.devices.flat[0].platform
    try:
        return reference.check(logps, batch, dtype=this.model.dtype, platform=platform)
    except InputError as error:
        raise InputError(
            f"{file}: {error}; delete {file.name} and {file.stem}.json there to have them computed "
            "again"
        ) from error


def _made_from(this: Run, settings: ConfigDict, params: Any) -> dict[str, Any]:
    """What decides about the reference's numbers, beside the tokens."""
    numbers = ("num_heads", "rotary_pct", "rotary_base", "layer_norm_epsilon", "parallel_residual")
    limits = ("max_length", "max_prompt_length", "truncation")
    return {
        "weights": fingerprint.identity(params),
        "model": {field: getattr(this.model, field) for field in numbers},
        "truncation": {key: settings[key] for key in limits},
        "dtype": this.model.dtype,
    }
