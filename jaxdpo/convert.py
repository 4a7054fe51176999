"""Hugging Face weights <-> parameters, read lazily and straight onto the mesh.

Each process reads only the bytes of its own shards, so a model need not fit into the
memory of one host. Only safetensors are read: pickled weights can run code. Left out: what
the numbers of a `config.json` mean (`pythia`), and training checkpoints (`checkpoint`).
"""

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxdpo import InputError, hf_layout, processes, sharding
from jaxdpo.pythia import init_params
from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.records import read_json, write_json
from jaxdpo.sharding import param_shardings

# Buffers that older versions of transformers stored; they are functions of the config.
_LEGACY = re.compile(r"(^|\.)(attention\.(masked_)?bias|rotary_emb\.inv_freq)$")
_DTYPES = ("F32", "F16", "BF16")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def load_hf(
    source: str | Path, *, mesh: Mesh, revision: str | None = None, **overrides: Any
) -> tuple[PythiaConfig, dict[str, Any]]:
    """The configuration and parameters of a Hugging Face checkpoint, placed on the mesh.

    `source` is a folder with config.json and safetensors, or a hub name `owner/name` (then
    `revision` picks a branch, tag or commit). `overrides` are fields of `PythiaConfig`:
    `param_dtype` is the dtype of the parameters whatever the file's, `scan_layers` the
    form of the tree. Raises one `InputError` that names every tensor that is missing,
    unexpected, or of another shape than the configuration says.
    """
    folder = local_folder(source, revision=revision)
    config = hf_config(folder, **overrides)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    shardings = jax.tree.leaves(param_shardings(shapes, mesh))
    with contextlib.ExitStack() as files:
        tensors = _open_tensors(folder, files)
        _refuse_mismatch(folder, config, tensors)
        params = [
            _read(config, tensors, _path(path), leaf, sharding)
            for (path, leaf), sharding in zip(leaves, shardings, strict=True)
        ]
    return config, jax.tree.unflatten(tree, params)


def hf_config(source: str | Path, *, revision: str | None = None, **overrides: Any) -> PythiaConfig:
    """The configuration that `load_hf` returns, without reading the weights."""
    folder = local_folder(source, revision=revision)
    try:
        return PythiaConfig.from_hf(_json(folder / "config.json"), **overrides)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def save_hf(
    folder: str | Path,
    config: PythiaConfig,
    params: dict[str, Any],
    *,
    tokenizer_from: str | Path | None = None,
    eos_id: int = 0,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that `transformers` loads, in the dtype of the parameters.

    `tokenizer_from` is a folder with tokenizer files, or a bare tokenizer.json, whose token
    `eos_id` becomes the end of text. All processes must call; the first one writes. The
    folder appears when it is complete. Raises `InputError` where the folder holds anything
    already, the tokenizer does not fit, or parameters and configuration disagree.
    """
    folder = Path(folder).absolute()
    processes.from_first(lambda: _refuse_taken(folder))
    _refuse_other_shapes(config, params)
    if tokenizer_from is not None:
        _refuse_foreign_tokenizer(tokenizer_path(tokenizer_from), config, eos_id)
    writes = processes.is_first()
    partial = folder.with_name(folder.name + ".partial")
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _write_weights(partial, config, params, max_shard_bytes, writes)
    if writes:
        ids = {"bos_token_id": eos_id, "eos_token_id": eos_id}
        write_json(partial / "config.json", config.to_hf(eos_id=eos_id))
        write_json(partial / "generation_config.json", ids)
        if tokenizer_from is not None:
            _copy_tokenizer(Path(tokenizer_from), partial, eos_id)
        os.replace(partial, folder)
    processes.from_first(lambda: None)  # the folder is there


def local_folder(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder itself, or the local copy of a hub repository `owner/name`.

    From a hub only safetensors and JSON files are fetched. Raises `InputError` where there
    is neither such a folder nor such a repository within reach.
    """
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise InputError(f"{source}: no such folder, and not a hub name owner/name")
    try:
        fetched = huggingface_hub.snapshot_download(
            str(source), revision=revision, allow_patterns=["*.safetensors", "*.json"]
        )
    # The hub's client raises OSError of many kinds, and ValueError for a malformed name.
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{source}: no such folder, and the hub does not give it: {reason}"
        ) from error
    return Path(fetched)


def tokenizer_path(source: str | Path) -> Path:
    """The tokenizer.json in a folder, or the file itself; `InputError` without one."""
    path = Path(source)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a tokenizer.json or its folder")
    return path


def eos_ids(folder: str | Path) -> tuple[int, ...]:
    """The ids that end a text, as `transformers` takes them from a checkpoint's folder.

    generation_config.json has the first word, config.json the second; `InputError` where
    neither names any.
    """
    for name in ("generation_config.json", "config.json"):
        found = _json(Path(folder) / name) if (Path(folder) / name).is_file() else {}
        ids = found.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if ids and all(type(token) is int for token in ids):
            return tuple(ids)
    raise InputError(
        f"{folder}: neither generation_config.json nor config.json has an eos_token_id; add one"
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: missing; the folder must hold a Hugging Face checkpoint")
    return read_json(_inside(path.parent, path.name))


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder; `InputError` where it is a link to somewhere else."""
    root, real = folder.resolve(), (folder / name).resolve()
    # The hub's cache holds every file once, and links of a snapshot lead there.
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (real.is_relative_to(root) or real.is_relative_to(blobs)):
        raise InputError(f"{folder / name}: is a link out of the folder; put the file itself there")
    return folder / name


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


# --- reading ---------------------------------------------------------------------------


def _open_tensors(folder: Path, files: contextlib.ExitStack) -> dict[str, Any]:
    """Every tensor of the folder by name, as a slice that has read nothing yet."""
    promised = {} if (folder / _SINGLE).is_file() else _weight_map(folder)
    tensors, found = {}, {}
    for name in sorted(set(promised.values())) or [_SINGLE]:
        try:
            file = files.enter_context(safe_open(_inside(folder, name), framework="np"))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder / name}: not readable: {error}") from error
        tensors |= {tensor: file.get_slice(tensor) for tensor in file.keys()}
        found |= dict.fromkeys(file.keys(), name)
    astray = [f"{t} is not in {file}" for t, file in promised.items() if found.get(t) != file]
    if astray:
        raise InputError(f"{folder / _INDEX}: {'; '.join(astray)}")
    return tensors


def _weight_map(folder: Path) -> dict[str, str]:
    """Which file holds which tensor, where there are several files."""
    if not (folder / _INDEX).is_file():
        pickled = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
        reason = f" (only {pickled}, pickles, which can run code)" if pickled else ""
        raise InputError(
            f"{folder}: holds no {_SINGLE} or {_INDEX}{reason}; "
            "save the model as safetensors with transformers' save_pretrained"
        )
    weight_map = _json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{folder / _INDEX}: lacks weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name == "..":
            raise InputError(
                f"{folder / _INDEX}: weight_map names {name!r}; must be a file in the folder"
            )
    return weight_map


def _refuse_mismatch(folder: Path, config: PythiaConfig, tensors: dict[str, Any]) -> None:
    expected = {
        name: hf_layout.torch_shape(config, form) for name, _, form in hf_layout.entries(config)
    }
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in sorted(tensors.items()):
        shape, dtype = list(tensor.get_shape()), tensor.get_dtype()
        if name not in expected:
            problems += [] if _LEGACY.search(name) else [f"{name} is unexpected"]
        elif shape != expected[name]:
            problems.append(f"{name} has shape {shape}, not {expected[name]}")
        elif dtype not in _DTYPES:
            problems.append(f"{name} has dtype {dtype}, not one of {', '.join(_DTYPES)}")
    if problems:
        raise InputError(f"{folder}: does not fit its config.json: {'; '.join(problems)}")


def _read(
    config: PythiaConfig,
    tensors: dict[str, Any],
    path: str,
    leaf: jax.ShapeDtypeStruct,
    sharding: NamedSharding,
) -> jax.Array:
    """One parameter on the mesh; a part that several devices hold is read once."""
    stacked = path.startswith("layers/")
    table = {
        ours: (name, form) for name, ours, form in [*hf_layout.TABLE, *hf_layout.entries(config)]
    }
    name, form = table[path.replace("layers/", "layers_{}/")]
    parts = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(s.indices(size) for s, size in zip(index, leaf.shape, strict=True))
        if key not in parts:
            parts[key] = block(index).astype(leaf.dtype)
        return parts[key]

    def block(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return _read_block(tensors[name], form, hf_layout.sizes(config), index)
        layers = range(config.num_layers)[index[0]]
        sources = (tensors[name.format(i)] for i in layers)
        return np.stack([_read_block(s, form, hf_layout.sizes(config), index[1:]) for s in sources])

    return jax.make_array_from_callback(leaf.shape, sharding, part)


def _read_block(
    tensor: Any, pattern: str, sizes: dict[str, int], index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` of our form of a tensor, from the rows and columns that hold it."""
    groups, ours = hf_layout.axes(pattern)
    wanted = dict(zip(ours, index, strict=True))
    ranges, shape = [], []
    for first, *rest in groups:
        start, stop, _ = wanted[first].indices(sizes[first])
        inner = [sizes[axis] for axis in rest]
        step = int(np.prod(inner, dtype=int))
        ranges.append(slice(start * step, stop * step))
        shape += [stop - start, *inner]
        wanted[first] = slice(None)
    theirs = [axis for group in groups for axis in group]
    block = np.asarray(tensor[tuple(ranges)]).reshape(shape)
    block = block.transpose([theirs.index(axis) for axis in ours])
    return block[tuple(wanted[axis] for axis in ours)]


# --- writing ---------------------------------------------------------------------------


def _refuse_taken(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not empty; name another folder")


def _refuse_other_shapes(config: PythiaConfig, params: dict[str, Any]) -> None:
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    expected, given = (
        {_path(p): (x.shape, str(x.dtype)) for p, x in jax.tree.leaves_with_path(tree)}
        for tree in (shapes, params)
    )
    for path in sorted(expected.keys() | given.keys()):
        if expected.get(path) != given.get(path):
            raise InputError(
                f"parameter {path}: is {given.get(path, 'missing')}, but the "
                f"configuration says {expected.get(path, 'there is none')}"
            )


def _write_weights(
    folder: Path,
    config: PythiaConfig,
    params: dict[str, Any],
    max_shard_bytes: int,
    writes: bool,
) -> None:
    """Shard after shard: the host holds one of them at a time."""
    shards = _shards(config, max_shard_bytes)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = [_SINGLE] if len(shards) == 1 else files
    for file, entries in zip(files, shards, strict=True):
        tensors = {}
        for name, path, form in entries:
            # Every process takes part in gathering, also those that do not write.
            tensor = _to_torch(config, form, sharding.fetched(_leaf(params, path)))
            if writes:
                tensors[name] = tensor
        if writes:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if writes and len(shards) > 1:
        weight_map = {
            name: file
            for file, entries in zip(files, shards, strict=True)
            for name, _, _ in entries
        }
        total = sum(_num_bytes(config, form) for _, _, form in hf_layout.entries(config))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / _INDEX, index)


def _num_bytes(config: PythiaConfig, pattern: str) -> int:
    itemsize = jnp.dtype(config.param_dtype).itemsize
    return int(np.prod(hf_layout.torch_shape(config, pattern))) * itemsize


def _shards(config: PythiaConfig, max_bytes: int) -> list[list[tuple[str, str, str]]]:
    """The table in runs of at most `max_bytes`; a larger tensor has a file of its own."""
    shards, room = [], 0
    for entry in hf_layout.entries(config):
        size = _num_bytes(config, entry[2])
        if size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(entry)
        room -= size
    return shards


def _leaf(params: dict[str, Any], path: str) -> jax.Array:
    top, *rest = path.split("/")
    layer = re.fullmatch(r"layers_(\d+)", top)
    stacked = layer is not None and "layers" in params
    leaf = params["layers" if stacked else top]
    for key in rest:
        leaf = leaf[key]
    return leaf[int(layer[1])] if stacked else leaf


def _to_torch(config: PythiaConfig, pattern: str, leaf: np.ndarray) -> np.ndarray:
    groups, ours = hf_layout.axes(pattern)
    theirs = [axis for group in groups for axis in group]
    leaf = leaf.transpose([ours.index(axis) for axis in theirs])
    # safetensors writes the buffer as it lies in memory, whatever the strides.
    return np.ascontiguousarray(leaf.reshape(hf_layout.torch_shape(config, pattern)))


# --- tokenizer -------------------------------------------------------------------------


def _refuse_foreign_tokenizer(path: Path, config: PythiaConfig, eos_id: int) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise InputError(
            f"{path}: has ids up to {highest}, but the model's vocabulary holds "
            f"{config.vocab_size}; name the model's own tokenizer"
        )
    if tokenizer.id_to_token(eos_id) is None:
        raise InputError(f"{path}: has no token {eos_id}, the end of text")


def _copy_tokenizer(source: Path, folder: Path, eos_id: int) -> None:
    path = tokenizer_path(source)
    shutil.copyfile(path, folder / "tokenizer.json")
    if source.is_dir():
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if not (folder / "tokenizer_config.json").is_file():
        # Without it, transformers knows neither the class nor which token ends a text.
        eos = tokenizers.Tokenizer.from_file(str(path)).id_to_token(eos_id)
        tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
        write_json(folder / "tokenizer_config.json", tokenizer | {"bos_token": eos})
