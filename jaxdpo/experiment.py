"""Several runs from one recipe: what each has of its own, in their order, and side by side.

A recipe's `runs` maps a name to the keys that this run sets differently. It is a whole run, in
`WORKDIR/NAME`, and may begin from what another one leaves there: a model ("{workdir}/../OTHER:
STAGE") or data. Left out: one run (`stages`), and what the trajectories of one run say
(`analysis.trajectories`).
"""

import graphlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from jaxdpo import InputError, processes, recipe, runs, stages
from jaxdpo.analysis import report, trajectories
from jaxdpo.analysis.trajectories import (
    SIDES,
    after_start,
    curve,
    measured,
    moved,
    number,
    seen,
)
from jaxdpo.metrics import console
from jaxdpo.records import Record

FREE = ("synthetic", "model.overrides")  # parts of a recipe that hold what they are given
FIGURE, CAPTIONS = "comparison.png", "comparison.md"
AVERAGE = "#8a6d3b"
Records = Sequence[Record]
Claim = tuple[str, Callable[[Records], bool]]  # as text, and whether the records bear it out
# A recipe's `prediction` -> what Section 5.4 says. None of it is a test by itself: a reward may
# fall for other reasons, so a verdict stands beside the other runs that it holds of.
PREDICTIONS: dict[str, list[Claim]] = {
    "chosen falls": [
        (
            "the chosen are such as the reference's own, whose expected reward is -beta KL "
            "(Eq. 16), so they should fall",
            lambda records: moved(records, "chosen") == "fell",
        )
    ],
    "average falls": [
        (
            "chosen and rejected together are such as the reference's own, so their average "
            "should fall",
            lambda records: moved(records, "averages") == "fell",
        )
    ],
    "rejected falls": [
        (
            "the rejected are such as the reference's own, so they should fall",
            lambda records: moved(records, "rejected") == "fell",
        )
    ],
    "chosen above zero": [
        (
            "neither response is such as the reference's own, so the chosen may end above zero",
            lambda records: moved(records, "chosen") == "rose",
        ),
        (
            "in the paper they stay above it all the while",
            lambda records: _above(records) == len(after_start(records)) > 1,
        ),
    ],
}


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Run what a recipe asks for in `workdir`, going on from whatever is there.

    Without `runs` this is `stages.run`. With them, all configurations, and what they name of
    each other, are checked before the first run starts (files are read as each run comes up),
    and at the end those that measured trajectories are drawn side by side. Raises `InputError`
    for every mistake.
    """
    if not config.runs:
        if config.prediction:
            raise InputError("prediction: is judged among runs, and there are none")
        if any(map(runs.is_run, Path(workdir).glob("*"))):
            raise InputError(f"--workdir {workdir}: holds several runs; choose another one")
        stages.run(config, workdir)
        return
    workdir = Path(os.path.abspath(workdir))
    if runs.is_run(workdir):
        raise InputError(f"--workdir {workdir}: holds a single run; choose another one")
    configs = configurations(config, workdir)
    for count, (name, one) in enumerate(configs.items(), 1):
        console.print(f"run {count} of {len(configs)}: {workdir / name}")
        stages.run(one, workdir / name)
    processes.from_first(lambda: _finish(workdir, configs))


def _finish(workdir: Path, configs: Mapping[str, ConfigDict]) -> None:
    for line in [*write(workdir, configs), *report.write(workdir)]:
        console.print(line, markup=False)


def configurations(config: ConfigDict, workdir: Path) -> dict[str, ConfigDict]:
    """The configuration of each run by name, each after the ones it needs, then by name.

    Raises `InputError` for a mistake in any of them.
    """
    configs = {name: _own(config, name) for name in config.runs}
    needs = {name: _needed(name, configs, workdir) for name in configs}
    try:
        order = list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(error.args[1])
        raise InputError(f"runs: each of {circle} needs the next one's model or data") from error
    return {name: configs[name] for name in order}


def _own(config: ConfigDict, name: str) -> ConfigDict:
    """A run's configuration: the recipe's, with the keys that it sets differently.

    Parts that hold what they are given, `FREE`, are set as a whole.
    """
    if not re.fullmatch(r"\w[\w-]*", name):
        raise InputError(f"runs: {name!r} is no name for a folder; use letters, digits, _ and -")
    if not isinstance(config.runs[name], ConfigDict):
        raise InputError(f"runs.{name}: must hold the keys that it sets, not {config.runs[name]!r}")
    one = config.copy_and_resolve_references()
    one.unlock()
    one.runs, own = ConfigDict({}), config.runs[name]
    try:
        if unknown := list(_unknown(own, recipe.blank())):
            raise InputError(f"no such keys: {', '.join(unknown)}")
        one.update(own)
        if "synthetic" in own:
            one.synthetic = own.synthetic
        if "overrides" in own.get("model", ()):
            one.model.overrides = own.model.overrides
        recipe.check(one)
        _check_prediction(one)
    except (AttributeError, TypeError, ValueError) as error:  # a wrong type, or an InputError
        raise InputError(f"runs.{name}: {' '.join(str(error).split())}") from error
    return one.lock()


def _check_prediction(one: ConfigDict) -> None:
    if one.prediction not in ("", *PREDICTIONS):
        raise InputError(f"prediction: must be one of {', '.join(PREDICTIONS)}")
    if one.prediction and not ("dpo" in one.stages and one.dpo.trajectories):
        raise InputError("prediction: has no effect without a dpo stage with trajectories")


def _unknown(found: ConfigDict, known: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Keys that a recipe does not have; `InputError` for a part of it that holds none."""
    for key, value in found.items():
        part = isinstance(known.get(key), ConfigDict)
        if part and not isinstance(value, ConfigDict):
            raise InputError(f"{prefix}{key}: must hold keys, not {value!r}")
        if key not in known:
            yield prefix + key
        elif part and prefix + key not in FREE:
            yield from _unknown(value, known[key], f"{prefix}{key}.")


def _needed(name: str, configs: Mapping[str, ConfigDict], workdir: Path) -> list[str]:
    """The runs whose folders a run's configuration points into, for a model or for data.

    Raises `InputError` for a path into the work directory that leads to no run.
    """
    one = configs[name]
    paths = {"data": one.data, "tokenizer": one.tokenizer}
    for stage in one.stages:
        paths |= {f"{stage}.data.{side}": one[stage].data[side] for side in ("train", "eval")}
    needed = set()
    for key, path in paths.items():
        path = recipe.path_of(path, one, workdir / name)
        other = _run_of(path, workdir)
        # What is no absolute path may be the name of a hub.
        if other is not None and other not in configs and os.path.isabs(path):
            raise InputError(
                f"runs.{name}.{key}: no run {other!r}; the runs are {', '.join(configs)}"
            )
        needed |= {other} & set(configs) - {name}
    return sorted(needed | _begun_from(name, configs, workdir))


def _begun_from(name: str, configs: Mapping[str, ConfigDict], workdir: Path) -> set[str]:
    """The run whose model a run begins from, if that is one of these runs."""
    model, mistake = configs[name].model, f"runs.{name}.model.weights:"
    path = recipe.path_of(model.weights, configs[name], workdir / name)
    if not (found := runs.named(path)):
        if os.path.isabs(path) and _run_of(path, workdir) is not None:
            raise InputError(f"{mistake} {model.weights!r} has no stage; name it as OTHER:STAGE")
        return set()
    folder, stage, which = found
    if which not in runs.WHICH:
        raise InputError(f"{mistake} {which!r} is unknown; {' or '.join(runs.WHICH)}")
    if model.overrides:
        raise InputError(f"runs.{name}.model.overrides: have no effect on the model of another run")
    if (other := _run_of(folder, workdir)) is None:
        return set()
    if other not in configs or stage not in (*configs[other].stages, "start"):
        raise InputError(
            f"{mistake} no run {other!r} with a stage {stage!r}; the runs are {', '.join(configs)}"
        )
    return {other}


def _run_of(path: str, workdir: Path) -> str | None:
    """The folder in the work directory that a path leads into; None: it leads elsewhere."""
    parts = Path(os.path.relpath(os.path.abspath(path), workdir)).parts if path else ()
    return parts[0] if parts and parts[0] != os.pardir else None


def write(workdir: Path, configs: Mapping[str, ConfigDict]) -> list[str]:
    """Draw and describe the runs that measured trajectories; returns what to print."""
    found = {name: trajectories.read(workdir / name / "dpo") for name in configs}
    found = {name: records for name, records in found.items() if records}
    if not found:
        return []
    draw(found).savefig(workdir / FIGURE, dpi=130)
    said = captions(found, {name: configs[name].prediction for name in found})
    (workdir / CAPTIONS).write_text("".join(f"- {caption}\n" for caption in said))
    return [*said, f"figure: {workdir / FIGURE}"]


def draw(found: Mapping[str, Records]) -> Figure:
    """A panel for each run, its implicit rewards over steps, and one of all the margins."""
    columns = min(3, len(found) + 1)
    rows = math.ceil((len(found) + 1) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)  # inches: a title is not the axis above's
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    own, margins, unused = panels[: len(found)], panels[len(found)], panels[len(found) + 1 :]
    for ax, (name, records) in zip(own, found.items(), strict=True):
        trajectories.draw_rewards(ax, records, SIDES)
        average = dict(color=AVERAGE, linestyle="--", label="their average")
        ax.plot(*curve(records, "rewards/averages"), **average)
        margins.plot(*curve(records, "rewards/margins"), label=title(name))
        ax.set(title=title(name), xlabel="step")
    margins.set(title="Margins: chosen minus rejected", xlabel="step")
    for ax in (*own, margins):
        trajectories.tidy(ax)
    for ax in unused:
        ax.remove()
    figure.suptitle("Implicit rewards of held-out responses, beta log(policy / reference)")
    return figure


def title(name: str) -> str:
    """A run's name, for people.

    >>> title("sft_on_chosen")
    'sft on chosen'
    """
    return name.replace("_", " ")


def captions(found: Mapping[str, Records], predictions: Mapping[str, str]) -> list[str]:
    """For each run its rewards at the end, and what Section 5.4 predicts of it, if anything.

    Beside a reward stands what Eq. 16 gives a response that the reference itself had drawn at
    those states, and beside a verdict the other runs of which it is true as well.
    """
    said = []
    for name, records in found.items():
        last = records[-1]
        text = f"{title(name)}: at step {last['step']}, "
        text += "; ".join(_beside_equation_16(last, who) for who in SIDES)
        text += f"; their average {measured(last, 'averages')}, margin {measured(last, 'margins')}."
        text += f" Chosen were above zero at {_above(records)} of {len(after_start(records))} "
        text += "measurements after step 0."
        if claims := PREDICTIONS.get(predictions[name]):
            others = {other: of for other, of in found.items() if other != name}
            text += " Section 5.4: "
            text += "; ".join(_judged(*claim, records, others) for claim in claims) + "."
        said.append(text)
    return said


def _beside_equation_16(record: Record, who: str) -> str:
    drawn = number(record, f"expected_rewards/{who}")
    return f"{who} {measured(record, who)} where the reference's own would earn {drawn}"


def _judged(
    claim: str,
    holds: Callable[[Records], bool],
    records: Records,
    others: Mapping[str, Records],
) -> str:
    it = holds(records)
    also = ", ".join(title(name) for name, of in others.items() if holds(of))
    where = f"{'also' if it else 'but'} of: {also}" if also else "of no other run"
    return f"{claim}: {seen(it)} ({where})"


def _above(records: Records) -> int:
    """At how many measurements after the first step the chosen are above zero."""
    return int((curve(after_start(records), "rewards/chosen")[1] > 0).sum())
