"""Which judge a command line asks for, and the options that each one obeys.

Left out: the judges themselves (`oracle`, `scored_judges`, `judge_server`, `judge`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdpo import InputError
from jaxdpo.judge import Judge, replay_judge

NEEDED = {  # judge -> the options that it cannot do without
    "oracle": (),
    "reward": ("judge_policy", "judge_reference", "judge_beta"),
    "likelihood": ("judge_model",),
    "server": ("judge_model",),
    "replay": ("recorded",),
}
_LIMITS = ("concurrency", "requests_per_minute", "timeout", "retries", "max_requests")
_PRICES = ("price_input", "price_output")
SERVER = ("template", "cache", *_LIMITS, *_PRICES)  # what a server may be given beside
OPTIONS = tuple(dict.fromkeys([*sum(NEEDED.values(), ()), *SERVER]))
FAIR = ("oracle", "reward", "likelihood")  # nothing is won by asking them in both orders
WITH_MODELS = ("reward", "likelihood")  # loaded as soon as the judge is there


def check(kind: str, given: Mapping[str, Any], *, both_orders: bool = False) -> dict[str, Any]:
    """The options that are given, by name; None is not given.

    Raises `InputError` for a judge that is unknown, for an option that is missing or has no
    effect on it, and for `both_orders` where order is nothing to it.

    >>> check("likelihood", {"judge_model": "runs/quickstart:dpo", "timeout": None})
    {'judge_model': 'runs/quickstart:dpo'}
    """
    if kind not in NEEDED:
        raise InputError(f"judge={kind!r}: is unknown; choose from {', '.join(NEEDED)}")
    given = {name: value for name, value in given.items() if value is not None}
    obeyed = NEEDED[kind] + (SERVER if kind == "server" else ())
    for name in given:
        if name not in obeyed:
            raise InputError(f"{name}: has no effect on the {kind} judge; leave it out")
    for name in NEEDED[kind]:
        if name not in given:
            raise InputError(f"{name}: is missing; the {kind} judge needs it")
    if both_orders and kind in FAIR:
        raise InputError(
            f"both_orders: has no effect on the {kind} judge, to whom order is nothing; "
            "leave it out"
        )
    if len(prices := [name for name in _PRICES if name in given]) == 1:
        raise InputError(f"{prices[0]}: alone says no price; give both {' and '.join(_PRICES)}")
    return given


def judge(
    kind: str,
    given: Mapping[str, Any],
    *,
    references: Mapping[str, str],
    cache: Path,
    dtype: str | None = None,
) -> Judge:
    """The judge of a name with its options; see `check`, and what raises.

    `references` are the oracle's; a server's answers are kept in the file `cache`, unless an
    option of that name says otherwise; models compute in `dtype`.
    """
    given = check(kind, given)
    if kind == "oracle":
        from jaxdpo.oracle import oracle_judge

        return oracle_judge(references)
    if kind == "replay":
        return replay_judge(given["recorded"])
    if kind == "server":
        from jaxdpo.judge_server import server_judge  # brings a client with it

        prices = tuple(given.pop(name) for name in _PRICES if name in given)
        model = given.pop("judge_model")
        return server_judge(model=model, **{"cache": cache, "price": prices or None} | given)
    from jaxdpo.scored_judges import likelihood_judge, reward_judge

    of = reward_judge if kind == "reward" else likelihood_judge
    return of(*(given[name] for name in NEEDED[kind]), dtype=dtype)
