"""What the credit benchmark measures, from scores of tokens to one record of numbers.

Every number is [value, low, high], the ends those of a 95% interval, null where it is not
defined. Over several runs it is the mean over them. Left out: where responses and scores
come from (`credit_benchmark`), the statistics themselves (`detection`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from jaxdpo.analysis import detection
from jaxdpo.analysis.detection import Estimate, Resamples
from jaxdpo.analysis.known_errors import Response
from jaxdpo.records import Record

REWARD, EVENLY, RANDOM = "DPO reward", "DPO reward, spread evenly", "random"
DPO, SFT, OVER_BASE = "DPO logp", "SFT logp", "SFT over base"
THIRDS = ("1st third", "2nd third", "3rd third")
PARTS = ("before the first error", "the errors", "next token", "later tokens", "end of text")
LOST = "lost to the first"  # of the second's AUROC, where the first is not put right
BINS = 48

Scores = dict[str, np.ndarray]  # name -> a value for each scored token; or for each run, too


class View(NamedTuple):
    """Some tokens, by their places among all scored ones, and which of them are to be found."""

    places: np.ndarray
    wrong: np.ndarray
    unit: int


class Values(NamedTuple):
    """For each score, a number for each run and thing looked at, and the unit of each thing."""

    of: Scores  # name -> [R, n]
    unit: np.ndarray  # [n]


def scores(
    responses: Sequence[Response],
    policy: np.ndarray,
    reference: np.ndarray,
    base: np.ndarray | None,
    *,
    beta: float,
    seed: int,
) -> Scores:
    """The reward and the baselines of every scored token, from log-probabilities in nats.

    DPO reward = beta (log pi - log pi_ref); SFT is the reference. Spread evenly, every token
    of a response has the mean of its rewards: all that a sequence-level reward knows. Random
    scores have mean zero, so that a value of many tokens has no other sum than one of few.
    """
    policy, reference = policy.astype(np.float64), reference.astype(np.float64)
    reward = beta * (policy - reference)
    evenly = np.zeros_like(reward)
    for response in responses:
        for places in (response.places, response.chosen_places):
            evenly[places] = reward[places].mean()
    found = {REWARD: reward, SFT: reference, DPO: policy}
    found |= {} if base is None else {OVER_BASE: reference - base}
    chance = np.random.default_rng(seed).uniform(-0.5, 0.5, len(reward))
    return found | {EVENLY: evenly, RANDOM: chance}


def measured(
    groups: Mapping[tuple[float, int | None], Sequence[int]],
    scores: Sequence[Scores],
    responses: Sequence[Response],
    mended: Sequence[Response],
    *,
    seed: int,
) -> Record:
    """All that is measured: one group of trials in full, and of every group what is swept.

    `groups` are of (beta, pairs trained on); the one in full is where the two sweeps cross: the
    most pairs at the beta that was trained on most numbers of pairs, or of those in most runs.
    `mended` are the responses with several errors in order, their first error put right.
    """
    units = 1 + max(response.case.unit for response in responses)
    names = [name for name in scores[0] if all(name in one for one in scores)]
    main, record = _crossing(groups), {"sweep": []}
    for setting, trials in groups.items():
        samples = detection.resamples(units, len(trials), seed=seed)
        of_group = {name: np.stack([scores[n][name] for n in trials]) for name in names}
        here = {"beta": setting[0], "pairs": setting[1], "runs": len(trials)}
        auroc = _means(samples, _each(of_group, [_whole(one) for one in responses]))
        right_value = _means(samples, _against_right_values(of_group, _errors(responses)))
        record["sweep"].append(here | {"auroc": auroc, "right_value": right_value})
        if setting == main:
            record |= {"main": here} | _in_full(samples, of_group, responses, mended)
    return record


def _crossing(groups: Mapping[tuple[float, int | None], Sequence[int]]) -> tuple:
    of_beta = {beta: [one for one in groups if one[0] == beta] for beta, _ in groups}
    runs = {beta: sum(len(groups[one]) for one in found) for beta, found in of_beta.items()}
    beta = max(of_beta, key=lambda beta: (len(of_beta[beta]), runs[beta]))
    return max(of_beta[beta], key=lambda one: one[1] or 0)


def _in_full(
    samples: Resamples, scores: Scores, responses: Sequence[Response], mended: Sequence[Response]
) -> Record:
    return {
        "responses": len(responses),
        "errors": len(_errors(responses)),
        "compared": _compared(_errors(responses)),
        "scores": _detection(samples, scores, responses),
        "breakdown": _breakdown(samples, scores, responses),
        "stitching": _stitching(samples, scores, responses, mended),
        "spill": _spill(samples, scores, responses),
        "histogram": _histogram(scores[REWARD], responses),
    }


def _detection(samples: Resamples, scores: Scores, responses: Sequence[Response]) -> Record:
    """Every statistic of every score, and how far the reward's AUROC lies above its own."""
    views = [_whole(response) for response in responses]
    places, wrong = (np.concatenate([view[n] for view in views]) for n in (0, 1))
    unit = np.repeat([view.unit for view in views], [len(view.places) for view in views])
    aurocs = _each(scores, views)
    above = {name: aurocs.of[REWARD] - values for name, values in aurocs.of.items()}
    found = {
        "auroc": _means(samples, aurocs),
        "reward_above": _means(samples, aurocs._replace(of=above)),
        "average_precision": _means(samples, _each(scores, views, detection.average_precision)),
        "top_1": _means(samples, _each(scores, views, detection.top_1)),
        "right_value": _means(samples, _against_right_values(scores, _errors(responses))),
    }
    for name, statistic in (("gap", detection.gap), ("pooled_auroc", detection.pooled_auroc)):
        found[name] = {
            score: statistic(samples, values[:, places], wrong, unit).as_json()
            for score, values in scores.items()
        }
    return {
        score: {name: of[score] for name, of in found.items() if score in of} for score in scores
    }


def _errors(responses: Sequence[Response]) -> list[tuple[Response, int]]:
    return [(one, number) for one in responses for number in range(len(one.case.errors))]


def _compared(errors: Sequence[tuple[Response, int]]) -> int:
    """How many of the errors can be compared with the right value in their place."""
    return sum(one.chosen_error is not None for one, _ in errors)


def _against_right_values(scores: Scores, errors: Sequence[tuple[Response, int]]) -> Values:
    """Whether each error scores lower than the right value in its place; a tie is half.

    The score of a value is the sum of its tokens'. Left out are errors of responses that the
    tokenizer splits otherwise where the right values stand in them, and the score that is
    spread evenly, of which a value's share says nothing but how long it is.
    """
    looked = [
        (one.places[one.error == n], one.chosen_places[one.chosen_error == n], one.case.unit)
        for one, n in errors
        if one.chosen_error is not None
    ]
    found = {}
    for name in [name for name in scores if name != EVENLY]:
        values = scores[name]
        sums = [[values[:, pair[n]].sum(axis=1) for pair in looked] for n in (0, 1)]
        wrong, right = (np.reshape(side, (len(looked), len(values))).T for side in sums)
        found[name] = (wrong < right) + 0.5 * (wrong == right)
    return Values(found, np.array([unit for *_, unit in looked], int))


def _breakdown(samples: Resamples, scores: Scores, responses: Sequence[Response]) -> list[Record]:
    """How errors are told from right tokens and from their right values, by what they are."""
    errors = _errors(responses)
    aurocs = _each(scores, [_single(*one) for one in errors])
    labels = [_what(*one) for one in errors]
    rows = []
    for by in labels[0]:
        found = sorted({label[by] for label in labels})
        for group in found if len(found) > 1 else ():
            here = np.array([label[by] == group for label in labels])
            beside = [errors[number] for number in np.flatnonzero(here)]
            row = {"by": by, "group": group, "errors": len(beside)}
            row["compared"] = _compared(beside)
            row |= {"auroc": _means(samples, _subset(aurocs, here))}
            right_value = _means(samples, _against_right_values(scores, beside))
            rows.append(row | {"right_value": right_value})
    return rows


def _what(response: Response, number: int) -> dict[str, str]:
    """What an error is, by every way to tell errors apart."""
    error, post = response.case.errors[number], response.case.pair.prompt
    first = np.flatnonzero(response.error == number)[0]
    third = THIRDS[min(3 * first // (len(response.error) - 1), 2)]  # EOS is no place for one
    copied = re.search(rf"(?<!\w){re.escape(error.wrong)}(?!\w)", post, re.IGNORECASE)
    return {
        "kind": error.kind,
        "place in the response": third,
        "errors in the response": str(len(response.case.errors)),
        "the wrong value": "stands in the post" if copied else "is not in the post",
    }


def _stitching(
    samples: Resamples,
    scores: Scores,
    responses: Sequence[Response],
    mended: Sequence[Response],
) -> list[Record]:
    """Whether an error is found after another one as it is where the first is put right.

    The second error is looked for among the right tokens after the first one; the same tokens
    follow where that is put right.
    """
    single = [_single(one, 0) for one in responses if len(one.case.errors) == 1]
    several = [one for one in responses if len(one.case.errors) > 1]
    if not several:
        return []
    after = [one.error[::-1].tolist().index(0) for one in several]  # tokens after the first error
    stitched = _each(scores, list(map(_single, several, [1] * len(after), after)))
    alone = _each(scores, list(map(_single, mended, [0] * len(after), after)))
    lost = {name: values - alone.of[name] for name, values in stitched.of.items()}
    rows = {
        "the only error": _each(scores, single),
        "the first of several": _each(scores, [_single(one, 0) for one in several]),
        "the second, after the first": stitched,
        "the second, the first put right": alone,
        LOST: stitched._replace(of=lost),
    }
    return [
        {"error": name, "errors": len(values.unit), "auroc": _means(samples, values)}
        for name, values in rows.items()
        if len(values.unit)
    ]


def _spill(samples: Resamples, scores: Scores, responses: Sequence[Response]) -> Record:
    """Where a response's score differs from that of the same put right: on its errors, or after?

    Each part's difference is a sum over its tokens, the mean over responses; the parts add
    up to the difference of the responses. Its share is sum over sum; a score that does not
    tell the two responses apart has none.
    """
    same = [one for one in responses if one.chosen_error is not None]
    unit = np.array([one.case.unit for one in same], int)
    rows: list[Record] = []
    if not same:
        return {"responses": 0, "rows": rows}
    names = [name for name in scores if name not in (EVENLY, RANDOM)]
    parts = [_parts(one) for one in same]
    sums = {  # [R, n, parts]
        name: np.array([list(map(partial(_differences, run), same, parts)) for run in scores[name]])
        for name in names
    }
    totals = {name: sums[name].sum(axis=2) for name in names}
    unclear = {name for name in names if _unclear(detection.mean(samples, totals[name], unit))}
    for number, part in enumerate(PARTS):
        of_part = {name: sums[name][..., number] for name in names}
        share = {
            name: detection.ratio(samples, of_part[name], totals[name], unit).as_json()
            for name in names
            if name not in unclear
        }
        difference = _means(samples, Values(of_part, unit))
        row = {"part": part, "tokens": float(np.mean([(of[0] == number).sum() for of in parts]))}
        rows.append(row | {"difference": difference, "share": share})
    return {"responses": len(same), "rows": rows}


def _unclear(estimate: Estimate) -> bool:
    """Whether zero lies in the interval: of such a difference nothing is a share."""
    return not estimate.low * estimate.high > 0


def _parts(response: Response) -> tuple[np.ndarray, np.ndarray]:
    """The part of `PARTS` that each token of the wrong and of the right response belongs to."""

    def of(error: np.ndarray) -> np.ndarray:
        wrong = error >= 0
        after = np.cumsum(wrong) > 0
        follows = np.append(False, wrong[:-1])
        part = np.select([wrong, ~after, follows], [1, 0, 2], 3)
        part[-1] = 4
        return part

    return of(response.error), of(response.chosen_error)


def _differences(run: np.ndarray, response: Response, parts: tuple) -> list[float]:
    """Wrong minus right response, summed over each part's tokens."""
    wrong, right = (
        np.bincount(part, run[places], minlength=len(PARTS))
        for part, places in zip(parts, (response.places, response.chosen_places), strict=True)
    )
    return (wrong - right).tolist()


def _histogram(rewards: np.ndarray, responses: Sequence[Response]) -> Record:
    """The shares of right and of wrong tokens in bins of the reward, of all runs together."""
    sides = [
        np.concatenate(
            [rewards[:, one.places[(one.error >= 0) == of]].ravel() for one in responses]
        )
        for of in (False, True)
    ]
    low, high = np.quantile(np.concatenate(sides), [0.0005, 0.9995])
    edges = np.linspace(min(low, -1e-9), max(high, 1e-9), BINS + 1)
    shares = [np.histogram(np.clip(side, *edges[[0, -1]]), edges)[0] / len(side) for side in sides]
    return {"edges": edges.tolist(), "right": shares[0].tolist(), "wrong": shares[1].tolist()}


def _whole(response: Response) -> View:
    return View(response.places, response.error >= 0, response.case.unit)


def _single(response: Response, number: int, last: int | None = None) -> View:
    """One error among the right tokens; among the `last` tokens only, if a number is given."""
    keep = (response.error < 0) | (response.error == number)
    keep[: 0 if last is None else len(keep) - last] = False
    return View(response.places[keep], response.error[keep] == number, response.case.unit)


def _each(scores: Scores, views: Sequence[View], statistic: Callable = detection.auroc) -> Values:
    """A statistic of every view, for every score and run."""
    unit = np.array([view.unit for view in views], int)
    of = {
        name: np.array(
            [[statistic(run[view.places], view.wrong) for view in views] for run in values]
        )
        for name, values in scores.items()
    }
    return Values(of, unit)


def _subset(values: Values, here: np.ndarray) -> Values:
    return Values({name: of[:, here] for name, of in values.of.items()}, values.unit[here])


def _means(samples: Resamples, values: Values) -> Record:
    return {
        name: detection.mean(samples, of, values.unit).as_json() for name, of in values.of.items()
    }
