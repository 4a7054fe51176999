"""The model against transformers, against itself in other layouts, and its numbers."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxdpo import InputError, attention, convert, hf_layout, pythia, pythia_config
from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.sharding import batch_spec, make_mesh

GOLDEN = pathlib.Path(__file__).parents[2] / "shared/data/golden/golden.json"
SMALL = PythiaConfig(
    vocab_size=61, num_layers=2, num_heads=2, width=32, mlp_width=48, rotary_pct=0.5
)
LENGTH = 24
initial = jax.jit(pythia.init_params, static_argnums=0)

# Head width, rotary_pct, parallel_residual, epsilon: every pair of values of two of the
# last three occurs.
SHAPES = [
    (64, 0.25, True, 1e-5),
    (64, 1.0, False, 1e-2),
    (80, 0.25, False, 1e-5),
    (80, 1.0, True, 1e-2),
    (128, 0.25, True, 1e-2),
    (128, 1.0, False, 1e-5),
    (256, 0.25, False, 1e-2),
    (256, 1.0, True, 1e-5),
]


def torch_model(head_width, rotary_pct, parallel_residual, epsilon):
    """A random GPT-NeoX with queries and keys so large that attention is far from uniform.

    The embedding is small, as in trained models, so that the first epsilon counts.
    """
    width = 2 * head_width
    config = transformers.GPTNeoXConfig(
        vocab_size=96,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width + 16,
        rotary_pct=rotary_pct,
        layer_norm_eps=epsilon,
        use_parallel_residual=parallel_residual,
        attn_implementation="eager",
    )
    model = transformers.GPTNeoXForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(head_width)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        std = 0.3
        if name.endswith("query_key_value.weight"):
            std = 2 / math.sqrt(width)
        elif parameter.ndim == 2:
            embedding = "embed_in" in name
            std = 4 * math.sqrt(epsilon) if embedding else 1 / math.sqrt(parameter.shape[1])
        torch.nn.init.normal_(parameter, mean, std, generator=generator)
    return model


def relative_error(model, folder, **overrides):
    """The largest difference of logits over the largest logit; the model goes by disk."""
    model.save_pretrained(folder)
    mesh = make_mesh(devices=jax.devices()[:1])
    config, params = convert.load_hf(folder, mesh=mesh, **overrides)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, LENGTH))
    with torch.no_grad():
        output = model(torch.tensor(tokens), output_attentions=True)
    weights = torch.stack(output.attentions)[..., -1, :].double()
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean()
    assert entropy < 0.5 * math.log(LENGTH)
    expected = output.logits.numpy()
    return np.abs(logits(config, params, tokens) - expected).max() / np.abs(expected).max()


def logits(config, params, tokens, positions=None, segment_ids=None, branch_ids=None):
    tokens = jnp.asarray(tokens, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    branch_ids = jnp.zeros_like(tokens) if branch_ids is None else branch_ids
    rows = [jnp.asarray(x, jnp.int32) for x in (tokens, positions, segment_ids, branch_ids)]

    @jax.jit
    def forward(params, rows):
        hidden = pythia.hidden_states(config, params, *rows)
        return pythia.unembed(hidden, params["unembedding"])

    return np.asarray(forward(params, rows))


@pytest.fixture(scope="module")
def params():
    """Parameters of `SMALL` whose attention is not uniform, with biases and scales."""
    tree = initial(SMALL, jax.random.key(0))
    leaves, form = jax.tree.flatten(tree)
    random = np.random.default_rng(1)
    noise = [0.3 * random.standard_normal(leaf.shape, "float32") for leaf in leaves]
    return jax.tree.map(jnp.add, tree, jax.tree.unflatten(form, noise))


# --- transformers ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_logits_equal_transformers(shape, tmp_path):
    # Both sides are float32 and sum in different orders: some 1e-6 of the largest logit.
    assert relative_error(torch_model(*shape), tmp_path) < 1e-5


def split_qkv_in_blocks(monkeypatch):
    mutated = [
        (name, path, form.replace("(N 3 H)", "(3 N H)")) for name, path, form in hf_layout.TABLE
    ]
    monkeypatch.setattr(hf_layout, "TABLE", mutated)
    return {}


def gelu_by_tanh(monkeypatch):
    monkeypatch.setattr(pythia, "_gelu", lambda x: jax.nn.gelu(x, approximate=True))
    return {}


def rotate_neighbours(monkeypatch):
    def rotate(x, cos, sin):
        half = cos.shape[-1]
        order = np.arange(2 * half).reshape(half, 2).T.ravel()
        order = np.concatenate([order, np.arange(2 * half, x.shape[-1])])
        return original(x[..., order], cos, sin)[..., np.argsort(order)]

    original = pythia.rotate
    monkeypatch.setattr(pythia, "rotate", rotate)
    return {}


@pytest.mark.parametrize(
    "mutate",
    [
        split_qkv_in_blocks,
        gelu_by_tanh,
        rotate_neighbours,
        lambda _: {"rotary_pct": 1.0},
        lambda _: {"parallel_residual": False},
        lambda _: {"layer_norm_epsilon": 1e-6},
    ],
    ids=["qkv blocks", "tanh", "rotary pairs", "whole head", "sequential", "epsilon"],
)
def test_a_wrong_model_fails_the_comparison(mutate, monkeypatch, tmp_path):
    model = torch_model(64, 0.25, True, 1e-5)
    # At least ten times the tolerance of the test above.
    assert relative_error(model, tmp_path, **mutate(monkeypatch)) > 1e-4


# --- rows ------------------------------------------------------------------------------

PROMPT, CHOSEN, REJECTED = 5, 6, 3


def pairs(count):
    """Random pairs of (prompt, chosen, rejected) token ids."""
    random = np.random.default_rng(3)
    lengths = (PROMPT, CHOSEN, REJECTED)
    return [[random.integers(0, SMALL.vocab_size, n) for n in lengths] for _ in range(count)]


def shared_row(pairs, padding):
    """[prompt | chosen | rejected] of each pair in turn, then padding; four arrays [1, T]."""
    positions = np.r_[0 : PROMPT + CHOSEN, PROMPT : PROMPT + REJECTED]
    branches = np.repeat([0, 1, 2], [PROMPT, CHOSEN, REJECTED])
    columns = [np.full((4, padding), [[7], [0], [0], [0]])]
    for segment, pair in reversed(list(enumerate(pairs, 1))):
        tokens = np.concatenate(pair)
        columns.insert(0, [tokens, positions, np.full_like(tokens, segment), branches])
    return np.concatenate(columns, axis=1)[:, None]


def separate_rows(pairs):
    """A row for each [prompt | response]; the logits of each pair in the shared order."""
    rows = np.zeros((2 * len(pairs), PROMPT + CHOSEN), int)
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        rows[2 * i] = np.r_[prompt, chosen]
        rows[2 * i + 1, : PROMPT + REJECTED] = np.r_[prompt, rejected]
    return rows


@pytest.mark.parametrize(
    "count, padding", [(1, 0), (2, 0), (2, 4)], ids=["shared", "packed", "packed and padded"]
)
def test_a_shared_row_equals_separate_rows(count, padding, params):
    row = shared_row(pairs(count), padding)
    together = logits(SMALL, params, *row)[0]
    alone = logits(SMALL, params, separate_rows(pairs(count)))
    expected = np.concatenate(
        [
            np.concatenate([chosen, rejected[PROMPT : PROMPT + REJECTED]])
            for chosen, rejected in zip(alone[::2], alone[1::2], strict=True)
        ]
    )
    # Masked keys add exact zeros; only the order of the sums differs.
    np.testing.assert_allclose(together[: len(expected)], expected, rtol=0, atol=1e-5)
    assert np.isfinite(together).all()


@pytest.mark.parametrize("ignored", [1, 2, 3], ids=["positions", "segments", "branches"])
def test_every_array_of_a_packed_row_counts(ignored, params):
    row = shared_row(pairs(2), 0)
    expected = logits(SMALL, params, *row)
    row[ignored] = {1: np.arange(row.shape[-1]), 2: 1, 3: 0}[ignored]
    assert np.abs(logits(SMALL, params, *row) - expected).max() > 0.1


def test_the_mask_equals_three_loops():
    segments, branches = shared_row(pairs(2), 3)[2:, 0]
    length = len(segments)
    expected = np.zeros((length, length), bool)
    for q in range(length):
        for k in range(q + 1):
            if segments[k] == segments[q]:
                expected[q, k] = branches[k] == 0 or branches[k] == branches[q]
    mask = attention.attention_mask(jnp.asarray(segments)[None], jnp.asarray(branches)[None])
    np.testing.assert_array_equal(mask[0], expected)


def test_a_token_outside_the_vocabulary_is_not_clipped(params):
    assert np.isnan(logits(SMALL, params, [[1, SMALL.vocab_size]])[0, 1]).all()


# --- how it is carried out -------------------------------------------------------------


def loss(config, params):
    """A scalar that every parameter enters, and whose gradient is not constant."""
    row = jnp.asarray(shared_row(pairs(2), 2), jnp.int32)
    hidden = pythia.hidden_states(config, params, *row)
    return jnp.mean(jax.nn.logsumexp(pythia.unembed(hidden, params["unembedding"]), axis=-1))


@pytest.fixture(scope="module")
def plain_value_and_grad(params):
    return jax.jit(jax.value_and_grad(lambda params: loss(SMALL, params)))(params)


@pytest.mark.parametrize(
    "scan_layers, remat",
    [(True, "none"), (False, "full"), (True, "dots")],
    ids=["scan", "full", "scan and dots"],
)
def test_scan_and_remat_change_no_number(scan_layers, remat, params, plain_value_and_grad):
    config = dataclasses.replace(SMALL, scan_layers=scan_layers, remat=remat)
    params = pythia.stack_layers(params) if scan_layers else params
    value, grad = jax.jit(jax.value_and_grad(lambda params: loss(config, params)))(params)
    grad = pythia.unstack_layers(grad) if scan_layers else grad
    np.testing.assert_allclose(value, plain_value_and_grad[0], rtol=1e-6)
    # The compiler fuses, and so rounds, differently.
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    jax.tree.map(same, grad, plain_value_and_grad[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remat_stores_less_for_the_backward_pass(dtype, params):
    def stored(remat):
        config = dataclasses.replace(SMALL, remat=remat, dtype=dtype)
        pull_back = lambda params: jax.vjp(lambda params: loss(config, params), params)[1]
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pull_back, params)))

    assert stored("full") < stored("dots") < stored("none")


def test_gelu_keeps_its_tail_in_bfloat16():
    x = jnp.linspace(-4.0, 4.0, 101, dtype="bfloat16")
    expected = torch.nn.functional.gelu(torch.tensor(np.asarray(x, np.float32))).numpy()
    np.testing.assert_allclose(np.asarray(pythia._gelu(x), np.float32), expected, rtol=1e-2)


@pytest.mark.parametrize(
    "num_devices, param_dtype", [(1, "float32"), (8, "float32"), (8, "bfloat16")]
)
def test_gradients_of_weights_are_sums_in_float32(num_devices, param_dtype):
    """Of 512 positions on one device or on eight; rounded on the way, they are 1e-3 off."""
    config = dataclasses.replace(SMALL, dtype="bfloat16", param_dtype=param_dtype)
    layer = pythia._Linear(config, 1, (2, 4), jax.nn.initializers.normal(1.0))
    x, g = (
        jax.random.normal(jax.random.key(i), (8, 64, *shape), "bfloat16")
        for i, shape in enumerate([(16,), (2, 4)])
    )
    params = layer.init(jax.random.key(2), x)
    expected = {
        "kernel": np.einsum("bti,btnh->inh", *(np.asarray(y, np.float64) for y in (x, g))),
        "bias": np.asarray(g, np.float64).sum((0, 1)),
    }
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    x, g = jax.device_put((x, g), jax.NamedSharding(mesh, batch_spec))
    pull_back = lambda params, x, g: jax.vjp(layer.apply, params, x)[1](g)
    of_params, of_x = jax.jit(pull_back)(params, x, g)
    assert of_x.dtype == jnp.bfloat16  # what goes on to the layer before
    for name, value in of_params["params"].items():
        assert value.dtype == param_dtype
        rounded = 2**-8 if param_dtype == "bfloat16" else 0  # once, at the end
        atol = 1e-5 * np.abs(expected[name]).max()
        value = np.asarray(value, np.float32)
        np.testing.assert_allclose(value, expected[name], rtol=rounded, atol=atol)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_is_near(param_dtype, params):
    config = dataclasses.replace(SMALL, dtype="bfloat16", param_dtype=param_dtype)
    cast = jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)
    row = shared_row(pairs(1), 0)
    expected = logits(SMALL, params, *row)
    error = np.abs(logits(config, cast, *row) - expected).max() / np.abs(expected).max()
    # Eight bits of mantissa, some ten roundings deep; zero would mean float32.
    assert 1e-4 < error < 3e-2


def test_dtypes():
    config = dataclasses.replace(SMALL, dtype="bfloat16", param_dtype="float16")
    params = jax.eval_shape(lambda key: pythia.init_params(config, key), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float16")}
    row = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    forward = lambda params, *row: pythia.hidden_states(config, params, *row)
    hidden = jax.eval_shape(forward, params, row, row, row, row)
    assert hidden.dtype == jnp.bfloat16
    assert jax.eval_shape(pythia.unembed, hidden, params["unembedding"]).dtype == jnp.float32


def test_stacking_is_undone_by_unstacking(params):
    stacked = pythia.stack_layers(params)
    assert stacked["layers"]["qkv"]["kernel"].shape == (2, 32, 2, 3, 16)
    jax.tree.map(np.testing.assert_array_equal, pythia.unstack_layers(stacked), params)


# --- numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scan"])
def test_initial_scales(scan_layers):
    config = PythiaConfig(997, 3, 4, 64, 256, scan_layers=scan_layers)
    params = initial(config, jax.random.key(0))
    params = pythia.unstack_layers(params) if scan_layers else params
    layer = params["layers_2"]
    small, residual = math.sqrt(2 / (5 * 64)), 2 / (3 * math.sqrt(64))
    for leaf in (params["embedding"], params["unembedding"]):
        np.testing.assert_allclose(leaf.std(), small, rtol=0.02)
    for name, std in {"qkv": small, "up": small, "out": residual, "down": residual}.items():
        # The standard deviation of 4096 numbers is known to 1.1 percent (one sigma).
        np.testing.assert_allclose(layer[name]["kernel"].std(), std, rtol=0.05)
        assert not layer[name]["bias"].any()
    assert (layer["attention_norm"]["scale"] == 1).all()


@pytest.mark.parametrize("size", pythia_config._SIZES)
def test_parameter_counts_of_the_suite(size):
    if not GOLDEN.exists():
        pytest.skip("no shared/data/golden beside the checkout")
    golden = json.loads(GOLDEN.read_text())["param_counts"]
    config = PythiaConfig.from_name(f"pythia-{size}")
    embeddings = 2 * config.vocab_size * config.width
    assert pythia.num_params(config) == golden["total"][size]
    assert pythia.num_params(config) - embeddings == golden["non_embedding"][size]


def test_parameter_count_by_hand():
    # V=61 D=32 F=48 L=2: embeddings 2VD, final norm 2D; in a layer two norms 4D, qkv
    # 3D^2+3D, out D^2+D, up DF+F, down FD+D.
    layer = 4 * 32 + 3 * 32**2 + 3 * 32 + 32**2 + 32 + 32 * 48 + 48 + 48 * 32 + 32
    assert pythia.num_params(SMALL) == 2 * 61 * 32 + 2 * 32 + 2 * layer


# --- configurations --------------------------------------------------------------------

HUB = {  # as the hub's pythia-70m has it
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}


def test_config_json_of_the_hub_is_the_named_model():
    assert PythiaConfig.from_hf(HUB) == PythiaConfig.from_name("pythia-70m")


def test_config_json_goes_through_transformers():
    config = PythiaConfig(61, 3, 2, 32, 48, 0.5, 500.0, 1e-3, False, 128, "float16")
    theirs = json.loads(transformers.GPTNeoXConfig(**config.to_hf()).to_json_string())
    read = PythiaConfig.from_hf(theirs, param_dtype="float16")
    assert read == PythiaConfig.from_hf(config.to_hf(), param_dtype="float16") == config


@pytest.mark.parametrize(
    "change, named",
    [
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"hidden_dropout": 0.1}, "hidden_dropout=0.1"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type='yarn'"),
        ({"rope_parameters": {"factor": 2.0}}, "rope_parameters.factor=2.0"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rotary_pct=0.25 and rope_parameters.partial_rotary_factor=0.5 disagree",
        ),
        ({"rotary_emb_base": None}, "rotary_emb_base is missing"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"hidden_size": 500}, "width=500: must be a multiple of num_heads=8"),
        ({"vocab_size": 0}, "vocab_size=0: must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_json_that_is_not_implemented_is_refused(change, named):
    with pytest.raises(InputError) as error:
        PythiaConfig.from_hf(HUB | change)
    assert named in str(error.value)


def test_all_problems_of_a_config_json_stand_in_one_error():
    hf = {key: value for key, value in HUB.items() if key != "vocab_size"}
    with pytest.raises(InputError, match="hidden_act.*vocab_size is missing.*window=4"):
        PythiaConfig.from_hf(hf | {"hidden_act": "relu", "window": 4})


@pytest.mark.parametrize(
    "change, named",
    [
        ({"rotary_pct": 0.3}, "rotates 19 of 64"),
        ({"rotary_pct": 0.01}, "rotates 0 of 64"),
        ({"rotary_pct": 2.0}, "rotates 128 of 64"),
        ({"num_heads": 7}, "multiple of num_heads=7"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"dtype": "float8"}, "dtype='float8': must be one of float32, bfloat16"),
        ({"param_dtype": "int8"}, "param_dtype='int8'"),
        ({"remat": "some"}, "remat='some': must be one of none, dots, full"),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_a_configuration_that_cannot_be_is_refused(change, named):
    with pytest.raises(InputError) as error:
        PythiaConfig.from_name("pythia-70m", **change)
    assert named in str(error.value)


def test_an_unknown_field_is_refused():
    with pytest.raises(InputError, match="widht: no such field; they are vocab_size, num_"):
        PythiaConfig.from_name("pythia-70m", widht=8)


@pytest.mark.parametrize("name", ["pythia-3b", "70m", "pythia-70m-large"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(InputError, match="the known ones are pythia-14m"):
        PythiaConfig.from_name(name)
