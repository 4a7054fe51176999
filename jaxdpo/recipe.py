"""What a configuration may ask for: its keys, their checks, and the objects they stand for.

A file in `configs/` starts from `blank()`, where every key stands with its meaning, and sets
what makes it a recipe. Every mistake in it is an `InputError` that names the key. Left out:
the model a run begins from (`runs`), reading data and running stages (`stages`).
"""

import functools
import json
import math
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict, config_dict

from jaxdpo import InputError, losses, pairs, processes, records, sharding, synthetic
from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.step import Objective, decayed, preference_objective, rmsprop, sft_objective, warmup

STAGES = ("sft", "dpo")
SIZES = ("sft_train", "sft_test", "pairs_train", "pairs_test")  # of synthetic
POSTS = ("posts_train", "posts_test")  # the same; 0 where they do not stand
TINY, HUGE = 1e-12, 1e30  # what must be positive; what has no other upper limit
OPTIONAL = ("max_prompt_length",)  # may be None
ALSO = {float: (int,), tuple: (list,), type(None): (int,)}  # what else may stand for a default
# Keys of a stage that train nothing.
OBSERVING = ("samples", "sample_tokens", "trajectories", "trajectories_every", "hang_seconds")
# Keys that change how rows are packed and nothing but time; the last is of older versions.
PACKING = ("row_length", "num_buckets", "pairs_per_row")
RANGES = {
    **dict.fromkeys(("batch_size", "eval_batch_size", "micro_batches", "epochs"), (1, HUGE)),
    **dict.fromkeys(("num_buckets", "max_skipped_in_a_row"), (1, HUGE)),
    "row_length": (0, HUGE),
    **dict.fromkeys(("checkpoint_every", "keep_checkpoints", "max_length"), (1, HUGE)),
    "sample_tokens": (1, HUGE),
    **dict.fromkeys(("eval_every", "warmup_steps", "weight_decay", "samples"), (0, HUGE)),
    "hang_seconds": (0, HUGE),
    **dict.fromkeys(("trajectories", "trajectories_every"), (0, HUGE)),
    **dict.fromkeys(("learning_rate", "max_grad_norm", "beta"), (TINY, HUGE)),
    "final_learning_rate": (0, 1),
    "label_smoothing": (0, 0.5),
}


def blank() -> ConfigDict:
    """Every key of a configuration; the values are the official DPO code's or its README's.

    >>> blank().dpo.learning_rate
    5e-07
    """
    config = ConfigDict()
    config.seed = 0  # of random weights, of the batches' order, of a split by prompt
    config.stages = STAGES
    # In paths, {workdir} is the run's folder and {data} this:
    config.data = "{workdir}/data"
    config.tokenizer = ""  # a tokenizer.json or its folder; empty: the one beside the weights
    config.eos_token = "<|endoftext|>"
    # Sizes and knobs (see synthetic.Task) of the built-in data, written to {workdir}/data.
    config.synthetic = ConfigDict({})

    config.model = ConfigDict()
    # A Hugging Face folder, a hub name, or WORKDIR:STAGE of another run; or else:
    config.model.weights = ""
    config.model.name = ""  # pythia-14m ... pythia-12b, from random weights
    config.model.overrides = ConfigDict({})  # fields of PythiaConfig
    config.model.dtype = "float32"  # of the computation
    config.model.param_dtype = "float32"
    config.model.remat = "none"  # or "dots", "full": what the backward pass computes again
    config.model.scan_layers = False  # True compiles one layer instead of all
    config.model.logits_memory = 512  # MiB of a device; for more, logits are multiplied twice
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # devices; -1: all the others

    config.sft = _blank_stage()
    config.sft.data.responses = "chosen"  # of pairs, to train on; or "rejected", "all"
    config.dpo = _blank_stage()
    config.dpo.loss = "dpo"  # or "ipo"
    config.dpo.beta = 0.1
    config.dpo.label_smoothing = 0.0
    # Of so many held-out pairs, follow the implicit rewards (see drift); 0: of none.
    config.dpo.trajectories = 0
    config.dpo.trajectories_every = 0  # steps; 0: at the start and the end only
    # Several runs (see experiment): a name, of the run and its folder -> its own keys.
    config.runs = ConfigDict({})
    config.prediction = ""  # of Section 5.4, that a comparison judges: experiment.PREDICTIONS
    return config.lock()  # a misspelt key in a recipe is an error too


def _blank_stage() -> ConfigDict:
    stage = ConfigDict()
    stage.data = ConfigDict()
    stage.data.train = ""  # a file, or a hub name
    stage.data.eval = ""  # the same; or else:
    stage.data.test_fraction = 0.0  # this share of the prompts of train
    stage.data.format = "pairs"  # see pairs.FORMATS
    stage.data.split = "train"  # of a hub data set; a file has no splits
    stage.data.eval_split = "train"
    stage.data.limit = config_dict.placeholder(int)  # read only the first rows
    stage.data.eval_limit = config_dict.placeholder(int)
    stage.data.max_bad_fraction = 0.01  # above it, bad rows stop the run
    stage.max_length = 512  # tokens of prompt and longer response
    stage.max_prompt_length = config_dict.placeholder(int)
    stage.max_prompt_length = 256  # None with truncation "drop"
    stage.truncation = "official"  # see tokens.Limits
    stage.layout = "shared"  # or "separate", the plain twin
    stage.row_length = 2048  # positions that the mean row has at most; 0: a pair to a row
    stage.num_buckets = 4  # row shapes at most, each of which is compiled
    stage.batch_size = 64  # pairs, over all devices and micro-batches
    stage.eval_batch_size = 32
    stage.micro_batches = 1  # gradients are summed over them: memory for time
    stage.epochs = 1
    stage.optimizer = "rmsprop"  # as PyTorch defines it; or "adamw"
    stage.learning_rate = 5e-7
    stage.final_learning_rate = 1.0  # of it, at the last step; 1: no decay, as officially
    stage.warmup_steps = 150
    stage.weight_decay = 0.0  # of adamw
    stage.max_grad_norm = 10.0
    stage.max_skipped_in_a_row = 5  # steps that are not finite before the run stops
    stage.eval_every = 312  # steps; 0: at the start and the end only
    stage.samples = 0  # at each evaluation, decode greedily from so many of its prompts
    stage.sample_tokens = 64  # of any sample, at most; meanwhile each device holds the model
    stage.checkpoint_every = 312
    stage.keep_checkpoints = 2  # the latest ones, beside the best
    stage.hang_seconds = (
        3600  # a step, with what is looked at after it, that takes longer ends the run
    )
    stage.hand_on = "last"  # or "best": the checkpoint that the next stage starts from
    return stage


def check(config: ConfigDict) -> None:
    """Refuse keys that contradict each other, have no effect, or name what does not exist."""
    _check_types(config, blank())
    if config.runs:
        raise InputError("runs: a run has no runs of its own")
    unknown = [name for name in config.stages if name not in STAGES]
    if unknown or not config.stages or len(set(config.stages)) < len(config.stages):
        raise InputError(f"stages: {config.stages} must be some of {STAGES}, each once")
    if set(config.mesh) != set(sharding.AXES):
        raise InputError(f"mesh: {dict(config.mesh)} must have the keys {', '.join(sharding.AXES)}")
    if config.seed < 0:
        raise InputError(f"seed: must not be negative, not {config.seed}")
    for name in config.stages:
        stage = config[name]
        if not stage.data.train:
            raise InputError(f"{name}.data.train: give a file or a hub name")
        if bool(stage.data.eval) == bool(stage.data.test_fraction):
            raise InputError(
                f"{name}.data: give either eval (a file) or test_fraction (a share of the prompts)"
            )
        for key in ("test_fraction", "max_bad_fraction"):
            if not 0 <= stage.data[key] <= 1:
                raise InputError(f"{name}.data.{key}: {stage.data[key]} is not between 0 and 1")
        if stage.data.test_fraction and (stage.data.eval_limit or stage.data.eval_split != "train"):
            raise InputError(f"{name}.data: eval_limit and eval_split have no effect without eval")
        if stage.optimizer == "rmsprop" and stage.weight_decay:
            raise InputError(f"{name}.weight_decay: has no effect with rmsprop; set it to 0")
        for key, (low, high) in RANGES.items():
            if key in stage and not low <= stage[key] <= high:
                raise InputError(f"{name}.{key}: {stage[key]} is not between {low} and {high}")
        if stage.get("trajectories_every") and not stage.trajectories:
            raise InputError(
                f"{name}.trajectories_every: has no effect without {name}.trajectories, the "
                "number of pairs; set that, or this to 0"
            )
        if stage.hand_on not in ("last", "best"):
            raise InputError(f"{name}.hand_on: {stage.hand_on!r} is unknown; last or best")
        every = stage.eval_every
        if stage.hand_on == "best" and (every == 0 or stage.checkpoint_every % every):
            raise InputError(
                f"{name}.hand_on: best needs an evaluation at every checkpoint; make "
                f"checkpoint_every={stage.checkpoint_every} a multiple of eval_every={every}"
            )
    if config.sft.data.responses not in pairs.RESPONSES:
        raise InputError(
            f"sft.data.responses: {config.sft.data.responses!r} is unknown; choose from "
            f"{', '.join(pairs.RESPONSES)}"
        )
    if bool(config.model.weights) == bool(config.model.name):
        raise InputError(
            "model: give either weights (a folder or hub name) or name (a size, random weights)"
        )
    if twice := set(config.model) & set(config.model.overrides):
        raise InputError(f"model.overrides: {', '.join(sorted(twice))} stand in model itself")
    if found := {"attention", "attention_span"} & set(config.model.overrides):
        raise InputError(f"model.overrides: {', '.join(sorted(found))} is chosen by a run itself")
    if config.model.name:
        random_model(config)
    if config.synthetic:
        synthetic_data(config)


def _check_types(config: ConfigDict, known: ConfigDict, prefix: str = "") -> None:
    """Refuse values of another type than a recipe begins with; a part without keys holds any."""
    for key, default in known.items():
        value, name = config.get(key), prefix + key
        if isinstance(default, ConfigDict) or isinstance(value, ConfigDict):
            if not (isinstance(value, ConfigDict) and isinstance(default, ConfigDict)):
                raise InputError(f"{name}: {str(value)[:40]!r} cannot stand there")
            _check_types(value, default, f"{name}.")
            continue
        kinds = {type(default), *ALSO.get(type(default), ())}
        kinds |= {type(None)} if key in OPTIONAL else set()
        if type(value) not in kinds:
            said = " or ".join(sorted(kind.__name__ for kind in kinds))
            raise InputError(f"{name}: {str(value)[:40]!r} is of no type that it may have ({said})")
        if isinstance(value, int | float) and not abs(value) <= HUGE:
            raise InputError(f"{name}: {str(value)[:40]} is not finite, or too large")


def random_model(config: ConfigDict) -> PythiaConfig:
    """The model that a configuration without weights to begin from describes."""
    model = config.model.to_dict()
    storage = {key: model[key] for key in model.keys() - {"weights", "name", "overrides"}}
    try:
        return PythiaConfig.from_name(model["name"], **model["overrides"], **storage)
    except InputError as error:
        raise InputError(f"model: {error}") from error


def synthetic_data(config: ConfigDict) -> tuple[synthetic.Task, dict[str, int]]:
    """The built-in task that a configuration asks for, with the seed and the counts of rows."""
    knobs = config.synthetic.to_dict()
    try:
        sizes = {name: knobs.pop(name) for name in SIZES}
        sizes |= {name: knobs.pop(name, 0) for name in POSTS}
        seed = knobs.pop("seed")
        task = synthetic.Task(**knobs)
    except KeyError as error:
        raise InputError(f"synthetic: {error} is missing") from error
    except TypeError as error:  # a key that is unknown
        raise InputError(f"synthetic: {error}") from error
    synthetic.check_sizes(sizes)
    return task, {"seed": seed} | sizes


def begun(folder: Path) -> bool:
    """Whether a stage in this folder, or in folders within it, has started to train."""
    return (folder / "metrics.jsonl").exists() or any(folder.glob("*/metrics.jsonl"))


def check_alike(config: ConfigDict) -> None:
    """Refuse processes of one run that were not started alike: they would wait for each other.

    Raises `InputError` that names the keys and packages on a process that is not as the first.
    """
    mine = {"configuration": json.loads(config.to_json_best_effort()), "versions": _versions()}
    theirs = processes.from_first(lambda: mine)
    if differ := records.differing(theirs, mine):
        raise InputError(
            f"process {jax.process_index()} was started with another {', '.join(differ)} than "
            "the first one; start all of them alike"
        )


def claim(config: ConfigDict, workdir: Path) -> list[str]:
    """Make the folder this configuration's; refuse it if another's has begun to train in it.

    The mesh and how rows are packed may change (a run goes on, to rounding), and so may the keys
    of a stage that has not begun, and what only observes in one that is not finished. Keys that
    the run's version did not have count as left at their defaults. Returns what of `versions.json`,
    packages and devices, is not as it was when the run was last gone on with.
    """
    file = workdir / "config.json"
    free = {"mesh"} | {name for name in STAGES if not begun(workdir / name)}
    wanted = json.loads(config.to_json_best_effort())
    if file.exists() and begun(workdir):
        going_on = [name for name in STAGES if not (workdir / name / "done.json").exists()]
        free |= {"prediction"} | {f"{name}.{key}" for name in going_on for key in OBSERVING}
        free |= {f"{name}.{key}" for name in STAGES for key in PACKING}
        defaults = json.loads(blank().to_json_best_effort())
        differ = records.differing(_filled(records.read_json(file), defaults), wanted)
        if differ := [key for key in differ if not {key, key.partition(".")[0]} & free]:
            raise InputError(
                f"{workdir}: belongs to another configuration; these keys differ: "
                f"{', '.join(differ)}. "
                "Choose another --workdir, or set them back"
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        records.write_json(file, wanted)
    except OSError as error:
        raise InputError(f"--workdir {workdir}: cannot be written to ({error.strerror})") from error
    except ValueError as error:
        raise InputError("configuration: every number must be finite") from error
    devices = {"devices": jax.device_count(), "kind": jax.devices()[0].device_kind}
    system = {"python": sys.version.split()[0], "platform": platform.platform()}
    return _note_versions(workdir, _versions() | system | devices)


def _note_versions(workdir: Path, now: dict[str, Any]) -> list[str]:
    """Write down what runs, and under `earlier` what ran before where that was another."""
    file, earlier, differ = workdir / "versions.json", [], []
    if file.exists() and begun(workdir):
        found = records.read_json(file)
        earlier = found.pop("earlier", [])
        if differ := records.differing(found, now):
            earlier = [*earlier, {key: found.get(key) for key in differ}]
    records.write_json(file, now | ({"earlier": earlier} if earlier else {}))
    return differ


def _versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers")
    return {name: version(name) for name in packages}


def _filled(found: records.Record, defaults: records.Record) -> records.Record:
    both = {key: value for key, value in defaults.items() if isinstance(value, dict)}
    nested = {key: _filled(found[key], both[key]) for key in both.keys() & found.keys()}
    return defaults | found | nested


def path_of(text: str, config: ConfigDict, workdir: Path) -> str:
    """A path of the configuration with {workdir} and {data} filled in."""
    return text.replace("{data}", config.data).replace("{workdir}", str(workdir))


def optimizer(
    name: str, settings: ConfigDict, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The stage's optimizer and its learning rate, which falls over `num_steps`."""
    schedule = warmup(settings.learning_rate, settings.warmup_steps)
    schedule = decayed(schedule, settings.final_learning_rate, num_steps)
    if settings.optimizer == "rmsprop":
        return rmsprop(schedule), schedule
    if settings.optimizer == "adamw":
        # b2 as Pythia itself was trained: 0.999 would remember more steps than short runs have.
        return optax.adamw(schedule, b2=0.95, weight_decay=settings.weight_decay), schedule
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
