"""What a run came to, as one page: from its data to the tokens that its policy rewards.

Reads what the folder holds; needs neither the model nor a device. A section whose file is not
there says what makes it, one whose file cannot be shown says why, and the rest is drawn. Left
out: what needs a model, and is written into the folder beforehand (`credit`,
`credit_benchmark`, `transcript`).
"""

import base64
import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from jinja2 import UndefinedError
from markupsafe import Markup
from rich.table import Table

from jaxdpo import InputError, recipe, runs
from jaxdpo.analysis import credit, credit_benchmark, curves, page, side_by_side, trajectories
from jaxdpo.analysis.curves import NOTHING
from jaxdpo.metrics import read_metrics
from jaxdpo.records import Record, read_json, read_log

FIGURES = {"sft": "sft_loss.png", "dpo": "rewards.png"}
TRAIN = "python launch/train.py --config ... --workdir {run}"
ANALYZE = "python launch/analyze.py {command} --run {{run}}"
DECODE = "python launch/decode.py --model {run}:{stage} --data ... --out {run}/decoded/greedy.jsonl"
# What reading a file can raise, and showing one whose content is not what it should be.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError)
UNREADABLE += (UndefinedError, ElementTree.ParseError)


class Part(NamedTuple):
    """A section of a run's report: what it shows of which file, and the command that makes it."""

    title: str
    what: str
    file: str  # {stage}: of each; *: of any; within a folder: written while that stage trains
    command: str  # {run}: its folder; {stage}: its last stage
    show: Callable[[Path], Markup]
    needs: str = ""  # a stage


def write(workdir: str | Path) -> list[Table | str]:
    """Write `report.html` into a run's folder, with the figures and `summary.md`.

    A folder of several runs gets a report that compares them. Returns what to print. Raises
    `InputError` for a folder that holds no run.
    """
    workdir = Path(workdir)
    alone = (workdir / "config.json").is_file()
    several = [] if alone else sorted(filter(runs.is_run, workdir.glob("*")))
    if not alone and not several:
        raise InputError(f"{workdir}: no run there (it has no config.json); name a run's folder")
    if not os.access(workdir, os.W_OK):
        raise InputError(f"{workdir}: cannot be written to")
    shown = _write_summary(workdir) if alone else []
    sections = _of_run(workdir) if alone else _of_runs(workdir, several)
    html = page.page(Path(os.path.abspath(workdir)).name, sections)
    (workdir / "report.html").write_text(html, encoding="utf-8")
    return [*shown, f"report: {workdir / 'report.html'}"]


def _write_summary(workdir: Path) -> list[Table | str]:
    rows, shown = [], []
    for stage, figure in FIGURES.items():
        try:
            records = read_metrics(workdir / stage)
            rows += curves.summary(records, stage)
            if records:
                curves.draw(records, stage).savefig(workdir / figure, dpi=130)
                shown.append(f"figure: {workdir / figure}")
        except UNREADABLE as error:
            shown.append(f"{stage}/metrics.jsonl cannot be drawn: {error}")
    table = Table(*curves.HEADER, caption=curves.NOTE)
    for row in rows:
        table.add_row(*row)
    lines = [f"| {' | '.join(row)} |" for row in (curves.HEADER, ("---",) * 6, *rows)]
    (workdir / "summary.md").write_text("\n".join(lines) + "\n")
    return [table, *shown]


def _of_run(workdir: Path) -> list[page.Section]:
    try:
        stages = _stages(read_json(workdir / "config.json"))
    except UNREADABLE:  # its own section says so
        stages = list(recipe.STAGES)
    sections = [page.Section(part.title, _shown(part, workdir, stages)) for part in PARTS]
    return [*sections, page.Section("Completions side by side", _completions(workdir, stages[-1]))]


def _shown(part: Part, workdir: Path, stages: Sequence[str]) -> Markup:
    """What each file of a part says, or that it is not there yet, or why it cannot be shown."""
    if part.needs and part.needs not in stages:
        return page.problem(f"{part.what}: none, as this run has no stage {part.needs}.")
    bodies = []
    for name in dict.fromkeys(part.file.format(stage=stage) for stage in stages):
        late = _finished(workdir, name.replace("*", stages[-1]))
        command = part.command.format(run="..." if late else _run(workdir), stage=stages[-1])
        files = dict.fromkeys(workdir / name.replace("*", stage) for stage in stages)
        found = [_tried(part.show, file, command) for file in files if file.exists()]
        bodies += found or [_missing(f"{part.what} ({name})", late, command)]
    return Markup("\n").join(bodies)


def _finished(workdir: Path, name: str) -> str:
    """The stage in whose folder a file is, if it has finished: it writes there no more."""
    stage, inside, _ = name.partition("/")
    return stage if inside and (workdir / stage / "done.json").exists() else ""


def _missing(what: str, late: str, command: str) -> Markup:
    if late:
        return page.macros("report.html").too_late(what, late, command)
    return page.missing(what, command)


def _tried(show: Callable[[Path], Markup], file: Path, command: str) -> Markup:
    try:
        return show(file)
    except UNREADABLE as error:
        return _unreadable(file, error, command)


def _stages(config: Record) -> list[str]:
    """Those of a run; what else its file may say is no name of a folder."""
    stages = [name for name in recipe.STAGES if name in config["stages"]]
    if not stages:
        raise ValueError(f"stages: names none of {', '.join(recipe.STAGES)}")
    return stages


def _unreadable(file: Path, error: Exception, command: str) -> Markup:
    if isinstance(error, InputError):  # names the file, and the remedy
        return page.problem(str(error))
    said = f"{file}: does not hold what it should ({type(error).__name__}: {error})"
    return page.problem(f"{said}; restore it, or make it again: {command}")


def _run(workdir: Path) -> str:
    """The folder as a command line would name it."""
    relative = os.path.relpath(workdir)
    return shlex.quote(os.path.abspath(workdir) if relative.startswith("..") else relative)


# The run: how far it has come, and what was asked of it.


def _overview(file: Path) -> Markup:
    config, versions = read_json(file), file.with_name("versions.json")
    return page.macros("report.html").overview(
        [(stage, *_came_to(file.parent / stage)) for stage in _stages(config)],
        _set_keys(config, json.loads(recipe.blank().to_json_best_effort())),
        json.dumps(config, indent=1, ensure_ascii=False),
        _flat(read_json(versions)).items() if versions.exists() else [],
    )


def _came_to(stage: Path) -> tuple[str, dict[str, str]]:
    """How far a stage has come, and what its last evaluation measured."""
    try:
        records, done = read_metrics(stage), stage / "done.json"
        if done.exists():
            state = f"finished at step {read_json(done)['step']}"
        else:
            state = f"not finished: at step {records[-1]['step']}" if records else "not begun"
        if records and None in records[-1].values():
            state += ", where not all was finite"
        ends = {row[1]: row[-1] for row in curves.summary(records, stage.name)}
        return state, {name: value for name, value in ends.items() if value != NOTHING}
    except InputError as error:
        return f"not known: {error}", {}
    except UNREADABLE:
        files = f"{stage.name}/done.json or {stage.name}/metrics.jsonl"
        return f"not known: {files} does not hold what it should", {}


def _set_keys(config: Record, default: Record) -> list[Markup]:
    """The keys that a recipe sets: those of its stages side by side, and the others."""
    flat, stages, of_stages, others = _flat(config), _stages(config), {}, []
    for key, value, usual in _differences([flat, _flat(default)]):
        stage, _, name = key.partition(".")
        if stage in stages:
            values = [flat.get(f"{one}.{name}", NOTHING) for one in stages]
            of_stages[name] = [name, *values, usual]
        elif value != NOTHING:  # else a key that is younger than the run
            others.append([key, value, usual])
    rows = [row for row in of_stages.values() if set(row[1:-1]) != {NOTHING}]
    return [
        page.table(("key of a stage", *stages, "default"), rows),
        page.table(("key", "value", "default"), others),
    ]


def _differences(flat: Sequence[dict[str, str]]) -> list[list[str]]:
    """A row for each key whose value is not the same in all configurations: key, values."""
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [[key, *(one.get(key, NOTHING) for one in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(config: Record, prefix: str = "") -> dict[str, str]:
    """Key with dots -> value as people write it."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is None or value == "":
            flat[prefix + key] = NOTHING
        else:
            said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            flat[prefix + key] = said
    return flat


# What its files say.


def _data(file: Path) -> Markup:
    """What was read and what was cut, as counts of each side of a stage."""
    report = read_json(file)
    columns = {side: _counts(report, side) for side in report["truncation"]}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [
        [name.replace("_", " "), *(column.get(name, NOTHING) for column in columns.values())]
        for name in names
    ]
    sources = [
        f"{side}: {read['source']} ({read['format']})" for side, read in report["rows"].items()
    ]
    table = page.table([file.parent.name, *columns], rows, "; ".join(sources))
    return page.macros("report.html").data(table, report["prompts_in_train_and_eval"])


def _counts(report: Record, side: str) -> dict[str, str]:
    """What reading and tokenising counted; a source that is split was read as train."""
    read, counts = report["rows"].get(side, {}), {}
    for name in ("limit", "rows", "kept", "duplicates", "contradictions"):
        if read.get(name) is not None:
            counts[name] = str(read[name])
    for reason, bad in read.get("skipped", {}).items():
        lines = ", ".join(map(str, bad["lines"][:5]))
        counts[f"skipped: {reason}"] = f"{bad['count']} (line {lines})"
    if side in report["pairs_merged_by_prompt"]:
        counts["merged: prompt met before"] = str(report["pairs_merged_by_prompt"][side])
    for name, value in report["truncation"][side].items():
        counts[name] = str(len(value) if isinstance(value, list) else value)
    return counts


def _curves(file: Path) -> Markup:
    stage, records = file.parent.name, read_log(file)
    figures = [page.figure(figure) for figure in curves.panels(records, stage)]
    table = page.table(curves.HEADER, curves.summary(records, stage), curves.NOTE)
    return page.macros("report.html").curves(stage, curves.LEGEND, figures, table)


def _trajectories(file: Path) -> Markup:
    records = trajectories.read(file.parent)
    drawn, captions = page.figure(trajectories.draw(records)), trajectories.captions(records)
    return page.macros("report.html").captioned(drawn, captions)


def _credit(file: Path) -> Markup:
    return credit.section(read_json(file))


def _credit_benchmark(file: Path) -> Markup:
    return credit_benchmark.section(read_json(file))


def _completions(workdir: Path, stage: str) -> Markup:
    """All files of completions at once: a prompt of one is looked for in the others."""
    command = DECODE.format(run=_run(workdir), stage=stage)
    files = sorted((workdir / "decoded").glob("*.jsonl"))
    if not files:
        return page.missing("What the policy says (decoded/*.jsonl)", command)
    columns, problems = [], []
    for file in files:
        try:
            columns.append(side_by_side.column(file))
        except UNREADABLE as error:
            problems.append(_unreadable(file, error, command))
    return Markup("\n").join([*problems, side_by_side.completions(columns)])


PARTS = (
    Part("The run", "The configuration", "config.json", TRAIN, _overview),
    Part("Data", "What was read", "{stage}/data_report.json", TRAIN, _data),
    Part("Curves", "The metrics", "{stage}/metrics.jsonl", TRAIN, _curves),
    Part(
        "Trajectories",
        "Where the rewards come from, step by step",
        f"dpo/{trajectories.FILE}",
        f"{TRAIN} --config.dpo.trajectories=64",
        _trajectories,
        needs="dpo",
    ),
    Part(
        "Rewards of tokens",
        "The reward of each token",
        "credit.json",
        ANALYZE.format(command="credit"),
        _credit,
        needs="dpo",
    ),
    Part(
        "Credit, measured",
        "How well rewards find the tokens that are wrong",
        "credit_benchmark.json",
        ANALYZE.format(command="credit-benchmark"),
        _credit_benchmark,
        needs="dpo",
    ),
    Part(
        "Samples during training",
        "What the policy says at each evaluation",
        "*/samples.jsonl",
        f"{TRAIN} --config.{{stage}}.samples=4",
        side_by_side.samples,
    ),
)


# Several runs.


def _of_runs(workdir: Path, several: Sequence[Path]) -> list[page.Section]:
    """Their figures, a line for each stage of each run, and the keys in which they differ."""
    command = TRAIN.format(run=_run(workdir))
    images = [_tried(_image, file, command) for file in sorted(workdir.glob("*.png"))]
    configs, lines, problems = {}, [], []
    for run in several:
        try:
            config = read_json(run / "config.json")
            configs[run.name] = _flat(config)
            lines += [(run.name, stage, *_came_to(run / stage)) for stage in _stages(config)]
        except UNREADABLE as error:
            problems.append(_unreadable(run / "config.json", error, command))
    names = dict.fromkeys(name for *_, ends in lines for name in ends)
    rows = [[*line, *(ends.get(name, NOTHING) for name in names)] for *line, ends in lines]
    table = page.table(("run", "stage", "state", *names), rows, "The last evaluation of each")
    keys = _differences(list(configs.values()))
    return [
        *([page.Section("Comparison", Markup("\n").join(images))] if images else []),
        page.Section("Runs", Markup("\n").join([*problems, table])),
        page.Section("Differences", page.table(["key", *configs], keys)),
    ]


def _image(file: Path) -> Markup:
    """A picture with the captions, one to a line, that stand beside it in FILE.md."""
    captions = file.with_suffix(".md")
    said = captions.read_text(encoding="utf-8").splitlines() if captions.exists() else []
    data = base64.b64encode(file.read_bytes()).decode()
    lines = [line.removeprefix("- ") for line in said]
    return page.macros("report.html").image(data, file.name, lines)
