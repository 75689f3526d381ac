"""Checkpoints: asynchronous, whole or absent, restorable on another mesh; one small wrapper around Orbax."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp

from kling_jax.errors import WeightsError, nearest


class Checkpoints:
  """The checkpoints of one work directory, under `checkpoints/<step>/{state,meta}`."""

  def __init__(self, workdir: pathlib.Path, config: ml_collections.ConfigDict | None = None):
    """Opens the folder; `config` is the `checkpoint` group of a run that saves, None for readers."""
    self.folder = workdir.absolute() / "checkpoints"
    if config is None:
      options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    else:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=config.keep or None, keep_period=config.keep_every or None, cleanup_tmp_directories=True
      )
    self._manager = ocp.CheckpointManager(
      self.folder, options=options, item_handlers={"state": ocp.StandardCheckpointHandler(),
                                                   "meta": ocp.JsonCheckpointHandler()}
    )  # fmt: skip

  def latest(self) -> int | None:
    """The newest complete step, None where there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Starts saving; returns once the arrays are copied to the host. A folder under its final name is complete."""
    meta = {**meta, "shapes": describe(state["params"])}
    self._manager.save(
      step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)), force=True
    )

  def meta(self, step: int) -> dict[str, Any]:
    """The JSON part of a checkpoint: config, counters, constants, parameter shapes."""
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

  def restore(self, step: int, abstract: Any, shardings: Any) -> Any:
    """Reads the state into the given shapes and shardings (any mesh).

    Raises:
      WeightsError: the checkpoint is of another model; names the first parameters that differ.
    """
    self.check(step, abstract["params"])
    target = jax.tree.map(
      lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, shardings
    )
    return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))).state

  def restore_params(self, step: int, shapes: Mapping[str, Any], averaged: bool = True) -> dict[str, jax.Array]:
    """Reads only the weights: EMA ones where they exist (`averaged`), else the raw ones."""
    self.check(step, shapes)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or sharding)
      for name, leaf in shapes.items()
    }
    trained = self.meta(step)["trained"] if averaged else []
    item = {
      "params": {name: leaf for name, leaf in spec.items() if name not in set(trained)},
      "ema": {name: spec[name] for name in trained},
    }
    item = {part: leaves for part, leaves in item.items() if leaves}
    args = ocp.checkpoint_utils.construct_restore_args(item)
    path = self.folder / str(step) / "state"
    restorer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    found = restorer.restore(path, args=ocp.args.PyTreeRestore(item=item, partial_restore=True, restore_args=args))
    return {**found.get("params", {}), **found.get("ema", {})}

  def check(self, step: int, shapes: Mapping[str, Any]) -> None:
    """Raises WeightsError where the checkpoint's parameters are not the model's."""
    saved, wanted = self.meta(step)["shapes"], describe(shapes)
    if saved == wanted:
      return
    where = f"checkpoint {self.folder / str(step)}"
    for name in sorted(set(saved) | set(wanted)):
      if name not in saved:
        raise WeightsError(f"{where} is of another model: it lacks {name!r}{nearest(name, saved)}")
      if name not in wanted:
        raise WeightsError(f"{where} is of another model: it holds {name!r}, which this config does not build")
      if saved[name] != wanted[name]:
        raise WeightsError(
          f"{where} is of another model: {name!r} is {saved[name]} there, {wanted[name]} by this config"
        )

  def wait(self) -> None:
    """Blocks until the save under way is on disk; raises what it failed with."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.wait_until_finished()
    self._manager.close()


def describe(params: Mapping[str, Any]) -> dict[str, str]:
  """{path: "float32[2,3]"}, comparable across files."""
  return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in params.items()}
