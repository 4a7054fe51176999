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
from rich.table import Table

from jaxdpo import InputError, sharding
from jaxdpo.analysis import credit, credit_measures, credit_tables, known_errors
from jaxdpo.analysis.credit_measures import Scores
from jaxdpo.analysis.known_errors import Case
from jaxdpo.analysis.token_scores import noise_floor, token_logps, whole_store
from jaxdpo.analysis.trials import Trial, by_setting, trials_of
from jaxdpo.language_models import LanguageModel, check_same_vocabulary, language_model
from jaxdpo.records import Record, write_json

FILES = ("credit_benchmark.json", "credit_benchmark.md", "credit_benchmark.png")
section = credit_tables.section  # of the record in the first of them


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
    trials, found = trials_of(run, models)
    if data:
        found = [(data, format or "pairs")]
    cases, counts, source = _cases([Source(*_data(*one, format), **asked) for one in found])
    folder = credit.folder(out or run)
    record = asked | {"data": source, "trials": [trial._asdict() for trial in trials]}
    scorer = _Scorer(cases, trials[0], dtype, source)
    scores = [scorer.scores(trial, seed=asked["seed"] + n) for n, trial in enumerate(trials)]
    groups = by_setting([(trial.beta, trial.pairs) for trial in trials])
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
