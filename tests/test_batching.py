"""Rows against a slow twin that reads the rules off token by token; order as a pure function."""

import numpy as np
import pytest
from examples import ragged_lengths, token_store

from jaxdpo import InputError
from jaxdpo.batching import Batches, RowShape, epoch_order, prefetch, row_shapes, rows


def test_a_row_worked_out_by_hand():
    store = token_store([[3, 2, 4]])
    prompt, chosen, rejected = (part.tolist() for part in store[0])
    batch = rows(store, [[0]], RowShape(9, 7))
    # The last token of a response (its EOS) predicts nothing: it is a target only.
    assert batch.tokens[0].tolist() == prompt + chosen[:1] + rejected[:3] + [0, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 3, 4, 5, 0, 0]
    assert batch.segment_ids[0].tolist() == [1] * 7 + [0, 0]
    assert batch.branch_ids[0].tolist() == [0, 0, 0, 1, 2, 2, 2, 0, 0]
    # Position 2, the prompt's last, predicts the first token of both responses.
    assert batch.scored_positions[0].tolist() == [2, 3, 2, 4, 5, 6, 0]
    assert batch.targets[0].tolist() == chosen + rejected + [0]
    assert batch.slots[0].tolist() == [0, 0, 1, 1, 1, 1, -1]
    assert batch.examples.tolist() == [[0]]


def test_the_separate_twin_by_hand():
    store = token_store([[3, 2, 4]])
    prompt, chosen, rejected = (part.tolist() for part in store[0])
    batch = rows(store, [[0]], RowShape(7, 5), layout="separate")
    assert batch.tokens.tolist() == [
        prompt + chosen[:1] + [0, 0, 0],
        prompt + rejected[:3] + [0],
    ]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 0, 0], [0, 1, 2, 3, 4, 5, 0]]
    assert batch.scored_positions.tolist() == [[2, 3, 0, 0, 0], [2, 3, 4, 5, 0]]
    assert batch.targets.tolist() == [chosen + [0, 0, 0], rejected + [0]]
    assert batch.slots.tolist() == [[0, 0, -1, -1, -1], [1, 1, 1, 1, -1]]


def scored_by_the_rules(batch):
    """{(example, branch): [(prefix, target)]} read off a batch, one scored token at a time.

    The prefix of a scored position is what attention lets it see, in the order of the row.
    """
    found = {}
    rows_per_group = len(batch.tokens) // len(batch.examples)
    for b, s in np.argwhere(batch.slots >= 0):
        pair, branch = divmod(int(batch.slots[b, s]), 2)
        query = batch.scored_positions[b, s]
        # A prompt's last position serves both branches, and sees the prompt alone.
        sees = [
            k
            for k in range(query + 1)
            if batch.segment_ids[b, k] == batch.segment_ids[b, query] == pair + 1
            and batch.branch_ids[b, k] in (0, batch.branch_ids[b, query])
        ]
        assert batch.positions[b, sees].tolist() == list(range(len(sees)))
        example = int(batch.examples[b // rows_per_group, pair])
        prefix = batch.tokens[b, sees].tolist()
        found.setdefault((example, branch), []).append((prefix, int(batch.targets[b, s])))
    return found


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("per_row", [1, 2, 3])
def test_every_response_token_is_scored_once_from_exactly_its_prefix(layout, per_row):
    store = token_store(ragged_lengths(12, seed=1))
    groups = np.arange(12).reshape(-1, per_row)
    shape = row_shapes(store, per_row, 1, layout)[-1]
    found = scored_by_the_rules(rows(store, groups, shape, layout=layout))
    expected = {}
    for i in range(len(store)):
        prompt, *responses = (part.tolist() for part in store[i])
        for branch, response in enumerate(responses):
            sequence = prompt + response
            expected[i, branch] = [
                (sequence[:at], sequence[at]) for at in range(len(prompt), len(sequence))
            ]
    assert found == expected


def test_sft_rows_have_one_branch_in_either_layout():
    store = token_store([[3, 2, 0], [1, 4, 0]])
    shape = RowShape(6, 4)
    for shared, separate in zip(
        rows(store, [[0], [1]], shape),
        rows(store, [[0], [1]], shape, layout="separate"),
        strict=True,
    ):
        np.testing.assert_array_equal(shared, separate)
    assert set(np.unique(rows(store, [[0], [1]], shape).branch_ids)) == {0, 1}


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_reference_values_lie_with_their_tokens(layout):
    """Let the reference of a token be a number made of its target: then they must agree."""
    store = token_store(ragged_lengths(6, seed=2))
    targets = np.concatenate([np.concatenate(store[i][1:]) for i in range(6)])
    batches = Batches(store, batch_size=6, pairs_per_row=2, layout=layout, reference=targets * 0.5)
    batch = batches[0]
    scored = batch.slots >= 0
    np.testing.assert_array_equal(batch.reference_token_logps[scored], batch.targets[scored] * 0.5)
    assert (batch.reference_token_logps[~scored] == 0).all()


@pytest.mark.parametrize("n, batch_size, epochs", [(10, 4, 1), (10, 4, 3), (8, 4, 2), (3, 8, 1)])
def test_every_example_exactly_once_an_epoch(n, batch_size, epochs):
    batches = Batches(token_store([[2, 1, 1]] * n), batch_size=batch_size, epochs=epochs, seed=3)
    seen = np.concatenate([batches.indices(step) for step in range(len(batches))])
    real = seen[seen >= 0]
    assert len(seen) - len(real) < batch_size  # fillers stand in the last batch only
    for epoch in range(epochs):
        assert sorted(real[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert epochs == 1 or real[:n].tolist() != real[n : 2 * n].tolist()


def test_order_is_a_function_of_seed_and_step_alone():
    store = token_store(ragged_lengths(20))
    make = lambda seed: Batches(store, batch_size=4, seed=seed, epochs=2)
    one, two = make(5), make(5)
    late = two[7]  # out of order, and from another object
    for a, b in zip(one[7], late, strict=True):
        np.testing.assert_array_equal(a, b)
    assert make(6).indices(0).tolist() != one.indices(0).tolist()
    np.testing.assert_array_equal(epoch_order(5, 1, 20), epoch_order.__wrapped__(5, 1, 20))
    streamed = list(prefetch(make(5), 3, 10))
    assert len(streamed) == 7
    for step, batch in enumerate(streamed, 3):
        np.testing.assert_array_equal(batch.tokens, one[step].tokens)


def test_evaluation_keeps_the_files_order():
    batches = Batches(token_store([[2, 1, 1]] * 5), batch_size=4)
    assert [batches.indices(step).tolist() for step in range(2)] == [[0, 1, 2, 3], [4, -1, -1, -1]]


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_processes_hold_the_rows_of_the_single_process(layout):
    store = token_store(ragged_lengths(16))
    make = lambda process: Batches(
        store, batch_size=8, pairs_per_row=2, seed=0, layout=layout, process=process
    )
    whole = make((0, 1))[1]
    parts = [make((rank, 4))[1] for rank in range(4)]
    for leaf, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        if leaf is not None:
            np.testing.assert_array_equal(leaf, np.concatenate(pieces))


def test_buckets_are_few_and_the_smallest_that_holds_is_taken():
    lengths = [[4, 2, 2]] * 8 + [[60, 20, 20]] * 8
    batches = Batches(token_store(lengths), batch_size=4, num_buckets=4)
    used = {batches[step].tokens.shape[1] for step in range(len(batches))}
    assert len(batches.shapes) <= 4 and len(used) == 2
    assert used == {batches.shapes[0].length, batches.shapes[-1].length}
    assert batches.shapes[-1].length == 112  # 60 + 19 + 19, rounded up to 16


def test_fillers_weigh_nothing():
    batch = Batches(token_store([[2, 3, 1]]), batch_size=4)[0]
    assert (batch.slots[1:] == -1).all() and (batch.segment_ids[1:] == 0).all()
    assert batch.examples[:, 0].tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(batch_size=6, pairs_per_row=4), "batch_size"),
        (dict(batch_size=0), "batch_size"),
        (dict(batch_size=6, process=(0, 4)), "batch_size"),
        (dict(batch_size=4, pairs_per_row=0), "pairs_per_row"),
        (dict(batch_size=4, num_buckets=0), "num_buckets"),
        (dict(batch_size=4, layout="both"), "layout"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(InputError, match=named):
        Batches(token_store([[2, 1, 1]] * 8), **options)


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="needs 6 positions"):
        rows(token_store([[3, 2, 3]]), [[0]], RowShape(5, 8))
