"""Malformed files and settings by the thousand: each is refused in a line, or read; none escapes.

Every case is drawn by its number, so one that fails is run again by its name. What is allowed is
`InputError` of one line, or success; any other exception fails, and so does a file that appears
anywhere but where it was asked for.
"""

import copy
import functools
import importlib.util
import json
import random
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdpo import InputError, convert, pairs, pythia, recipe, tokens
from jaxdpo.pairs import Pair
from jaxdpo.sharding import make_mesh
from jaxdpo.synthetic import Task, example, tokenizer

ROOT = Path(__file__).parents[1]
CONFIG = pythia.PythiaConfig(vocab_size=64, num_layers=1, num_heads=2, width=16, mlp_width=16)
EACH = 20  # cases to a test, so that a failure is found among few
NASTY = (
    None, True, -1, 0, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", " ", "\0", "\ud800",
    "../../etc/passwd", "/dev/zero", "{workdir}", "a" * 10_000, [], {}, [[]], {"": {}}, [None] * 50,
    "<|endoftext|>", "é" * 99, "\r\n", "%s%n", "__class__",
)  # fmt: skip


def refused_or_read(read, lines=1):
    """What `read` gives; None where it refuses, in so many lines at most."""
    try:
        return read()
    except InputError as error:
        assert 0 < len(str(error).strip().split("\n")) <= lines, error
        return None


@pytest.fixture
def fenced(tmp_path):
    """A folder, beside which nothing may appear."""
    before = sorted(tmp_path.iterdir())
    inside = tmp_path / "inside"
    inside.mkdir()
    yield inside
    assert sorted(tmp_path.iterdir()) == [*before, inside]


def damaged(draw, content):
    """Bytes with a few changed, cut out, put in or doubled."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        to = min(len(content), at + draw.choice([1, 1, 2, 8, 200]))
        content[at:to] = draw.choice(
            [b"", bytes(draw.randrange(256) for _ in range(to - at)), b"\0" * 9, content[at:to] * 2,
             b'"', b"{", b"\xff\xfe", b"\n", b"1e999", b"[" * 5000]
        )  # fmt: skip
    return bytes(content)


def spoilt_value(draw, value):
    """A JSON value with something in it replaced, removed, renamed or nested."""
    value = copy.deepcopy(value)
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(sorted(value))
        change = draw.randrange(4)
        if change == 0:
            del value[key]
        elif change == 1:
            value[str(draw.choice(NASTY))[:50]] = value.pop(key)
        else:
            value[key] = spoilt_value(draw, value[key])
        return value
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        value[place] = spoilt_value(draw, value[place])
        return value
    return draw.choice(NASTY)


def as_json(value):
    try:
        return json.dumps(value).encode()
    except (ValueError, UnicodeEncodeError):
        return repr(value).encode(errors="replace")


ROWS = {
    "pairs": {"prompt": "Sam is at", "chosen": " home.", "rejected": " sea."},
    "completions": {"prompt": "Sam is at", "completion": " home."},
    "openai_comparisons": {
        "info": {"post": "p", "title": "t", "subreddit": "s", "id": "1"},
        "summaries": [{"text": " a", "policy": "x"}, {"text": " b", "policy": "y"}],
        "choice": 1,
    },
    "carper_comparisons": {
        "prompt": "SUBREDDIT: r/s\nTITLE: t\nPOST: p",
        "chosen": "TL;DR: a",
        "rejected": "TL;DR: b",
    },
    "carper_tldr": {"prompt": "SUBREDDIT: r/s\nTITLE: t\nPOST: p\nTL;DR:", "label": " a"},
    "hh": {"chosen": "\n\nHuman: h\n\nAssistant: a", "rejected": "\n\nHuman: h\n\nAssistant: b"},
}


@pytest.mark.parametrize("seed", range(0, 900, EACH))
@pytest.mark.filterwarnings("error")
def test_data_rows(fenced, seed):
    for case in range(seed, seed + EACH):
        draw = random.Random(case)
        form = draw.choice(sorted(ROWS))
        good = as_json(ROWS[form])
        bad = [
            damaged(draw, good) if draw.random() < 0.5 else as_json(spoilt_value(draw, ROWS[form]))
            for _ in range(draw.randint(1, 3))
        ]
        suffix = draw.choice([".jsonl", ".jsonl", ".jsonl", ".json", ".jsonl.gz", ".parquet"])
        file = fenced / f"{case}{suffix}"
        file.write_bytes(b"\n".join([good, *bad]) + b"\n" * draw.randint(0, 1))
        read_it = functools.partial(pairs.read_pairs, str(file), format=form, max_bad_fraction=1.0)
        found = refused_or_read(read_it, lines=12)  # what was wrong with the rows is counted
        if found:
            read, report = found
            assert all(pair.prompt.strip() and pair.chosen.strip() for pair in read)
            assert report.as_json()["kept"] == len(read)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A token cache, and what makes it."""
    folder = tmp_path_factory.mktemp("cache")
    words = tokenizer()
    examples = [
        Pair(one.prompt, one.chosen, one.rejected, line)
        for line, one in enumerate(
            (example(Task(), seed=0, split="train", index=i) for i in range(8)), 1
        )
    ]
    limits = tokens.Limits(64, 48, "official")
    eos = tokens.eos_id(words)
    make = lambda at: tokens.tokenize(examples, words, eos=eos, limits=limits, folder=at)
    make(folder)
    return folder, make


@pytest.mark.parametrize("seed", range(0, 300, EACH))
def test_token_caches(fenced, cache, seed):
    """Half-written, changed, cut or foreign: never other tokens than those that were made."""
    folder, make = cache
    right = make(folder)
    for case in range(seed, seed + EACH):
        draw = random.Random(case)
        copied = fenced / str(case)
        shutil.copytree(folder, copied)
        file = draw.choice(sorted(p for p in copied.rglob("*") if p.is_file()))
        how = draw.randrange(4)
        if how == 0:
            file.unlink()
        elif how == 1:
            file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])
        elif how == 2 and file.suffix == ".json":
            file.write_bytes(as_json(spoilt_value(draw, json.loads(file.read_bytes()))))
        else:
            file.write_bytes(damaged(draw, file.read_bytes()))
        found = refused_or_read(lambda: make(copied))  # noqa: B023
        if found is not None:
            np.testing.assert_array_equal(found.tokens, right.tokens)
            np.testing.assert_array_equal(found.lengths, right.lengths)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    params = pythia.init_params(CONFIG, jax.random.key(0))
    folders = [tmp_path_factory.mktemp("hf") / name for name in ("one", "several")]
    convert.save_hf(folders[0], CONFIG, params)
    convert.save_hf(folders[1], CONFIG, params, max_shard_bytes=4000)
    return folders


def loaded(folder):
    return convert.load_hf(folder, mesh=make_mesh(devices=jax.devices()[:1]))


def header_of(content):
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@pytest.mark.parametrize("seed", range(0, 500, EACH))
def test_safetensors_headers(fenced, model, seed):
    """Sizes, offsets, dtypes, shapes and names that lie."""
    content = (model[0] / "model.safetensors").read_bytes()
    folder = fenced / "hf"
    shutil.copytree(model[0], folder)
    for case in range(seed, seed + EACH):
        draw = random.Random(case)
        header, data = header_of(content)
        if draw.random() < 0.5:
            head = as_json(spoilt_value(draw, header))
            size = draw.choice([len(head)] * 4 + [0, len(head) - 1, 2**63, len(content) + 1])
            lying = struct.pack("<Q", size) + head + data[: draw.choice([len(data), 100, 0])]
        else:
            lying = damaged(draw, content[: 8 + len(json.dumps(header))]) + data
        (folder / "model.safetensors").write_bytes(lying)
        refused_or_read(lambda: loaded(folder))


@pytest.mark.parametrize("seed", range(0, 200, EACH))
def test_indices_and_configurations_of_models(fenced, model, seed):
    index = json.loads((model[1] / "model.safetensors.index.json").read_bytes())
    config = json.loads((model[1] / "config.json").read_bytes())
    folder = fenced / "hf"
    shutil.copytree(model[1], folder)
    for case in range(seed, seed + EACH):
        draw = random.Random(case)
        name, value = draw.choice(
            [("model.safetensors.index.json", index), ("config.json", config)]
        )
        bad = as_json(spoilt_value(draw, value))
        (folder / name).write_bytes(bad if draw.random() < 0.7 else damaged(draw, as_json(value)))
        refused_or_read(lambda: loaded(folder))
        (folder / name).write_bytes(as_json(value))


def test_links_that_leave_the_folder_are_refused(fenced, model):
    secret = fenced / "elsewhere.safetensors"
    shutil.copyfile(model[0] / "model.safetensors", secret)
    for name in ("model.safetensors", "config.json"):
        folder = fenced / f"hf-{name}"
        shutil.copytree(model[0], folder)
        target = secret if name == "model.safetensors" else model[0] / name
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        with pytest.raises(InputError, match=f"{name}: is a link out of the folder"):
            loaded(folder)


def test_links_of_the_hubs_cache_are_followed(fenced, model):
    snapshot, blobs = fenced / "models--a--b/snapshots/0123", fenced / "models--a--b/blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for file in model[0].iterdir():
        shutil.copyfile(file, blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    assert loaded(snapshot)[0] == CONFIG


def test_a_name_with_a_path_in_it_is_refused(fenced, model):
    folder = fenced / "hf"
    shutil.copytree(model[1], folder)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_bytes())
    for name in ("../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", ""):
        first = next(iter(index["weight_map"]))
        index["weight_map"][first] = name
        file.write_text(json.dumps(index))
        with pytest.raises(InputError):
            loaded(folder)


def keys(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "configs/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("seed", range(0, 500, EACH))
def test_overrides_of_a_configuration(fenced, quickstart, seed):
    """A key of any value, as a command line sets it, or a recipe of one's own."""
    names = sorted(keys(quickstart))
    for case in range(seed, seed + EACH):
        draw = random.Random(case)
        config = quickstart.copy_and_resolve_references()
        for _ in range(draw.randint(1, 3)):
            key, value = draw.choice(names), draw.choice(NASTY)
            try:
                config.update_from_flattened_dict({key: value})
            except (TypeError, ValueError, KeyError, OverflowError):
                pass  # a recipe or a command line is told, before any of ours sees it
        found = refused_or_read(lambda: recipe.check(config) or True)  # noqa: B023
        if found:
            refused_or_read(lambda: recipe.claim(config, fenced / str(case)))  # noqa: B023
            for name in config.stages:
                refused_or_read(lambda: recipe.optimizer(name, config[name], 10))  # noqa: B023
