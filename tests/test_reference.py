"""The numbers of the reference lie with their tokens whatever the rows; computed once, whatever
stops it; of anything else, or spoilt, they are refused."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from examples import TINY, ragged_lengths, token_store

from jaxdpo import InputError, pythia, reference
from jaxdpo.batching import Batches
from jaxdpo.reference import check, kept, reference_token_logps
from jaxdpo.step import token_logps

STORE = token_store(ragged_lengths(23, seed=3))
MADE_FROM = {"weights": "sft", "tokens": "k", "truncation": {"max_length": 9}, "dtype": "float32"}
logps_of = jax.jit(partial(token_logps, TINY))


@pytest.fixture(scope="module")
def params():
    scaled = lambda x: 3.0 * x if x.ndim > 1 else x
    return jax.tree.map(scaled, pythia.init_params(TINY, jax.random.key(0)))


def in_order(batch_size=3, **options):
    return Batches(STORE, batch_size=batch_size, **options)


@pytest.fixture(scope="module")
def flat(params):
    return reference_token_logps(partial(logps_of, params), in_order(row_length=22))


ROWS = {
    "a pair to a row": dict(batch_size=8),
    "separate rows": dict(batch_size=8, layout="separate"),
    "packed": dict(batch_size=8, row_length=48),
    "packed tighter": dict(batch_size=16, row_length=128, num_buckets=2),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_training_batches_find_the_policys_own_numbers(params, flat, rows):
    """Policy = reference: token by token the two agree in any layout, packing and order."""
    batches = Batches(STORE, seed=1, reference=flat, **rows)
    for step in range(len(batches)):
        batch = batches[step]
        scored = batch.slots >= 0
        np.testing.assert_allclose(
            np.asarray(logps_of(params, batch))[scored],
            batch.reference_token_logps[scored],
            atol=1e-5,  # sums over other row lengths round differently
        )


def numbered(batch):
    """What tells where it belongs instead of a log-probability: example, branch and target."""
    slots = np.maximum(batch.slots, 0)
    group = np.arange(len(slots))[:, None] * len(batch.examples) // len(slots)
    return -(batch.examples[group, slots // 2] * 1000.0 + slots % 2 * 100.0 + batch.targets)


EXPECTED = -np.concatenate(
    [
        np.concatenate([i * 1000.0 + STORE[i].chosen, i * 1000.0 + 100 + STORE[i].rejected])
        for i in range(len(STORE))
    ]
)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("seed", [None, 4])
def test_numbers_come_back_to_their_place_from_any_rows(rows, seed):
    found = reference_token_logps(numbered, Batches(STORE, seed=seed, **rows))
    np.testing.assert_array_equal(found, EXPECTED)
    assert found.dtype == np.float32


def counted(calls, stop_at=None):
    def compute(batch):
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(sorted(batch.examples[batch.examples >= 0].tolist()))
        return numbered(batch)

    return compute


def test_computed_once_then_read(tmp_path):
    calls, seen = [], []
    for _ in range(2):
        values = kept(
            tmp_path / "a/x.npy",
            MADE_FROM,
            counted(calls),
            in_order(),
            progress=lambda *now: seen.append(now),
        )
        np.testing.assert_array_equal(values, EXPECTED)
        assert isinstance(values, np.memmap) and not values.flags.writeable
    assert len(calls) == 8 and seen == [
        (0, 0),
        *((n, n) for n in (3, 6, 9, 12, 15, 18, 21, 23)),
        (23, 0),
    ]


@pytest.mark.parametrize("stops", [(0, 3, 7), (5,), (1, 2)])
def test_an_interrupted_pass_goes_on_where_it_was(tmp_path, stops):
    calls = []
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            kept(tmp_path / "x.npy", MADE_FROM, counted(calls, stop), in_order(row_length=40))
    values = kept(tmp_path / "x.npy", MADE_FROM, counted(calls), in_order(row_length=40))
    np.testing.assert_array_equal(values, EXPECTED)
    assert sum(calls, []) == list(range(23))  # none twice


def test_gone_on_with_in_batches_of_another_size(tmp_path):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "x.npy", MADE_FROM, counted(calls, 5), in_order())  # 15 examples
    values = kept(tmp_path / "x.npy", MADE_FROM, counted(calls), in_order(4))
    np.testing.assert_array_equal(values, EXPECTED)
    assert calls[5] == [12, 13, 14, 15]
    np.testing.assert_array_equal(
        kept(tmp_path / "x.npy", MADE_FROM, counted([], 0), in_order()), EXPECTED
    )


KILLED = """
import os, signal, sys
import test_reference as test
from jaxdpo import reference
reference.RECORD_SECONDS = 0.0
calls = []
def compute(batch):
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1)
    return test.numbered(batch)
reference.kept(sys.argv[1], test.MADE_FROM, compute, test.in_order())
"""


def test_a_killed_pass_goes_on_where_it_was(tmp_path):
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "x.npy")]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "x.json").read_text())["examples"] == 15
    calls = []
    values = kept(tmp_path / "x.npy", MADE_FROM, counted(calls), in_order())
    np.testing.assert_array_equal(values, EXPECTED)
    assert sum(calls, []) == list(range(15, 23))


@pytest.fixture
def whole(tmp_path):
    kept(tmp_path / "x.npy", MADE_FROM, numbered, in_order())
    return tmp_path / "x.npy"


@pytest.fixture
def half(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "x.npy", MADE_FROM, counted([], 5), in_order())
    return tmp_path / "x.npy"


@pytest.mark.parametrize("state", ["whole", "half"])
@pytest.mark.parametrize(
    "changes, named",
    [
        ({"weights": "another"}, "another weights;"),
        (
            {"truncation": {"max_length": 8}, "tokens": "l"},
            "another tokens, truncation.max_length;",
        ),
        ({"dtype": "bfloat16", "more": 1}, "another dtype, more;"),
    ],
)
def test_values_of_something_else_are_refused_by_name(request, state, changes, named):
    file = request.getfixturevalue(state)
    with pytest.raises(InputError, match=named) as caught:
        kept(file, MADE_FROM | changes, numbered, in_order())
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_values_of_an_older_version_are_refused(whole, monkeypatch):
    monkeypatch.setattr(reference, "VERSION", reference.VERSION + 1)
    with pytest.raises(InputError, match="another code;"):
        kept(whole, MADE_FROM, numbered, in_order())


def cut_short(file):
    os.truncate(file, file.stat().st_size - 4)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)


def other_array(file):
    with open(file, "wb") as stream:
        np.save(stream, np.zeros(3))


SPOILT = {
    "cut short": (cut_short, "x.npy: is missing or cut short"),
    "missing": (Path.unlink, "x.npy: is missing or cut short"),
    "empty": (lambda file: file.write_bytes(b""), "x.npy: is missing or cut short"),
    "a bit": (flip_a_bit, "x.npy: its bytes have changed"),
    "another array": (other_array, "x.npy: holds float64 .3., not float32"),
    "no manifest": (lambda file: file.with_suffix(".json").unlink(), "x.json, .* is missing"),
    "half a manifest": (lambda file: cut_short(file.with_suffix(".json")), "x.json: does not hold"),
}


@pytest.mark.parametrize("state", ["whole", "half"])
@pytest.mark.parametrize("spoil, named", SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_file_is_refused_by_name(request, state, spoil, named):
    file = request.getfixturevalue(state)
    spoil(file)
    with pytest.raises(InputError, match=named) as caught:
        kept(file, MADE_FROM, numbered, in_order())
    assert "\n" not in str(caught.value)


def test_a_number_that_is_not_finite_is_refused_each_time(tmp_path):
    compute = lambda batch: np.where(batch.examples[:, :1] == 7, np.nan, numbered(batch))
    for _ in range(2):
        with pytest.raises(InputError, match="x.npy: some log-probabilities are not finite"):
            kept(tmp_path / "x.npy", MADE_FROM, compute, in_order())


def test_the_check_measures_rounding_and_stops_at_more(params, flat):
    compute = partial(logps_of, params)
    batches = Batches(STORE, batch_size=8, seed=1, row_length=48, reference=flat)
    assert 0 < check(compute, batches, dtype="float32", seed=0) < 1e-5
    batches.reference = np.roll(flat, 1)
    with pytest.raises(InputError, match="off by .* nats a token .* where float32 allows 0.1"):
        check(compute, batches, dtype="float32", seed=0)
    batches.reference = np.full_like(flat, np.nan)
    with pytest.raises(InputError, match="off by nan"):
        check(compute, batches, dtype="float32", seed=0)


def test_one_number_for_every_scored_token(flat):
    assert flat.shape == (STORE.scored_offsets[-1],) and flat.dtype == np.float32
    assert len(np.unique(flat)) > 0.9 * len(flat)  # so that a swap would show
