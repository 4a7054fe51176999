"""Which models an analysis compares: a run's, those of a folder of runs, or models by name.

Of a folder those with a dpo stage are taken, all of them finished; runs that an analysis would
average differ in their seed alone. Left out: what is measured (`credit_benchmark`, `sweep`).
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxdpo import InputError, recipe, runs
from jaxdpo.metrics import console
from jaxdpo.records import Record, differing, read_json

RUN_ALONE = {"seed", "model.weights", "dpo.beta", "dpo.data.limit"}  # of a group, may differ


class Trial(NamedTuple):
    """The models to measure, by name; and the run they are of, its seed and training pairs."""

    policy: str
    reference: str
    base: str | None
    beta: float
    name: str | None = None
    seed: int | None = None
    pairs: int | None = None


def trials_of(run: str | None, models: Record) -> tuple[list[Trial], list[tuple[str | None, str]]]:
    """What to measure, and the held-out data and its format that each run names."""
    renamed = {"policy" if name == "model" else name: models[name] for name in models}
    if not 0 < models.get("beta", 1) < float("inf"):
        raise InputError(f"--beta: {models['beta']} must be above 0; give that of the training")
    if run is None:
        for name in ("model", "reference", "beta"):
            if name not in models:
                raise InputError(f"--{name}: give it, or --run, a run's work directory")
        return [Trial(**{"base": None} | renamed)], [(None, "pairs")]
    if runs.is_run(run):
        roles = runs.roles(run)
        return [_overridden(Path(run), roles, renamed)], [(roles.data, roles.format)]
    if models:
        raise InputError(f"--{min(models)}: every run in {run} has its own; leave it out")
    found = [(folder, runs.roles(folder)) for folder in _preference_runs(Path(run))]
    trials = [_trial(folder, roles) for folder, roles in found]
    _check_seeds_alone_differ(Path(run), trials)
    return trials, [(roles.data, roles.format) for _, roles in found]


def by_setting(settings: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """The trials that share a setting, in order.

    >>> by_setting([0.1, 0.3, 0.1])
    {0.1: [0, 2], 0.3: [1]}
    """
    found: dict[Hashable, list[int]] = {}
    for number, setting in enumerate(settings):
        found.setdefault(setting, []).append(number)
    return found


def _overridden(workdir: Path, roles: runs.Roles, models: Record) -> Trial:
    """A run with other models or another beta: with other models it is that run no more."""
    if not {"policy", "reference"} & models.keys():
        return _trial(workdir, roles)._replace(**models)
    if "policy" not in models:
        _check_finished(workdir)
    base = None if "reference" in models else _base(workdir, roles)
    own = dict(policy=roles.policy, reference=roles.reference, base=base, beta=roles.beta)
    return Trial(**own | models)


def _check_seeds_alone_differ(folder: Path, trials: Sequence[Trial]) -> None:
    """Raise `InputError` where runs that would be averaged differ in what is no seed."""
    settings = [(trial.beta, trial.pairs) for trial in trials]
    for numbers in by_setting(settings).values():
        first, *others = (trials[number] for number in numbers)
        seeds = {first.seed: first.name}
        config = read_json(folder / first.name / "config.json")
        for other in others:
            found = differing(config, read_json(folder / other.name / "config.json"))
            if wrong := [key for key in found if key not in RUN_ALONE]:
                raise InputError(
                    f"--run {folder}: {first.name} and {other.name} differ in {', '.join(wrong)}, "
                    "not in their seed alone; measure each alone"
                )
            if seeds.setdefault(other.seed, other.name) != other.name:
                raise InputError(
                    f"--run {folder}: {seeds[other.seed]} and {other.name} have the same beta, "
                    "pairs and seed; measure each alone"
                )


def _preference_runs(folder: Path) -> list[Path]:
    """The runs in a folder that have a dpo stage; those without are named on the console."""
    found = sorted(file.parent for file in folder.glob("*/config.json"))
    found = [one for one in found if runs.is_run(one)]
    without = [one.name for one in found if "dpo" not in _config(one).stages]
    if len(found) == len(without):
        said = "none of its runs has a dpo stage" if found else "neither a run nor a folder of runs"
        raise InputError(f"--run {folder}: {said}; name one that has")
    if without:
        console.print(f"not measured, without a dpo stage: {', '.join(without)}")
    return [one for one in found if one.name not in without]


def _trial(workdir: Path, roles: runs.Roles) -> Trial:
    _check_finished(workdir)
    report = read_json(workdir / "dpo" / "data_report.json")
    return Trial(
        policy=roles.policy,
        reference=roles.reference,
        base=_base(workdir, roles),
        beta=roles.beta,
        name=workdir.name,
        seed=_config(workdir).seed,
        pairs=report["truncation"]["train"]["examples"],
    )


def _check_finished(workdir: Path) -> None:
    if not (workdir / "dpo" / "done.json").is_file():
        raise InputError(f"{workdir}: its dpo stage has not finished; run its recipe again first")


def _base(workdir: Path, roles: runs.Roles) -> str | None:
    """What the reference was made from, also where another run made it; None: not known."""
    if roles.base != roles.reference:
        return roles.base
    config = _config(workdir)
    made = runs.named(recipe.path_of(config.model.weights, config, workdir))
    return f"{made[0]}:start" if made and made[1] != "start" else None


def _config(workdir: Path) -> ConfigDict:
    return ConfigDict(read_json(workdir / "config.json"))
