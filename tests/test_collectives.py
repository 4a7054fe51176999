"""What a program sends: counted in written-out text, and in programs whose partition is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdpo import sharding
from jaxdpo.collectives import sent

LOOP = """HloModule jit_f, entry_computation_layout={(f32[4]{0})->f32[8]{0}}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[1024]{0} all-gather(%h), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[8]) tuple(%i, %g)
}

%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%fused (p: f32[8]) -> f32[8] {
  ROOT %r = f32[512]{0} reduce-scatter(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main.2 (p: f32[4]) -> f32[8] {
  %w = (s32[], f32[8]) while(%s), condition=%condition.1, body=%body.1
  %f = f32[512]{0} fusion(%w), kind=kCustom, calls=%fused
  %c = (f32[64], f32[64], u32[], u32[]) collective-permute-start(%f), source_target_pairs={{0,1}}
  %d = f32[64]{0} collective-permute-done(%c)
  ROOT %a = f32[8]{0} all-reduce(%d), replica_groups=mesh['x'=2,'y'=4] {'x','y'}, to_apply=%add
}
"""


def test_a_text_by_hand():
    """bf16[1024] gathered by 4, six times; a half of f32[1024] sent once; a ring of eight twice."""
    assert sent(LOOP) == {
        "all-gather": (6, 6 * 2048 * 3 // 4),
        "reduce-scatter": (1, 4096 // 2),
        "collective-permute": (1, 256),
        "all-reduce": (1, 2 * 32 * 7 // 8),
    }


def test_a_known_trip_count_is_believed():
    trips = ', backend_config={"known_trip_count":{"n":"9"}}'
    text = LOOP.replace("body=%body.1", "body=%body.1" + trips)
    assert sent(text)["all-gather"][0] == 9


def test_a_mesh_of_devices_in_another_order_is_read_too():
    named = "mesh['x'=2,'y'=4], device_ids=([2,4]T(1,0)) {'y'}"
    text = LOOP.replace("mesh['x'=2,'y'=4] {'x','y'}", named)
    assert sent(text)["all-reduce"] == (1, 2 * 32 * 3 // 4)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=4, tensor=1)


def shape_of(mesh, spec):
    return jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, spec))


@pytest.mark.parametrize(
    "spec, expected",
    [
        (P("fsdp"), {"all-gather": (1, 64 * 64 * 4 * 3 // 4)}),
        (P(("data", "fsdp")), {"all-gather": (1, 64 * 64 * 4 * 7 // 8)}),
        (P(), {}),
    ],
)
def test_gathering_a_matrix(mesh, spec, expected):
    whole = NamedSharding(mesh, P())
    gather = jax.jit(lambda x: x + 1, out_shardings=whole)
    assert sent(gather.lower(shape_of(mesh, spec)).compile().as_text()) == expected


def test_summing_over_rows(mesh):
    """Each device has a part of the sum of 64 numbers: one all-reduce, whatever the mesh."""
    add = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, P()))
    found = sent(add.lower(shape_of(mesh, P(("data", "fsdp")))).compile().as_text())
    assert found == {"all-reduce": (1, 2 * 64 * 4 * 7 // 8)}
