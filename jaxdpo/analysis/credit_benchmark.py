"""How well a policy's token rewards find the tokens that are known to be wrong.

On responses whose wrong characters are marked, the reward of every token,
beta log pi(token)/pi_ref(token) (arXiv 2404.12358, Eq. 10-11), and the baselines that a
skeptic would try first are measured as detectors of the wrong tokens: within a response, by
what the error is and where it stands, with another error before it, and in what the error
does to the right tokens after it. The end-of-text token counts as a right one.

Most right tokens are easy: words that any model of the text expects. A score that is low
wherever a value stands beats them without knowing a single value, so each error is also
compared with the right value in its place.

Left out: the responses (`known_errors`), the statistics (`detection`), what is measured
(`credit_measures`), and how it is shown (`credit_tables`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from rich.table import Table

from jaxdpo import InputError, recipe, runs, sharding
from jaxdpo.analysis import credit, credit_measures, credit_tables, known_errors
from jaxdpo.analysis.credit_measures import Scores
from jaxdpo.analysis.known_errors import Case
from jaxdpo.analysis.token_scores import noise_floor, token_logps, whole_store
from jaxdpo.language_models import LanguageModel, check_same_vocabulary, language_model
from jaxdpo.metrics import console
from jaxdpo.records import Record, differing, read_json, write_json

FILES = ("credit_benchmark.json", "credit_benchmark.md", "credit_benchmark.png")
RUN_ALONE = {"seed", "model.weights", "dpo.beta", "dpo.data.limit"}  # of a group, may differ
section = credit_tables.section  # of the record in the first of them


class Trial(NamedTuple):
    """The models to measure, by name; and the run they are of, its seed and training pairs."""

    policy: str
    reference: str
    base: str | None
    beta: float
    name: str | None = None
    seed: int | None = None
    pairs: int | None = None


class Source(NamedTuple):
    """Where the responses come from."""

    data: str
    format: str
    split: str | None
    limit: int | None
    corrupt: bool
    seed: int


def write(
    *,
    run: str | None,
    model: str | None,
    reference: str | None,
    base: str | None,
    beta: float | None,
    dtype: str | None,
    data: str | None,
    format: str | None,
    split: str | None,
    limit: int | None,
    corrupt: bool | None,
    seed: int | None,
    out: str | None,
) -> list[Table | str]:
    """Measure a run, a folder of runs, or models by name; returns what to print.

    Of a folder of runs, those with a dpo stage are measured: runs that differ in their seed
    alone are averaged, and those of other betas and numbers of pairs set side by side. Writes
    the `FILES` into `out`, or else the run's folder. Raises `InputError` for what is missing,
    contradicts, or has no effect.
    """
    if not (out or run):
        raise InputError("--out: give a folder to write into, or --run")
    asked = dict(split=split, limit=limit, corrupt=bool(corrupt), seed=seed or 0)
    if asked["seed"] < 0:
        raise InputError(f"--seed: {seed} must be 0 or more")
    models = dict(model=model, reference=reference, base=base, beta=beta)
    models = {name: value for name, value in models.items() if value is not None}
    if run and data and out and {"model", "reference", "beta"} <= models.keys():
        raise InputError("--run: has no effect where all else is given; leave it out")
    trials, found = _trials(run, models)
    if data:
        found = [(data, format or "pairs")]
    cases, counts, source = _cases([Source(*_data(*one, format), **asked) for one in found])
    folder = credit.folder(out or run)
    record = asked | {"data": source, "trials": [trial._asdict() for trial in trials]}
    scorer = _Scorer(cases, trials[0], dtype, source)
    scores = [scorer.scores(trial, seed=asked["seed"] + n) for n, trial in enumerate(trials)]
    groups = credit_measures.groups([(trial.beta, trial.pairs) for trial in trials])
    responses = scorer.responses, scorer.mended
    record |= credit_measures.measured(groups, scores, *responses, seed=asked["seed"])
    main = groups[record["main"]["beta"], record["main"]["pairs"]]
    noise_floor = max(scorer.noise_floor(trials[n]) for n in main)
    return _written(record | {"counts": counts, "noise_floor": noise_floor}, folder)


def _written(record: Record, folder: Path) -> list[Table | str]:
    write_json(folder / FILES[0], record)
    (folder / FILES[1]).write_text(credit_tables.markdown(record), encoding="utf-8")
    credit_tables.draw(record).savefig(folder / FILES[2], dpi=130)
    return [*credit_tables.rich_tables(record), f"figure: {folder / FILES[2]}"]


def _trials(run: str | None, models: Record) -> tuple[list[Trial], list[tuple[str | None, str]]]:
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
    for numbers in credit_measures.groups(settings).values():
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
        raise InputError(f"--run {folder}: {said}; train with configs/credit.py, or name a run")
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


def _data(data: str | None, format_of_it: str, format: str | None) -> tuple[str, str]:
    if not data:
        raise InputError("--data: give held-out pairs; there is no run that names them")
    return data, format or format_of_it


def _cases(sources: Sequence[Source]) -> tuple[list[Case], Record, str]:
    """The responses of the sources, which must all hold the same, counts, and the first's name."""
    found = {source: _read(source) for source in dict.fromkeys(sources)}
    first, *others = found
    for other in others:
        if found[other][0] != found[first][0]:
            raise InputError(
                f"{other.data}: holds other pairs than {first.data}; name those to measure all "
                "runs on with --data"
            )
    return *found[first], first.data


def _read(source: Source) -> tuple[list[Case], Record]:
    if source.corrupt:
        asked = dict(format=source.format, split=source.split, limit=source.limit)
        return known_errors.corrupted(source.data, **asked, seed=source.seed)
    if source.format != "pairs":
        raise InputError(f"--format {source.format}: has no marked errors; use --corrupt")
    if source.split is not None:
        raise InputError("--split: has no effect on a file with marked errors; leave it out")
    return known_errors.labelled(source.data, limit=source.limit)


class _Scorer:
    """Scores the cases with one model after another, none in memory with the next."""

    def __init__(self, cases: Sequence[Case], trial: Trial, dtype: str | None, source: str):
        self._mesh, self._dtype = sharding.make_mesh(), dtype
        first = self._model(trial.policy)
        several = [case for case in cases if len(case.errors) > 1]
        every = [*cases, *map(known_errors.first_put_right, several)]
        longest = first.lm.model.config.max_positions
        pairs = [case.pair for case in every]
        try:
            self._store = whole_store(pairs, first.tokenizer, first.eos_ids[0], longest)
            every = known_errors.responses(every, self._store, first.tokenizer)
        except InputError as cause:
            raise InputError(f"{source} {cause}") from cause
        self.responses, self.mended = every[: len(cases)], every[len(cases) :]
        self._first, self._keys, self._known = first._replace(lm=None), {}, {}

    def scores(self, trial: Trial, *, seed: int) -> Scores:
        """Every score of every scored token; reward and baselines, by name."""
        names = trial.policy, trial.reference, trial.base
        logps = [None if name is None else self._scored(name)[0] for name in names]
        every = [*self.responses, *self.mended]
        return credit_measures.scores(every, *logps, beta=trial.beta, seed=seed)

    def noise_floor(self, trial: Trial) -> float:
        """How far rounding alone moves a reward: beta times what it does to both models."""
        return trial.beta * sum(self._scored(name)[1] for name in (trial.policy, trial.reference))

    def _scored(self, name: str) -> tuple[np.ndarray, float]:
        """A model's log-probabilities and their noise; runs of one start share a reference."""
        if name not in self._keys:
            model = self._model(name)
            check_same_vocabulary([self._first, model])
            self._keys[name] = _key(model)
            if _key(model) not in self._known:
                logps = token_logps(model, self._store, label=name)
                self._known[_key(model)] = logps, noise_floor(model, self._store, logps)
        return self._known[self._keys[name]]

    def _model(self, name: str) -> LanguageModel:
        return language_model(name, self._mesh, dtype=self._dtype)


def _key(model: LanguageModel) -> str:
    return " ".join(model.identity.values())
