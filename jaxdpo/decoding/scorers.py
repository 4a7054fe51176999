"""What is maximised or drawn from: one model, a product of models, with or without a reference.

A scorer is an argument of every search. It is a pytree: parameters and exponents are traced,
models and names are static, so a sweep over exponents compiles once. Each of its models runs
on its own prompt with its own cache; the tokens decoded are common to all.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdpo import InputError

Cache = Any


@runtime_checkable
class Model(Protocol):
    """What decoding needs of a model; `pythia_cache.CachedPythia` says what each means.

    A model is static and hashable; its parameters are passed beside it.
    """

    vocab_size: int
    max_length: int

    def prefill(self, params, tokens, lengths, *, num_beams, room): ...
    def extend(self, params, cache, tokens, *, room): ...
    def reorder(self, cache, parents): ...
    def num_nodes(self, cache): ...
    def compact(self, cache, prompts, *, num_nodes, room): ...


class Scores(NamedTuple):
    """For each next token: what is accumulated, and what is reported beside it.

    Both are log-probabilities in float32; `parts` holds one array per part that the scorer
    names in `part_names`.
    """

    logps: Float[Array, "B K V"]
    parts: tuple[Float[Array, "B K V"], ...]


def _scorer(*, data: list[str], meta: list[str]):
    register = functools.partial(
        jax.tree_util.register_dataclass, data_fields=data, meta_fields=meta
    )
    return lambda cls: register(dataclasses.dataclass(frozen=True)(cls))


@_scorer(data=["params"], meta=["model"])
class LM:
    """One language model: log pi(token | prompt, tokens so far), normalised over its logits.

    With `length_penalty=0` a search for the highest sum is the search for the highest
    return of the token MDP (2404.12358, Eq. 13).
    """

    model: Model
    params: Any

    @property
    def models(self) -> "tuple[LM, ...]":
        return (self,)

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    part_names = ()

    def check(self, *, draws: bool) -> None:
        """Raise `InputError` for what cannot be scored, or drawn from."""

    def scores(self, logits: tuple[Float[Array, "B K V"], ...]) -> Scores:
        """From the logits of `models` to what is maximised."""
        return Scores(jax.nn.log_softmax(logits[0], axis=-1), ())


@_scorer(data=["models", "exponents"], meta=["normalised"])
class Product:
    """A product of models with exponents: log pi = sum_i w_i log pi_i (2404.12358, Eq. 14).

    Proxy tuning and emulated fine-tuning are (base, tuned, untuned) with exponents
    (1, guidance, -guidance); `guidance` is not DPO's beta. With `normalised="token"` the sum
    is renormalised at every token, which is the policy of Eq. 14 and can be sampled. With
    "sequence" it is not, so that a search maximises the product over whole sequences; the
    two rank beams differently, and the second gives no distribution to sample from.

    Each model is normalised over its own vocabulary; ids that not all of them have are cut
    off. The parts reported are the models' own log-probabilities.
    """

    models: tuple[LM, ...]
    exponents: Any  # [M], traced
    normalised: str = "token"

    @property
    def vocab_size(self) -> int:
        return min(lm.vocab_size for lm in self.models)

    @property
    def part_names(self) -> tuple[str, ...]:
        return tuple(f"model_{i}" for i in range(len(self.models)))

    def check(self, *, draws: bool) -> None:
        """Raise `InputError` for what cannot be scored, or drawn from."""
        if len(self.exponents) != len(self.models):
            raise InputError(
                f"product: {len(self.exponents)} exponents for {len(self.models)} models"
            )
        if not all(map(math.isfinite, self.exponents.tolist())):
            raise InputError(f"product: exponents {self.exponents.tolist()} must be finite")
        if self.normalised not in ("token", "sequence"):
            raise InputError(f"product: normalised={self.normalised!r}; 'token' or 'sequence'")
        if draws and self.normalised == "sequence":
            raise InputError(
                "product: a product over sequences is no distribution over tokens; "
                "search it with beams, or normalise it by token"
            )

    def scores(self, logits: tuple[Float[Array, "B K _"], ...]) -> Scores:
        """From the logits of `models` to what is maximised."""
        logps = tuple(jax.nn.log_softmax(z, axis=-1)[..., : self.vocab_size] for z in logits)
        total = sum(w * logp for w, logp in zip(self.exponents, logps, strict=True))
        if self.normalised == "token":
            total = jax.nn.log_softmax(total, axis=-1)
        return Scores(total, logps)


@_scorer(data=["scorer", "reference"], meta=[])
class WithReference:
    """Any scorer, with a reference's log-probabilities reported beside it.

    The search is the scorer's. `beta` times the difference is the implicit reward of each
    token as it is decoded, beta log pi/pi_ref (2404.12358, Eq. 10).
    """

    scorer: LM | Product
    reference: LM

    @property
    def models(self) -> tuple[LM, ...]:
        return (*self.scorer.models, self.reference)

    @property
    def vocab_size(self) -> int:
        return min(self.scorer.vocab_size, self.reference.vocab_size)

    @property
    def part_names(self) -> tuple[str, ...]:
        return (*self.scorer.part_names, "reference")

    def check(self, *, draws: bool) -> None:
        """Raise `InputError` for what cannot be scored, or drawn from."""
        self.scorer.check(draws=draws)

    def scores(self, logits: tuple[Float[Array, "B K _"], ...]) -> Scores:
        """From the logits of `models` to what is maximised."""
        *own, reference = logits
        logps, parts = self.scorer.scores(tuple(own))
        reference = jax.nn.log_softmax(reference, axis=-1)
        cut = lambda x: x[..., : self.vocab_size]
        return Scores(cut(logps), tuple(cut(x) for x in (*parts, reference)))


Scorer = LM | Product | WithReference


def prefill(
    scorer: Scorer,
    prompts: tuple[tuple[Int[Array, "B _"], Int[Array, " B"]], ...],
    *,
    num_beams: int,
    room: int,
) -> tuple[Scores, tuple[Cache, ...]]:
    """Scores of the first token, the same for each of K beams, and the models' caches."""
    logits, caches = [], []
    for lm, (tokens, lengths) in zip(scorer.models, prompts, strict=True):
        z, cache = lm.model.prefill(lm.params, tokens, lengths, num_beams=num_beams, room=room)
        logits.append(jnp.broadcast_to(z[:, None], (z.shape[0], num_beams, z.shape[1])))
        caches.append(cache)
    return scorer.scores(tuple(logits)), tuple(caches)


def extend(
    scorer: Scorer, caches: tuple[Cache, ...], tokens: Int[Array, "B K"], *, room: Any
) -> tuple[Scores, tuple[Cache, ...]]:
    """Scores of the token after `tokens`, and the caches that hold them."""
    steps = [
        lm.model.extend(lm.params, cache, tokens, room=room)
        for lm, cache in zip(scorer.models, caches, strict=True)
    ]
    logits, caches = zip(*steps, strict=True)
    return scorer.scores(logits), caches
