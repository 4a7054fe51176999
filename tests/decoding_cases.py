"""Searches with known answers: models, prompts and options that several tests share.

The models are random, from NumPy's frozen generator, with end tokens likely enough that
hypotheses end early. `data/beam_answers.json` holds what transformers answers to each case,
and what the slow twin of 4.29.2's beam search answers under `length_norm="total"`.
"""

import json
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.decoding import LM
from jaxdpo.pythia import hidden_states, init_params, unembed
from jaxdpo.pythia_cache import CachedPythia
from jaxdpo.pythia_config import PythiaConfig

ANSWERS = Path(__file__).parent / "data" / "beam_answers.json"


class Case(NamedTuple):
    """One call: a model, ragged prompts, and how to search."""

    seed: int  # of the model and the prompts
    vocab_size: int
    eos_ids: tuple[int, ...]
    eos_bias: float
    beam_size: int
    max_new_tokens: int
    length_penalty: float
    early_stopping: bool | str
    length_norm: str = "generated"
    min_new_tokens: int = 0
    no_repeat_ngram: int = 0

    @property
    def prompts(self) -> list[list[int]]:
        r = np.random.RandomState(1000 + self.seed)
        return [r.randint(8, self.vocab_size, r.randint(1, 9)).tolist() for _ in range(4)]


def config(vocab_size: int) -> PythiaConfig:
    return PythiaConfig(
        vocab_size=vocab_size,
        num_layers=2,
        num_heads=4,
        width=32,
        mlp_width=64,
        max_positions=64,
    )


@cache
def _params(vocab_size: int, seed: int, eos_ids: tuple[int, ...], eos_bias: float):
    shapes = jax.eval_shape(lambda key: init_params(config(vocab_size), key), jax.random.key(0))
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    r = np.random.RandomState(seed)

    def random(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(("scale", "bias")):
            return np.full(leaf.shape, name.endswith("scale"), np.float32)
        scale = 0.6 if name == "unembedding" else 0.3
        return (scale * r.standard_normal(leaf.shape)).astype(np.float32)

    filled = jax.tree.unflatten(tree, [random(*leaf) for leaf in leaves])
    # The first hidden unit is 1 everywhere, which gives the end tokens a bias.
    filled["final_norm"]["scale"][0], filled["final_norm"]["bias"][0] = 0.0, 1.0
    filled["unembedding"][:, 0] = 0.0
    filled["unembedding"][list(eos_ids), 0] = eos_bias
    return jax.tree.map(jnp.asarray, filled)


def params(case: Case):
    """The random parameters of a case's model."""
    return _params(case.vocab_size, case.seed, case.eos_ids, case.eos_bias)


def lm(case: Case) -> LM:
    return LM(CachedPythia(config(case.vocab_size)), params(case))


@partial(jax.jit, static_argnums=0)
def _logits(config, params, rows, lengths):
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1])[None], rows.shape)
    real = (positions < lengths[:, None]).astype(jnp.int32)
    hidden = hidden_states(config, params, rows, positions, real, jnp.zeros_like(rows))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return unembed(last, params["unembedding"])


def logits_after(case: Case, prompt: list[int]):
    """A function from continuations to the logits after them, by whole rows without a cache."""

    def logits(continuations):
        rows = np.zeros((32, 32), np.int32)
        lengths = np.ones(32, np.int32)
        for row, tokens in enumerate(continuations):
            lengths[row] = len(prompt) + len(tokens)
            rows[row, : lengths[row]] = [*prompt, *tokens]
        found = _logits(config(case.vocab_size), params(case), rows, lengths)
        return np.array(found)[: len(continuations)]

    return logits


def cases() -> list[Case]:
    """Every beam size with every mode of stopping; penalties and end tokens in turns."""
    found, n = [], 0
    for beam_size in (2, 3, 5, 10, 20):
        for early_stopping in (False, True, "never"):
            for penalty in (0.0, 1.0, 2.0, -0.7):
                eos_ids = ((3,), (3, 7))[n // 4 % 2]  # a model for each program
                more = ({"min_new_tokens": 3}, {"no_repeat_ngram": 2}, {})[n % 3]
                case = Case(
                    seed=n % 7,
                    vocab_size=97,
                    eos_ids=eos_ids,
                    eos_bias=(2.5, 3.0, 4.0)[n % 3],
                    beam_size=beam_size,
                    max_new_tokens=17 + n % 6,
                    length_penalty=penalty,
                    early_stopping=early_stopping,
                )
                found.append(case._replace(**more) if n % 4 == 1 else case)
                n += 1
    return found


def total_cases() -> list[Case]:
    """The same without what 4.29.2 does not share: one end token, no constraints."""
    return [
        case._replace(
            length_norm="total", eos_ids=(3,), min_new_tokens=0, no_repeat_ngram=0, seed=i % 5
        )
        for i, case in enumerate(cases())
    ]


def answers() -> dict[str, list]:
    return json.loads(ANSWERS.read_text())
