"""Names of RAFT-small in torchvision's layout (`raft_small`), and the network from such a file."""

import os
import pathlib

from flax import nnx

from kling_jax.errors import WeightsError
from kling_jax.interop import safetensors
from kling_jax.interop.names import CONV2D, Entry, recipes
from kling_jax.models.raft import Raft
from kling_jax.nn import params as params_lib

UPDATE = {
  "correlations": "motion_encoder.convcorr1.0", "flow_into": "motion_encoder.convflow1.0",
  "flow_out": "motion_encoder.convflow2.0", "motion": "motion_encoder.conv.0",
  "gate": "recurrent_block.convgru1.convz", "reset": "recurrent_block.convgru1.convr",
  "candidate": "recurrent_block.convgru1.convq", "head_into": "flow_head.conv1", "head_out": "flow_head.conv2",
}  # fmt: skip
BLOCK = {"into": "convnormrelu1.0", "middle": "convnormrelu2.0", "out": "convnormrelu3.0", "shortcut": "downsample.0"}


def entries() -> dict[str, Entry]:
  """Where each parameter of `Raft` lies."""
  pairs = {f"update.{ours}": f"update_block.{theirs}" for ours, theirs in UPDATE.items()}
  for ours, theirs in (("features", "feature_encoder"), ("context", "context_encoder")):
    pairs[f"{ours}.stem"], pairs[f"{ours}.out"] = f"{theirs}.convnormrelu.0", f"{theirs}.conv"
    for block in range(6):
      layer, place = divmod(block, 2)
      for part, name in BLOCK.items():
        if part != "shortcut" or (place == 0 and layer > 0):
          pairs[f"{ours}.blocks.{block}.{part}"] = f"{theirs}.layer{layer + 1}.{place}.{name}"
  found = {}
  for ours, theirs in pairs.items():
    found[f"{ours}.conv.kernel"] = Entry(f"{theirs}.weight", CONV2D)
    found[f"{ours}.conv.bias"] = Entry(f"{theirs}.bias")
  return found


def load(source: str | os.PathLike[str]) -> tuple[nnx.GraphDef, params_lib.Params, str]:
  """(graph, parameters, fingerprint of the weights) of the RAFT-small in a file or folder of safetensors.

  Raises:
    WeightsError: damaged files, or another network, such as RAFT-large.
  """
  source = pathlib.Path(source)
  tensors = safetensors.Tensors(source)
  if "update_block.recurrent_block.convgru2.convz.weight" in tensors or "mask_predictor.conv.weight" in tensors:
    raise WeightsError(f"{source} holds RAFT-large; RAFT-small (torchvision's raft_small) is built here")
  graph, shapes, _ = params_lib.abstract(lambda: Raft(rngs=nnx.Rngs(0)))
  params, _ = safetensors.load_into(shapes, source, recipes(entries()))
  return graph, params, safetensors.fingerprint(tensors)
