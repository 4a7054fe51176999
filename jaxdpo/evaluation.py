"""A win rate from start to end: two sides answer the same prompts, and a judge compares them.

The folder it is written into holds what each model said, every verdict with its reason, the
numbers, and a page with the pairs side by side. The same command goes on with a folder that was
not finished; what was made with other settings is not touched. Left out: where responses come
from (`sides`), judges (`judges`), and what the numbers mean (`analysis.win_rates`).
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxdpo import InputError, completions, judges, sides
from jaxdpo.analysis import tables, verdicts
from jaxdpo.analysis.credit import folder
from jaxdpo.analysis.win_rates import win_rates
from jaxdpo.judge import Comparison, Judge, judged, record
from jaxdpo.metrics import console
from jaxdpo.records import (
    Record,
    check_known,
    check_same,
    settings_file,
    write_json,
    write_log,
)
from jaxdpo.sides import Asked, Side

ROLES = ("policy", "opponent")
NUMBERS, VERDICTS, CACHE = "win_rate.json", "verdicts.jsonl", "answers.jsonl"
OPTIONS = [
    name for name in completions.OPTIONS if name not in ("num_samples", "num_return", "seed")
]
DECODING = ("method", *OPTIONS, *sides.LIMITS)  # one completion is compared, so one is decoded
WRITTEN = (VERDICTS, NUMBERS, "win_rate.md", "win_rate.html")


def win_rate(
    *,
    policy: str | None,
    opponent: str | None = None,
    data: str | None,
    judge: str | None,
    out: str | None,
    format: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    subset: str | None = None,
    dtype: str | None = None,
    both_orders: bool | None = None,
    seed: int | None = None,
    **options: Any,
) -> list[Any]:
    """Write `win_rate.{json,md,html}` and `verdicts.jsonl` into `out`; returns what to print.

    Both sides answer the first `limit` prompts of `data`. A side is a model as
    `language_models` names them, a file that `launch/decode.py` has written, or the data set's
    "chosen" (the opponent if none is given) or "rejected" responses. `options` are those of the
    judge, see `judges`, and of how models decode, see `DECODING` and `sides.decoding`; what is
    None is not given. The seed is that of the orders (see `judge.judged`), of the intervals,
    and of tokens if they are drawn. Raises `InputError` for what is missing, wrong or without
    effect.
    """
    opponent, both_orders, seed = opponent or "chosen", bool(both_orders), seed or 0
    given = {"policy": policy, "opponent": opponent, "data": data, "judge": judge, "out": out}
    asking = {name: options.pop(name, None) for name in judges.OPTIONS}
    _check(given, dtype, seed)
    judges.check(judge, asking, both_orders=both_orders)
    how = _decoding(options, [policy, opponent], seed)
    asked, report = sides.asked(data, format=format, split=split, limit=limit, subset=subset)
    into = folder(out)
    for said in (str(report), *_shortage(asked, limit)):
        console.print(said, markup=False)
    chosen = {one.prompt.texts[0]: one.chosen for one in asked}
    more = {"references": chosen, "cache": into / CACHE, "dtype": dtype}
    who = functools.cache(lambda: judges.judge(judge, asking, **more))
    made_by = _settings(asked, policy, opponent, subset, both_orders, seed)
    if judge not in judges.WITH_MODELS:  # whose models wait until those of the sides are let go
        made_by |= _identity(who())
    _check_same(into / VERDICTS, made_by)
    both = [
        sides.side(name, asked, decoding=how, dtype=dtype, out=into / f"{role}.jsonl")
        for role, name in zip(ROLES, (policy, opponent), strict=True)
    ]
    made_by |= {role: one.identity for role, one in zip(ROLES, both, strict=True)}
    made_by |= _identity(who())
    _check_same(into / VERDICTS, made_by)
    about = {"data": report.as_json(), "asked": limit, "settings": made_by}
    return _written(into, about, _comparisons(asked, both), both, who())


def _check(given: Mapping[str, Any], dtype: str | None, seed: int) -> None:
    """Raise `InputError` for what can be told before anything is read."""
    for name, value in given.items():
        if not value:
            raise InputError(f"{name}: is missing; give it")
    if given["policy"] == given["opponent"]:
        raise InputError(f"opponent={given['opponent']}: is the policy itself; give another")
    if seed < 0:
        raise InputError(f"seed={seed}: must be 0 or above")
    models = "model" in [sides.kind(given[role]) for role in ROLES]
    if dtype is not None and not models and given["judge"] not in judges.WITH_MODELS:
        raise InputError("dtype: has no effect where neither a side nor the judge is a model")


def _decoding(options: Mapping[str, Any], names: Sequence[str], seed: int) -> Record:
    """How the sides of these names decode; `InputError` for an option that has no effect."""
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := options.keys() - set(DECODING):
        raise TypeError(f"win_rate() takes no option {min(unknown)}")
    if given and "model" not in map(sides.kind, names):
        raise InputError(f"{min(given)}: has no effect where no side is a model; leave it out")
    draws = "seed" in completions.METHODS.get(given.get("method", "greedy"), ())
    return sides.decoding(given | ({"seed": seed} if draws else {}))


def _shortage(asked: Sequence[Asked], limit: int | None) -> list[str]:
    if limit is None or len(asked) == limit:
        return []
    return [f"warning: limit={limit} prompts were asked for, and the data has {len(asked)}"]


def _identity(judge: Judge) -> Record:
    return {"judge": json.loads(json.dumps(judge.identity))}


def _settings(
    asked: Sequence[Asked],
    policy: str,
    opponent: str,
    subset: str | None,
    both_orders: bool,
    seed: int,
) -> Record:
    """What decides the verdicts, as far as it is known before anybody is asked anything."""
    texts = [[one.prompt.texts[0], one.chosen, one.subset] for one in asked]
    return {
        "prompts": {
            "number": len(asked),
            "sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        },
        "subset": subset,
        "sides": [sides.kind(policy), sides.kind(opponent)],
        "both_orders": both_orders,
        "seed": seed,
    }


def _check_same(verdicts: Path, made_by: Record) -> None:
    """Raise `InputError` for verdicts of other settings, as far as they are known by now."""
    if verdicts.exists():  # an attempt that came to nothing binds nobody
        check_known(verdicts)
        check_same(verdicts, made_by, but={*ROLES, "judge"} - made_by.keys())


def _comparisons(asked: Sequence[Asked], both: Sequence[Side]) -> list[Comparison]:
    return [
        Comparison(one.prompt.texts[0], left, right, one.prompt.place, one.subset)
        for one, left, right in zip(asked, *(each.texts for each in both), strict=True)
    ]


def _written(
    into: Path,
    about: Record,
    comparisons: Sequence[Comparison],
    both: Sequence[Side],
    judge: Judge,
) -> list[Any]:
    """Ask the judge, and write all that comes of it; returns what to print."""
    seed, both_orders = about["settings"]["seed"], about["settings"]["both_orders"]
    said = judged(judge, comparisons, seed=seed, both_orders=both_orders)
    counted, unit = sides.lengths(both)
    numbers = about | {
        "policy": both[0].name,
        "opponent": both[1].name,
        "judge": {"name": judge.name, "fair": judge.fair},
        "unit": unit,
        "cut": {role: one.cut for role, one in zip(ROLES, both, strict=True)},
        "versions": {name: version(name) for name in ("jax", "numpy", "scipy")},
        **win_rates(said, comparisons, counted, seed=seed).as_json(),
    }
    rows = [
        record(*each) | {"lengths": length}
        for *each, length in zip(comparisons, said, counted.tolist(), strict=True)
    ]
    write_json(settings_file(into / VERDICTS), about["settings"])
    write_log(into / VERDICTS, rows)
    write_json(into / NUMBERS, numbers)
    shown = verdicts.shown(numbers)
    (into / "win_rate.md").write_text(tables.markdown(shown), encoding="utf-8")
    (into / "win_rate.html").write_text(verdicts.page(numbers, rows), encoding="utf-8")
    wrote = ", ".join(str(into / name) for name in WRITTEN)
    return [*map(tables.rich_table, shown), *verdicts.remarks(numbers), f"wrote {wrote}"]
