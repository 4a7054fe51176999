"""Judges that give each response a score of its own, by what models say, and prefer the higher.

The score is the implicit reward of a policy trained by DPO, or the log-likelihood under a model
that is held to know. A response is scored as its text stands, leading space and all, with its end
token; an empty one has that token alone. Only equal scores are a tie: a difference that rounding
may have made is none. Left out: judges who are asked in words (`judge_server`).
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxdpo import InputError, sharding
from jaxdpo.analysis.token_scores import token_logps
from jaxdpo.judge import FIRST, SECOND, TIE, Judge, Question, Verdict
from jaxdpo.language_models import LanguageModel, check_same_vocabulary, language_model
from jaxdpo.prompts import tail
from jaxdpo.tokens import TokenReport, TokenStore, text_ids

_Text = tuple[str, str]  # a prompt and a response to it


def reward_judge(policy: str, reference: str, beta: float, *, dtype: str | None = None) -> Judge:
    """The judge who prefers the higher implicit reward, beta (log pi(y|x) - log pi_ref(y|x)).

    2305.18290, Eq. 5, summed over the response and its end token: a preference model is any
    policy with the reference that it was trained against. Models go by the names of
    `language_models`, and compute in `dtype`. Raises `InputError` for models that cannot be
    loaded or do not go together, and for a beta that is not above 0; asked, for a prompt or a
    response that cannot be scored whole.
    """
    if not 0 < beta < math.inf:
        raise InputError(f"beta={beta}: must be above 0; give that of the policy's training")
    models = _loaded((policy, reference), dtype)
    roles = {"policy": models[0].identity, "reference": models[1].identity}
    identity = {"kind": "implicit reward", **roles, "beta": beta}
    name = f"implicit reward of {policy} against {reference}"
    return Judge(name, identity, functools.partial(_ask, models, (beta, -beta)), fair=True)


def likelihood_judge(model: str, *, dtype: str | None = None) -> Judge:
    """The judge who prefers the higher log pi(y|x), summed over the response and its end token.

    In nats; a longer response is mostly a less likely one. Names, `dtype` and what raises are as
    for `reward_judge`.
    """
    models = _loaded((model,), dtype)
    identity = {"kind": "log-likelihood", "model": models[0].identity}
    return Judge(
        f"log-likelihood under {model}",
        identity,
        functools.partial(_ask, models, (1.0,)),
        fair=True,
    )


def _loaded(names: Sequence[str], dtype: str | None) -> list[LanguageModel]:
    mesh = sharding.make_mesh()
    models = [language_model(name, mesh, dtype=dtype) for name in names]
    check_same_vocabulary(models)
    return models


def _ask(
    models: Sequence[LanguageModel], weights: Sequence[float], questions: Sequence[Question]
) -> Iterator[tuple[int, Verdict]]:
    """By the models' log-likelihoods, times their weights; each text is scored once."""
    texts: dict[_Text, int] = {}
    for number, (prompt, *responses) in enumerate(questions, 1):
        for response in responses:
            texts.setdefault((prompt, response), number)
    scores = _scores(models, weights, texts) if texts else {}
    for place, (prompt, *responses) in enumerate(questions):
        first, second = (scores[prompt, response] for response in responses)
        preferred = TIE if first == second else FIRST if first > second else SECOND
        yield place, Verdict(preferred, f"{first:.6g} | {second:.6g}")


def _scores(
    models: Sequence[LanguageModel], weights: Sequence[float], texts: Mapping[_Text, int]
) -> dict[_Text, float]:
    store = _store(models, texts)
    sums = np.zeros(len(store))
    for model, weight in zip(models, weights, strict=True):
        logps = token_logps(model, store, label=f"judge, {model.name}")
        sums += weight * np.add.reduceat(logps.astype(np.float64), store.scored_offsets[:-1])
    return dict(zip(texts, sums.tolist(), strict=True))


def _store(models: Sequence[LanguageModel], texts: Mapping[_Text, int]) -> TokenStore:
    """The texts as examples of one response each, in their order."""
    room = min(model.lm.model.config.max_positions for model in models)
    ids = [_ids(text, number, models[0], room) for text, number in texts.items()]
    lengths = np.array([(len(prompt), len(response), 0) for prompt, response in ids])
    starts = np.cumsum(lengths.sum(axis=1)) - lengths.sum(axis=1)
    tokens = np.concatenate([part for each in ids for part in each])
    report = TokenReport(len(ids), 0, 0, 0, 0, [], [], len(tokens))
    return TokenStore(tokens, starts, lengths, np.array(list(texts.values())), "", report)


def _ids(text: _Text, number: int, model: LanguageModel, room: int) -> list[list[int]]:
    """The ids of a prompt, and of a response with its end token, of the question of a number."""
    place = f"question {number}, prompt {tail(text[0])!r}"
    try:
        prompt, response = (text_ids(part, model.tokenizer) for part in text)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    if not prompt or set(prompt + response) & set(model.eos_ids):
        raise InputError(f"{place}: is empty, or a text holds an end token; give plain text")
    response.append(model.eos_ids[0])
    if len(prompt) + len(response) > room:
        raise InputError(
            f"{place}: prompt and response are {len(prompt) + len(response)} tokens, more than "
            f"the model's {room}; shorten them"
        )
    return [prompt, response]
