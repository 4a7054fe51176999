"""A language model by its name: a Hugging Face folder, a hub name, or a stage of a run.

It comes ready to decode, with the tokenizer that turns text into its ids and back. Left out:
what is decoded from it (`completions`).
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh
from tokenizers import Tokenizer

from jaxdpo import InputError, convert, runs
from jaxdpo.decoding import LM
from jaxdpo.fingerprint import identity as identity_of
from jaxdpo.pythia_cache import decoding_params
from jaxdpo.tokens import check_vocabulary, load_tokenizer


class LanguageModel(NamedTuple):
    """A model that decodes, what it speaks, and how one tells which it is."""

    name: str
    lm: LM
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    step: int | None  # of a run's checkpoint
    identity: dict[str, str]  # the same where weights, dtype and tokenizer are


def language_model(name: str, mesh: Mesh, *, dtype: str | None = None) -> LanguageModel:
    """The model of a name, on the mesh.

    A name is a folder with a Hugging Face checkpoint, `owner/name` on the hub, or
    `WORKDIR:STAGE` of a run, its last checkpoint unless `:best` follows; `WORKDIR:start` is
    what the run began from. `dtype` is that of the computation; without one, what the run was
    trained in, or float32. Raises `InputError` where there is no such model, its tokenizer
    does not fit, or the device does not compute in its dtype.
    """
    stored = _stored(name, mesh, dtype)
    config = dataclasses.replace(stored.model, dtype=dtype or stored.model.dtype)
    if config.dtype == "float16" and mesh.devices.flat[0].platform == "cpu":
        raise InputError(f"{name}: a CPU does not decode in float16; give dtype float32, bfloat16")
    tokenizer = load_tokenizer(stored.tokenizer)
    check_vocabulary(tokenizer, config.vocab_size, stored.tokenizer)
    lm = LM(*decoding_params(config, stored.load(), mesh))
    words = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
    identity = {"dtype": config.dtype, "weights": identity_of(lm.params), "tokenizer": words}
    return LanguageModel(name, lm, tokenizer, stored.eos_ids, stored.step, identity)


def check_same_vocabulary(models: Sequence[LanguageModel]) -> None:
    """Raise `InputError`, naming both, where two models would write or end a text differently."""
    first = models[0]
    for other in models[1:]:
        ours, theirs = first.tokenizer.get_vocab(), other.tokenizer.get_vocab()
        if differ := len(ours.items() ^ theirs.items()):
            raise InputError(
                f"{first.name} and {other.name}: their tokenizers differ in {differ} entries; "
                "models that score the same tokens must have the same vocabulary"
            )
        if set(first.eos_ids) != set(other.eos_ids):
            raise InputError(
                f"{first.name} and {other.name}: end a text with different tokens, "
                f"{list(first.eos_ids)} and {list(other.eos_ids)}"
            )


def _stored(name: str, mesh: Mesh, dtype: str | None) -> runs.Stored:
    if run := runs.named(name):
        workdir, stage, which = run
        return runs.trained(workdir, stage, mesh=mesh, which=which)
    if runs.is_run(name):
        raise InputError(f"{name}: is a run; name a stage of it, as in {name}:dpo")
    folder = convert.local_folder(name)
    # Parameters come in what is computed in: no copy in float32 stands beside them.
    overrides = {} if dtype is None else {"dtype": dtype, "param_dtype": dtype}
    config = convert.hf_config(folder, **overrides)
    load = lambda: convert.load_hf(folder, mesh=mesh, **overrides)[1]
    return runs.Stored(config, folder, convert.eos_ids(folder), load, None)
