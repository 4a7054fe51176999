"""The mesh, the table of the parameters' places, and what the compiler makes of them."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdpo import InputError, pythia, qfunction, sharding

CONFIG = pythia.PythiaConfig(
    vocab_size=64, num_layers=2, num_heads=4, width=32, mlp_width=48, rotary_pct=0.5
)
NUMBERS = {"num_heads": 4, "width": 32, "mlp_width": 48, "vocab_size": 64}


def shapes(**overrides):
    config = pythia.dataclasses.replace(CONFIG, **overrides)
    return jax.eval_shape(lambda key: pythia.init_params(config, key), jax.random.key(0))


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1)),
        ({"data": 2, "fsdp": 1, "tensor": 4}, (2, 1, 4)),
    ],
    ids=["all data", "inferred data", "inferred fsdp", "nothing inferred"],
)
def test_mesh_sizes(sizes, expected):
    mesh = sharding.make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert tuple(mesh.shape.values()) == expected
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_a_mesh_of_some_devices():
    devices = jax.devices()[2:6]
    mesh = sharding.make_mesh(tensor=2, devices=devices)
    assert set(mesh.devices.ravel()) == set(devices)


@pytest.mark.parametrize(
    "sizes, named",
    [
        ({"data": 3}, "data=3 x fsdp=1 x tensor=1: does not divide 8 devices"),
        ({"fsdp": 3}, "data=-1 x fsdp=3 x tensor=1: does not divide 8 devices"),
        ({"fsdp": 16}, "does not divide 8 devices"),
        ({"fsdp": -1}, "one of them may be -1"),
        ({"tensor": 0}, "sizes must be at least 1"),
        ({"tensor": -2}, "sizes must be at least 1"),
    ],
    ids=["product", "remainder", "too many", "two free", "zero", "negative"],
)
def test_impossible_meshes_are_refused(sizes, named):
    with pytest.raises(InputError) as error:
        sharding.make_mesh(**sizes)
    assert named in str(error.value)


def test_both_trees_are_split_alike():
    separate = sharding.param_specs(shapes())
    stacked = sharding.param_specs(shapes(scan_layers=True))
    same = lambda spec, of_all: of_all == (P(None, *spec) if spec else P())
    assert jax.tree.all(jax.tree.map(same, separate["layers_1"], stacked["layers"]))
    assert separate["layers_0"] == separate["layers_1"]
    assert separate["layers_0"]["qkv"]["kernel"] == P("fsdp", "tensor", None, None)
    assert separate["layers_0"]["out"]["kernel"] == P("tensor", None, "fsdp")
    assert separate["unembedding"] == stacked["unembedding"] == P("tensor", "fsdp")


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scan"])
def test_every_matrix_is_split_over_all_of_fsdp_and_tensor(scan_layers):
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    tree = shapes(scan_layers=scan_layers)
    places = sharding.param_shardings(tree, mesh)
    for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True):
        part = jax.ShapeDtypeStruct(place.shard_shape(leaf.shape), leaf.dtype)
        # The largest vector, stacked, has 2 x 3 x 32 numbers; the smallest matrix 1024.
        assert leaf.size < 200 or leaf.size == 8 * part.size


def test_a_parameter_without_a_rule_is_named():
    tree = shapes()
    tree["layers_1"]["gate"] = {"kernel": tree["embedding"]}
    with pytest.raises(InputError, match="parameter layers_1/gate/kernel: no rule"):
        sharding.param_specs(tree)


def test_what_does_not_divide_is_refused_all_at_once():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    sharding.check_divisible(mesh, batch_rows=8, **NUMBERS)
    wrong = {"num_heads": 3, "width": 34, "mlp_width": 49, "vocab_size": 65}
    with pytest.raises(InputError) as error:
        sharding.check_divisible(mesh, batch_rows=6, **wrong)
    for named in (
        "batch rows=6 is no multiple of data=1 x fsdp=4",
        "width=34 is no multiple of fsdp=4",
        "num_heads=3 is no multiple of tensor=2",
        "mlp_width=49 is no multiple of tensor=2",
        "vocab_size=65 is no multiple of tensor=2",
    ):
        assert named in str(error.value)


def test_check_divisible_misses_nothing_that_the_table_splits():
    # A dimension that the check lets through although the table splits it would fail here.
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    for leaf, place in zip(
        jax.tree.leaves(shapes()),
        jax.tree.leaves(sharding.param_shardings(shapes(), mesh)),
        strict=True,
    ):
        assert len(place.shard_shape(leaf.shape)) == leaf.ndim  # raises if it does not divide


def compiled_gradient(mesh):
    """The text of the compiled gradient of 16 rows of 8 tokens, rows over the mesh."""
    rows = NamedSharding(mesh, sharding.batch_spec)
    places = sharding.param_shardings(shapes(), mesh)
    row = jax.ShapeDtypeStruct((16, 8), jnp.int32, sharding=rows)

    def loss(params, *row):
        hidden = pythia.hidden_states(CONFIG, params, *row)
        return jnp.sum(qfunction.token_logps(hidden, params["unembedding"], row[0]))

    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes(),
        places,
    )
    step = jax.jit(jax.grad(loss), out_shardings=places)
    return step.lower(params, row, row, row, row).compile().as_text()


def test_under_a_mesh_in_context_each_device_computes_its_own_rows_only():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    with jax.set_mesh(mesh):
        text = compiled_gradient(mesh)
    # Two of the sixteen rows of eight tokens; no product of all of them, nor of a part of
    # the width, which would be summed over the devices.
    products = re.findall(r"= f32\[([\d,]+)\]\S* (?:dot|custom-call)\(", text)
    moved = re.findall(r"= f32\[([\d,]+)\]\S* (?:all-gather|all-to-all)\(", text)
    assert products and moved
    assert not [shape for shape in products + moved if re.match("16,8|128", shape)]
