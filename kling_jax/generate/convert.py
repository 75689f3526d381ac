"""`kling import` and `kling export`: weights of others into our folders and work directories, and ours out of them."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from kling_jax import config as config_lib
from kling_jax import files
from kling_jax.data import conditions
from kling_jax.errors import UsageError, WeightsError
from kling_jax.interop import detect, lora, outward, safetensors
from kling_jax.models import video_dit, video_vae
from kling_jax.nn import lora as nn_lora
from kling_jax.nn.params import Params
from kling_jax.train import encoders, task, workdir
from kling_jax.train.checkpoint import Checkpoints

NAMINGS = ("kling_jax", "diffusers")
MODEL = "kling_jax.json"  # of an exported model: what a work directory knows beside the weights
LORA = "lora.safetensors"  # adapters of a run that trained some, ready for `kling sample --lora` or diffusers
REST = "rest"  # parameters of neither part, or that diffusers has no place for
# Subfolders of a pipeline: in diffusers' layout and in ours.
TRANSFORMER, VAE, TEXT = ("transformer", "dit"), ("vae",), ("text_encoder", "text")
PARTS = (*TRANSFORMER, *VAE, REST)  # of an export


# ---- in --------------------------------------------------------------------------------------------------------------


def import_(
  source: str, out: str, *, dtype: str = "keep", config: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
  """Brings weights in.

  Args:
    source: a folder or file of one model, a pipeline in diffusers' layout, or what `export` wrote.
    out: where it goes: one model becomes a folder of safetensors under our names, for `init_from`, `codec.weights` and
      `text.weights`; a pipeline or an export becomes a work directory that `kling sample` takes.
    dtype: of the tensors of one model: keep, float32 or bfloat16; work directories hold float32.
    config: training config of a pipeline's work directory, in place of the one that fits the transformer.
    overrides: of that config, such as "--config.precision=bfloat16".

  Returns:
    The summary, JSON-ready.

  Raises:
    UsageError: nothing there, `out` is in use, or a config for what takes none.
    WeightsError: weights that are damaged, unknown or of a form that is not built here.
  """
  folder, target = pathlib.Path(source), pathlib.Path(out)
  if not folder.exists():
    raise UsageError(f"there is no {source}")
  if target.exists() and any(target.iterdir()):
    raise UsageError(f"{out} is not empty; give a new --out")
  exported = (folder / MODEL).is_file()
  transformer = _part(folder, TRANSFORMER)
  if transformer is not None and not exported:
    return _import_pipeline(folder, transformer, target, config, overrides)
  if config or overrides:
    raise UsageError(f"{source} is no pipeline (transformer/ and vae/), and takes no --config")
  if exported:
    return _import_export(folder, target)
  found = detect.recognise(folder)
  if found is None:
    near = sorted({name.split(".")[0] for name in safetensors.Tensors(folder)})[:8]
    raise WeightsError(
      f"{source} holds nothing that is known here; its names begin with {', '.join(near)}. Known: Wan 2.1's "
      "text-to-video transformers and VAE, T5 v1.1, umT5, CLIP's text tower, Stable Diffusion's VAE (docs/weights.md)"
    )
  return outward.inward(found, target, dtype)


def _part(folder: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path | None:
  return next((folder / name for name in names if folder.is_dir() and (folder / name).is_dir()), None)


def _import_pipeline(
  folder: pathlib.Path, transformer: pathlib.Path, target: pathlib.Path, spec: str | None, overrides: Sequence[str]
) -> dict[str, Any]:
  """A work directory of a transformer with the VAE and the text encoder beside it."""
  dit = detect.wanted(transformer, "video_dit")
  vae_folder, text_folder = _part(folder, VAE), _part(folder, TEXT)
  if vae_folder is None:
    raise WeightsError(f"{folder} has a transformer and no vae; a work directory for `kling sample` needs both")
  vae = detect.wanted(vae_folder, "video_vae")
  text = None if text_folder is None else detect.wanted(text_folder, *encoders.TEXT_KINDS)
  family = f"d{dit.config.width}"  # a member of the scaling family, by its width
  sizes = video_dit.PRESETS | ({family: video_dit.preset(family)} if dit.config.width % 16 == 0 else {})
  size = named(sizes, dit.config, ("conditions", "remat", "latent_channels", "text_width"), "transformer")
  preset = named(video_vae.PRESETS, vae.config, ("remat",), "vae")
  config = config_lib.load(spec or f"video_dit:size={size},res=480p", overrides)
  config.model.size, config.model.conditions = size, ()
  config.codec.name, config.codec.preset, config.codec.weights = "vae", preset, str(vae_folder.resolve())
  config.codec.channels, config.codec.spatial = vae.config.channels, vae.config.spatial
  config.text.encoder, config.text.width, config.text.padding = "cached", dit.config.text_width, True
  config.text.weights = None if text_folder is None else str(text_folder.resolve())
  job = task.make(config)
  params: Params = {}
  for prefix, found in (("dit.", dit), ("codec.", vae)):
    wanted = {name.removeprefix(prefix): leaf for name, leaf in job.shapes.items() if name.startswith(prefix)}
    loaded, _ = safetensors.load_into(wanted, found.tensors.source, found.name_map, allow_unexpected=found.ignored)
    params |= {prefix + name: array for name, array in loaded.items()}
  params["null_text"] = _null_text(config, text is not None)
  sources = {
    name: outward.origin(found) for name, found in (("dit", dit), ("vae", vae), ("text", text)) if found is not None
  }
  constants = {"conditions": conditions.Percentiles(()).to_json(), "sources": sources}
  _write_workdir(target, config, params, job, 0, constants)
  return {
    "kind": "work directory", "folder": str(target), "size": size, "vae": preset,
    "parameters": sum(array.size for array in params.values()), "text": config.text.weights, "source": sources,
  }  # fmt: skip


def named(presets: Mapping[str, Any], shape: Any, free: tuple[str, ...], what: str) -> str:
  """The preset of this shape, apart from the fields `free`.

  Raises:
    WeightsError: none has it.
  """
  same = {field: getattr(shape, field) for field in free}
  for name, preset in presets.items():
    if dataclasses.replace(preset, **same) == shape:
      return name
  raise WeightsError(
    f"the {what} has a shape without a name ({shape}), and configs go by names: {', '.join(presets)}. Import it alone, "
    "and give it a name in the PRESETS of its class"
  )


def _null_text(config: ml_collections.ConfigDict, known: bool) -> Any:
  """What the text encoder makes of the empty prompt, where that is one token (T5's is its end token); else zeros."""
  nothing = np.zeros((1, config.text.width), np.float32)
  if not known:
    return nothing
  encoder = encoders.text_encoder(config)
  tokens_BL, mask_BL = encoder.tokenizer([""])
  length = int(mask_BL.sum())
  if length != 1:
    return nothing
  text_BLD = jax.jit(encoder.encode)(encoder.params, tokens_BL[:, :1], mask_BL[:, :1])
  return np.asarray(text_BLD[0], np.float32)


def _import_export(folder: pathlib.Path, target: pathlib.Path) -> dict[str, Any]:
  """The work directory of which `export` made `folder`."""
  try:
    facts = json.loads((folder / MODEL).read_text(encoding="utf-8"))
    config, step, constants = config_lib.restore(facts["config"]), int(facts["step"]), dict(facts["constants"])
    prefixes = {str(name): str(prefix) for name, prefix in facts["parts"].items()}
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise WeightsError(f"{folder / MODEL} is damaged ({error!r}); export the model again") from error
  job = task.make(config)
  params: Params = {}
  sources = {}
  for name, prefix in prefixes.items():
    if name not in PARTS:
      raise WeightsError(f"{folder / MODEL} names the part {name!r}; there are {', '.join(PARTS)}")
    part = folder / name
    found = None if name == REST else detect.recognise(part)
    wanted = {path.removeprefix(prefix): leaf for path, leaf in job.shapes.items() if path.startswith(prefix)}
    if found is None:
      held = safetensors.Tensors(part)
      wanted = {path: leaf for path, leaf in wanted.items() if path in held}
      loaded, _ = safetensors.load_into(wanted, part)
    else:
      missing = found.ours if REST in prefixes else ()
      loaded, _ = safetensors.load_into(wanted, part, found.name_map, allow_missing=missing)
      sources[name] = outward.origin(found)
    params |= {prefix + path: array for path, array in loaded.items()}
  lost = [path for path in job.shapes if path not in params]
  if lost:
    raise WeightsError(f"{folder} lacks {len(lost)} of {len(job.shapes)} parameters, first {lost[0]}; export it again")
  _write_workdir(target, config, params, job, step, constants | {"sources": sources})
  return {"kind": "work directory", "folder": str(target), "step": step, "source": sources}


def _write_workdir(
  target: pathlib.Path, config: ml_collections.ConfigDict, params: Params, job: task.Task, step: int, constants: Any
) -> None:
  trained = [name for name in job.shapes if job.trainable(name)]
  target.mkdir(parents=True, exist_ok=True)
  checkpoints = Checkpoints(target, config.checkpoint)
  meta = {"config": config_lib.plain(config), "counters": {}, "constants": constants}
  checkpoints.save_weights(step, {name: np.asarray(params[name]) for name in job.shapes}, trained, meta)
  checkpoints.close()
  files.write_json(target / "config.json", config_lib.plain(config))  # last: without it this is no work directory


# ---- out -------------------------------------------------------------------------------------------------------------


def export(folder: str, out: str, *, naming: str = "kling_jax", step: int | None = None) -> dict[str, Any]:
  """Writes the EMA weights of a video_dit or video_vae work directory as folders of safetensors.

  Args:
    folder: the work directory.
    out: a new folder; of a video_dit it gets dit/ (or transformer/), vae/ where the codec is one, rest/ for what is
      neither (null text, an encoder trained along), lora.safetensors of a run that trained adapters, and
      kling_jax.json; of a video_vae the VAE alone.
    naming: kling_jax, or diffusers: Wan's names; what they have no place for goes to rest/ as well.
    step: of the checkpoint; None for the newest.

  Raises:
    UsageError: another naming or task, or `out` is in use. WeightsError: no checkpoint.
  """
  if naming not in NAMINGS:
    raise UsageError(f"--naming {naming!r} is unknown; there are {', '.join(NAMINGS)}")
  source, target = pathlib.Path(folder), pathlib.Path(out)
  if target.exists() and any(target.iterdir()):
    raise UsageError(f"{out} is not empty; give a new --out")
  config = workdir.read_config(source)
  if config.task not in ("video_dit", "video_vae"):
    raise UsageError(f"{folder} trained the task {config.task!r}; export knows video_dit and video_vae")
  job = task.make(config)
  checkpoints = Checkpoints(source)
  step = checkpoints.latest() if step is None else step
  if step is None:
    raise WeightsError(f"{folder} holds no complete checkpoint")
  params = checkpoints.restore_params(step, job.shapes)
  told = {"path": str(source), "step": step}
  if config.task == "video_vae":
    _write_part(target, naming, "video_vae", job.shape, params, told)  # type: ignore[attr-defined]
    return {"kind": "video_vae", "folder": out, "step": step, "naming": naming, "parts": {"": ""}, "rest": []}
  rest, parts = _write_model(target, naming, config, job, params, told)
  constants = checkpoints.meta(step)["constants"]
  facts = {"config": config_lib.plain(config), "step": step, "constants": constants, "parts": parts}
  files.write_json(target / MODEL, facts)
  return {"kind": "video_dit", "folder": out, "step": step, "naming": naming, "parts": parts, "rest": rest}


def _write_model(
  target: pathlib.Path, naming: str, config: Any, job: Any, params: Params, told: Mapping[str, Any]
) -> tuple[list[str], dict[str, str]]:
  """Writes the parts of a text-to-video model; returns what went to rest/, and {folder: prefix of its parameters}."""
  own = naming == NAMINGS[0]
  under = lambda prefix: {name.removeprefix(prefix): params[name] for name in params if name.startswith(prefix)}
  parts = {TRANSFORMER[own]: "dit."}
  rest = _write_part(target / TRANSFORMER[own], naming, "video_dit", job.dit, under("dit."), told)
  if config.codec.name == "vae":
    parts["vae"] = "codec."
    _write_part(target / "vae", naming, "video_vae", video_vae.preset(config.codec.preset), under("codec."), told)
  held = tuple(parts.values())
  beside = {f"dit.{path}" for path in rest} | {name for name in params if not name.startswith(held)}
  if beside:
    parts[REST] = ""
    safetensors.write(target / REST, {name: params[name] for name in beside})
  adapters = nn_lora.of(params, "lora.")
  if adapters and own:
    lora.save(target / LORA, adapters)
  elif adapters:
    lora.export(target / LORA, adapters, job.dit)
  return sorted(beside), parts


def _write_part(
  folder: pathlib.Path, naming: str, kind: str, config: Any, params: Params, told: Mapping[str, Any]
) -> list[str]:
  if naming == NAMINGS[0]:
    outward.write_ours(folder, kind, config, params, told)
    return []
  return outward.write_diffusers(folder, kind, config, params)
