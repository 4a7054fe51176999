"""Hugging Face folders: there and back bit for bit, and every fault named."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jaxdpo import InputError, convert, pythia
from jaxdpo.sharding import make_mesh

TOKENIZER = pathlib.Path(__file__).parents[2] / "shared/data/tokenizer/20B_tokenizer.json"
CONFIG = pythia.PythiaConfig(
    vocab_size=64, num_layers=2, num_heads=4, width=32, mlp_width=48, rotary_pct=0.5
)
ONE = {"devices": jax.devices()[:1]}
FIRST = "gpt_neox.layers.0."


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(lambda key: pythia.init_params(CONFIG, key), jax.random.key(0))
    random = np.random.default_rng(0)
    draw = lambda leaf: jax.numpy.asarray(random.standard_normal(leaf.shape, "float32"))
    return jax.tree.map(draw, shapes)


@pytest.fixture
def folder(params, tmp_path):
    convert.save_hf(tmp_path / "model", CONFIG, params)
    return tmp_path / "model"


def load(folder, **overrides):
    return convert.load_hf(folder, mesh=make_mesh(**ONE), **overrides)


def assert_equal(tree, other):
    def same(x, y):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)

    jax.tree.map(same, tree, other)


def rewrite(folder, change):
    """Change the tensors of a folder with one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- there and back --------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("mesh", [ONE, {"fsdp": 2, "tensor": 2}], ids=["one", "2x2x2"])
def test_parameters_come_back_bit_for_bit(mesh, scan_layers, params, folder):
    mesh = make_mesh(**mesh)
    config, loaded = convert.load_hf(folder, mesh=mesh, scan_layers=scan_layers)
    assert config == pythia.dataclasses.replace(CONFIG, scan_layers=scan_layers)
    assert_equal(loaded, pythia.stack_layers(params) if scan_layers else params)
    kernel = loaded["layers" if scan_layers else "layers_0"]["qkv"]["kernel"]
    assert kernel.size == (mesh.shape["fsdp"] * mesh.shape["tensor"]) * (
        kernel.addressable_shards[0].data.size
    )


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 20_000, 1], ids=["one", "some", "all"])
@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scan"])
def test_files_of_any_size_hold_the_same(scan_layers, max_shard_bytes, params, tmp_path):
    config = pythia.dataclasses.replace(CONFIG, scan_layers=scan_layers)
    tree = pythia.stack_layers(params) if scan_layers else params
    convert.save_hf(tmp_path / "m", config, tree, max_shard_bytes=max_shard_bytes)
    assert_equal(load(tmp_path / "m")[1], params)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(files) == {5 * 10**9: 1, 20_000: 6, 1: 28}[max_shard_bytes]
    if len(files) > 1:
        index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * pythia.num_params(CONFIG)
        assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"


def test_the_tensors_of_the_largest_file_fit_its_limit(params, tmp_path):
    convert.save_hf(tmp_path / "m", CONFIG, params, max_shard_bytes=20_000)
    for file in (tmp_path / "m").glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 20_000


def torch_folder(folder, dtype, **options):
    config = transformers.GPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        rotary_pct=0.5,
        eos_token_id=0,
    )
    model = transformers.GPTNeoXForCausalLM(config).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(i))
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "5KB"}], ids=["one", "sharded"])
def test_folders_of_transformers_come_back_bit_for_bit(dtype, options, tmp_path):
    model = torch_folder(tmp_path / "theirs", getattr(torch, dtype), **options)
    config, params = load(tmp_path / "theirs", param_dtype=dtype)
    convert.save_hf(tmp_path / "ours", config, params)
    ours, report = transformers.GPTNeoXForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    assert ours.dtype == getattr(torch, dtype)
    ours = ours.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours[name], tensor), name


def test_float32_parameters_of_a_half_precision_file_are_exact(tmp_path):
    model = torch_folder(tmp_path / "m", torch.float16)
    _, params = load(tmp_path / "m")
    kernel = model.gpt_neox.layers[1].mlp.dense_h_to_4h.weight.detach().float().numpy()
    np.testing.assert_array_equal(params["layers_1"]["up"]["kernel"], kernel.T)
    assert params["embedding"].dtype == "float32"


def test_transformers_continues_a_text_as_we_do(params, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = np.random.default_rng(1).integers(1, 64, (1, 7))
    prompt = torch.tensor(tokens)
    theirs = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
    )[0, 7:].tolist()

    @jax.jit
    def next_token(tokens, length):
        row = jax.numpy.ones_like(tokens)
        positions = jax.numpy.arange(tokens.shape[1])[None]
        hidden = pythia.hidden_states(CONFIG, params, tokens, positions, row, 0 * row)
        scores = pythia.unembed(hidden[0, length - 1], params["unembedding"])
        return jax.numpy.argmax(scores.at[0].set(-jax.numpy.inf))

    row = np.zeros((1, 11), np.int32)
    row[:, :7] = tokens
    for length in range(7, 11):
        row[0, length] = next_token(jax.numpy.asarray(row), length)
    assert row[0, 7:].tolist() == theirs


def test_buffers_of_older_versions_are_passed_over(params, folder):
    def add(tensors):
        tensors[FIRST + "attention.bias"] = np.ones((1, 1, 4, 4), bool)
        tensors[FIRST + "attention.masked_bias"] = np.float32([-1e9])
        tensors[FIRST + "attention.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    rewrite(folder, add)
    assert_equal(load(folder)[1], params)


def test_each_part_is_read_once_however_many_devices_hold_it(folder, monkeypatch):
    read = []
    original = convert._read_block
    monkeypatch.setattr(
        convert, "_read_block", lambda *args: read.append(args[1]) or original(*args)
    )
    convert.load_hf(folder, mesh=make_mesh(fsdp=2, tensor=2))
    # Two embeddings and four matrices a layer in 2 x 2 parts, qkv's bias in 2, the rest whole.
    assert len(read) == 4 * (2 + 2 * 4) + 2 * 2 + 2 * 7 + 2


# --- the tokenizer ---------------------------------------------------------------------


@pytest.fixture
def tokenizer_json(tmp_path):
    vocabulary = {"<eos>": 0, "<unk>": 1, "a": 2, "b": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


def test_a_bare_tokenizer_becomes_one_that_transformers_loads(params, tokenizer_json, tmp_path):
    convert.save_hf(tmp_path / "m", CONFIG, params, tokenizer_from=tokenizer_json)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer("b a a")["input_ids"] == [3, 2, 2]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<eos>", 0)
    # And on from there: a folder's files are copied as they are.
    convert.save_hf(tmp_path / "n", CONFIG, params, tokenizer_from=tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "n" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_another_end_of_text_is_written_everywhere(params, tokenizer_json, tmp_path):
    convert.save_hf(tmp_path / "m", CONFIG, params, tokenizer_from=tokenizer_json, eos_id=3)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "m" / name).read_text())["eos_token_id"] == 3
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m").eos_token == "b"


def test_the_pythia_tokenizer_keeps_its_ids(params, tmp_path):
    if not TOKENIZER.exists():
        pytest.skip("no shared/data/tokenizer beside the checkout")
    config = pythia.dataclasses.replace(CONFIG, vocab_size=50304)
    wide = jax.numpy.zeros((50304, 32))
    tree = params | {"embedding": wide, "unembedding": wide}
    convert.save_hf(tmp_path / "m", config, tree, tokenizer_from=TOKENIZER)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    original = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    text = "Hello,  world!\n\n\tprint(x)  <|endoftext|>"
    assert ours(text)["input_ids"] == original.encode(text).ids
    assert (ours.eos_token, ours.eos_token_id) == ("<|endoftext|>", 0)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"eos_id": 9}, "has no token 9"),
        ({"tokenizer_from": "nowhere"}, "nowhere: no such file"),
    ],
    ids=["end of text", "no file"],
)
def test_a_tokenizer_that_does_not_fit_is_refused(options, named, params, tokenizer_json, tmp_path):
    with pytest.raises(InputError, match=named):
        convert.save_hf(
            tmp_path / "m", CONFIG, params, **{"tokenizer_from": tokenizer_json} | options
        )
    assert not (tmp_path / "m").exists()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer_json, params, tmp_path):
    config = pythia.dataclasses.replace(CONFIG, vocab_size=3)
    narrow = {name: params[name][:3] for name in ("embedding", "unembedding")}
    with pytest.raises(InputError, match="has ids up to 3, but .* holds 3"):
        convert.save_hf(tmp_path / "m", config, params | narrow, tokenizer_from=tokenizer_json)


# --- faults ----------------------------------------------------------------------------


def test_every_tensor_that_does_not_fit_is_named_in_one_error(folder):
    def spoil(tensors):
        del tensors["embed_out.weight"]
        tensors["embed_out.bias"] = np.zeros(64, np.float32)
        tensors[FIRST + "mlp.dense_h_to_4h.weight"] = np.zeros((32, 48), np.float32)
        tensors[FIRST + "attention.dense.weight"] = np.zeros((32, 32), np.int8)

    rewrite(folder, spoil)
    with pytest.raises(InputError) as error:
        load(folder)
    for named in (
        "embed_out.weight is missing",
        "embed_out.bias is unexpected",
        FIRST + "mlp.dense_h_to_4h.weight has shape [32, 48], not [48, 32]",
        FIRST + "attention.dense.weight has dtype I8",
    ):
        assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_of_fewer_layers_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(InputError, match="layers.1.attention.dense.bias is unexpected"):
        load(folder)


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def foreign_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])


def index(weight_map):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        text = json.dumps(weight_map)
        (folder / "model.safetensors.index.json").write_text(text)

    return change


@pytest.mark.parametrize(
    "spoil, named",
    [
        (no_config, "config.json: missing"),
        (broken_config, "config.json: does not hold a whole JSON object"),
        (foreign_config, "model: config.json: rotary_pct is missing.*model_type='llama'"),
        (no_weights, "holds no model.safetensors"),
        (only_pickles, "only pytorch_model.bin, pickles, which can run code"),
        (truncated, "model.safetensors: not readable"),
        (index([]), "index.json: does not hold a whole JSON object"),
        (index({}), "index.json: lacks weight_map"),
        (index({"weight_map": {"x": "../model.safetensors"}}), "must be a file in the fol"),
        (index({"weight_map": {"x": "/etc/passwd"}}), "names '/etc/passwd'"),
        (index({"weight_map": {"x": ".."}}), "names '..'"),
        (index({"weight_map": {"x": 3}}), "names 3"),
        (index({"weight_map": {"x": "absent.safetensors"}}), "absent.safetensors: not read"),
    ],
    ids=[
        *("no config", "broken config", "foreign config", "no weights", "pickles"),
        *("truncated", "index list", "index empty", "index up", "index absolute"),
        *("index dots", "index number", "index absent"),
    ],
)
def test_a_folder_at_fault_is_refused(spoil, named, folder):
    spoil(folder)
    with pytest.raises(InputError, match=named):
        load(folder)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(params, tmp_path):
    convert.save_hf(tmp_path / "m", CONFIG, params, max_shard_bytes=20_000)
    file = tmp_path / "m/model.safetensors.index.json"
    text = json.loads(file.read_text())
    text["weight_map"]["gpt_neox.phantom"] = text["weight_map"]["embed_out.weight"]
    file.write_text(json.dumps(text))
    with pytest.raises(InputError, match="gpt_neox.phantom is not in model-00006"):
        load(tmp_path / "m")


@pytest.mark.parametrize("source", ["nowhere", "/no/such/folder"])
def test_no_folder_and_no_hub_name(source):
    with pytest.raises(InputError, match="no such folder, and not a hub name owner/name"):
        load(source)


def test_a_hub_out_of_reach_is_an_input_error(monkeypatch):
    def unreachable(*args, **kwargs):
        raise convert.huggingface_hub.errors.LocalEntryNotFoundError("no network\ndetails")

    monkeypatch.setattr(convert.huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(InputError, match="owner/name: no such folder.*no network$"):
        load("owner/name")


def test_a_hub_name_is_fetched_without_code(monkeypatch, folder):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(convert.huggingface_hub, "snapshot_download", fetch)
    assert load("owner/name", revision="step3000")[0] == CONFIG
    assert asked == {
        "name": "owner/name",
        "revision": "step3000",
        "allow_patterns": ["*.safetensors", "*.json"],
    }


def test_a_folder_that_holds_something_is_not_overwritten(params, folder):
    before = sorted(folder.iterdir())
    with pytest.raises(InputError, match="exists and is not empty"):
        convert.save_hf(folder, CONFIG, params)
    assert sorted(folder.iterdir()) == before


def test_what_an_interrupted_export_left_is_replaced(params, tmp_path):
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "model-00009-of-00009.safetensors").touch()
    (tmp_path / "m").mkdir()
    convert.save_hf(tmp_path / "m", CONFIG, params)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        *("config.json", "generation_config.json", "m", "model.safetensors")
    ]


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda tree: tree.pop("unembedding"), "unembedding: is missing"),
        (lambda tree: tree.update(head=tree["embedding"]), "head: .*says there is none"),
        (lambda tree: tree.update(embedding=tree["embedding"].T), r"embedding: is \(\(32, 64"),
        (
            lambda tree: tree.update(embedding=tree["embedding"].astype("bfloat16")),
            "bfloat16.*float32",
        ),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_parameters_of_another_configuration_are_not_written(change, named, params, tmp_path):
    tree = dict(params)
    change(tree)
    with pytest.raises(InputError, match=named):
        convert.save_hf(tmp_path / "m", CONFIG, tree)
    assert not (tmp_path / "m").exists()


def test_the_folder_can_be_moved(params, folder, tmp_path):
    shutil.move(folder, tmp_path / "elsewhere")
    assert_equal(load(tmp_path / "elsewhere")[1], params)


def test_a_text_ends_where_transformers_ends_it(tmp_path):
    def written(**files):
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return convert.eos_ids(tmp_path)

    assert written(config={"eos_token_id": 3}) == (3,)
    assert written(generation_config={"eos_token_id": [0, 5]}) == (0, 5)
    assert written(generation_config={"do_sample": True}) == (3,)
    for nothing in (None, [], "0", True):
        with pytest.raises(InputError, match="neither generation_config.json nor config.json"):
            written(config={"eos_token_id": nothing})
