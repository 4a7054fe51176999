"""Implicit rewards while a policy leaves its reference: which fall, where, and what theory says.

Measured in training on fixed held-out pairs, and on what the policy itself says to their
prompts. Policy and reference are asked for whole distributions, so that an expectation under
the reference is exact (2404.12358, Eq. 16 and Section 5.4). Left out: when a measurement is
due (`train`), and several runs side by side (`experiment`).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxdpo import InputError, decoding, pythia, qfunction
from jaxdpo.batching import Batch, Batches, prefetch
from jaxdpo.completions import memory, rows_of
from jaxdpo.pythia_cache import decoding_params
from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.records import Record, read_log
from jaxdpo.tokens import TokenStore
from jaxdpo.train import put_batch

FILE = "trajectories.jsonl"
SIDES = ("chosen", "rejected")
SAID = (*SIDES, "samples")
FIRST = 3  # tokens: how a response opens
PARTS = ("first", "middle", "end")
ROWS = 8  # pairs whose whole distributions exist at a time
ROUNDING = 1e-5  # nats: what the two sides of Eq. 16 may differ by in float32
SIGMAS = 2.0  # standard errors: a mean nearer to zero is not told apart from it
LASTING = 3  # measurements that must agree on the sign of what rose or fell
COLOURS = {"chosen": "#1f77b4", "rejected": "#d1495b", "samples": "#2a9d5c"}
STYLES = {"first": ":", "middle": "-", "end": "--"}
TITLES = (
    "Implicit rewards, beta log(policy / reference)",
    "Where they come from: first 3 tokens, middle, end token",
    "Under the reference: E log(policy / reference) = -KL [nats]",
    "Log-likelihood of a response under the policy [nats]",
    "Length of a response [tokens]",
    "Margin per token: chosen minus rejected",
)


class States(NamedTuple):
    """What two models say at scored positions, in nats."""

    policy_logps: Any  # of the target
    reference_logps: Any
    expected: Any  # of log pi/pi_ref, under the reference
    kl: Any  # KL(pi_ref || pi), by another route


class Response(NamedTuple):
    """The implicit rewards of a response's tokens, and whether the last is an end token."""

    rewards: np.ndarray
    ended: bool


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """What is measured: the pairs of `store`, and one sample of the policy for each prompt.

    The reference's parameters are needed while it measures, and only then.
    """

    model: PythiaConfig
    mesh: Mesh
    store: TokenStore
    constraints: decoding.Constraints  # of a sample
    beta: float
    seed: int
    batch_size: int  # prompts that are sampled from together

    def record(self, step: int, policy: Any, reference: Any) -> Record:
        """The numbers of one measurement; one that is not finite is None.

        For WHO of chosen, rejected and samples, means over the pairs: `rewards/WHO`, beta
        log pi/pi_ref of the response, its standard error `errors/WHO`, its parts
        `rewards/WHO/PART` (first three tokens, middle, end token), `lengths/WHO` in tokens.
        Of chosen and rejected also `logps/WHO`; at a state, on average, the expected log-ratio
        under the reference, `expected/WHO`, and `kl/WHO`, KL(reference || policy), of which
        Eq. 16 says that they sum to zero (`residual` is the largest sum); and
        `expected_rewards/WHO`, beta times the sum of the former over a response: what one that
        the reference itself had drawn would earn at these states. Of pairs, `rewards/margins`
        (and `margins_per_token`, each response divided by its length), `rewards/averages` of
        chosen and rejected, and `rewards/accuracies`. `ended/samples` is a share.
        """
        states = self._states(policy, reference)
        values = {"residual": np.abs(states.expected + states.kl).max()}
        said = {}
        for side, who in enumerate(SIDES):
            responses = States(*(self._of_responses(flat)[side] for flat in states))
            said[who] = self._rewarded(side, responses)
            values |= _of_states(who, responses, self.beta)
        said["samples"] = self._samples(step, policy, reference)
        for who, responses in said.items():
            values |= _of_rewards(who, responses)
        values |= _of_pairs(said["chosen"], said["rejected"])
        values["ended/samples"] = np.mean([response.ended for response in said["samples"]])
        finite = {name: float(x) if math.isfinite(x) else None for name, x in values.items()}
        return {"step": step, "pairs": len(self.store), "beta": self.beta} | finite

    def _states(self, policy: Any, reference: Any) -> States:
        """Values of every scored token, flat, as `store.scored_offsets` say."""
        batches = Batches(self.store, batch_size=rows_of(self.mesh, ROWS))
        found = []
        for batch in prefetch(batches, 0, len(batches)):
            values = states(self.model, policy, reference, put_batch(batch, self.mesh))
            found.append([x[batch.slots >= 0] for x in jax.device_get(values)])
        return States(*(np.concatenate(x).astype(np.float64) for x in zip(*found, strict=True)))

    def _of_responses(self, flat: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Values of scored tokens, split into those of each chosen and each rejected response."""
        starts, chosen = self.store.scored_offsets[:-1], self.store.lengths[:, 1]
        each = np.split(flat, np.column_stack([starts, starts + chosen]).ravel()[1:])
        return each[0::2], each[1::2]

    def _rewarded(self, side: int, responses: States) -> list[Response]:
        last = [self.store[index][1 + side][-1] for index in range(len(self.store))]
        ended = np.isin(last, self.constraints.eos_ids).tolist()
        logps = zip(responses.policy_logps, responses.reference_logps, strict=True)
        rewards = [self.beta * (policy - reference) for policy, reference in logps]
        return list(map(Response, rewards, ended))

    def _samples(self, step: int, policy: Any, reference: Any) -> list[Response]:
        models = (
            decoding.LM(*decoding_params(self.model, params, self.mesh))
            for params in (policy, reference)
        )
        found = decoding.sample(
            decoding.WithReference(*models),
            [self.store[index].prompt.tolist() for index in range(len(self.store))],
            self.constraints,
            key=jax.random.fold_in(jax.random.key(self.seed), step),
            batch_size=self.batch_size,
            mesh=self.mesh,
            memory_limit=memory(self.mesh),
        )
        return [Response(one.implicit_rewards(self.beta), one.ended) for [one] in found]


@functools.partial(jax.jit, static_argnums=0)
def states(model: PythiaConfig, policy: Any, reference: Any, batch: Batch) -> States:
    """Both models at the scored positions of a batch, [B, S] each."""

    def logps_and_logits(params):
        hidden = pythia.hidden_states(
            model, params, batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids
        )
        hidden = qfunction.scored_hidden(hidden, batch.scored_positions)
        logps = qfunction.token_logps(hidden, params["unembedding"], batch.targets)
        return logps, qfunction.logits(hidden, params["unembedding"])

    (policy_logps, ours), (reference_logps, theirs) = map(logps_and_logits, (policy, reference))
    expected = qfunction.expected_log_ratios(ours, theirs)
    return States(policy_logps, reference_logps, expected, qfunction.kl_divergences(theirs, ours))


def first_pairs(store: TokenStore, count: int) -> TokenStore:
    """The first `count` examples of a store; `InputError` where it has fewer."""
    if count > len(store):
        raise InputError(f"{count} are more than the {len(store)} held-out pairs; give fewer")
    return dataclasses.replace(
        store,
        starts=store.starts[:count],
        lengths=store.lengths[:count],
        lines=store.lines[:count],
    )


def parts(response: Response) -> tuple[float, float, float]:
    """The sums of a response's rewards: its first three tokens, the middle, its end token.

    An end token belongs to the end alone; a response that was cut has none.

    >>> parts(Response(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), ended=True))
    (6.0, 9.0, 6.0)
    >>> parts(Response(np.array([1.0, 2.0]), ended=True))
    (1.0, 0.0, 2.0)
    """
    rewards = response.rewards.astype(np.float64)
    end = len(rewards) - response.ended
    first = min(FIRST, end)
    return tuple(float(part.sum()) for part in np.split(rewards, [first, end]))


def _of_rewards(who: str, responses: Sequence[Response]) -> dict[str, float]:
    sums = _sums([response.rewards for response in responses])
    split = np.mean([parts(response) for response in responses], axis=0)
    return {
        f"rewards/{who}": sums.mean(),
        f"errors/{who}": _standard_error(sums),
        **{f"rewards/{who}/{part}": x for part, x in zip(PARTS, split, strict=True)},
        f"lengths/{who}": np.mean([len(response.rewards) for response in responses]),
    }


def _of_pairs(chosen: Sequence[Response], rejected: Sequence[Response]) -> dict[str, float]:
    """Chosen minus rejected reward, whole and per token of each; how often above zero; average."""
    sums, means = (
        np.array([[x(r.rewards, dtype=np.float64) for r in side] for side in (chosen, rejected)])
        for x in (np.sum, np.mean)
    )
    margins, averages = sums[0] - sums[1], sums.mean(axis=0)
    return {
        "rewards/averages": averages.mean(),
        "errors/averages": _standard_error(averages),
        "rewards/margins": margins.mean(),
        "errors/margins": _standard_error(margins),
        "rewards/margins_per_token": (means[0] - means[1]).mean(),
        "rewards/accuracies": (margins > 0).mean(),
    }


def _of_states(who: str, responses: States, beta: float) -> dict[str, float]:
    return {
        f"logps/{who}": _sums(responses.policy_logps).mean(),
        f"expected/{who}": np.concatenate(responses.expected).mean(),
        f"kl/{who}": np.concatenate(responses.kl).mean(),
        f"expected_rewards/{who}": beta * _sums(responses.expected).mean(),
    }


def _sums(values: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([x.sum(dtype=np.float64) for x in values])


def _standard_error(values: np.ndarray) -> float:
    return values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf


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
