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

from jaxdpo import InputError, recipe, runs, stages
from jaxdpo.analysis import report, trajectories
from jaxdpo.analysis.trajectories import SIDES, curve, measured, moved, seen
from jaxdpo.metrics import console
from jaxdpo.records import Record

FREE = ("synthetic", "model.overrides")  # parts of a recipe that hold what they are given
FIGURE, CAPTIONS = "comparison.png", "comparison.md"
AVERAGE = "#8a6d3b"
Records = Sequence[Record]
Claim = tuple[str, Callable[[Records], bool]]  # as text, and whether the records bear it out
# A recipe's `prediction` -> what Section 5.4 says.
PREDICTIONS: dict[str, list[Claim]] = {
    "chosen falls": [
        (
            "the chosen are such as the reference's own, whose expected reward is -beta KL "
            "(Eq. 16), so the chosen must fall",
            lambda records: moved(records[-1], "chosen") == "fell",
        )
    ],
    "average falls": [
        (
            "chosen and rejected alike are such as the reference's own, so their average must fall",
            lambda records: moved(records[-1], "averages") == "fell",
        )
    ],
    "rejected falls": [
        (
            "the rejected are such as the reference's own, so the rejected must fall",
            lambda records: moved(records[-1], "rejected") == "fell",
        )
    ],
    "chosen above zero": [
        (
            "no response is such as the reference's own, so nothing forbids the chosen to end "
            "above zero",
            lambda records: moved(records[-1], "chosen") == "rose",
        ),
        (
            "in the paper they stay above it all the while",
            lambda records: bool((curve(records[1:], "rewards/chosen")[1] > 0).all()),
        ),
    ],
}


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Run what a recipe asks for in `workdir`, going on from whatever is there.

    Without `runs` this is `stages.run`. With them, all configurations are checked before the
    first run starts, and at the end those that measured trajectories are drawn side by side.
    Raises `InputError` for every mistake.
    """
    if not config.runs:
        if config.prediction:
            raise InputError("prediction: is judged among runs, and there are none")
        stages.run(config, workdir)
        return
    workdir = Path(os.path.abspath(workdir))
    if runs.is_run(workdir):
        raise InputError(f"--workdir {workdir}: holds a single run; choose another one")
    configs = configurations(config, workdir)
    for number, (name, one) in enumerate(configs.items(), 1):
        console.print(f"run {number} of {len(configs)}: {workdir / name}")
        stages.run(one, workdir / name)
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
        one.update(own)
        if "synthetic" in own:
            one.synthetic = own.synthetic
        if "overrides" in own.get("model", ()):
            one.model.overrides = own.model.overrides
        if unknown := list(_unknown(one, recipe.blank())):
            raise InputError(f"no such keys: {', '.join(unknown)}")
        recipe.check(one)
        _check_prediction(one)
    except (TypeError, ValueError) as error:  # a value of the wrong type, or an InputError
        raise InputError(f"runs.{name}: {error}") from error
    return one.lock()


def _check_prediction(one: ConfigDict) -> None:
    if one.prediction not in ("", *PREDICTIONS):
        raise InputError(f"prediction: must be one of {', '.join(PREDICTIONS)}")
    if one.prediction and not ("dpo" in one.stages and one.dpo.trajectories):
        raise InputError("prediction: has no effect without a dpo stage with trajectories")


def _unknown(found: ConfigDict, known: ConfigDict, prefix: str = "") -> Iterator[str]:
    for key, value in found.items():
        if key not in known:
            yield prefix + key
        elif isinstance(value, ConfigDict) and prefix + key not in FREE:
            yield from _unknown(value, known[key], f"{prefix}{key}.")


def _needed(name: str, configs: Mapping[str, ConfigDict], workdir: Path) -> list[str]:
    """The runs whose folders a run's configuration points into, for a model or for data."""
    one = configs[name]
    filled = lambda text: recipe.path_of(text, one, workdir / name)
    paths = [one.data, one.tokenizer]
    paths += [one[stage].data[side] for stage in one.stages for side in ("train", "eval")]
    needed = {_run_of(filled(path), workdir) for path in paths if path} & set(configs) - {name}
    folder, stage, _ = runs.named(filled(one.model.weights)) or (os.pardir, None, None)
    if (other := _run_of(folder, workdir)) is not None:
        if other not in configs or stage not in (*configs[other].stages, "start"):
            raise InputError(
                f"runs.{name}.model.weights: no run {other!r} with a stage {stage!r}; the runs "
                f"are {', '.join(configs)}"
            )
        needed.add(other)
    return sorted(needed)


def _run_of(path: str, workdir: Path) -> str | None:
    """The folder in the work directory that a path leads into; None: it leads elsewhere."""
    parts = Path(os.path.relpath(os.path.abspath(path), workdir)).parts
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
    """For each run what Section 5.4 predicts, if anything, and whether it was seen."""
    said = []
    for name, records in found.items():
        last, (_, chosen) = records[-1], curve(records[1:], "rewards/chosen")
        numbers = ", ".join(f"{who} {measured(last, who)}" for who in (*SIDES, "averages"))
        numbers = numbers.replace("averages", "their average")
        text = f"{title(name)}: at step {last['step']}, {numbers}, margin "
        text += f"{measured(last, 'margins')}; chosen were above zero at {int((chosen > 0).sum())}"
        text += f" of {len(chosen)} measurements after the first."
        claims = PREDICTIONS[predictions[name]] if predictions[name] else []
        if claims:
            text += " Section 5.4: "
            text += "; ".join(f"{claim}: {seen(holds(records))}" for claim, holds in claims) + "."
        said.append(text)
    return said
