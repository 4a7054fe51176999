"""From prompts as text to completions as text: which models speak, and by which method.

A `Scoring` says which models are asked, a rule of `decoding` how tokens are chosen; a `Decoder`
is both with the models loaded. Left out: the search itself (`decoding`), where prompts come
from (`prompts`), and files of completions (`transcript`).
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

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

_WARP = ("temperature", "top_k", "top_p")
_BEAMS = ("length_penalty", "early_stopping", "length_norm")
# The options that each method obeys.
METHODS = {
    "greedy": (),
    "sample": ("num_samples", *_WARP, "seed"),
    "beam": ("beam_size", "num_return", *_BEAMS),
    "beam_sample": ("beam_size", "num_return", *_BEAMS, *_WARP, "seed"),
}
OPTIONS = tuple(dict.fromkeys(METHODS["sample"] + METHODS["beam_sample"]))
EARLY_STOPPING = {"false": False, "true": True, "never": "never"}  # as words of a command line
_LARGEST = 1e30  # of an exponent or beta: times a log-probability it is finite in float32
_GREEDY = Samples()


class Scoring(NamedTuple):
    """Which models are asked, by name, and what is made of their answers; see `scoring`."""

    names: tuple[str, ...]
    exponents: tuple[float, ...] | None  # of a product
    normalised: str | None  # of a product
    reference: str | None
    beta: float | None
    dtype: str | None


class Decoder(NamedTuple):
    """A search with the models that it asks, in the scorer's order, the reference last."""

    scoring: Scoring
    models: tuple[LanguageModel, ...]
    search: Search
    num_return: int | None
    seed: int


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
    if reference is not None and (beta is None or not 1 / _LARGEST <= beta <= _LARGEST):
        raise InputError(
            f"beta={beta}: with a reference, give one above 0 (and at most {_LARGEST:g}), "
            "such as that of DPO"
        )
    if model:
        return Scoring((model,), None, None, reference, beta, dtype)
    names, exponents = zip(*map(_factor, product), strict=True)
    return Scoring(names, exponents, normalised or "token", reference, beta, dtype)


def method(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What `decoder` takes for a method of a command line: its `rule`, `num_return`, `seed`.

    `METHODS` lists which there are, and what each obeys; an option that is None is not given.
    Raises `InputError` for one that the method does not obey.

    >>> method("sample", {"num_samples": 2, "beam_size": None})["rule"].num_samples
    2
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
    if "early_stopping" in given:
        given["early_stopping"] = EARLY_STOPPING[given["early_stopping"]]
    part = lambda names: {option: given[option] for option in names if option in given}
    warp = Warp(**part(_WARP)) if "seed" in METHODS[name] else None
    if "beam_size" not in METHODS[name]:
        return {"rule": Samples(**part(["num_samples"]), warp=warp)} | part(["seed"])
    rule = Beams(given.get("beam_size", 4), **part(_BEAMS), warp=warp)
    return {"rule": rule, "num_return": given.get("num_return", 1)} | part(["seed"])


def decoder(
    scoring: Scoring,
    rule: Beams | Samples = _GREEDY,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    no_repeat_ngram: int = 0,
    num_return: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Decoder:
    """A search with its models loaded; the tokenizer says how a text ends.

    See `decoding.Constraints` for the limits. A prompt gets its first `num_return` completions
    (None: all); `batch_size` prompts are decoded together (None: 8, rounded up to the mesh's
    rows) on the mesh (None: all devices). Raises `InputError` for what is out of range, before
    a model is loaded where that can be told, and for models that do not go together.
    """
    limits = Constraints(max_new_tokens, (), min_new_tokens, no_repeat_ngram=no_repeat_ngram)
    _check(rule, limits, num_return, seed)
    mesh = sharding.make_mesh() if mesh is None else mesh
    models = _loaded(scoring, mesh)
    tokens = num_tokens(models[0].tokenizer)
    search = Search(
        _scorer(scoring, models),
        rule,
        dataclasses.replace(limits, eos_ids=models[0].eos_ids, num_tokens=tokens),
        batch_size=rows_of(mesh, 8) if batch_size is None else batch_size,
        mesh=mesh,
        memory_limit=memory(mesh),
        key=jax.random.key(seed),
    )
    search.check()
    return Decoder(scoring, models, search, num_return, seed)


def with_rule(decoder: Decoder, rule: Beams | Samples) -> Decoder:
    """The same models, searched by another rule; `InputError` for one that cannot be."""
    search = dataclasses.replace(decoder.search, rule=rule)
    search.check()
    return decoder._replace(search=search)


def completions(
    decoder: Decoder, prompts: Sequence[Prompt], *, numbers: Sequence[int] | None = None
) -> Iterator[tuple[int, list[Record]]]:
    """An iterator of (place of a prompt, its completions, best first), as prompts finish.

    A completion has what `completion` says and, with a reference, `implicit_rewards`, one a
    token, and `implicit_reward`, their sum. Draws are keyed by `numbers`; see
    `decoding.Search`. Raises `InputError` at once, with the place where a prompt stands, for
    one that cannot be decoded.
    """
    ids = [_ids(decoder, prompt) for prompt in prompts]
    return (
        (place, [_rewarded(decoder, one) for one in found[: decoder.num_return]])
        for place, found in decoder.search.run(ids, numbers=numbers)
    )


def completion(found: Hypothesis, tokenizer: Tokenizer) -> Record:
    """A hypothesis as text, and all that is known of it.

    It has its `text` (without the end token) and `tokens` (with it); `token_logps` under the
    scorer and `logps`, their sum; the `score` that it is ranked by; `length` in tokens;
    whether an end token `ended` it; `parts`, the log-probability of each token under the
    "reference" and each model of a product, "model_0" and so on.
    """
    said = found.tokens[:-1] if found.ended else found.tokens
    return {
        "text": tokenizer.decode(said.tolist(), skip_special_tokens=False),
        "tokens": found.tokens.tolist(),
        "token_logps": _numbers(found.logps),
        "logps": float(found.logps.sum(dtype=np.float64)),
        "score": found.score,
        "length": len(found.tokens),
        "ended": found.ended,
        "parts": {name: _numbers(logps) for name, logps in found.parts.items()},
    }


def settings(decoder: Decoder, prompts: Sequence[Prompt]) -> Record:
    """All that is meant to decide what is decoded from these prompts, as JSON; not how fast.

    `notes` are for people, and decide nothing: models move, and libraries change.
    """
    scoring, search = decoder.scoring, decoder.search
    roles = [f"model_{i}" for i in range(len(scoring.names))]
    models = dict(zip([*roles, "reference"], decoder.models, strict=False))
    texts = json.dumps([prompt.texts for prompt in prompts]).encode()
    return {
        "models": {role: model.identity for role, model in models.items()},
        "exponents": scoring.exponents,
        "normalised": scoring.normalised,
        "beta": scoring.beta,
        "rule": {"kind": type(search.rule).__name__, **dataclasses.asdict(search.rule)},
        "num_return": decoder.num_return,
        "seed": decoder.seed,
        **dataclasses.asdict(search.constraints),
        "prompts": {"number": len(prompts), "sha256": hashlib.sha256(texts).hexdigest()},
        "notes": {
            "models": {role: [model.name, model.step] for role, model in models.items()},
            "versions": {name: version(name) for name in ("jax", "jaxlib", "tokenizers")},
        },
    }


def rows_of(mesh: Mesh, count: int) -> int:
    """So many prompts, or the next number that divides over the mesh's rows."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-count // rows) * rows


def memory(mesh: Mesh) -> int:
    """The bytes of a device, or its share of the host's."""
    device, *others = mesh.local_devices
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (1 + len(others))


def _factor(text: str) -> tuple[str, float]:
    name, _, exponent = text.rpartition("=")
    try:
        value = float(exponent)
    except ValueError:
        value = math.nan
    if not name or not abs(value) <= _LARGEST:
        raise InputError(f"product: {text!r} is not NAME=EXPONENT, a model and a number up to 1e30")
    return name, value


def _check(rule: Beams | Samples, limits: Constraints, num_return: int | None, seed: int) -> None:
    """What needs no vocabulary to be seen."""
    limits.check(vocab_size=1)
    rule.check(max(rule.width, 1))
    if num_return is not None and not 1 <= num_return <= rule.width:
        raise InputError(
            f"num_return={num_return}: must be between 1 and the {rule.width} that are searched"
        )
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed}: must be between 0 and {2**32 - 1}")


def _loaded(scoring: Scoring, mesh: Mesh) -> tuple[LanguageModel, ...]:
    """The models in the scorer's order, each loaded once."""
    load = functools.cache(lambda name: language_model(name, mesh, dtype=scoring.dtype))
    models = tuple(load(name) for name in (*scoring.names, scoring.reference) if name is not None)
    check_same_vocabulary(models)
    return models


def _scorer(scoring: Scoring, models: Sequence[LanguageModel]) -> Scorer:
    lms = tuple(model.lm for model in models)
    own = lms if scoring.reference is None else lms[:-1]
    scorer = own[0]
    if scoring.exponents is not None:
        scorer = Product(own, np.asarray(scoring.exponents, np.float32), scoring.normalised)
    return scorer if scoring.reference is None else WithReference(scorer, lms[-1])


def _ids(decoder: Decoder, prompt: Prompt) -> list[list[int]]:
    texts, models = prompt.for_each(len(decoder.models)), decoder.models
    try:
        ids = [text_ids(text, model.tokenizer) for text, model in zip(texts, models, strict=True)]
        decoder.search.checked(ids)
    except InputError as error:
        raise InputError(f"{prompt.place}: {error}") from error
    return ids


def _rewarded(decoder: Decoder, found: Hypothesis) -> Record:
    if not all(np.isfinite(logps).all() for logps in (found.logps, *found.parts.values())):
        names = ", ".join(model.name for model in decoder.models)
        raise InputError(f"{names}: log-probabilities are not finite; look at the weights")
    record = completion(found, decoder.models[0].tokenizer)
    if decoder.scoring.beta is not None:
        rewards = found.implicit_rewards(decoder.scoring.beta)
        record["implicit_rewards"] = _numbers(rewards)
        record["implicit_reward"] = float(rewards.sum(dtype=np.float64))
    return record


def _numbers(values: np.ndarray) -> list[float]:
    """Float32 numbers in the fewest digits that give them back."""
    return [float(str(value)) for value in values]
