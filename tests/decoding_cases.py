"""Searches with known answers: models, prompts and options that several tests share.

The models are random, from NumPy's frozen generator, with end tokens likely enough that
hypotheses end early. `data/beam_answers.json` holds what transformers answers to each case,
and what the slow twin of 4.29.2's beam search answers under `length_norm="total"`.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxdpo.pythia import init_params
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


def params(vocab_size: int, *, seed: int, eos_ids=(), eos_bias: float = 0.0):
    """Random parameters whose first hidden unit is 1 wherever text could end."""
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
    filled["final_norm"]["scale"][0], filled["final_norm"]["bias"][0] = 0.0, 1.0
    filled["unembedding"][:, 0] = 0.0
    filled["unembedding"][list(eos_ids), 0] = eos_bias
    return jax.tree.map(jax.numpy.asarray, filled)


def cases() -> list[Case]:
    """Every beam size with every mode of stopping; penalties and end tokens in turns."""
    found, n = [], 0
    for beam_size in (2, 3, 5, 10, 20):
        for early_stopping in (False, True, "never"):
            for penalty in (0.0, 1.0, 2.0, -0.7):
                eos_ids = ((3,), (3, 7))[n // 4 % 2]  # a model for each program
                more = (("min_new_tokens", 3), ("no_repeat_ngram", 2), ("no_repeat_ngram", 0))[n % 3]
                case = Case(
                    seed=n % 7,
                    vocab_size=97,
                    eos_ids=eos_ids,
                    eos_bias=(1.0, 2.5, 4.0)[n % 3],
                    beam_size=beam_size,
                    max_new_tokens=9 + n % 7,
                    length_penalty=penalty,
                    early_stopping=early_stopping,
                )
                found.append(case._replace(**dict([more])) if n % 4 == 1 else case)
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
