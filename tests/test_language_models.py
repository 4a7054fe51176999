"""A name finds its model, another is refused; a fingerprint says whether it is still the same."""

import re

import jax
import jax.numpy as jnp
import pytest
from speakers import checkpoint, run, spoken

from jaxdpo import InputError, sharding, synthetic
from jaxdpo.fingerprint import identity
from jaxdpo.language_models import check_same_vocabulary, language_model


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("models") / "policy", seed=1)


@pytest.fixture(scope="module")
def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def test_models_that_cannot_be_loaded_are_named(name, one_device, tmp_path):
    run(tmp_path / "r", {1: 0.1})
    for wrong, said in (
        ("no:where", "no: no run there"),
        ("nowhere", "nowhere: no such folder, and not a hub name"),
        (f"{tmp_path}/r", "is a run; name a stage of it, as in .*/r:dpo"),
        (f"{tmp_path}/r:sft", "no checkpoints of a stage 'sft'"),
        (f"{tmp_path}/r:dpo:bset", "r: which='bset' is unknown; last or best"),
    ):
        with pytest.raises(InputError, match=said):
            language_model(wrong, one_device)
    with pytest.raises(InputError, match="policy: a CPU does not decode in float16"):
        language_model(name, one_device, dtype="float16")
    with pytest.raises(InputError, match="dtype='float8'"):
        language_model(name, one_device, dtype="float8")


def test_models_of_other_words_do_not_go_together(name, one_device, tmp_path):
    words = synthetic.tokenizer()
    words.add_tokens([" more"])
    other = checkpoint(tmp_path / "other", seed=3, tokenizer=words)
    expected = f"{re.escape(name)} and {re.escape(other)}: their tokenizers differ in 1 entries"
    with pytest.raises(InputError, match=expected):
        check_same_vocabulary([language_model(each, one_device) for each in (name, other)])
    ends = checkpoint(tmp_path / "ends", seed=3)
    for file in (tmp_path / "ends").glob("*config.json"):
        file.write_text(file.read_text().replace('"eos_token_id": 0', '"eos_token_id": [0, 5]'))
    with pytest.raises(InputError, match=r"end a text with different tokens, \[0\] and \[0, 5\]"):
        check_same_vocabulary([language_model(each, one_device) for each in (name, ends)])
    (tmp_path / "ends/generation_config.json").unlink()
    config = tmp_path / "ends/config.json"
    config.write_text(config.read_text().replace('"eos_token_id": [0, 5]', '"eos_token_id": null'))
    with pytest.raises(InputError, match="ends: neither .* has an eos_token_id"):
        language_model(ends, one_device)
    words.add_tokens([f" more{i}" for i in range(40)])
    words.save(str(tmp_path / "other/tokenizer.json"))
    with pytest.raises(InputError, match="has ids up to 332, .* holds 320"):
        language_model(other, one_device)


def test_the_models_of_bfloat16_are_of_bfloat16(name, one_device):
    half = language_model(name, one_device, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.lm.params)} == {"bfloat16"}
    assert half.identity["weights"] != language_model(name, one_device).identity["weights"]


CHANGES = {
    "sign": lambda leaf: -leaf,
    "rows": lambda leaf: leaf[::-1],
    "shape": lambda leaf: leaf.T,
    "dtype": lambda leaf: jax.lax.bitcast_convert_type(leaf, jnp.int32),
    "last bit": lambda leaf: leaf.at[3, 2].set(jnp.nextafter(leaf[3, 2], jnp.inf)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_fingerprint_sees_every_change(change):
    params = spoken(1)
    before = identity(params)
    params["embedding"] = change(params["embedding"])
    assert identity(params) != before


def test_a_fingerprint_is_the_same_on_any_mesh(name, one_device):
    here = language_model(name, one_device)
    for sizes in (dict(tensor=4), dict(fsdp=2, tensor=2)):
        there = language_model(name, sharding.make_mesh(**sizes))
        assert there.identity == here.identity


def test_weights_of_bfloat16_have_a_fingerprint_too():
    one = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.zeros(())}
    assert identity(one) == identity({"b": one["b"] * 2, "a": one["a"]})
