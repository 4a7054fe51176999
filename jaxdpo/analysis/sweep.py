"""Does more search give better text? Win rate, length and implicit reward by number of beams.

Figure 2 of arXiv 2404.12358: likelihood is the return of a policy trained by DPO (Eq. 13), so a
wider beam should find better responses, until it finds what is only likely. A cell is a policy
decoded in one way; its completions stand in a file of their own, which the next sweep goes on
with, and two cells that are decoded alike share it. Runs that differ in their seed alone are
averaged. Left out: the search (`decoding`), the judge (`judge`), and tables and figures
(`sweep_tables`).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from jaxdpo import InputError, judges, sides
from jaxdpo.analysis import sweep_tables, tables
from jaxdpo.analysis.credit import folder
from jaxdpo.analysis.detection import Resamples, ratio, resamples
from jaxdpo.analysis.trials import Trial, trials_of
from jaxdpo.analysis.win_rates import POINTS
from jaxdpo.completions import Decoder, decoder, scoring, with_rule
from jaxdpo.decoding import Beams, Warp
from jaxdpo.judge import Comparison, Judge, judged, remembering
from jaxdpo.metrics import console
from jaxdpo.prompts import Prompt
from jaxdpo.records import Record, write_json
from jaxdpo.sides import Asked
from jaxdpo.transcript import decode

METHODS = ("beam", "beam_sample")
BEAM_SIZES = (1, 2, 5, 10, 20)  # the paper's
# What of a finished beam's log-probability is its score; see `decoding.Beams`.
NORMS = {
    "generated": dict(length_penalty=1.0, length_norm="generated"),
    "total": dict(length_penalty=1.0, length_norm="total"),
    "sum": dict(length_penalty=0.0, early_stopping="never"),  # Eq. 13
}
MEASURES = ("win_rate", "length", "implicit_reward", "logps", "ended", "empty")
# Of `write`, beside the models.
OPTIONS = "data format split limit out methods norms beam_sizes max_new_tokens temperature "
OPTIONS += f"batch_size dtype seed judge both_orders {' '.join(judges.OPTIONS)}"
FILES = tuple(f"sweep.{kind}" for kind in ("json", "md", "png"))
Measured = dict[str, np.ndarray]  # of each of the `MEASURES`, a number for every prompt


class Cell(NamedTuple):
    """A way to decode: deterministic beams ("beam") or drawn ones, how many, and their score."""

    method: str
    norm: str
    beam_size: int

    def rule(self, temperature: float) -> Beams:
        norm = NORMS["generated" if self.beam_size == 1 else self.norm]
        warp = Warp(temperature) if self.method == "beam_sample" else None
        return Beams(self.beam_size, **norm, warp=warp)

    @property
    def file(self) -> str:
        """Where its completions stand; one beam has no rival, so its score decides nothing."""
        norm = "" if self.beam_size == 1 else f"_{self.norm}"
        return f"{self.method}_{self.beam_size}{norm}.jsonl"


def write(
    *,
    run: str | None,
    model: str | None = None,
    reference: str | None = None,
    beta: float | None = None,
    data: str | None = None,
    format: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    out: str | None = None,
    methods: Sequence[str] | None = None,
    norms: Sequence[str] | None = None,
    beam_sizes: Sequence[int | str] | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    judge: str | None = None,
    both_orders: bool | None = None,
    **judging: Any,
) -> list[Table | str]:
    """Sweep a run, a folder of runs, or a policy by name, over ways to decode; what to print.

    Every policy answers the first `limit` prompts of the data, and the judge (see `judges`; the
    built-in task's oracle where none is named) compares its answers with the data set's chosen
    ones. Writes the `FILES`, and the completions of each cell, into `out`, or `sweep` in the run's
    folder; the same command goes on with them. Raises `InputError` for what is missing, wrong or
    without effect.
    """
    given = (methods, METHODS), (norms, tuple(NORMS)), (beam_sizes, BEAM_SIZES)
    ways = cells(*(default if one is None else one for one, default in given))
    if temperature is not None and "beam_sample" not in {cell.method for cell in ways}:
        raise InputError("temperature: has no effect without beam_sample; leave it out")
    judge, both_orders = judge or "oracle", bool(both_orders)
    judges.check(judge, judging, both_orders=both_orders)
    models = {"model": model, "reference": reference, "beta": beta}
    trials, held_out = trials_of(
        run, {n: value for n, value in models.items() if value is not None}
    )
    source, its_format = (data, "pairs") if data else _held_out(held_out)
    asked, report = sides.asked(source, format=format or its_format, split=split, limit=limit)
    console.print(str(report), markup=False)
    into = folder(out or (run and str(Path(run, "sweep"))))
    chosen = {one.prompt.texts[0]: one.chosen for one in asked}
    more = {"references": chosen, "cache": into / "answers.jsonl", "dtype": dtype}
    who = judges.judge(judge, judging, **more)
    limits = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    decoding = {"max_new_tokens": sides.MAX_NEW_TOKENS, "temperature": 1.0}
    decoding |= {name: value for name, value in limits.items() if value is not None}
    decoding |= {"dtype": dtype, "batch_size": batch_size, "seed": seed or 0}
    found = swept(trials, ways, asked, who, into=into, both_orders=both_orders, **decoding)
    record = {"data": report.as_json(), "prompts": len(asked), "judge": who.name, "cells": found}
    record |= {"opponent": f"the chosen of {Path(source).name}", "decoding": decoding}
    record |= {"judging": dict(who.identity) | {"both_orders": both_orders}}
    return _written(record | {"trials": [trial._asdict() for trial in trials]}, into)


def _held_out(of_runs: Sequence[tuple[str | None, str]]) -> tuple[str, str]:
    """The file that all runs hold out, and its format."""
    found = {(name and os.path.realpath(name), its_format) for name, its_format in of_runs}
    if len(found) > 1:
        raise InputError("data: the runs hold out different files; name the one to ask all of")
    source, its_format = found.pop()
    if not source:
        raise InputError("data: give held-out prompts; there is no run that names them")
    return source, its_format


def _written(record: Record, into: Path) -> list[Table | str]:
    write_json(into / FILES[0], record)
    (into / FILES[1]).write_text(sweep_tables.markdown(record), encoding="utf-8")
    sweep_tables.draw(record).savefig(into / FILES[2], dpi=130)
    wrote = ", ".join(str(into / name) for name in FILES)
    table = tables.rich_table(sweep_tables.brief(record))
    return [table, *sweep_tables.readings(record), f"wrote {wrote}"]


def cells(
    methods: Sequence[str], norms: Sequence[str], beam_sizes: Sequence[int | str]
) -> list[Cell]:
    """Every way to decode, each once, more beams later; `InputError` for what is unknown.

    >>> [cell.file for cell in cells(["beam"], ["generated", "total"], [2, 1])]
    ['beam_1.jsonl', 'beam_2_generated.jsonl', 'beam_1.jsonl', 'beam_2_total.jsonl']
    """
    for name, given, known in (("methods", methods, METHODS), ("norms", norms, tuple(NORMS))):
        if not given or (wrong := [one for one in given if one not in known]):
            said = f"{wrong[0]!r} is unknown" if given else "none is given"
            raise InputError(f"{name}: {said}; choose from {', '.join(known)}")
    if not beam_sizes or not all(str(size).isdecimal() and int(size) for size in beam_sizes):
        raise InputError(f"beam_sizes: {list(beam_sizes)} must be numbers of beams, from 1")
    sizes = sorted(set(map(int, beam_sizes)))
    every = ((method, norm, size) for method in methods for norm in norms for size in sizes)
    return [Cell(*one) for one in dict.fromkeys(every)]


def swept(
    trials: Sequence[Trial],
    ways: Sequence[Cell],
    asked: Sequence[Asked],
    judge: Judge,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str | None,
    batch_size: int | None,
    into: Path,
    both_orders: bool = False,
) -> list[Record]:
    """What each way of decoding comes to, for each beta: estimates over prompts and runs.

    An estimate is [value, low, high], a percentile bootstrap of 95% that draws prompts, the
    same for every cell, and runs. `gain` is the win rate less that of the fewest beams, and
    `step` less that of the next fewer beams, prompt by prompt.
    """
    options = dict(max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size)
    found: dict[tuple[float, Cell], list[Measured]] = {}
    prompts, judge = [one.prompt for one in asked], remembering(judge)
    for number, trial in enumerate(trials, 1):
        console.print(f"policy {number} of {len(trials)}: {trial.policy}", markup=False)
        models = dict(model=trial.policy, reference=trial.reference, beta=trial.beta)
        ready = decoder(scoring(**models, dtype=dtype), ways[0].rule(temperature), **options)
        for cell, said in _decoded(ready, ways, prompts, temperature, into / (trial.name or ".")):
            wins = _wins(judge, asked, said, seed=seed, both_orders=both_orders)
            found.setdefault((trial.beta, cell), []).append(measured(said, wins))
    return _rows(found, len(prompts), seed)


def measured(said: Sequence[Record], wins: np.ndarray) -> Measured:
    """Of each prompt's best completion the numbers that a sweep follows.

    `length` is in tokens, without the end token; `implicit_reward` beta log pi(y|x)/pi_ref(y|x)
    and `logps` log pi(y|x) in nats, with it.
    """
    best = [record["completions"][0] for record in said]
    column = lambda value: np.array([value(one) for one in best], float)
    return {
        "win_rate": wins,
        "length": column(lambda one: one["length"] - one["ended"]),
        "implicit_reward": column(lambda one: one["implicit_reward"]),
        "logps": column(lambda one: one["logps"]),
        "ended": column(lambda one: one["ended"]),
        "empty": column(lambda one: not one["text"].strip()),
    }


def _decoded(
    ready: Decoder, ways: Sequence[Cell], prompts: Sequence[Prompt], temperature: float, to: Path
) -> Iterator[tuple[Cell, list[Record]]]:
    """The completions of each cell; what two of them share is decoded once."""
    files: dict[str, list[Record]] = {}
    for cell in ways:
        if cell.file not in files:
            one = with_rule(ready, cell.rule(temperature))._replace(num_return=1)
            label = Path(cell.file).stem
            files[cell.file] = decode(one, prompts, out=to / cell.file, label=label)
        yield cell, files[cell.file]


def _wins(
    judge: Judge, asked: Sequence[Asked], said: Sequence[Record], **orders: Any
) -> np.ndarray:
    """1 where the policy's completion wins, 1/2 for a tie; NaN where no answer could be read."""
    best = [record["completions"][0]["text"] for record in said]
    comparisons = [
        Comparison(one.prompt.texts[0], text, one.chosen, one.prompt.place)
        for one, text in zip(asked, best, strict=True)
    ]
    answers = judged(judge, comparisons, **orders)
    return np.array([POINTS.get(one.winner, np.nan) for one in answers])


def _rows(
    found: Mapping[tuple[float, Cell], list[Measured]], prompts: int, seed: int
) -> list[Record]:
    rows: list[Record] = []
    for (beta, cell), of_runs in found.items():
        samples = resamples(prompts, len(of_runs), seed=seed)
        row = {"beta": beta} | cell._asdict() | {"runs": len(of_runs)}
        row |= {name: _estimate(samples, _stacked(of_runs, name)) for name in MEASURES}
        wins = _stacked(of_runs, "win_rate")
        row["unread"] = int(np.isnan(wins).sum())
        for name, size in zip(("gain", "step"), _fewer(cell, beta, found), strict=True):
            other = size and found[beta, cell._replace(beam_size=size)]
            row[name] = other and _estimate(samples, wins - _stacked(other, "win_rate"))
        rows.append(row)
    return rows


def _fewer(cell: Cell, beta: float, found) -> tuple[int | None, int | None]:
    """The fewest beams of a cell's line, and the next fewer ones; None where it has these."""
    line = [other for of, other in found if of == beta and other[:2] == cell[:2]]
    sizes = sorted(one.beam_size for one in line if one.beam_size < cell.beam_size)
    return (sizes[0], sizes[-1]) if sizes else (None, None)


def _stacked(of_runs: Sequence[Measured], name: str) -> np.ndarray:
    return np.stack([one[name] for one in of_runs])


def _estimate(samples: Resamples, values: np.ndarray) -> list[float | None]:
    known = np.isfinite(values)
    prompts = np.arange(values.shape[1])
    return ratio(samples, np.where(known, values, 0.0), known.astype(float), prompts).as_json()
