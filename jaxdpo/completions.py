"""From prompts as text to completions as text: which models speak, and by which method.

A `Request` says what is wanted, with nothing in it that has no effect; a `Decoder` is that
request with its models loaded. Left out: the search itself (`decoding`), where prompts come
from (`prompts`), and files of completions (`transcript`).
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdpo import InputError, sharding
from jaxdpo.decoding import (
    Beams,
    Constraints,
    Hypothesis,
    Product,
    Samples,
    Scorer,
    Search,
    Warp,
    WithReference,
)
from jaxdpo.language_models import LanguageModel, check_same_vocabulary, language_model
from jaxdpo.prompts import Prompt
from jaxdpo.records import Record
from jaxdpo.tokens import num_tokens, text_ids

_DRAWS = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 0}
_BEAMS = {
    "beam_size": 4,
    "num_return": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "length_norm": "generated",
}
# The options that each method obeys, with their values where none is given.
METHODS = {
    "greedy": {},
    "sample": {"num_samples": 1} | _DRAWS,
    "beam": _BEAMS,
    "beam_sample": _BEAMS | _DRAWS,
}
OPTIONS = ("num_samples", *_BEAMS, *_DRAWS)
EARLY_STOPPING = {"false": False, "true": True, "never": "never"}  # as words of a command line


class Scoring(NamedTuple):
    """Which models are asked, by name, and what is made of their answers; see `scoring`."""

    names: tuple[str, ...]
    exponents: tuple[float, ...] | None  # of a product
    normalised: str | None  # of a product
    reference: str | None
    beta: float | None
    dtype: str | None


class Method(NamedTuple):
    """How tokens are chosen: a rule of the search, and every option that made it."""

    name: str
    rule: Beams | Samples
    options: dict[str, Any]


class Request(NamedTuple):
    """What is asked for. The end tokens and `num_tokens` are the tokenizer's to say."""

    scoring: Scoring
    method: Method
    constraints: Constraints


class Decoder(NamedTuple):
    """A request with its models loaded, in the scorer's order, the reference last."""

    request: Request
    models: tuple[LanguageModel, ...]
    search: Search


def scoring(
    *,
    model: str | None = None,
    product: Sequence[str] = (),
    normalised: str | None = None,
    reference: str | None = None,
    beta: float | None = None,
    dtype: str | None = None,
) -> Scoring:
    """One `model`, or a `product` of several (each NAME=EXPONENT); a reference beside it.

    See `language_models` for names, `decoding.Product` for `normalised` ("token" where none
    is given). With a `reference` and a `beta` each token also gets its implicit reward. Raises
    `InputError` for what is wrong, missing, or without effect.

    >>> scoring(product=["base=1", "tuned=0.5"]).exponents
    (1.0, 0.5)
    """
    if bool(model) == bool(product):
        raise InputError("give either model, or product: NAME=EXPONENT for each of several models")
    if normalised is not None and not product:
        raise InputError("normalised: has no effect without product; leave it out")
    if beta is not None and reference is None:
        raise InputError("beta: has no effect without reference; leave it out, or name a reference")
    if reference is not None and (beta is None or not 0 < beta < math.inf):
        raise InputError(f"beta={beta}: with a reference, give one above 0, such as that of DPO")
    if model:
        return Scoring((model,), None, None, reference, beta, dtype)
    names, exponents = zip(*map(_factor, product), strict=True)
    return Scoring(names, exponents, normalised or "token", reference, beta, dtype)


def method(name: str, given: Mapping[str, Any]) -> Method:
    """The method of a name, obeying the options given; those that are None are not given.

    `METHODS` lists which there are; `decoding.Beams`, `Samples` and `Warp` say what they mean;
    of a beam search `num_return` are returned. Raises `InputError` for an option that is out
    of range, or that the method does not obey.

    >>> method("sample", {"temperature": 0.7, "beam_size": None}).options["temperature"]
    0.7
    """
    if name not in METHODS:
        raise InputError(f"method={name!r}: is unknown; choose from {', '.join(METHODS)}")
    given = {option: value for option, value in given.items() if value is not None}
    for option in given:
        if option not in METHODS[name]:
            obey = " and ".join(other for other in METHODS if option in METHODS[other])
            raise InputError(
                f"{option}: has no effect on {name}, only on {obey or 'no method at all'}; "
                "leave it out, or choose another method"
            )
    options = METHODS[name] | given
    if (early := options.get("early_stopping")) in EARLY_STOPPING:
        options["early_stopping"] = EARLY_STOPPING[early]
    return Method(name, _rule(options), options)


def decoder(request: Request, *, batch_size: int = 8, mesh: Mesh | None = None) -> Decoder:
    """The request, ready to decode `batch_size` prompts together on the mesh (None: all devices).

    Raises `InputError` where a model cannot be loaded, or does not go with the others.
    """
    if jax.process_count() > 1:
        raise InputError("several processes: decoding is of one process yet, with all its devices")
    mesh = sharding.make_mesh() if mesh is None else mesh
    names = [*request.scoring.names, request.scoring.reference]
    names = [name for name in names if name is not None]
    dtype = request.scoring.dtype
    loaded = {name: language_model(name, mesh, dtype=dtype) for name in dict.fromkeys(names)}
    models = tuple(loaded[name] for name in names)
    check_same_vocabulary(models)
    constraints = dataclasses.replace(
        request.constraints,
        eos_ids=models[0].eos_ids,
        num_tokens=num_tokens(models[0].tokenizer),
    )
    search = Search(
        _scorer(request.scoring, models),
        request.method.rule,
        constraints,
        batch_size=batch_size,
        mesh=mesh,
        memory_limit=_memory(mesh),
        key=jax.random.key(request.method.options.get("seed", 0)),
    )
    return Decoder(request, models, search)


def completions(
    decoder: Decoder, prompts: Sequence[Prompt], *, numbers: Sequence[int] | None = None
) -> Iterator[tuple[int, list[Record]]]:
    """Yield (place of a prompt, its completions, best first) as prompts finish.

    A completion has its `text` (without the end token) and `tokens` (with it); `token_logps`
    under the scorer and `logps`, their sum; the `score` that it is ranked by; `length` in
    tokens; whether an end token `ended` it; `parts`, the other log-probabilities of each token;
    with a reference `implicit_rewards`, one a token, and `implicit_reward`, their sum.

    Draws are keyed by `numbers`; see `decoding.Search`. Raises `InputError`, with the place
    where a prompt stands, for one that cannot be decoded.
    """
    ids = [_ids(decoder.models, prompt) for prompt in prompts]
    try:
        for place, found in decoder.search.run(ids, numbers=numbers):
            found = found[: decoder.request.method.options.get("num_return")]
            yield place, [_completion(decoder, hypothesis) for hypothesis in found]
    except InputError as error:
        if numbered := re.match(r"prompt (\d+): ", str(error)):
            said = str(error)[numbered.end() :]
            raise InputError(f"{prompts[int(numbered[1])].place}: {said}") from error
        raise


def settings(decoder: Decoder, prompts: Sequence[Prompt]) -> Record:
    """All that decides what is decoded from these prompts, as JSON; not how fast."""
    request, roles = decoder.request, [f"model_{i}" for i in range(len(decoder.models))]
    if request.scoring.reference is not None:
        roles[-1] = "reference"
    identities = [model.identity for model in decoder.models]
    limits = dataclasses.asdict(decoder.search.constraints)
    texts = json.dumps([prompt.texts for prompt in prompts]).encode()
    return {
        "models": dict(zip(roles, identities, strict=True)),
        "exponents": request.scoring.exponents,
        "normalised": request.scoring.normalised,
        "beta": request.scoring.beta,
        "method": request.method.name,
        **request.method.options,
        **limits,
        "prompts": {"number": len(prompts), "sha256": hashlib.sha256(texts).hexdigest()},
        "versions": {name: version(name) for name in ("jax", "jaxlib", "tokenizers")},
    }


def _factor(text: str) -> tuple[str, float]:
    name, _, exponent = text.rpartition("=")
    try:
        value = float(exponent)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise InputError(f"product: {text!r} is not NAME=EXPONENT, a model and a number")
    return name, value


def _rule(options: dict[str, Any]) -> Beams | Samples:
    warp = None
    if "temperature" in options:
        warp = Warp(options["temperature"], options["top_k"], options["top_p"])
        warp.check()
    if "beam_size" not in options:
        return Samples(options.get("num_samples", 1), warp)
    size, wanted = options["beam_size"], options["num_return"]
    if not 1 <= wanted <= size:
        raise InputError(f"num_return={wanted}: must be between 1 and beam_size={size}")
    named = (options[name] for name in ("length_penalty", "early_stopping", "length_norm"))
    return Beams(size, *named, warp)


def _scorer(scoring: Scoring, models: Sequence[LanguageModel]) -> Scorer:
    lms = tuple(model.lm for model in models)
    own = lms if scoring.reference is None else lms[:-1]
    scorer = own[0]
    if scoring.exponents is not None:
        scorer = Product(own, np.asarray(scoring.exponents, np.float32), scoring.normalised)
    return scorer if scoring.reference is None else WithReference(scorer, lms[-1])


def _ids(models: Sequence[LanguageModel], prompt: Prompt) -> list[list[int]]:
    texts = prompt.for_each(len(models))
    try:
        return [text_ids(text, model.tokenizer) for text, model in zip(texts, models, strict=True)]
    except InputError as error:
        raise InputError(f"{prompt.place}: {error}") from error


def _completion(decoder: Decoder, found: Hypothesis) -> Record:
    if not all(np.isfinite(logps).all() for logps in (found.logps, *found.parts.values())):
        names = ", ".join(model.name for model in decoder.models)
        raise InputError(f"{names}: log-probabilities are not finite; look at the weights")
    said = found.tokens[:-1] if found.ended else found.tokens
    tokenizer, beta = decoder.models[0].tokenizer, decoder.request.scoring.beta
    record = {
        "text": tokenizer.decode(said.tolist(), skip_special_tokens=False),
        "tokens": found.tokens.tolist(),
        "token_logps": _numbers(found.logps),
        "logps": float(found.logps.sum(dtype=np.float64)),
        "score": found.score,
        "length": len(found.tokens),
        "ended": found.ended,
        "parts": {name: _numbers(logps) for name, logps in found.parts.items()},
    }
    if beta is not None:
        rewards = found.implicit_rewards(beta)
        record["implicit_rewards"] = _numbers(rewards)
        record["implicit_reward"] = float(rewards.sum(dtype=np.float64))
    return record


def _numbers(values: np.ndarray) -> list[float]:
    """Float32 numbers in the fewest digits that give them back."""
    return [float(str(value)) for value in values]


def _memory(mesh: Mesh) -> int:
    """The bytes of a device, or its share of the host's."""
    device = mesh.devices.flat[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // mesh.size
