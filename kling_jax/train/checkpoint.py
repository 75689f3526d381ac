"""Checkpoints: asynchronous, whole or absent, restorable on another mesh; one small wrapper around Orbax."""

import fnmatch
import pathlib
from collections.abc import Mapping, Sequence
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

  def save_weights(self, step: int, params: Mapping[str, Any], trained: Sequence[str], meta: Mapping[str, Any]) -> None:
    """Saves weights alone: for sampling and warm starts (`restore_params`), not for going on with a run."""
    frozen = {name: value for name, value in params.items() if name not in trained}
    state = {"params": frozen, "ema": {name: params[name] for name in trained}}
    meta = {**meta, "trained": list(trained), "shapes": describe(params)}
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    self._manager.save(step, args=items, force=True)

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

  def restore_params(self, step: int, shapes: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads only the weights: the EMA of the trained ones, the raw values of the frozen ones.

    Args:
      shapes: {path: ShapeDtypeStruct}, with a sharding where the array shall not land on the first device.

    Raises:
      WeightsError: the checkpoint is of another model.
    """
    self.check(step, shapes)
    return self._read_params(step, shapes)

  def restore_matching(
    self, step: int, shapes: Mapping[str, Any], allow_missing: Sequence[str] = ()
  ) -> tuple[dict[str, jax.Array], dict[str, list[str]]]:
    """Reads those weights that another model shares with this checkpoint, by name.

    Args:
      allow_missing: patterns of names that the checkpoint may lack.

    Returns:
      (weights, {"loaded", "missing", "unexpected"}).

    Raises:
      WeightsError: a name is missing and not allowed to, or a shape differs.
    """
    saved, wanted = self.meta(step)["shapes"], describe(shapes)
    missing = [name for name in wanted if name not in saved]
    refused = [name for name in missing if not any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_missing)]
    where = f"checkpoint {self.folder / str(step)}"
    if refused:
      raise WeightsError(
        f"{where} lacks {len(refused)} of {len(wanted)} parameters, first {refused[0]!r}{nearest(refused[0], saved)}; "
        "allow them by init_allow_missing, e.g. ('text.*',)"
      )
    for name in wanted:
      if name in saved and saved[name] != wanted[name]:
        raise WeightsError(f"{where}: {name!r} is {saved[name]} there, {wanted[name]} by this config")
    shared = {name: leaf for name, leaf in shapes.items() if name in saved}
    report = {"loaded": list(shared), "missing": missing, "unexpected": [name for name in saved if name not in wanted]}
    return self._read_params(step, shared), report

  def _read_params(self, step: int, shapes: Mapping[str, Any]) -> dict[str, jax.Array]:
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first)
      for name, leaf in shapes.items()
    }
    trained = set(self.meta(step)["trained"])
    item = {
      "params": {name: leaf for name, leaf in spec.items() if name not in trained},
      "ema": {name: leaf for name, leaf in spec.items() if name in trained},
    }
    item = {part: leaves for part, leaves in item.items() if leaves}
    args = ocp.checkpoint_utils.construct_restore_args(item)
    restorer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    found = restorer.restore(
      self.folder / str(step) / "state",
      args=ocp.args.PyTreeRestore(item=item, partial_restore=True, restore_args=args),
    )
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
