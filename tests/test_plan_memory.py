"""Memory before compiling: exact where it follows from shapes, near the compiler's figure where it is a fit."""

import functools
import json
import math
import pathlib

import jax
import pytest

from kling_jax import config as config_lib
from kling_jax.errors import MeshError
from kling_jax.plan import memory, programs, search
from kling_jax.plan import plan as plan_lib
from kling_jax.plan.topology import GIB, Topology
from kling_jax.train import sharding, task
from kling_jax.train.state import Update

# GiB that the TPU compiler (libtpu 0.0.42.1) took for the temporaries of training steps, as `kling plan` reads them.
COMPILED = json.loads((pathlib.Path(__file__).parent / "plan_compiled.json").read_text(encoding="utf-8"))
SMALL = ("--config.precision=bfloat16", "--config.data.batch=8", "--config.model.remat=full")


@functools.cache
def job(spec: str, *overrides: str) -> task.Task:
  return task.make(config_lib.load(spec, overrides))


def mesh_of(*sizes: int) -> dict[str, int]:
  return dict(zip(sharding.AXES, sizes, strict=True))


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (2, 2, 1, 2), (1, 2, 4, 1)])
@pytest.mark.parametrize("offload", [False, True])
def test_what_is_given_is_predicted_to_the_byte(sizes: tuple[int, ...], offload: bool) -> None:
  made = job("configs/video_dit.py:runlocal", *SMALL, f"--config.optimizer.offload={offload}")
  update = Update(made, sharding.make_mesh(mesh_of(*sizes), jax.devices()))
  predicted = memory.predict(made, mesh_of(*sizes))
  for kind, key in (("params", "params"), ("ema", "ema"), ("optimiser", "opt")):
    scalars = 4 * sum(not leaf.ndim for leaf in jax.tree.leaves(update.abstract[key]))
    assert predicted.by_kind[kind] == programs.bytes_on_device(update.abstract[key], update.shardings[key]) - scalars
  moments = 8 * sum(math.prod(update.shardings["params"][name].shard_shape(leaf.shape))
                    for name, leaf in update.abstract["params"].items())  # fmt: skip
  assert predicted.host == (moments if offload else 0)


@pytest.mark.parametrize("row", COMPILED, ids=lambda row: f"{row['config'].partition(':')[2]} {row['overrides'][-1]}")
def test_temporaries_are_within_a_tenth_of_what_the_compiler_took(row: dict) -> None:
  predicted = memory.predict(job(row["config"], *row["overrides"]), mesh_of(*row["mesh"]))
  assert predicted.temporaries == pytest.approx(row["gib"] * GIB, rel=0.1)


def test_a_policy_that_saves_more_takes_more_and_offload_moves_it_to_the_host() -> None:
  of = lambda remat: memory.predict(
    job("configs/video_dit.py:size=d128x2", *SMALL[:2], f"--config.model.remat={remat}"), mesh_of(1, 8, 1, 1)
  )
  block = of("full").by_kind["activations"]
  assert of("none").temporaries > of("names:qkv,attention").temporaries > of("full").temporaries
  assert (of("offload:block").by_kind["activations"], of("offload:block").host) == (0, block)
  one = of("names:attention").by_kind["activations"] - block
  assert of("offload:attention").host == one and of("offload:attention").by_kind["activations"] == block


def test_a_config_that_cannot_fit_is_refused_with_what_would() -> None:
  large = ("configs/video_dit.py:size=d512x2,res=256", "--config.precision=bfloat16", "--config.data.batch=2048")
  config = config_lib.load(large[0], [*large[1:], "--config.mesh.tensor=2"])
  message = (
    r"^video_dit on v6e:2x2 with mesh \{'replica': 1, 'fsdp': 2, 'context': 1, 'tensor': 2\} needs about [\d.]+ GiB a "
    r"device \(batch [\d.]+, activations [\d.]+, workspace [\d.]+\) of 31.25, of which 5% stay free; "
  )
  with pytest.raises(MeshError, match=message + r"the smallest mesh that would hold it has \d+ devices: \{.*\}$") as no:
    plan_lib.plan(config, Topology.parse("v6e:2x2"), compile_=False)
  # What it names does fit, and half of it does not.
  devices = int(str(no.value).partition("it has ")[2].split()[0])
  made, topology = job(*large), Topology.parse("v6e:2x2")
  fits = lambda count: any(memory.predict(made, mesh).fits(topology) for mesh in memory.meshes(made, count))
  assert fits(devices) and not fits(devices // 2)


def test_a_policy_that_would_fit_is_named_before_more_chips() -> None:
  config = config_lib.load(
    "configs/video_dit.py:size=d128x2,res=256",
    ("--config.precision=bfloat16", "--config.data.batch=1024", "--config.model.remat=none"),
  )
  with pytest.raises(MeshError, match="with config.model.remat = '(full|names:attention)' it would fit$"):
    plan_lib.plan(config, Topology.parse("v5e:2x2"), compile_=False)


def test_search_tries_every_mesh_that_divides_and_puts_the_fastest_first() -> None:
  made, topology = job("configs/video_dit.py:size=d384x2,res=256", *SMALL), Topology.parse("v5p:2x2x2")
  meshes = memory.meshes(made, topology.size)
  every = [
    mesh_of(r, f, c, t) for r in (1, 2, 4, 8) for f in (1, 2, 4, 8) for c in (1, 2, 4, 8) for t in (1, 2, 4, 8)
    if r * f * c * t == 8
  ]  # fmt: skip
  for mesh in every:  # 6 heads, 5120 tokens, 8 rows
    legal = mesh["tensor"] <= 2
    assert (mesh in meshes) == legal, mesh
  found = search.candidates(made, topology)
  assert found[0].seconds <= min(one.seconds for one in found) * (1 + search.ALIKE)
  assert search.seconds(made, mesh_of(1, 8, 1, 1), topology) < search.seconds(made, mesh_of(1, 1, 8, 1), topology)


def test_sizes_of_a_mesh_fill_the_topology_or_are_refused() -> None:
  config = config_lib.load("configs/video_dit.py", ("--config.mesh.tensor=2",))
  assert plan_lib.sizes(config, Topology.parse("v5p:2x2x2")) == mesh_of(1, 4, 1, 2)
  config.mesh.fsdp = 3
  with pytest.raises(MeshError, match="does not multiply to the 8 devices of v5p:2x2x2; or use --search"):
    plan_lib.sizes(config, Topology.parse("v5p:2x2x2"))
