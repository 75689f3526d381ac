"""Safetensors: round trips, shards, strict loading with reports, hostile files."""

import json
import pathlib
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_jax.errors import WeightsError
from kling_jax.interop import safetensors as weights


def some_tensors():
  generator = np.random.default_rng(0)
  return {
    "blocks.attn.kernel": generator.normal(size=(3, 4, 5)).astype(np.float32),
    "blocks.norm.scale": generator.normal(size=(3, 4)).astype(ml_dtypes.bfloat16),
    "head.bias": np.full((), 0.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "steps": np.arange(7, dtype=np.int64),
  }


def spec(tensors):
  return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in tensors.items()}


def assert_same(left, right):
  assert set(left) == set(right)
  for name in left:
    assert left[name].dtype == right[name].dtype and left[name].shape == right[name].shape
    assert left[name].tobytes() == right[name].tobytes()


@pytest.mark.parametrize("shard_bytes", [10**9, 100, 1])
def test_round_trip_in_one_file_and_in_shards(tmp_path, shard_bytes):
  tensors = some_tensors()
  written = weights.write(tmp_path, tensors, metadata={"made": "here"}, shard_bytes=shard_bytes)
  assert [path.name for path in written] == sorted(path.name for path in tmp_path.iterdir())
  read = weights.Tensors(tmp_path)
  assert_same(tensors, read)
  assert read.metadata["made"] == "here"
  params, report = weights.load_into(spec(tensors), tmp_path)
  assert_same(tensors, params)
  assert sorted(report.loaded) == sorted(tensors) and not report.missing and not report.unexpected and not report.cast
  json.dumps(report.to_json())


def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
  tensors = some_tensors()
  (path,) = weights.write(tmp_path / "ours", tensors)
  assert_same(tensors, safetensors.numpy.load_file(path))
  safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors")
  assert_same(tensors, weights.Tensors(tmp_path / "theirs.safetensors"))


def test_eight_bit_floats_are_read(tmp_path):
  tensors = {"a": np.arange(6).astype(ml_dtypes.float8_e4m3fn), "b": np.arange(6).astype(ml_dtypes.float8_e5m2)}
  weights.write(tmp_path, tensors)
  assert_same(tensors, weights.Tensors(tmp_path))


def test_shards_keep_below_the_limit_and_the_index_names_every_tensor(tmp_path):
  tensors = {f"w{i}": np.full((10,), i, np.float32) for i in range(7)}
  written = weights.write(tmp_path, tensors, shard_bytes=100)
  index = json.loads(written[-1].read_text())
  assert set(index["weight_map"]) == set(tensors) and index["metadata"]["total_size"] == 7 * 40
  assert len(written) == 1 + 4  # two arrays of 40 bytes a shard
  assert all(sum(a.nbytes for a in safetensors.numpy.load_file(path).values()) <= 100 for path in written[:-1])


def test_writing_again_leaves_nothing_of_the_old_weights(tmp_path):
  weights.write(tmp_path, {f"w{i}": np.zeros(10, np.float32) for i in range(7)}, shard_bytes=100)
  weights.write(tmp_path, {"a": np.ones(2, np.float32)})
  assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
  weights.write(tmp_path, {f"w{i}": np.zeros(10, np.float32) for i in range(3)}, shard_bytes=100)
  assert set(weights.Tensors(tmp_path)) == {"w0", "w1", "w2"}


@pytest.mark.parametrize("lost", ["index", "shard", "index and shard"])
def test_part_of_a_sharded_set_is_refused_or_whole(tmp_path, lost):
  tensors = {f"w{i}": np.full(10, i, np.float32) for i in range(7)}
  written = weights.write(tmp_path, tensors, shard_bytes=100)
  if "index" in lost:
    written[-1].unlink()
  if "shard" in lost:
    written[1].unlink()
    with pytest.raises(WeightsError, match=r"lacks 1 of 4 shards.*00002-of-00004"):
      weights.Tensors(tmp_path)
  else:
    assert_same(tensors, weights.Tensors(tmp_path))  # all shards are there, and their names say so


def test_floats_are_cast_and_counted_other_types_are_not(tmp_path):
  tensors = some_tensors()
  weights.write(tmp_path, tensors)
  wanted = spec(tensors) | {"blocks.norm.scale": jax.ShapeDtypeStruct((3, 4), jnp.float32)}
  params, report = weights.load_into(wanted, tmp_path)
  np.testing.assert_array_equal(params["blocks.norm.scale"], tensors["blocks.norm.scale"].astype(np.float32))
  assert report.cast == {"bfloat16 -> float32": 1}
  with pytest.raises(WeightsError, match=r"steps \(int64 in the file, float32 in the model\)"):
    weights.load_into(wanted | {"steps": jax.ShapeDtypeStruct((7,), jnp.float32)}, tmp_path)


def test_a_mesh_gets_sharded_arrays(tmp_path):
  tensors = {"w": np.arange(64, dtype=np.float32).reshape(16, 4)}
  weights.write(tmp_path, tensors)
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  sharding = jax.sharding.NamedSharding(mesh, jax.P("a", "b"))
  wanted = {"w": jax.ShapeDtypeStruct((16, 4), jnp.bfloat16, sharding=sharding)}
  params, _ = weights.load_into(wanted, tmp_path)
  assert params["w"].sharding == sharding and params["w"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(params["w"], np.float32), tensors["w"])


def test_name_maps_rename_and_build_stacked_layers(tmp_path):
  layers = {f"model.layer.{i}.weight": np.full((2, 3), i, np.float32) for i in range(3)}
  weights.write(tmp_path, layers | {"model.final": np.ones(4, np.float32)})
  stacked = weights.Built(tuple(layers), lambda *parts: np.stack([part.T for part in parts]))
  wanted = {
    "blocks.kernel": jax.ShapeDtypeStruct((3, 3, 2), jnp.float32),
    "final": jax.ShapeDtypeStruct((4,), jnp.float32),
  }
  params, report = weights.load_into(wanted, tmp_path, {"blocks.kernel": stacked, "final": "model.final"})
  np.testing.assert_array_equal(params["blocks.kernel"], np.stack([np.full((3, 2), i) for i in range(3)]))
  assert not report.unexpected
  wrong = wanted | {"blocks.kernel": jax.ShapeDtypeStruct((3, 2, 3), jnp.float32)}
  with pytest.raises(WeightsError, match=r"blocks.kernel \(\(3, 3, 2\) in the file, \(3, 2, 3\) in the model\)"):
    weights.load_into(wrong, tmp_path, {"blocks.kernel": stacked, "final": "model.final"})


def test_stacked_layers_are_read_slice_by_slice(tmp_path):
  """A mesh that cuts layers, rows and columns gets what stacking everything gives; other slices are not read."""
  draw = np.random.default_rng(0)
  layers = {f"layer.{i}": draw.normal(size=(6, 8)).astype(ml_dtypes.bfloat16) for i in range(4)}
  weights.write(tmp_path, layers)
  whole = np.stack([array.T for array in layers.values()])
  turn = lambda array: array.T
  mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
  for spec in (jax.P("a", "b", "c"), jax.P(None, ("a", "c"), "b"), jax.P()):
    sharding = jax.sharding.NamedSharding(mesh, spec)
    wanted = {"w": jax.ShapeDtypeStruct(whole.shape, jnp.float32, sharding=sharding)}
    params, report = weights.load_into(wanted, tmp_path, {"w": weights.Stacked(tuple(layers), turn)})
    assert params["w"].sharding == sharding and report.cast == {"bfloat16 -> float32": 1}
    np.testing.assert_array_equal(np.asarray(params["w"]), whole.astype(np.float32))
  asked = []
  lazy = weights.Layers(weights.Stacked(tuple(layers), turn), Watched(layers, asked))
  asked.clear()
  np.testing.assert_array_equal(lazy[1:3, 2:5, :1], whole[1:3, 2:5, :1])
  assert set(asked) == {"layer.1", "layer.2"}
  uneven = layers | {"layer.3": np.zeros((6, 7), ml_dtypes.bfloat16)}
  with pytest.raises(WeightsError, match="layer.3 is .* unlike"):
    weights.Layers(weights.Stacked(tuple(layers), turn), uneven)


class Watched(dict):
  """Notes which tensors are asked for."""

  def __init__(self, tensors, asked):
    super().__init__(tensors)
    self.asked = asked

  def __getitem__(self, name):
    self.asked.append(name)
    return super().__getitem__(name)


@pytest.mark.drill
def test_a_large_checkpoint_is_streamed_within_the_bound():
  """The width of Wan's 14B from sparse files, in a process of its own: its exit code says whether the bound held."""
  script = pathlib.Path(__file__).parents[1] / "benchmarks" / "stream_weights.py"
  run = subprocess.run([sys.executable, script, "--depth", "4"], capture_output=True, text=True)
  assert run.returncode == 0, run.stdout + run.stderr
  assert "14b with 4 blocks" in run.stdout


def test_what_is_not_finite_is_refused(tmp_path):
  for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
    for bad in (np.nan, np.inf, -np.inf):
      values = np.ones((300, 7), dtype)
      assert weights.finite(values) and weights.finite(values[:, ::2])
      values[250, 3] = bad
      assert not weights.finite(values)
  weights.write(tmp_path, {"w": values})
  with pytest.raises(WeightsError, match="w is not finite"):
    weights.load_into({"w": jax.ShapeDtypeStruct((300, 7), jnp.float32)}, tmp_path)
  big = tmp_path / "big"
  weights.write(big, {"w": np.full(3, 1e30, np.float32)})
  with pytest.raises(WeightsError, match="w is not finite everywhere .as float16"):
    weights.load_into({"w": jax.ShapeDtypeStruct((3,), jnp.float16)}, big)


def test_a_fingerprint_knows_weights_and_not_their_files(tmp_path):
  tensors = some_tensors()
  weights.write(tmp_path / "one", tensors)
  weights.write(tmp_path / "shards", tensors, shard_bytes=1)
  changed = tensors | {"head.bias": np.full((), 0.25, np.float32)}
  weights.write(tmp_path / "changed", changed)
  one, shards, other = (weights.fingerprint(tmp_path / name) for name in ("one", "shards", "changed"))
  assert one == shards != other and len(one) == 16


def test_differences_are_listed_with_the_nearest_names(tmp_path):
  weights.write(tmp_path, {
    "model.head.kernel": np.ones(2, np.float32), "blocks.atn.kernel": np.ones(2, np.float32),
    "wide": np.ones(3, np.float32),
  })  # fmt: skip
  wanted = {name: jax.ShapeDtypeStruct((2,), jnp.float32) for name in ("head.kernel", "blocks.attn.kernel", "wide")}
  with pytest.raises(WeightsError) as raised:
    weights.load_into(wanted, tmp_path)
  message = str(raised.value)
  assert "head.kernel (nearest: model.head.kernel)" in message
  assert "blocks.attn.kernel (nearest: blocks.atn.kernel)" in message
  assert "1 of another shape or type: wide ((3,) in the file, (2,) in the model)" in message
  assert "2 unexpected: blocks.atn.kernel, model.head.kernel" in message
  assert "\n" not in message


def test_partial_loads_need_patterns_and_are_reported(tmp_path):
  weights.write(tmp_path, {"body.w": np.ones(2, np.float32), "head.w": np.ones(3, np.float32), "old": np.ones(1)})
  wanted = {name: jax.ShapeDtypeStruct((2,), jnp.float32) for name in ("body.w", "head.w", "head.b")}
  for patterns in ({"allow_missing": ("head.*",)}, {"allow_unexpected": ("old",)}, {"allow_missing": ("ead.*",)}):
    with pytest.raises(WeightsError):
      weights.load_into(wanted, tmp_path, **patterns)
  params, report = weights.load_into(wanted, tmp_path, allow_missing=("head.*",), allow_unexpected=("old",))
  assert list(params) == ["body.w"] == report.loaded
  assert sorted(report.missing) == ["head.b", "head.w"] and report.unexpected == ["old"]
  assert "head.w" in report.mismatched and "not loaded: head.b" in str(report) and "not used: old" in str(report)


def file_of(header, data=b""):
  encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(encoded)) + encoded + data


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HOSTILE = {
  "empty": b"",
  "short": b"\x01\x02",
  "header longer than the file": struct.pack("<Q", 2**63) + b"{}",
  "not json": file_of(b"{]"),
  "nested": file_of(b"[" * 100_000),
  "offsets beyond the end": file_of({"a": {**F32, "data_offsets": [0, 400], "shape": [100]}}, b"1234"),
  "negative offsets": file_of({"a": {**F32, "data_offsets": [-4, 0]}}, b"1234"),
  "shape and bytes differ": file_of({"a": {**F32, "shape": [2]}}, b"1234"),
  "shape overflows": file_of({"a": {**F32, "shape": [2**40, 2**40], "data_offsets": [0, 0]}}),
  "overlap": file_of({"a": F32, "b": F32}, b"1234"),
  "unknown type": file_of({"a": {**F32, "dtype": "F1"}}, b"1234"),
  "unread bytes": file_of({"a": F32}, b"12345678"),
  "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtin\x94.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_errors_that_name_the_file(tmp_path, kind):
  path = tmp_path / "model.safetensors"
  path.write_bytes(HOSTILE[kind])
  with pytest.raises(WeightsError, match=r"model\.safetensors"):
    weights.Tensors(tmp_path)


@pytest.mark.parametrize("text", [
  "", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../../etc/passwd"}}',
  '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": "gone.safetensors"}}',
  '{"weight_map": {"b": "model.safetensors"}}', '{"weight_map": {"a": ".."}}',
])  # fmt: skip
def test_hostile_indices_are_errors(tmp_path, text):
  weights.write(tmp_path, {"a": np.ones(2, np.float32)})
  (tmp_path / "model.safetensors.index.json").write_text(text)
  with pytest.raises(WeightsError):
    weights.Tensors(tmp_path)


def test_nothing_there_twice_there_and_nothing_to_write(tmp_path):
  with pytest.raises(WeightsError, match=r"no \.safetensors file"):
    weights.Tensors(tmp_path)
  with pytest.raises(WeightsError, match="no tensors"):
    weights.write(tmp_path, {})
  with pytest.raises(WeightsError, match="complex128"):
    weights.write(tmp_path, {"a": np.ones(1, np.complex128)})
  for name in ("x", "y"):
    safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / f"{name}.safetensors")
  with pytest.raises(WeightsError, match="keep one"):
    weights.Tensors(tmp_path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp("damaged")
  (path,) = weights.write(folder, {"a": np.ones(3, np.float32), "b": np.ones(2, np.int32)})
  content = bytearray(path.read_bytes())
  for _ in range(data.draw(st.integers(1, 4))):
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
  path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
  try:
    for array in weights.Tensors(folder).values():
      array.sum()
  except WeightsError:
    pass
