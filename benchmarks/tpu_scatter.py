"""What the TPU compiler makes of a reduce-scatter over the fsdp axis, by topology, mesh and size of the array.

  make tpu
  PYTHONPATH=.venv/3.11/libtpu python benchmarks/tpu_scatter.py

Each program is one explicit `jax.lax.psum_scatter` of an array that every device holds whole. Where the compiler writes
an all-reduce instead (and cuts it afterwards), it sends twice the bytes.
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kling_jax.plan import collectives
from kling_jax.train import sharding

MESHES = {
  "v5p:2x2x1": [(1, 4, 1, 1)],
  "v5p:2x2x2": [(1, 8, 1, 1), (2, 4, 1, 1), (4, 2, 1, 1)],
  "v5p:4x4x4": [(1, 64, 1, 1), (4, 16, 1, 1), (16, 4, 1, 1)],
  "v6e:2x4": [(1, 8, 1, 1)],
  "v6e:4x4": [(1, 16, 1, 1), (4, 4, 1, 1)],
}


def kinds(topology: str, sizes: tuple[int, ...], size: int, dtype: str) -> set[str]:
  """The collectives of the compiled program."""
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), devices)

  def scatter(x: jax.Array) -> jax.Array:
    return 2 * jax.lax.psum_scatter(x[0], "fsdp", scatter_dimension=0, tiled=True)

  cut = NamedSharding(mesh, P("fsdp"))
  run = jax.shard_map(scatter, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)
  argument = jax.ShapeDtypeStruct((mesh.shape["fsdp"], size, size), jnp.dtype(dtype))
  text = jax.jit(run, in_shardings=cut, out_shardings=cut).lower(argument).compile().as_text()
  return {one.kind for one in collectives.read(text, mesh.shape)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--sizes", default="256,1024,8192", help="of square arrays")
  args = parser.parse_args()
  for topology, meshes in MESHES.items():
    for sizes in meshes:
      for size in map(int, args.sizes.split(",")):
        found = {dtype: ", ".join(sorted(kinds(topology, sizes, size, dtype))) for dtype in ("float32", "bfloat16")}
        print(f"{topology:10} {sizes!s:15} {size:5} ", *(f"{dtype}: {kind:15}" for dtype, kind in found.items()))


if __name__ == "__main__":
  main()
