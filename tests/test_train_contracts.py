"""What the step computes in, where its state lies, and what it refuses: read from lowered programs, nothing compiled
that need not be."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train_state
import whole_model

from kling_jax import config as config_lib
from kling_jax.errors import ConfigError, MeshError
from kling_jax.nn import lowering
from kling_jax.train import sharding, task
from kling_jax.train.state import Update

ROOT = pathlib.Path(__file__).parents[1]
DOT = re.compile(r"stablehlo\.dot_general .*: \(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>")


# ---- dtypes --------------------------------------------------------------------------------------------------------


@functools.cache
def dots(gradient: str = "float32") -> list[list[tuple[tuple[int, ...], str]]]:
  """(left, right, result) of every product of a bfloat16 step, lowered for TPU; each (shape, dtype)."""
  with lowering.target("tpu", "v5p"):
    text = whole_model.lowered(whole_model.make_mesh(), dtype=jnp.bfloat16, gradient=jnp.dtype(gradient)).as_text()

  def array(text: str) -> tuple[tuple[int, ...], str]:
    *shape, dtype = text.split("x")
    return tuple(map(int, shape)), dtype

  return [[array(part) for part in found] for found in DOT.findall(text)]


def test_no_float32_product_in_the_bfloat16_path() -> None:
  """The exceptions, float32 by design: times, scores and their modulation (a row a frame), and the head."""
  c, rows = whole_model.CONFIG, whole_model.ROWS
  outputs = c.patch[1] * c.patch[2] * c.latent_channels
  frames = {rows, rows * 3}  # one row a sample, or one a frame

  def is_exception(shapes: list[tuple[int, ...]]) -> bool:
    # Of the three shapes of a product, the kernel's is two-dimensional; the others count the rows.
    counted = {int(np.prod(shape[:-1])) for shape in shapes} | {int(np.prod(shape[1:])) for shape in shapes}
    return any(outputs in shape for shape in shapes) or bool(frames & counted)

  found = dots()
  products = [product for product in found if {dtype for _, dtype in product[:2]} != {"bf16"}]
  assert len(found) - len(products) > 100
  assert 10 <= len(products) <= 20
  for product in products:
    shapes = [shape for shape, _ in product]
    assert is_exception(shapes), product
    assert all(len(shape) < 4 for shape in shapes), f"attention in float32: {product}"


@pytest.mark.parametrize(("asked", "result"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_gradients_of_kernels_leave_the_product_in_the_dtype_they_are_summed_in(asked: str, result: str) -> None:
  """The sum over devices happens on the product's result: its dtype is that of the sum."""
  c = whole_model.CONFIG
  kernels = {(c.width, c.mlp_width), (c.mlp_width, c.width)}
  found = [product[2][1] for product in dots(asked) if product[2][0] in kernels and len(product[0][0]) == 3]
  assert len(found) == 2 and set(found) == {result}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"optimizer.gradient": "float16"}, "'optimizer.gradient' = 'float16' is unknown"),
    ({"optimizer.gradient": "bfloat16"}, "needs precision = 'bfloat16'"),
  ],
)
def test_dtypes_of_gradients_that_cannot_be(changes: dict[str, str], message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    test_train_state.start(test_train_state.config(**{key.replace(".", "__"): v for key, v in changes.items()}))


# ---- optimiser state on the host -----------------------------------------------------------------------------------


def test_offloaded_moments_live_on_the_host_and_change_nothing() -> None:
  mesh = whole_model.make_mesh(fsdp=4)
  run = lambda offload: test_train_state.run(
    *test_train_state.start(test_train_state.config(optimizer__offload=offload), mesh), test_train_state.batch(), 3
  )
  (kept, metrics), (away, metrics_away) = run(False), run(True)
  assert metrics == metrics_away
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(kept["params"]), jax.device_get(away["params"]))
  moments = away["opt"][0].mu["kernel"].sharding
  assert (moments.memory_kind, moments.spec) == ("pinned_host", away["params"]["kernel"].sharding.spec)
  assert "pinned_host" not in {tree["kernel"].sharding.memory_kind for tree in (away["params"], kept["opt"][0].mu)}


def test_offload_is_refused_where_there_is_no_such_memory(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(sharding, "HOST_MEMORY", "no_such_memory")
  with pytest.raises(MeshError, match=r"'optimizer.offload' needs no_such_memory memory, cpu has .*; set it to False"):
    test_train_state.start(test_train_state.config(optimizer__offload=True))


# ---- refusals of real configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("mesh", "changes", "messages"),
  [
    ({"tensor": 4}, {"model.size": "S", "text.width": 256},
     ["tensor=4 does not divide heads of the Video DiT (6); legal sizes of tensor: 1, 2, 3"]),
    ({"tensor": 4}, {}, ["tensor=4 does not divide heads of the Video DiT (2); legal sizes of tensor: 1, 2"]),
    ({"context": 3}, {"data.buckets": ((9, 32, 32), (1, 32, 32))},
     ["context=3 does not divide tokens of bucket 1x32x32 (16); legal sizes of context: 1, 2"]),
    ({"replica": 2, "fsdp": 4}, {"data.batch": 12}, ["replica=2 does not divide", "legal sizes of replica: 1, 3"]),
    ({"fsdp": 3}, {}, ["fsdp=3 does not divide", "legal sizes of fsdp: 1, 2"]),
  ],
)  # fmt: skip
def test_configs_are_refused_before_anything_is_allocated(
  mesh: dict[str, int], changes: dict[str, object], messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  c = config_lib.load(f"{ROOT}/configs/video_dit.py:runlocal")
  c.update_from_flattened_dict(changes)
  job = task.make(c)
  monkeypatch.setattr(jax, "device_put", None)
  monkeypatch.setattr(jax, "jit", None)
  with pytest.raises(MeshError) as caught:
    Update(job, whole_model.make_mesh(**mesh))
  for message in messages:
    assert message in str(caught.value)


def test_the_text_encoder_is_whole_over_tensor_and_limits_no_mesh() -> None:
  """Its one head divides by nothing; the Video DiT's two do."""
  job = task.make(config_lib.load(f"{ROOT}/configs/video_dit.py:runlocal"))
  update = Update(job, whole_model.make_mesh(fsdp=2, tensor=2))
  used = {name: set(sharding.spec) for name, sharding in update.parameter_shardings.items() if "kernel" in name}
  assert any(name.startswith("text.") for name in used)
  for name, axes in used.items():
    assert ("tensor" in axes) == (name.startswith("dit.blocks.") and "modulation" not in name), (name, axes)


def test_slices_are_crossed_by_replica_alone() -> None:
  """On devices that say which slice they are of, as those of two TPU slices do."""

  class Chip:
    platform, device_kind, process_index = "tpu", "a TPU", 0

    def __init__(self, number: int):
      self.id, self.slice_index, self.core_on_chip = number, number // 4, 0
      self.coords = (number % 2, number % 4 // 2, 0)

  chips = [Chip(number) for number in range(8)]
  assert sharding.slice_count(chips) == 2
  with pytest.raises(MeshError, match="the devices are 2 slices, .* legal sizes of replica: 2, 4, 8"):
    sharding.make_mesh({"replica": 1, "fsdp": -1, "context": 1, "tensor": 1}, chips)
  placed = sharding._ordered(chips, [4, 2, 1, 1], 2)
  assert [[chip.slice_index for chip in row.flat] for row in placed] == [[0, 0], [0, 0], [1, 1], [1, 1]]
