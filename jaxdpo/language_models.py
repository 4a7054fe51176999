"""A language model by its name: a Hugging Face folder, a hub name, or a stage of a run.

It comes ready to decode, with the tokenizer that turns text into its ids and back. Left out:
what is decoded from it (`completions`).
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tokenizers import Tokenizer

from jaxdpo import InputError, convert, runs
from jaxdpo.decoding import LM
from jaxdpo.pythia_cache import decoding_params
from jaxdpo.tokens import check_vocabulary, load_tokenizer

_RUN = re.compile(r"(?P<workdir>.+?):(?P<stage>\w+)(:(?P<which>last|best))?")


class LanguageModel(NamedTuple):
    """A model that decodes, what it speaks, and how one tells which it is."""

    name: str
    lm: LM
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    identity: dict[str, Any]  # the same where name, weights, dtype and tokenizer are


def language_model(name: str, mesh: Mesh, *, dtype: str | None = None) -> LanguageModel:
    """The model of a name, on the mesh.

    A name is a folder with a Hugging Face checkpoint, `owner/name` on the hub, or
    `WORKDIR:STAGE` of a run, its last checkpoint unless `:best` follows. `dtype` is that of
    the computation; without one, what the run was trained in, or float32. Raises
    `InputError` where there is no such model, or its tokenizer does not fit.
    """
    run = None if Path(name).is_dir() else _RUN.fullmatch(name)
    of_name = _of_run(run, mesh, dtype) if run else _of_checkpoint(name, mesh, dtype)
    config, params, tokenizer_file, eos_ids, step = of_name
    tokenizer = load_tokenizer(tokenizer_file)
    check_vocabulary(tokenizer, config.vocab_size, tokenizer_file)
    lm = LM(*decoding_params(config, params, mesh))
    identity = {
        "name": name,
        "step": step,
        "dtype": config.dtype,
        "weights": fingerprint(lm.params),
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16],
    }
    return LanguageModel(name, lm, tokenizer, eos_ids, identity)


def check_same_vocabulary(models: Sequence[LanguageModel]) -> None:
    """Raise `InputError`, naming both, where two models would write or end a text differently."""
    first = models[0]
    for other in models[1:]:
        ours, theirs = first.tokenizer.get_vocab(), other.tokenizer.get_vocab()
        differ = len(ours.items() ^ theirs.items())
        if differ:
            raise InputError(
                f"{first.name} and {other.name}: their tokenizers differ in {differ} entries; "
                "models that score the same tokens must have the same vocabulary"
            )
        if set(first.eos_ids) != set(other.eos_ids):
            raise InputError(
                f"{first.name} and {other.name}: end a text with different tokens, "
                f"{list(first.eos_ids)} and {list(other.eos_ids)}"
            )


def fingerprint(params: Any) -> str:
    """A hash of the parameters' bits and shapes, the same on any mesh.

    >>> one = fingerprint({"a": jnp.array([1.0, 2.0])})
    >>> one == fingerprint({"a": jnp.array([1.0, 2.0])}), one == fingerprint(
    ...     {"a": jnp.array([2.0, 1.0])}
    ... )
    (True, False)
    """
    digest = hashlib.sha256()
    sums = jax.device_get(jax.tree.map(_bit_sum, params))
    for path, value in jax.tree.leaves_with_path(sums):
        digest.update(f"{jax.tree_util.keystr(path)} {value} ".encode())
    for leaf in jax.tree.leaves(params):
        digest.update(f"{leaf.shape} {leaf.dtype} ".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _bit_sum(leaf):
    """The sum of the numbers' bits, each times its odd place, modulo 2^32."""
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
    places = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        places = places * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * places + 1), dtype=jnp.uint32)


def _of_run(run: re.Match, mesh: Mesh, dtype: str | None):
    found = runs.trained(run["workdir"], run["stage"], mesh=mesh, which=run["which"] or "last")
    config = dataclasses.replace(found.model, dtype=dtype or found.model.dtype)
    return config, found.load(), found.tokenizer, (found.eos_id,), found.step


def _of_checkpoint(name: str, mesh: Mesh, dtype: str | None):
    if runs.is_run(name):
        raise InputError(f"{name}: is a run; name a stage of it, as in {name}:dpo")
    folder = convert.local_folder(name)
    overrides = {} if dtype is None else {"dtype": dtype, "param_dtype": dtype}
    config, params = convert.load_hf(folder, mesh=mesh, **overrides)
    return config, params, folder, convert.eos_ids(folder), None
