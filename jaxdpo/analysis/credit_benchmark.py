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
from jaxdpo.analysis import credit_measures, credit_tables, known_errors
from jaxdpo.analysis.credit_measures import Scores
from jaxdpo.analysis.known_errors import Case
from jaxdpo.analysis.token_scores import noise_floor, token_logps, whole_store
from jaxdpo.language_models import LanguageModel, check_same_vocabulary, language_model
from jaxdpo.metrics import console
from jaxdpo.records import Record, read_json, write_json

FILES = ("credit_benchmark.json", "credit_benchmark.md", "credit_benchmark.png")
section = credit_tables.section  # of the record in the first of them


class Trial(NamedTuple):
    """The models to measure, by name; a run's seed, and the pairs that it was trained on."""

    name: str
    policy: str
    reference: str
    base: str | None
    beta: float
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
    models = dict(model=model, reference=reference, base=base, beta=beta)
    models = {name: value for name, value in models.items() if value is not None}
    trials, found = _trials(run, models)
    asked = dict(split=split, limit=limit, corrupt=bool(corrupt), seed=seed or 0)
    sources = [Source(*_data(data, format, *of_run), **asked) for of_run in found]
    cases, counts = _cases(sources)
    scorer = _Scorer(cases, trials[0], dtype)
    scores = [scorer.scores(trial, seed=asked["seed"] + n) for n, trial in enumerate(trials)]
    record = asked | {"data": sources[0].data, "trials": [trial._asdict() for trial in trials]}
    record |= {"counts": counts, "noise_floor": trials[0].beta * scorer.noise_floor}
    groups = credit_measures.groups([(trial.beta, trial.pairs) for trial in trials])
    responses = scorer.responses, scorer.mended
    record |= credit_measures.measured(groups, scores, *responses, seed=asked["seed"])
    folder = Path(out or run)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILES[0], record)
    (folder / FILES[1]).write_text(credit_tables.markdown(record), encoding="utf-8")
    credit_tables.draw(record).savefig(folder / FILES[2], dpi=130)
    return [*credit_tables.rich_tables(record), f"figure: {folder / FILES[2]}"]


def _trials(run: str | None, models: Record) -> tuple[list[Trial], list[tuple[str | None, str]]]:
    """What to measure, and the held-out data and its format that each run names."""
    if run is None:
        for name in ("model", "reference", "beta"):
            if name not in models:
                raise InputError(f"--{name}: give it, or --run, a run's work directory")
        name = models.pop("model")
        trial = Trial(name, name, **{"base": None} | models)
        return [_checked(trial)], [(None, "pairs")]
    folders = [Path(run)] if runs.is_run(run) else _preference_runs(Path(run))
    if models and not runs.is_run(run):
        raise InputError(f"--{min(models)}: every run in {run} has its own; leave it out")
    found = [(folder, runs.roles(folder)) for folder in folders]
    trials = [_trial(folder, roles) for folder, roles in found]
    if runs.is_run(run):
        renamed = {"policy" if name == "model" else name: models[name] for name in models}
        trials = [trials[0]._replace(**renamed)]
    seen: dict[tuple, str] = {}
    for trial in map(_checked, trials):
        other = seen.setdefault((trial.beta, trial.pairs, trial.seed), trial.name)
        if other != trial.name:
            raise InputError(
                f"--run {run}: {other} and {trial.name} have the same beta, pairs and seed, so "
                "they differ in what is no seed; measure each alone"
            )
    return trials, [(roles.data, roles.format) for _, roles in found]


def _checked(trial: Trial) -> Trial:
    if not 0 < trial.beta < float("inf"):
        raise InputError(f"--beta: {trial.beta} must be positive")
    return trial


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
    report = workdir / "dpo" / "data_report.json"
    if not report.is_file():
        raise InputError(f"{workdir}: its dpo stage has not begun; run its recipe first")
    pairs = read_json(report)["truncation"]["train"]["examples"]
    seed = _config(workdir).seed
    names = roles.policy, roles.reference, _base(workdir, roles)
    return Trial(workdir.name, *names, beta=roles.beta, seed=seed, pairs=pairs)


def _base(workdir: Path, roles: runs.Roles) -> str | None:
    """What the reference was made from, also where another run made it; None: not known."""
    if roles.base != roles.reference:
        return roles.base
    config = _config(workdir)
    made = runs.named(recipe.path_of(config.model.weights, config, workdir))
    return f"{made[0]}:start" if made and made[1] != "start" else None


def _config(workdir: Path) -> ConfigDict:
    return ConfigDict(read_json(workdir / "config.json"))


def _data(data, format, of_run: str | None, format_of_run: str) -> tuple[str, str]:
    if not (data or of_run):
        raise InputError("--data: give held-out pairs; there is no run that names them")
    return data or of_run, format or format_of_run


def _cases(sources: Sequence[Source]) -> tuple[list[Case], Record]:
    """The responses of the sources, which must all hold the same, and what was counted."""
    found = {source: _read(source) for source in dict.fromkeys(sources)}
    first, *others = found
    for other in others:
        if found[other][0] != found[first][0]:
            raise InputError(
                f"{other.data}: holds other pairs than {first.data}; name those to measure all "
                "runs on with --data"
            )
    return found[first]


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

    def __init__(self, cases: Sequence[Case], trial: Trial, dtype: str | None):
        self._mesh, self._dtype = sharding.make_mesh(), dtype
        self._first = first = self._model(trial.policy)
        several = [case for case in cases if len(case.errors) > 1]
        every = [*cases, *map(known_errors.first_put_right, several)]
        longest = first.lm.model.config.max_positions
        pairs = [case.pair for case in every]
        self._store = whole_store(pairs, first.tokenizer, first.eos_ids[0], longest)
        every = known_errors.responses(every, self._store, first.tokenizer)
        self.responses, self.mended = every[: len(cases)], every[len(cases) :]
        logps = token_logps(first, self._store, label=first.name)
        self.noise_floor = noise_floor(first, self._store, logps)
        self._known = {_key(first): logps}  # runs of one start share their reference
        self._first = first._replace(lm=None)

    def scores(self, trial: Trial, *, seed: int) -> Scores:
        """Every score of every scored token; reward and baselines, by name."""
        names = trial.policy, trial.reference, trial.base
        logps = [None if name is None else self._logps(name) for name in names]
        every = [*self.responses, *self.mended]
        return credit_measures.scores(every, *logps, beta=trial.beta, seed=seed)

    def _logps(self, name: str) -> np.ndarray:
        model = self._model(name)
        check_same_vocabulary([self._first, model])
        if _key(model) not in self._known:
            self._known[_key(model)] = token_logps(model, self._store, label=name)
        return self._known[_key(model)]

    def _model(self, name: str) -> LanguageModel:
        return language_model(name, self._mesh, dtype=self._dtype)


def _key(model: LanguageModel) -> str:
    return " ".join(model.identity.values())
