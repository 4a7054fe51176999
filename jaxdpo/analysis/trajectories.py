"""Implicit rewards while a policy leaves its reference: which fall, where, and what theory says.

Reads what `drift` measured in training, draws it, and says of it in sentences what 2404.12358,
Eq. 16 and Section 5.4, say of such rewards. Needs neither the model nor a device. Left out:
several runs side by side (`experiment`).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxdpo import InputError
from jaxdpo.records import Record, read_log

FILE = "trajectories.jsonl"
SIDES = ("chosen", "rejected")
SAID = (*SIDES, "samples")
PARTS = ("first", "middle", "end")
ROUNDING = 1e-5  # nats: what the two sides of Eq. 16 may differ by in float32
SIGMAS = 2.0  # standard errors: a mean nearer to zero is not told apart from it
LASTING = 3  # measurements that must agree on the sign of what rose or fell
COLOURS = {"chosen": "#1f77b4", "rejected": "#d1495b", "samples": "#2a9d5c"}
STYLES = dict(zip(PARTS, (":", "-", "--"), strict=True))
TITLES = (
    "Implicit rewards, beta log(policy / reference)",
    "Where they come from: first 3 tokens, middle, end token",
    "Under the reference: E log(policy / reference) = -KL [nats]",
    "Log-likelihood of a response under the policy [nats]",
    "Length of a response [tokens]",
    "Margin per token: chosen minus rejected",
)


def read(folder: str | Path) -> list[Record]:
    """The records of a stage in order; none where it measured none."""
    return read_log(Path(folder) / FILE)


def curve(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a quantity, without the steps where it was not finite."""
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return steps, values


def draw_rewards(ax: Axes, records: Sequence[Record], names: Sequence[str] = SAID) -> None:
    """Implicit rewards over steps, with a band of two standard errors, and the zero line."""
    for who in names:
        steps, values = curve(records, f"rewards/{who}")
        ax.plot(steps, values, color=COLOURS[who], label=who)
        at, errors = curve(records, f"errors/{who}")
        if len(at) == len(steps):
            low, high = values - SIGMAS * errors, values + SIGMAS * errors
            ax.fill_between(steps, low, high, color=COLOURS[who], alpha=0.15, linewidth=0)
    ax.axhline(0, color="black", linewidth=0.8)


def draw(records: Sequence[Record]) -> Figure:
    """Six panels over steps; the caller saves the figure. `InputError` without records."""
    _check(records)
    figure = Figure(figsize=(12, 11), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)  # inches: a title is not the axis above's
    axes = figure.subplots(3, 2)
    draw_rewards(axes[0, 0], records)
    for who in SIDES:
        for part, style in STYLES.items():
            _draw(axes[0, 1], records, f"rewards/{who}/{part}", who, f"{who}, {part}", style)
        _draw(axes[1, 0], records, f"expected/{who}", who, f"{who}: expected log-ratio")
        steps, values = curve(records, f"kl/{who}")
        circles = dict(linestyle="", marker="o", fillstyle="none", color=COLOURS[who])
        axes[1, 0].plot(steps, -values, label=f"{who}: minus KL", **circles)
        _draw(axes[1, 1], records, f"logps/{who}", who, who)
    for who in SAID:
        _draw(axes[2, 0], records, f"lengths/{who}", who, who)
    axes[2, 1].plot(*curve(records, "rewards/margins_per_token"), color="black")
    for ax in (axes[0, 1], axes[1, 0], axes[2, 1]):
        ax.axhline(0, color="black", linewidth=0.8)
    for ax, title in zip(axes.flat, TITLES, strict=True):
        ax.set(title=title, xlabel="step")
        tidy(ax)
    return figure


def tidy(ax: Axes) -> None:
    """A light grid, no box, and a legend where curves have names."""
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize="small")


def _draw(ax: Axes, records, name: str, who: str, label: str, style: str = "-") -> None:
    ax.plot(*curve(records, name), color=COLOURS[who], linestyle=style, label=label)


def captions(records: Sequence[Record]) -> list[str]:
    """What the measurements say of Eq. 16 and Section 5.4, as sentences with their numbers.

    Of Section 5.4 without a verdict: the records do not know what the reference was trained on.
    """
    _check(records)
    last, since = records[-1], after_start(records)
    if not since:
        return [_extent(records), "Every implicit reward is zero there: nothing has moved yet."]
    return [
        _extent(records),
        _equation_16(since),
        "Section 5.4: of a reference fine-tuned on responses such as the chosen ones, the rewards "
        "of chosen and rejected both fall while the margin grows. At the end chosen "
        f"{moved(records, 'chosen')} ({measured(last, 'chosen')}), rejected "
        f"{moved(records, 'rejected')} ({measured(last, 'rejected')}), and the margin "
        f"{moved(records, 'margins')} ({measured(last, 'margins')}).",
        f"At the states of the chosen responses, one of the reference's own would earn "
        f"{number(last, 'expected_rewards/chosen')}. Of what chosen earn, "
        f"{_where(last, 'chosen')}; of what rejected earn, {_where(last, 'rejected')}.",
        _log_likelihoods(records),
        _own_samples(last),
    ]


def after_start(records: Sequence[Record]) -> list[Record]:
    """The measurements of a policy that has been trained: at step 0 every reward is zero.

    >>> after_start([{"step": 0}, {"step": 25}])
    [{'step': 25}]
    """
    return [record for record in records if record["step"] > 0]


def moved(records: Sequence[Record], who: str) -> str:
    """Where a reward is at the end: rose, fell, or stayed, from zero at the first step.

    Beyond its error, and of the same sign at the last three measurements after the first step.

    >>> records = [{"step": n, "rewards/chosen": -0.3, "errors/chosen": 0.1} for n in (1, 2)]
    >>> moved(records, "chosen")
    'fell'
    >>> moved([{"step": 0, "rewards/chosen": 0.4, "errors/chosen": 0.1}, *records], "chosen")
    'fell'
    """
    values = [record[f"rewards/{who}"] for record in after_start(records)][-LASTING:]
    error = records[-1][f"errors/{who}"]
    if not values or None in (*values, error) or abs(values[-1]) <= SIGMAS * error:
        return "stayed"
    if min(values) <= 0 <= max(values):
        return "stayed"
    return "rose" if values[-1] > 0 else "fell"


def measured(record: Record, who: str) -> str:
    """A mean reward with its error, as text.

    >>> measured({"rewards/chosen": -0.3, "errors/chosen": 0.1}, "chosen")
    '-0.300 ± 0.200'
    """
    error = record[f"errors/{who}"]
    return number(record, f"rewards/{who}") + ("" if error is None else f" ± {SIGMAS * error:.3f}")


def number(record: Record, name: str) -> str:
    """A quantity of a record, as text.

    >>> number({"rewards/chosen": None}, "rewards/chosen")
    'not finite'
    """
    return "not finite" if record[name] is None else f"{record[name]:+.3f}"


def seen(it: bool) -> str:
    """The verdict on a prediction.

    >>> seen(True), seen(False)
    ('seen', 'NOT seen')
    """
    return "seen" if it else "NOT seen"


def _check(records: Sequence[Record]) -> None:
    if not records:
        raise InputError("trajectories: none were measured; set dpo.trajectories")


def _extent(records: Sequence[Record]) -> str:
    first, last, pairs = records[0], records[-1], sorted({r["pairs"] for r in records})
    return (
        f"Measured on {' to '.join(map(str, dict.fromkeys((pairs[0], pairs[-1]))))} held-out pairs "
        f"at {len(records)} steps, {first['step']} to {last['step']}, with beta {last['beta']:g}. "
        f"Bands and ± are {SIGMAS:g} standard errors over the pairs, of one training run; what "
        f"rose or fell is beyond them at the last step, and has the same sign at the last {LASTING}"
        " measurements."
    )


def _equation_16(records: Sequence[Record]) -> str:
    of_all = lambda name: max(math.inf if r[name] is None else r[name] for r in records)
    largest, residual = max(of_all(f"expected/{who}") for who in SIDES), of_all("residual")
    return (
        "Eq. 16: under the reference, the expected log-ratio of the next token is minus "
        "KL(reference || policy), so never above zero. The two sides, each from both whole "
        f"distributions, differ by at most {residual:.1e} nats at any state, and the largest mean "
        f"of the left one is {largest:+.1e}: {seen(largest <= residual <= ROUNDING)}."
    )


def _log_likelihoods(records: Sequence[Record]) -> str:
    ends = records[0], records[-1]
    of = lambda who: " to ".join(number(record, f"logps/{who}") for record in ends)
    return (
        f"From step {ends[0]['step']} to {ends[1]['step']} the log-likelihood went from "
        f"{of('chosen')} nats for chosen, from {of('rejected')} for rejected."
    )


def _where(record: Record, who: str) -> str:
    first, middle, end = (number(record, f"rewards/{who}/{part}") for part in PARTS)
    return f"{first} is in the first three tokens, {middle} in the middle, {end} in the end token"


def _own_samples(record: Record) -> str:
    value, error = record["rewards/samples"], record["errors/samples"]
    never_below = None not in (value, error) and value >= -SIGMAS * error
    lengths = [number(record, f"lengths/{who}").lstrip("+") for who in ("samples", "chosen")]
    return (
        f"The policy's own samples earn {measured(record, 'samples')}; in expectation that is "
        f"beta KL(policy || reference), never below zero: {seen(never_below)}. They are "
        f"{lengths[0]} tokens long (chosen {lengths[1]}), and {record['ended/samples']:.0%} of "
        "them end."
    )
