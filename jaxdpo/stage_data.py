"""What a stage trains on: its examples read, counted and tokenised, in rows for its devices.

Everything that is left out, cut or padded on the way is counted and said. Left out: what each of
those is (`pairs`, `tokens`, `batching`), and what is done with them (`stages`).
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from jaxdpo import InputError, pairs, processes, recipe, sharding
from jaxdpo.batching import LENGTH_MULTIPLE, Batches
from jaxdpo.metrics import console
from jaxdpo.records import Record, read_json, write_json
from jaxdpo.tokens import Limits, TokenStore, eos_id, tokenize


def stage_batches(
    config: ConfigDict, workdir: Path, name: str, tokenizer: Tokenizer, mesh: Mesh
) -> dict[str, Batches]:
    """The training and evaluation batches of a stage.

    Raises `InputError` for mistakes in the data, and where it has changed since the stage began.
    """
    settings, stores = config[name], _stores(config, workdir, name, tokenizer)
    train = dict(micro_batches=settings.micro_batches, epochs=settings.epochs, seed=config.seed)
    batches = {
        "train": in_rows(config, name, stores["train"], mesh, "batch_size", **train),
        "eval": in_rows(config, name, stores["eval"], mesh, "eval_batch_size"),
    }
    for side, data in batches.items():
        console.print(f"{name} {side}: {data.padding}")
    return batches


def in_rows(
    config: ConfigDict,
    name: str,
    store: TokenStore,
    mesh: Mesh,
    key: str,
    *,
    micro_batches: int = 1,
    **order: int,
) -> Batches:
    """Batches of so many pairs as the stage's `key` says, in rows that the devices can share.

    `order` is the `seed` and the `epochs`; without it, once and as in the file.
    """
    settings, devices = config[name], mesh.shape["data"] * mesh.shape["fsdp"]
    try:
        return Batches(
            store,
            batch_size=settings[key],
            row_length=settings.row_length,
            num_buckets=settings.num_buckets,
            layout=settings.layout,
            # Whole vector registers of a CPU; whole blocks of an accelerator's attention.
            length_multiple=LENGTH_MULTIPLE if mesh.devices.flat[0].platform == "cpu" else 128,
            divisor=devices * micro_batches,
            parts=sharding.row_parts(mesh),
            **order,
        )
    except InputError as error:
        raise InputError(f"{name} ({key}={settings[key]}): {error}") from error


def _stores(
    config: ConfigDict, workdir: Path, name: str, tokenizer: Tokenizer
) -> dict[str, TokenStore]:
    settings, folder = config[name], workdir / name
    examples, reading = _examples(config, workdir, name)
    limits = Limits(settings.max_length, settings.max_prompt_length, settings.truncation)
    eos = eos_id(tokenizer, config.eos_token)
    stores = {}
    for side, rows in examples.items():
        options = dict(eos=eos, limits=limits, folder=workdir / "tokens")
        made = functools.partial(tokenize, rows, tokenizer, **options)
        stores[side] = processes.first_then_others(made)
        if stores[side].key != processes.from_first(lambda: stores[side].key):  # noqa: B023
            raise InputError(
                f"{name} {side}: process {jax.process_index()} reads other rows, or has another "
                "tokenizer, than the first one; give all of them the same files"
            )
        console.print(f"{name} {side}: {stores[side].report}")
    processes.from_first(lambda: _report(folder, stores, reading))
    return stores


def _report(folder: Path, stores: dict[str, TokenStore], reading: Record) -> None:
    """Say what was counted; `InputError` where the stage began with other tokens."""
    file = folder / "data_report.json"
    keys = {side: store.key for side, store in stores.items()}
    if recipe.begun(folder) and read_json(file)["tokens"] != keys:
        raise InputError(
            f"{folder}: the data or the tokenizer has changed since this stage began; "
            "set it back, or choose another --workdir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    cut = {side: dataclasses.asdict(store.report) for side, store in stores.items()}
    write_json(file, reading | {"truncation": cut, "tokens": keys})


def _examples(
    config: ConfigDict, workdir: Path, name: str
) -> tuple[dict[str, list[pairs.Pair]], dict[str, Any]]:
    """The validated examples of both sides, and what reading them counted."""
    data = config[name].data
    sources = {"train": (data.train, data.split, data.limit)}
    if data.eval:
        sources["eval"] = (data.eval, data.eval_split, data.eval_limit)
    examples, rows, merged = {}, {}, {}
    for side, (source, split, limit) in sources.items():
        read, report = pairs.read_pairs(
            recipe.path_of(source, config, workdir),
            format=data.format,
            split=split,
            max_bad_fraction=data.max_bad_fraction,
            limit=limit,
        )
        console.print(f"{name} {side}: {report}")
        rows[side], merged[side], examples[side] = report.as_json(), 0, read
        if name == "sft":
            examples[side], merged[side] = _sft_examples(read, data)
        if merged[side]:
            console.print(f"{name} {side}: {merged[side]} pairs of a prompt met before: one kept")
        if name == "dpo" and any(pair.rejected is None for pair in read):
            raise InputError(f"dpo.data.format: {data.format!r} has no rejected responses")
    if data.test_fraction:
        examples["train"], examples["eval"] = pairs.split_by_prompt(
            examples["train"], test_fraction=data.test_fraction, seed=config.seed
        )
    prompts = [{pair.prompt for pair in examples[side]} for side in ("train", "eval")]
    if both := len(prompts[0] & prompts[1]):
        console.print(f"{name}: warning: {both} prompts stand in both train and eval")
    reading = {"rows": rows, "pairs_merged_by_prompt": merged}
    return examples, reading | {"prompts_in_train_and_eval": both}


def _sft_examples(read: list[pairs.Pair], data: ConfigDict) -> tuple[list[pairs.Pair], int]:
    """The examples that SFT trains on, and how many pairs are left out for a later one."""
    try:
        examples = pairs.sft_examples(read, data.responses)
    except InputError as error:
        raise InputError(f"sft.data.responses: {data.responses!r}, but {error}") from error
    return examples, len(read) - len({example.line for example in examples})
