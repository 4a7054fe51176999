"""The numbers of the reference lie with their tokens whatever the rows; computed once, whatever
stops it; of anything else, or spoilt, they are refused."""

import errno
import json
import os
import re
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
from jaxdpo.reference import check, drawn, kept, reference_token_logps
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
def test_numbers_come_back_to_their_place_from_any_rows(rows):
    found = reference_token_logps(numbered, Batches(STORE, **rows))
    np.testing.assert_array_equal(found, EXPECTED)
    assert found.dtype == np.float32


@pytest.mark.parametrize("order", [dict(epochs=2), dict(seed=4)])
def test_another_order_than_the_files_is_refused(tmp_path, order):
    """An example twice in a batch would run over into the next; a file says how many are done."""
    batches = in_order(8, row_length=48, **order)
    for computed in (
        lambda: reference_token_logps(numbered, batches),
        lambda: kept(tmp_path / "x.npy", MADE_FROM, numbered, batches),
    ):
        with pytest.raises(ValueError, match="every example of the store once, in its order"):
            computed()


def test_one_batch_is_under_way_while_another_is_fetched():
    """The next one is dispatched before the numbers of this one are waited for."""
    events = []

    class Result:
        def __init__(self, batch):
            self.found, self.first = numbered(batch), int(batch.examples.flat[0])
            events.append(("dispatched", self.first))

        def __array__(self, dtype=None, copy=None):
            events.append(("fetched", self.first))
            return self.found

    found = reference_token_logps(Result, in_order(9))
    np.testing.assert_array_equal(found, EXPECTED)
    done = [what for what, _ in events]
    assert done == ["dispatched", "dispatched", "fetched", "dispatched", "fetched", "fetched"]


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
    assert sorted({*sum(calls, [])}) == list(range(23))
    assert len(calls) <= 8 + len(stops)  # again only what was under way


def test_gone_on_with_in_batches_of_another_size(tmp_path):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "x.npy", MADE_FROM, counted(calls, 5), in_order())  # 12 examples
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
    assert json.loads((tmp_path / "x.json").read_text())["examples"] == 12
    calls = []
    values = kept(tmp_path / "x.npy", MADE_FROM, counted(calls), in_order())
    np.testing.assert_array_equal(values, EXPECTED)
    assert sum(calls, []) == list(range(12, 23))


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


def saying(**changes):
    """Spoil the manifest: entries that are changed, or left out (None)."""

    def spoil(file):
        beside = file.with_suffix(".json")
        record = json.loads(beside.read_text()) | changes
        record = {key: value for key, value in record.items() if value is not None}
        beside.write_text(json.dumps(record))

    return spoil


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
    "too many": (saying(examples=24), "x.npy: x.json is spoilt: it says that 24 of 23 examples"),
    "below none": (saying(examples=-1), "x.npy: x.json is spoilt: it says that -1 of 23"),
    "no number": (saying(examples=None), "x.npy: x.json is spoilt: it says that None of 23"),
    "a fraction": (saying(examples=4.5), "x.npy: x.json is spoilt: it says that 4.5 of 23"),
    "no checksum": (saying(checksum=None), "x.npy: its bytes have changed"),
    "an older one": (saying(manifest=None), "x.npy: x.json is of an older version"),
}


@pytest.mark.parametrize("state", ["whole", "half"])
@pytest.mark.parametrize("spoil, named", SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_file_is_refused_by_name(request, state, spoil, named):
    file = request.getfixturevalue(state)
    beside = file.with_name("y.npy"), file.with_name("y.json")
    for other in beside:  # what another data set has is not to be lost
        other.write_text("whole")
    spoil(file)
    with pytest.raises(InputError, match=named) as caught:
        kept(file, MADE_FROM, numbered, in_order())
    assert "\n" not in str(caught.value)
    found = re.search(r"delete (x\.npy)(?: and (x\.json) there)? to have", str(caught.value))
    for name in filter(None, found.groups()):  # as it says
        file.with_name(name).unlink(missing_ok=True)
    np.testing.assert_array_equal(kept(file, MADE_FROM, numbered, in_order()), EXPECTED)
    assert all(other.read_text() == "whole" for other in beside)


def test_a_full_disk_says_so_before_the_pass(tmp_path, monkeypatch):
    def full(descriptor, start, size):
        assert (start, size) == (0, os.fstat(descriptor).st_size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full, raising=False)
        with pytest.raises(
            InputError, match="x.npy: 0.0 MiB .* cannot .* [(]No space left"
        ) as said:
            kept(tmp_path / "x.npy", MADE_FROM, lambda _: pytest.fail("a pass"), in_order())
    assert "\n" not in str(said.value)
    np.testing.assert_array_equal(
        kept(tmp_path / "x.npy", MADE_FROM, numbered, in_order()), EXPECTED
    )


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "reference").write_text("")
    with pytest.raises(InputError, match="reference/x.npy: .* cannot be written there [(]"):
        kept(tmp_path / "reference/x.npy", MADE_FROM, numbered, in_order())


def test_a_number_that_is_not_finite_is_refused_each_time(tmp_path):
    compute = lambda batch: np.where(batch.examples[:, :1] == 7, np.nan, numbered(batch))
    for _ in range(2):
        with pytest.raises(InputError, match="x.npy: some log-probabilities are not finite"):
            kept(tmp_path / "x.npy", MADE_FROM, compute, in_order())


CPU = dict(dtype="float32", platform="cpu")


def test_the_check_measures_rounding_and_stops_at_more(params, flat):
    compute = partial(logps_of, params)
    batches = Batches(STORE, batch_size=8, seed=1, row_length=48, reference=flat)
    batch = drawn(batches, seed=0)
    assert 0 < check(compute, batch, **CPU) < 1e-5
    batches.reference = np.roll(flat, 1)
    with pytest.raises(InputError, match="off by .* nats a token .* float32 allows 0.001"):
        check(compute, drawn(batches, seed=0), **CPU)
    batches.reference = flat + np.float32(0.05)
    with pytest.raises(InputError, match="off by 0.05 nats a token"):
        check(compute, drawn(batches, seed=0), **CPU)
    # An accelerator may multiply float32 in fewer bits.
    assert check(compute, drawn(batches, seed=0), dtype="float32", platform="tpu") > 0.04
    batches.reference = np.full_like(flat, np.nan)
    with pytest.raises(InputError, match="off by nan"):
        check(compute, drawn(batches, seed=0), **CPU)


def test_what_is_checked_fits_what_a_step_fits(flat):
    """As many rows as one of the micro-batches has, some of them with numbers, also at the end."""
    for layout in ("shared", "separate"):  # the last batch has 3 examples
        batches = Batches(STORE, batch_size=20, divisor=4, layout=layout, reference=flat)
        for seed in range(6):
            whole, part = (drawn(batches, seed=seed, micro_batches=n) for n in (1, 4))
            assert [len(x) * 4 for x in part] == [len(x) for x in whole]
            assert (part.slots >= 0).any() and (part.examples[0] >= 0).any()
            assert check(numbered, part._replace(reference_token_logps=numbered(part)), **CPU) == 0
    firsts = {drawn(batches, seed=(0, step)).examples[0, 0].item() for step in range(9)}
    assert len(firsts) > 1  # another batch at another step


def test_one_number_for_every_scored_token(flat):
    assert flat.shape == (STORE.scored_offsets[-1],) and flat.dtype == np.float32
    assert len(np.unique(flat)) > 0.9 * len(flat)  # so that a swap would show
