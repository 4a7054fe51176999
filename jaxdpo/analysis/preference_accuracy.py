"""How often a policy scores the chosen response of labelled pairs higher than the rejected one.

As RewardBench (arXiv 2403.13787) measures DPO policies: a pair is won where the implicit reward
of the chosen response, beta times its log-probability ratio summed over its tokens, is the
higher; a subset's accuracy is the share of its pairs that are won, and several are averaged with
equal weights. There a tie is lost, here it is half won, and counted. Beside it stand the same
per token, the log-likelihood without a reference, and what length alone would have won.

No response is cut, as truncation would compare other texts than were labelled: a pair too long
for the models is an error that names its line. Left out: how it is shown (`preference_tables`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer
from rich.table import Table

from jaxdpo import InputError, runs, sharding
from jaxdpo.analysis import credit, preference_tables, tables
from jaxdpo.analysis.detection import Estimate, Resamples, mean, ratio, resamples
from jaxdpo.analysis.token_scores import token_logps, whole_store
from jaxdpo.analysis.win_rates import wilson
from jaxdpo.language_models import check_same_vocabulary, language_model
from jaxdpo.pairs import DataReport, Pair, field_values, read_pairs
from jaxdpo.records import Record, write_json

FILES = tuple(f"preference_accuracy.{kind}" for kind in ("json", "md", "png"))
REWARD, LIKELIHOOD = "implicit reward", "log-likelihood"
PER_TOKEN = "{}, per token"
LONGER, SHORTER = "the longer one wins", "the shorter one wins"
SEED = 0  # of the bootstrap


class Accuracy(NamedTuple):
    """The share of pairs won, a tie half won, with its interval in two ways; see `accuracy`."""

    pairs: int
    ties: int
    wilson: Estimate
    bootstrap: Estimate

    def as_json(self) -> Record:
        value, *wilson = self.wilson.as_json()
        ends = {"wilson": wilson, "bootstrap": self.bootstrap.as_json()[1:]}
        return {"accuracy": value, "pairs": self.pairs, "ties": self.ties} | ends


class LengthShare(NamedTuple):
    """How much of an accuracy length alone explains; see `length_share`."""

    chosen_longer: Accuracy
    chosen_shorter: Accuracy
    balanced: Estimate
    picks_longer: Estimate
    r_squared: float

    def as_json(self) -> Record:
        return {
            "chosen_longer": self.chosen_longer.as_json(),
            "chosen_shorter": self.chosen_shorter.as_json(),
            "balanced": self.balanced.as_json(),
            "picks_longer": self.picks_longer.as_json(),
            "r_squared": None if math.isnan(self.r_squared) else self.r_squared,
        }


def write(
    *,
    run: str | None = None,
    model: str | None = None,
    reference: str | None = None,
    beta: float | None = None,
    dtype: str | None = None,
    data: str | None = None,
    format: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    subset: str | None = None,
    out: str | None = None,
) -> list[Table | str]:
    """Measure a policy on labelled pairs and write the `FILES` into `out`; returns what to print.

    A `run` gives the models, beta, data and `out` that are not given; without one and without a
    `reference` there are no rewards, only likelihoods. `subset` names a field of the rows (dotted
    where nested) by whose values accuracy is told apart. Bad rows are counted by reason, repeated
    pairs and contradicting labels too, and these are kept. Raises `InputError` for what is
    missing, wrong or without effect, and names the line of a pair that cannot be scored whole.
    """
    given = {"model": model, "reference": reference, "beta": beta}
    given |= {"data": data, "format": format, "out": out}
    given = _checked(given if run is None else _filled(run, given))
    pairs, report = _pairs(given["data"], given["format"] or "pairs", split, limit)
    asked = {} if split is None else {"split": split}
    values = None if subset is None else field_values(given["data"], subset, pairs, **asked)
    into = credit.folder(given["out"])
    names = {"policy": given["model"], "reference": given["reference"]}
    models, lengths, logps = _scored(names, pairs, dtype, given["data"])
    prompts = [pair.prompt for pair in pairs]
    found = measured(scores(lengths, **logps, beta=given["beta"]), lengths, prompts, values)
    record = {"source": given["data"], "models": models, "beta": given["beta"]}
    record |= {"data": report.as_json(), "subset": subset} | found
    return [str(report), *_written(record, into)]


def scores(
    lengths: Integer[np.ndarray, "n 2"],
    policy: Float[np.ndarray, "n 2"],
    reference: Float[np.ndarray, "n 2"] | None = None,
    *,
    beta: float | None = None,
) -> dict[str, Float[np.ndarray, "n 2"]]:
    """Every score of the chosen and the rejected response of each pair, by name.

    `policy` and `reference` are log-probabilities of whole responses in nats, `lengths` their
    tokens, both with the end token. The implicit reward is beta (policy - reference)
    (2305.18290, Eq. 5); per token it is divided by the length, as is the log-likelihood.

    >>> found = scores(np.array([[2, 4]]), np.array([[-3.0, -4.0]]))
    >>> found[LIKELIHOOD].tolist(), found[PER_TOKEN.format(LIKELIHOOD)].tolist()
    ([[-3.0, -4.0]], [[-1.5, -1.0]])
    """
    whole = {} if reference is None else {REWARD: beta * (policy - reference)}
    whole |= {LIKELIHOOD: policy}
    found = {}
    for name, values in whole.items():
        found |= {name: values, PER_TOKEN.format(name): values / lengths}
    return found | {LONGER: lengths.astype(float), SHORTER: -lengths.astype(float)}


def measured(
    scores: Mapping[str, Float[np.ndarray, "n 2"]],
    lengths: Integer[np.ndarray, "n 2"],
    prompts: Sequence[str],
    subsets: Sequence[str | int | float | bool] | None = None,
) -> Record:
    """What the scores are worth, in all and by subset, as a JSON object.

    A pair's prompt is its unit of the bootstrap, its `lengths` are in tokens. An estimate is
    [value, low, high], null where it is not defined.
    """
    numbers = {prompt: number for number, prompt in enumerate(sorted(set(prompts)))}
    unit = np.array([numbers[prompt] for prompt in prompts])
    samples = resamples(len(numbers), seed=SEED)
    won = {name: wins(values) for name, values in scores.items()}
    longer = lengths[:, 0] - lengths[:, 1]
    share = lambda of: length_share(samples, of[:, 0] - of[:, 1], longer, unit).as_json()
    of_models = [name for name in scores if name not in (LONGER, SHORTER)]
    found = {
        "pairs": len(unit),
        "prompts": len(numbers),
        "mean_lengths": dict(zip(("chosen", "rejected"), lengths.mean(axis=0), strict=True)),
        "equally_long": int((longer == 0).sum()),
        "scores": _accuracies(samples, won, unit),
        "length": {name: share(scores[name]) for name in of_models},
    }
    return found | ({} if subsets is None else _by_subset(samples, won, unit, subsets))


def wins(scores: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    """1 where the chosen response scores higher, 0 where the rejected one does, 1/2 at a tie.

    >>> wins(np.array([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]])).tolist()
    [1.0, 0.0, 0.5]
    """
    return (1 + np.sign(scores[:, 0] - scores[:, 1])) / 2


def accuracy(
    samples: Resamples, won: Float[np.ndarray, " n"], unit: Integer[np.ndarray, " n"]
) -> Accuracy:
    """The mean of `won`, with Wilson's interval and the bootstrap's over units.

    Wilson's takes pairs for independent, which several of one prompt are not: it is the one to
    look at where pairs are few, the other where prompts repeat.

    >>> found = accuracy(resamples(2, seed=0), np.array([1.0, 0.5, 1.0]), np.array([0, 0, 1]))
    >>> found.pairs, found.ties, round(found.bootstrap.value, 3)
    (3, 1, 0.833)
    """
    ties, average = int((won == 0.5).sum()), mean(samples, won[None], unit)
    return Accuracy(len(won), ties, wilson(float(won.sum()), len(won)), average)


def mean_of_groups(
    samples: Resamples,
    won: Float[np.ndarray, " n"],
    groups: Bool[np.ndarray, "G n"],
    unit: Integer[np.ndarray, " n"],
) -> Estimate:
    """The mean, with equal weights, of the accuracies of groups of pairs.

    NaN where a group has no pair; draws in which one has none are left out of the interval.
    """
    # A "run" of `ratio` is a group here, and always drawn once.
    fixed = samples._replace(runs=np.ones((len(samples.units), len(groups)), int))
    return ratio(fixed, groups * won, groups.astype(float), unit)


def length_share(
    samples: Resamples,
    margins: Float[np.ndarray, " n"],
    longer: Integer[np.ndarray, " n"],
    unit: Integer[np.ndarray, " n"],
) -> LengthShare:
    """How much length explains, of margins (chosen minus rejected score) and `longer`, in tokens.

    `chosen_longer` and `chosen_shorter` are the accuracies on the pairs whose chosen response is
    the longer or the shorter one, and `balanced` the mean of the two: what would be left if
    labels did not go with length; 1/2 for a score that is length itself. `picks_longer` is how
    often the higher score is the longer response's, of pairs of different lengths, a tie half.
    `r_squared` is the squared correlation of the margins with the differences in length: the
    share of their variance that a straight line explains. NaN where either never differs.
    """
    won, differ = (1 + np.sign(margins)) / 2, longer != 0
    sides = np.stack([longer > 0, longer < 0])
    picked = np.where(longer > 0, won, 1 - won)
    return LengthShare(
        *(accuracy(samples, won[side], unit[side]) for side in sides),
        mean_of_groups(samples, won, sides, unit),
        mean(samples, picked[None, differ], unit[differ]),
        r_squared(margins, longer),
    )


def r_squared(x: np.ndarray, y: np.ndarray) -> float:
    """The squared correlation of two rows of numbers; NaN where one of them is constant.

    >>> round(r_squared(np.array([0.0, 1.0, 2.0]), np.array([1, 3, 2])), 3)
    0.25
    """
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def _by_subset(
    samples: Resamples,
    won: Mapping[str, np.ndarray],
    unit: np.ndarray,
    subsets: Sequence[str | int | float | bool],
) -> Record:
    names = np.array([one if isinstance(one, str) else json.dumps(one) for one in subsets])
    order = dict(sorted(zip(names.tolist(), subsets, strict=True), key=_numbers_first))
    groups = np.stack([names == name for name in order])
    rows = [
        {
            "subset": name,
            "pairs": int(group.sum()),
            "prompts": len(np.unique(unit[group])),
            "scores": _accuracies(
                samples, {of: one[group] for of, one in won.items()}, unit[group]
            ),
        }
        for name, group in zip(order, groups, strict=True)
    ]
    means = {of: mean_of_groups(samples, one, groups, unit).as_json() for of, one in won.items()}
    return {"subsets": rows, "mean_over_subsets": means}


def _accuracies(samples: Resamples, won: Mapping[str, np.ndarray], unit: np.ndarray) -> Record:
    return {name: accuracy(samples, one, unit).as_json() for name, one in won.items()}


def _numbers_first(subset: tuple[str, Any]) -> tuple[bool, Any]:
    return isinstance(subset[1], str), subset[1]


def _filled(run: str, given: Record) -> Record:
    """What is given, and from the run what is not."""
    if None not in [value for name, value in given.items() if name != "format"]:
        raise InputError("run: has no effect where all else is given; leave it out")
    roles = runs.roles(run)
    own = {"model": roles.policy, "reference": roles.reference, "beta": roles.beta, "out": run}
    if given["data"] is None:
        own |= {"data": roles.data, "format": roles.format}
    return own | {
        name: value for name, value in given.items() if value is not None or name not in own
    }


def _checked(given: Record) -> Record:
    """What is given, if it is enough and nothing of it without effect."""
    for name in ("model", "data", "out"):
        if given[name] is None:
            raise InputError(f"{name}: is missing; give it, or a run that has it")
    if given["beta"] is not None and given["reference"] is None:
        raise InputError("beta: has no effect without reference; leave it out, or name a reference")
    if given["reference"] is not None and not 0 < (given["beta"] or 0) < math.inf:
        raise InputError(f"beta={given['beta']}: must be above 0; give that of the training")
    return given


def _pairs(
    data: str, format: str, split: str | None, limit: int | None
) -> tuple[list[Pair], DataReport]:
    asked = {} if split is None else {"split": split}
    pairs, report = read_pairs(data, format=format, limit=limit, max_bad_fraction=1.0, **asked)
    for pair in pairs:
        if pair.rejected is None:
            raise InputError(f"{data} line {pair.line}: has no rejected response; give pairs")
    return pairs, report


def _scored(
    names: Mapping[str, str | None], pairs: Sequence[Pair], dtype: str | None, source: str
) -> tuple[Record, np.ndarray, dict[str, np.ndarray]]:
    """What the models are, the responses' lengths [n, 2], and by role their log-probabilities."""
    mesh = sharding.make_mesh()
    models = {role: language_model(name, mesh, dtype=dtype) for role, name in names.items() if name}
    check_same_vocabulary(list(models.values()))
    first = models["policy"]
    room = min(model.lm.model.config.max_positions for model in models.values())
    try:
        store = whole_store(pairs, first.tokenizer, first.eos_ids[0], room)
    except InputError as cause:
        raise InputError(f"{source} {cause}") from cause
    lengths = store.lengths[:, 1:]
    starts = np.cumsum(lengths.ravel()) - lengths.ravel()
    logps = {}
    for role, model in models.items():
        tokens = token_logps(model, store, label=f"accuracy, {role}").astype(np.float64)
        logps[role] = np.add.reduceat(tokens, starts).reshape(-1, 2)
    known = {
        role: {"name": model.name, "step": model.step} | model.identity
        for role, model in models.items()
    }
    return known, lengths, logps


def _written(record: Record, folder: Path) -> list[Table | str]:
    shown = preference_tables.shown(record)
    write_json(folder / FILES[0], record)
    (folder / FILES[1]).write_text(tables.markdown(shown), encoding="utf-8")
    preference_tables.draw(record).savefig(folder / FILES[2], dpi=130)
    files = ", ".join(str(folder / name) for name in FILES)
    return [*map(tables.rich_table, shown), f"wrote {files}"]
