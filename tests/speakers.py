"""Small models that speak the built-in task's words: as checkpoints, and as the stage of a run."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxdpo import convert, recipe, synthetic
from jaxdpo.checkpoint import Checkpoints
from jaxdpo.pythia import init_params
from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.step import initial_state, rmsprop, warmup

# The task has 292 tokens; the other rows of the vocabulary are padding.
MODEL = PythiaConfig(
    vocab_size=320, num_layers=2, num_heads=4, width=32, mlp_width=64, max_positions=64
)
TEXTS = (" I live in Oslo.", " I feel sad. I have a pet dog.", " I", " My home is in Cairo.")


_initial = jax.jit(functools.partial(init_params, MODEL))


def spoken(seed: int, eos_bias: float = 7.5) -> Any:
    """Random parameters whose texts differ, and end every few tokens.

    The first hidden unit is 1 everywhere, and says nothing but that a text could end.
    """
    drawn = _initial(jax.random.key(seed))
    params = jax.tree.map(lambda leaf: 3 * leaf, drawn)
    end = jnp.zeros(MODEL.vocab_size).at[0].set(eos_bias)
    params["unembedding"] = params["unembedding"].at[:, 0].set(end)
    norm = params["final_norm"]
    norm["scale"], norm["bias"] = norm["scale"].at[0].set(0.0), norm["bias"].at[0].set(1.0)
    return params


def checkpoint(folder: Path, seed: int, tokenizer=None, **more) -> str:
    """A Hugging Face folder's name."""
    (tokenizer or synthetic.tokenizer()).save(str(folder.with_suffix(".json")))
    tokenizer_file = folder.with_suffix(".json")
    convert.save_hf(folder, MODEL, spoken(seed, **more), tokenizer_from=tokenizer_file)
    return str(folder)


def run(workdir: Path, losses: dict[int, float], stage: str = "dpo") -> None:
    """A run with a checkpoint for each step and loss; its parameters are `spoken(step)`."""
    settings = recipe.blank()
    settings.stages = ("sft", "dpo")
    settings.tokenizer = "{workdir}/tokenizer.json"
    settings.model.name = "pythia-14m"
    fields = ("vocab_size", "num_layers", "num_heads", "width", "mlp_width", "max_positions")
    with settings.unlocked():
        settings.model.overrides = {field: getattr(MODEL, field) for field in fields}
    recipe.claim(settings, workdir)
    synthetic.tokenizer().save(str(workdir / "tokenizer.json"))
    tx = rmsprop(warmup(1e-3, 2))
    with Checkpoints(workdir / stage / "checkpoints", keep=len(losses)) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, initial_state(jax.device_put(spoken(step)), tx), loss=loss)
            checkpoints.wait()
