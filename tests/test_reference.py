"""The numbers of the reference lie with their tokens whatever the rows; others are refused."""

from functools import partial

import jax
import numpy as np
import pytest
from examples import TINY, ragged_lengths, token_store

from jaxdpo import InputError, pythia
from jaxdpo.batching import Batches
from jaxdpo.reference import kept, reference_token_logps
from jaxdpo.step import token_logps

STORE = token_store(ragged_lengths(7, seed=3))
logps_of = jax.jit(partial(token_logps, TINY))


@pytest.fixture(scope="module")
def params():
    scaled = lambda x: 3.0 * x if x.ndim > 1 else x
    return jax.tree.map(scaled, pythia.init_params(TINY, jax.random.key(0)))


@pytest.fixture(scope="module")
def flat(params):
    return reference_token_logps(partial(logps_of, params), STORE, batch_size=3, num_buckets=2)


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("pairs_per_row", [1, 2])
def test_training_batches_find_the_policys_own_numbers(params, flat, layout, pairs_per_row):
    """Policy = reference: token by token the two agree in any layout, packing and order."""
    batches = Batches(
        STORE, batch_size=4, seed=1, pairs_per_row=pairs_per_row, layout=layout, reference=flat
    )
    for step in range(len(batches)):
        batch = batches[step]
        scored = batch.slots >= 0
        np.testing.assert_allclose(
            np.asarray(logps_of(params, batch))[scored],
            batch.reference_token_logps[scored],
            atol=1e-5,  # sums over other row lengths round differently
        )


def test_one_number_for_every_scored_token(flat):
    assert flat.shape == (STORE.scored_offsets[-1],) and flat.dtype == np.float32
    assert len(np.unique(flat)) > 0.9 * len(flat)  # so that a swap would show


def test_computed_once_then_read(tmp_path):
    calls = []
    compute = lambda: calls.append(1) or np.arange(3, dtype=np.float32)
    for _ in range(2):
        values = kept(tmp_path / "a/train.npy", {"weights": "sft step 9"}, compute)
        np.testing.assert_array_equal(values, [0, 1, 2])
    assert len(calls) == 1 and isinstance(values, np.memmap)


def test_values_of_something_else_are_refused_by_name(tmp_path):
    compute = lambda: np.zeros(3, np.float32)
    kept(tmp_path / "train.npy", {"weights": "sft step 9", "tokens": "k"}, compute)
    with pytest.raises(InputError, match="another weights;"):
        kept(tmp_path / "train.npy", {"weights": "sft step 8", "tokens": "k"}, compute)
    with pytest.raises(InputError, match="another dtype, tokens;"):
        kept(
            tmp_path / "train.npy",
            {"weights": "sft step 9", "tokens": "j", "dtype": "bfloat16"},
            compute,
        )


def test_an_interrupted_write_counts_for_nothing(tmp_path):
    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "train.npy", {}, killed)
    (tmp_path / "train.npy.writing").write_bytes(b"half")
    values = kept(tmp_path / "train.npy", {}, lambda: np.ones(2, np.float32))
    np.testing.assert_array_equal(values, 1)
