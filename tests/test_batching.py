"""Rows against a slow twin that reads the rules off token by token; order as a pure function;
packing that changes nothing but the padding."""

import itertools

import numpy as np
import pytest
from examples import ragged_lengths, token_store

from jaxdpo import InputError, packing
from jaxdpo.batching import Batches, RowShape, prefetch, row_shape, rows


def test_a_row_worked_out_by_hand():
    store = token_store([[3, 2, 4]])
    prompt, chosen, rejected = (part.tolist() for part in store[0])
    batch = rows(store, [[0]], RowShape(1, 9, 7, 1))
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
    batch = rows(store, [[0]], RowShape(1, 7, 5, 1), layout="separate")
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
    shape = row_shape(store, groups, layout=layout)
    found = scored_by_the_rules(rows(store, groups, shape, layout=layout))
    assert found == prefixes(store)


def prefixes(store):
    """{(example, branch): [(prefix, target)]} of a data set."""
    expected = {}
    for i in range(len(store)):
        prompt, *responses = (part.tolist() for part in store[i])
        for branch, response in enumerate(responses):
            sequence = prompt + response
            expected[i, branch] = [
                (sequence[:at], sequence[at]) for at in range(len(prompt), len(sequence))
            ]
    return expected


@pytest.mark.parametrize("seed", range(6))
def test_any_packing_scores_every_token_once_from_exactly_its_prefix(seed):
    """In shapes that are few, over batches that hold the examples they held unpacked."""
    rng = np.random.default_rng(seed)
    store = token_store(ragged_lengths(int(rng.integers(20, 60)), seed=seed))
    batch_size, divisor = int(rng.integers(4, 17)), int(rng.integers(1, 4))
    options = dict(row_length=int(rng.integers(22, 90)), num_buckets=int(rng.integers(1, 5)))
    batches = Batches(store, batch_size=batch_size, seed=seed, divisor=divisor, **options)
    assert len(set(batches.shapes)) == len(batches.shapes) <= options["num_buckets"]
    assert batches.num_rows % divisor == 0
    found, positions, scored = {}, 0, 0
    for step in range(len(batches)):
        batch = batches[step]
        shape = RowShape(*batch.tokens.shape, batch.targets.shape[1], batch.examples.shape[1])
        assert shape in batches.shapes and shape.length % 16 == shape.scored % 16 == 0
        assert sorted(batch.examples[batch.examples >= 0]) == sorted(
            i for i in batches.indices(step) if i >= 0
        )
        found |= scored_by_the_rules(batch)
        positions, scored = positions + batch.tokens.size, scored + batch.targets.size
    assert found == prefixes(store)
    expected = store.lengths.sum() - 2 * len(store), positions, store.lengths[:, 1:].sum(), scored
    assert batches.padding == (*expected, len(batches.shapes))


def test_sft_rows_have_one_branch_in_either_layout():
    store = token_store([[3, 2, 0], [1, 4, 0]])
    shape = RowShape(2, 6, 4, 1)
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
    row_length = 40 if layout == "shared" else 0
    batches = Batches(
        store, batch_size=6, row_length=row_length, layout=layout, reference=targets * 0.5
    )
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
    make = lambda seed: Batches(store, batch_size=4, seed=seed, epochs=2, row_length=40)
    one, two = make(5), make(5)
    late = two[7]  # out of order, and from another object
    for a, b in zip(one[7], late, strict=True):
        np.testing.assert_array_equal(a, b)
    assert make(6).indices(0).tolist() != one.indices(0).tolist()
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
    targets = np.concatenate([np.concatenate(store[i][1:]) for i in range(16)])
    row_length = 30 if layout == "shared" else 0
    make = lambda parts: Batches(
        store,
        batch_size=8,
        row_length=row_length,
        divisor=4,
        seed=0,
        layout=layout,
        reference=targets * 0.5,
        parts=parts,
    )
    whole = make(((0,), 1))[1]
    assert whole.examples.shape[1] == (1 if layout == "separate" else 2)
    parts = [make(((rank,), 4))[1] for rank in range(4)]
    for leaf, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(leaf, np.concatenate(pieces))
    outer = make(((0, 3), 4))[1]  # of devices that do not lie side by side
    for leaf, first, _, _, last in zip(outer, *parts, strict=True):
        np.testing.assert_array_equal(leaf, np.concatenate([first, last]))
    for part in parts:
        wanted = np.where(part.slots >= 0, part.targets * 0.5, 0)
        np.testing.assert_array_equal(part.reference_token_logps, wanted)


def test_buckets_are_few_and_the_smallest_that_holds_is_taken():
    lengths = [[4, 2, 2]] * 8 + [[60, 20, 20]] * 8
    batches = Batches(token_store(lengths), batch_size=4, num_buckets=4)
    assert [shape.length for shape in batches.shapes] == [16, 112]  # 60 + 19 + 19, up to 16
    assert [batches[step].tokens.shape[1] for step in range(4)] == [16, 16, 112, 112]
    assert batches.span == 112 and batches.num_rows == 4


def test_a_shape_must_be_worth_its_compilation():
    lengths = [[100, 40, 40]] * 1000 + [[90, 40, 40]] * 4  # 4 of 1004 batches could be shorter
    assert len(Batches(token_store(lengths), batch_size=1, num_buckets=2).shapes) == 1


@pytest.mark.parametrize("seed", range(20))
def test_the_edges_are_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    lengths, scored = rng.integers(1, 9, 30) * 100, rng.integers(1, 400, 30)
    found = packing.bucket_edges(lengths, scored, 3)

    def work(edges):
        which = np.searchsorted(edges, lengths)
        return sum(edges[b] + scored[which == b].max() for b in which)

    occurring = np.unique(lengths)
    every = itertools.chain.from_iterable(
        itertools.combinations(occurring[:-1], k) for k in range(3)
    )
    assert work(found) <= 1.01 * min(work(np.array([*edges, occurring[-1]])) for edges in every)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_levelling_keeps_every_example_and_never_fills_a_row_further(rows):
    sizes = np.random.default_rng(rows).integers(1, 100, (40, 48, 2))
    places = packing.dealt(sizes, rows)
    fullest = lambda places: packing.loads(sizes, places, rows).max(1)
    level = packing.levelled(sizes, places, rows, packing.POSITIONS)
    before, after = fullest(places), fullest(level)
    assert (after <= before)[:, packing.POSITIONS].all()
    best = np.maximum(-(-sizes.sum(1) // rows), sizes.max(1))[:, packing.POSITIONS]
    assert (before[:, packing.POSITIONS] >= best).all()
    assert after[:, packing.POSITIONS].mean() < 1.05 * best.mean()
    limits = after[:, packing.POSITIONS] + 5
    scored = fullest(packing.levelled(sizes, level, rows, packing.SCORED, limits=limits))
    assert (scored[:, packing.SCORED] <= after[:, packing.SCORED]).all()
    assert rows == 1 or scored[:, packing.SCORED].mean() < 0.95 * after[:, packing.SCORED].mean()
    assert (scored[:, packing.POSITIONS] <= limits).all()


def like_tldr(rng, n):
    """Posts of 308 tokens +- 100, summaries of 35: what truncation leaves of TL;DR."""
    prompts = np.clip(rng.normal(308, 100, n), 40, 483)
    return np.column_stack([prompts, *np.clip(rng.normal(35, 9, (2, n)), 4, 49)]).astype(int)


def like_hh(rng, n):
    """Dialogues and answers with heavy tails, cut to 512 tokens."""
    means, tails = np.array([[107.0], [72.0], [54.0]]), np.array([[0.9], [1.0], [1.0]])
    drawn = rng.lognormal(np.log(means) - tails**2 / 2, tails, (3, n)).astype(int) + 1
    prompts = np.minimum(drawn[0], 256)
    return np.column_stack([prompts, *np.minimum(drawn[1:], 512 - prompts)])


@pytest.mark.parametrize("draw, positions, scored", [(like_tldr, 0.95, 0.8), (like_hh, 0.92, 0.65)])
@pytest.mark.parametrize("divisor", [1, 8])
def test_little_is_padding(draw, positions, scored, divisor):
    store = token_store(draw(np.random.default_rng(0), 6400))
    batches = Batches(store, batch_size=64, seed=0, row_length=2048, num_buckets=4, divisor=divisor)
    found = batches.padding
    assert found.positions / found.all_positions > positions, str(found)
    assert found.scored / found.all_scored > scored, str(found)


@pytest.mark.parametrize("pairs, divisor, rows", [(8, 1, 2), (16, 2, 4), (12, 4, 4), (6, 4, 4)])
def test_the_mean_row_is_no_longer_than_asked(pairs, divisor, rows):
    """Pairs of 378: eight are 1.5 rows of 2048, sixteen 3, twelve 2.2."""
    store = token_store([[310, 35, 35]] * 48)
    batches = Batches(store, batch_size=pairs, row_length=2048, divisor=divisor)
    assert batches.num_rows == rows and batches.shapes[-1].length <= 2048


def slowly_levelled(sizes, places, rows, axis, limit):
    """One batch, by the rule: each example in turn where the fuller of two rows falls most."""
    count, places = len(sizes), [*places, *range(rows)]
    sizes = [*sizes, *[np.zeros(2, int)] * rows]  # nothing, in every row
    load = lambda row: sum(size for size, at in zip(sizes, places, strict=True) if at == row)
    for one in range(count):
        best, swapped = 0, None
        for other in range(count + rows):
            ours, theirs = load(places[one]), load(places[other])
            moved = sizes[one] - sizes[other]
            fuller = np.maximum(ours - moved, theirs + moved)
            gain = max(ours[axis], theirs[axis]) - fuller[axis]
            if gain > best and (limit is None or fuller[1 - axis] <= limit):
                best, swapped = gain, other
        if swapped is not None:
            places[one], here = places[swapped], places[one]
            if swapped < count:
                places[swapped] = here
    return places[:count]


@pytest.mark.parametrize("axis, limits", [(0, None), (1, np.arange(3) * 10 + 200)])
def test_levelling_follows_the_rule_in_any_company(axis, limits):
    sizes = np.random.default_rng(axis).integers(1, 100, (3, 12, 2))
    places = packing.dealt(sizes, 3)
    level = packing.levelled(sizes, places, 3, axis, limits)
    for batch, limit in enumerate([None] * 3 if limits is None else limits):
        slow = slowly_levelled(sizes[batch], places[batch], 3, axis, limit)
        assert level[batch].tolist() == slow
    assert (level != places).any()


def test_fillers_weigh_nothing():
    batch = Batches(token_store([[2, 3, 1]]), batch_size=4)[0]
    assert (batch.slots[1:] == -1).all() and (batch.segment_ids[1:] == 0).all()
    assert batch.examples[:, 0].tolist() == [0, -1, -1, -1]


def test_a_last_batch_of_fillers_takes_the_rows_of_the_others():
    batches = Batches(token_store([[20, 5, 5]] * 33), batch_size=32, row_length=112)
    last = batches[1]
    assert last.examples.shape == batches[0].examples.shape == (8, 4)
    assert (last.examples >= 0).sum() == 1 and len(last.tokens) == 8


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(batch_size=0), "batch_size: 0 pairs cannot fill"),
        (dict(batch_size=6, parts=((0,), 4)), "batch_size: 6 .* multiple of 4 .*; give a multiple"),
        (dict(batch_size=6, divisor=4), "batch_size: 6 .* multiple of 4 .*; give a multiple"),
        (dict(batch_size=6, divisor=8, row_length=9), "batch_size: 6 .* of 8 .*; give at least"),
        (dict(batch_size=4, row_length=-1), "row_length: must be at least 0"),
        (dict(batch_size=4, row_length=8), "row_length: 8 is less than the 9 .* of line 6;"),
        (dict(batch_size=4, num_buckets=0), "num_buckets: must be at least 1"),
        (dict(batch_size=4, layout="both"), "layout"),
        (dict(batch_size=4, layout="separate", row_length=64), "row_length: 64 has no effect"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(InputError, match=named):
        Batches(token_store([[2, 1, 1]] * 5 + [[5, 3, 3]] + [[2, 1, 1]] * 2), **options)


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="needs 6 positions"):
        rows(token_store([[3, 2, 3]]), [[0]], RowShape(1, 5, 8, 1))
