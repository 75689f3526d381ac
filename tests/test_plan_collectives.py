"""Collectives read from HLO text: each notation of device groups against what it stands for, and a real program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kling_jax.plan import collectives

MESH = {"replica": 2, "fsdp": 2, "context": 1, "tensor": 2}
TEXT = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{
  %p = (s32[], f32[4,8]) parameter(0)
  %x = f32[4,8]{{1,0}} get-tuple-element(%p), index=1
  ROOT %inner = {line}
}}

ENTRY %main (p.0: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{
  %p.0 = (s32[], f32[4,8]) parameter(0)
  ROOT %loop = (s32[], f32[4,8]) while(%p.0), condition=%never, body=%body, {trips}
}}

%never (p: (s32[], f32[4,8])) -> pred[] {{
  ROOT %no = pred[] constant(false)
}}
"""
TEXT = TEXT.replace("{trips}", 'backend_config={{"known_trip_count":{{"n":"5"}}}}')
GATHER = 'bf16[4,8]{{1,0}} all-gather(%x), channel_id=1, {groups}, dimensions={{0}}, metadata={{op_name="jit(f)/dot"}}'
NOTATIONS = [
  ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
  ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("replica",)),
  ("replica_groups=[4,2]<=[8]", ("tensor",)),
  ("replica_groups=[4,2]<=[4,2]T(1,0)", None),
  ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
  ("replica_groups=[1,8]<=[8]", ("replica", "fsdp", "tensor")),
  ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}", ("fsdp",)),
  ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ("replica",)),
  ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", ("fsdp",)),
  ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", ("tensor",)),
  ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}", ("fsdp",)),
  ("replica_groups=mesh['a'=2,'b'=4]", ("replica", "fsdp", "tensor")),
  ("replica_groups={}", ("replica", "fsdp", "tensor")),
]


@pytest.mark.parametrize(("groups", "axes"), NOTATIONS)
def test_every_notation_of_groups(groups: str, axes: tuple[str, ...] | None) -> None:
  (found,) = collectives.read(TEXT.format(line=GATHER.format(groups=groups)), MESH)
  assert (found.kind, found.arrays, found.bytes) == ("all-gather", (("bf16", (4, 8)),), 64)
  assert (found.loops, found.trips, found.source) == (1, 5, "jit(f)/dot")
  assert sorted(device for group in found.groups for device in group) == list(range(8))
  if axes is None:  # pairs at a distance of 2 in a mesh whose last axis has 2
    assert found.groups == ((0, 2), (4, 6), (1, 3), (5, 7))
  else:
    assert found.axes == axes


@pytest.mark.parametrize(
  ("line", "kind", "size"),
  [
    ("f32[4,8]{1,0} collective-permute(%x), source_target_pairs={{0,2},{2,0}}", "collective-permute", 128),
    ("(f32[4,8], f32[4,8], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,2}}",
     "collective-permute", 128),
    ("(f32[2,8], f32[4,8]) all-gather-start(%x), replica_groups=[4,2]<=[8], dimensions={0}", "all-gather", 128),
    ('(f32[64,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%x), channel_id=10, is_host_transfer=true, '
     'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}',
     "all-reduce", 4 * 65536),
    ("(f32[4,8], bf16[3]) all-reduce(%x, %y), replica_groups=[4,2]<=[8], to_apply=%add", "all-reduce", 134),
  ],
)  # fmt: skip
def test_kinds_and_sizes(line: str, kind: str, size: int) -> None:
  (found,) = collectives.read(TEXT.format(line=line), MESH)
  assert (found.kind, found.bytes) == (kind, size)


def test_what_follows_a_kernel_with_metadata_on_lines_of_its_own() -> None:
  """The TPU compiler's text of a Pallas kernel; all that stood behind it in a computation was once left out."""
  kernel = (
    'f32[4,8] custom-call(%x), frontend_attributes={kernel_metadata={\n"block_q":"512"\n}}, metadata={op_name="k"}'
  )
  line = f"{kernel}\n  ROOT %last = {GATHER.format(groups='replica_groups=[4,2]<=[8]')}"
  (found,) = collectives.read(TEXT.format(line=line), MESH)
  assert (found.kind, found.axes, found.loops) == ("all-gather", ("tensor",), 1)


def test_what_is_not_understood_is_refused() -> None:
  with pytest.raises(ValueError, match="no entry computation"):
    collectives.read("HloModule nothing", MESH)
  with pytest.raises(ValueError, match="no device groups"):
    collectives.read(TEXT.format(line=GATHER.format(groups="replica_groups=new(8)")), MESH)


def test_a_real_program() -> None:
  """A gathered matrix, and a sum over two axes inside a loop of seven."""
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 1, 2), tuple(MESH), axis_types=(AxisType.Auto,) * 4)

  def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
    sums = jax.shard_map(lambda x: jax.lax.psum(x, ("replica", "tensor")), mesh=mesh, in_specs=P(), out_specs=P())
    return sums(jnp.sin(x)) / 4, None

  def f(x: jax.Array, w: jax.Array) -> jax.Array:
    whole = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
    return jax.lax.scan(body, x, None, length=7)[0] @ whole

  shardings = (NamedSharding(mesh, P()), NamedSharding(mesh, P("fsdp")))
  arguments = [jax.ShapeDtypeStruct((16, 16), jnp.float32)] * 2
  compiled = jax.jit(f, in_shardings=shardings, out_shardings=shardings[0]).lower(*arguments).compile()
  found = {one.kind: one for one in collectives.read(compiled.as_text(), mesh.shape)}
  assert found.keys() == {"all-gather", "all-reduce"}
  gather, total = found["all-gather"], found["all-reduce"]
  assert (gather.axes, gather.loops, gather.bytes) == (("fsdp",), 0, 16 * 16 * 4)
  assert (total.axes, total.loops, total.trips) == (("replica", "tensor"), 1, 7)
