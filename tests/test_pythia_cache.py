"""The cached step: what it computes, and that no cache moves while it does."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_cases import Case, config, logits_after, params

from jaxdpo import pythia
from jaxdpo.decoding import LM, Beams, Constraints, Samples, loop
from jaxdpo.pythia_cache import CachedPythia, decoding_params
from jaxdpo.sharding import make_mesh

CASE = Case(2, 97, (3,), 2.0, 3, 8, 1.0, False)
MODEL = CachedPythia(config(97))


def padded(prompts, width):
    rows = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(rows), jnp.array([len(p) for p in prompts], jnp.int32)


def random_walk(steps, *, model=MODEL, compact_at=None, width=12, beams=3):
    """Prefill, then random tokens and parents: (logits, the texts they follow) of each step."""
    rng = np.random.default_rng(0)
    rows, lengths = padded(CASE.prompts, width)
    room = steps * beams
    logits, pool = jax.jit(partial(model.prefill, num_beams=beams, room=room))(
        params(CASE), rows, lengths
    )
    yield logits[:, None], [[[]]] * len(rows)
    texts = [[[] for _ in range(beams)] for _ in CASE.prompts]
    extend, reorder = jax.jit(model.extend), jax.jit(model.reorder)
    for step in range(steps):
        if step == compact_at:
            alive = int(model.num_nodes(pool).max())
            room = (steps - step) * beams
            everything = jnp.arange(len(rows))
            pool = model.compact(pool, everything, num_nodes=alive, room=room)
            assert pool.visible.shape[-1] == alive + room
        tokens = rng.integers(0, 97, (len(rows), beams))
        logits, pool = extend(params(CASE), pool, jnp.asarray(tokens), room=room)
        room -= beams
        texts = [
            [text + [int(token)] for text, token in zip(*each, strict=True)]
            for each in zip(texts, tokens, strict=True)
        ]
        yield logits, texts
        parents = rng.integers(0, beams, (len(rows), beams))
        pool = reorder(pool, jnp.asarray(parents))
        texts = [[own[p] for p in parent] for own, parent in zip(texts, parents, strict=True)]


def greatest_error(walk):
    errors = []
    for logits, texts in walk:
        for prompt, mine, own in zip(CASE.prompts, logits, texts, strict=True):
            expected = logits_after(CASE, prompt)(own)
            errors.append(np.abs(np.asarray(mine) - expected).max() / np.abs(expected).max())
    return max(errors)


@pytest.mark.parametrize("compact_at", (None, 3))
def test_cached_logits_are_those_of_whole_rows(compact_at):
    # Float32 sums in another order; no text is another's by chance, so a wrong ancestor shows.
    assert greatest_error(random_walk(6, compact_at=compact_at)) < 1e-5


def unmoved(self, pool, parents):
    return pool


def everything_visible(self, pool, parents):
    return pool._replace(visible=jnp.ones_like(pool.visible))


@pytest.mark.parametrize("reorder", (unmoved, everything_visible))
def test_wrong_ancestors_fail_the_comparison(reorder, monkeypatch):
    monkeypatch.setattr(CachedPythia, "reorder", reorder)
    assert greatest_error(random_walk(6)) > 1e-3


def test_wrong_positions_fail_the_comparison(monkeypatch):
    right = pythia.rotary_angles
    wrong = lambda positions, width, base: right(0 * positions, width, base)
    monkeypatch.setattr("jaxdpo.pythia_cache.rotary_angles", wrong)
    assert greatest_error(random_walk(2)) > 1e-3


def test_padding_of_a_prompt_changes_nothing():
    near = [np.asarray(logits) for logits, _ in random_walk(3)]
    far = [np.asarray(logits) for logits, _ in random_walk(3, width=24)]
    for mine, other in zip(near, far, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_the_head_in_float32():
    half = CachedPythia(dataclasses.replace(MODEL.config, dtype="bfloat16"))
    steps = zip(random_walk(4, model=half), random_walk(4), strict=True)
    for (logits, _), (exact, _) in steps:
        assert logits.dtype == jnp.float32
        assert (logits != logits.astype(jnp.bfloat16)).mean() > 0.9  # no logit was rounded
        error = np.abs(np.asarray(logits - exact)).max() / np.abs(np.asarray(exact)).max()
        assert error < 0.05  # eight bits through two layers


def test_decoding_params_unstack_cast_and_reshard():
    stacked = pythia.stack_layers(params(CASE))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    half = {"scan_layers": True, "dtype": "bfloat16"}
    scanned = CachedPythia(config(97)).config.__class__(**vars(config(96)) | half)
    cut = jax.tree.map(lambda leaf: leaf[:96] if leaf.shape[:1] == (97,) else leaf, stacked)
    model, mine = decoding_params(scanned, cut, mesh)
    assert not model.config.scan_layers and model.config.param_dtype == "bfloat16"
    for leaf in jax.tree.leaves(mine):
        assert leaf.dtype == jnp.bfloat16
        assert "fsdp" not in str(leaf.sharding.spec)
    up = mine["layers_1"]["up"]["kernel"]
    assert up.addressable_shards[0].data.shape == (32, 64 // 2)
    np.testing.assert_array_equal(up, params(CASE)["layers_1"]["up"]["kernel"].astype("bfloat16"))


# --- the compiled loop -------------------------------------------------------------------


def compiled_segment(rule, batch, model=MODEL, steps=8):
    scorer, constraints = LM(model, params(CASE)), Constraints(16, (3,))
    rows, lengths = padded((CASE.prompts * 3)[:batch], 24)
    keys = jax.random.split(jax.random.key(0), batch)
    state = loop.start(
        scorer,
        rule,
        constraints,
        ((rows, lengths),),
        keys,
        jnp.ones(batch, bool),
        mesh=None,
        room=steps * rule.width,
        capacity=16,
    )
    return state, loop.segment.lower(
        scorer, rule, constraints, 1, 9, state, mesh=None, steps=steps
    ).compile()


def moved_caches(rule, batch, model=MODEL):
    """The instructions of the compiled loop that make a whole new cache.

    What may: the loop itself, and an update in place.
    """
    state, compiled = compiled_segment(rule, batch, model)
    heads, width, nodes = state.caches[0].keys[0].shape
    assert len({heads, width, nodes}) == 3
    shapes = {f"{a},{b},{c}" for a, b, c in ((heads, width, nodes), (heads, nodes, width))}
    shapes |= {f"{batch},{heads // batch},{s.split(',', 1)[1]}" for s in shapes}
    moved = []
    for line in compiled.as_text().splitlines():
        made = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = f32\[([\d,]+)\]\S* ([\w\-]+)\(", line)
        if not made or made[2] not in shapes:
            continue
        name, operation = made[1], made[3]
        in_place = "dynamic-update-slice" in name or operation == "dynamic-update-slice"
        passed = operation in ("parameter", "get-tuple-element", "bitcast")
        if not in_place and not passed:
            moved.append(line.strip()[:120])
    return moved


@pytest.mark.parametrize(
    "rule, batch",
    ((Beams(5), 3), (Beams(5), 1), (Beams(1), 1), (Beams(20), 3), (Samples(4), 3), (Samples(), 1)),
    ids=str,
)
def test_no_cache_is_copied_in_the_compiled_loop(rule, batch):
    assert moved_caches(rule, batch) == []


class Gathering(CachedPythia):
    """The usual design: what the beams stored is gathered anew at every step."""

    def reorder(self, pool, parents):
        nodes = (parents[0, 0] + jnp.arange(pool.values[0].shape[1])) % 7
        values = tuple(jnp.take(v, nodes, axis=1) for v in pool.values)
        return super().reorder(pool, parents)._replace(values=values)


def test_a_gathered_cache_is_noticed():
    assert moved_caches(Beams(5), 3, Gathering(config(97)))
