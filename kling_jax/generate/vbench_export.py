"""`kling eval vbench`: the videos that VBench, VBench-I2V and VBench-Long look at, and totals of their scores."""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kling_jax.errors import DataError, UsageError
from kling_jax.evals import vbench
from kling_jax.train import workdir as workdirs

TOTALS: dict[str, Callable[[Mapping[str, float]], vbench.Total]] = {
  "vbench": vbench.total,
  "i2v": vbench.i2v_total,
  "i2v-owl1": functools.partial(vbench.i2v_total, definition="owl1"),
}
SEED_STEP = 1000  # seeds of one prompt lie together, those of the next this far on


def export(
  workdir: str, suite: str, out: str, *, dimensions: list[str], images: str | None, clips: int, step: int | None,
  settings: Any, limit: int | None,
) -> dict[str, Any]:  # fmt: skip
  """Films the prompts of a suite with a checkpoint; started again, it goes on.

  A video_dit run films one video a prompt; an owl run rolls out `clips` clips, for VBench-Long and VBench-I2V.

  Args:
    suite: VBench's `VBench_full_info.json`, or `vbench2_i2v_full_info.json` of VBench-I2V.
    dimensions: only their prompts; []: all. images: folder of VBench-I2V's pictures.
    settings: `sample.Settings`; an owl run has its own. limit: first prompts only.

  Returns:
    {videos, folder, fps, command}: command is what VBench is to be called with.

  Raises:
    UsageError: an I2V suite without pictures, or another task. DataError: no suite, or a picture is missing.
  """
  prompts = vbench.read_suite(suite, dimensions)[:limit]
  needed = sorted({prompt.image for prompt in prompts if prompt.image})
  if needed and images is None:
    raise UsageError(f"{suite} is of VBench-I2V: give --images, the folder of its pictures")
  paths = {name: os.path.join(images or "", name) for name in needed}
  missing = [name for name, path in paths.items() if not os.path.isfile(path)]
  if missing:
    raise DataError(f"{images} lacks {len(missing)} of {len(needed)} pictures, first {missing[0]!r}")
  numbers = {text: number for number, text in enumerate(dict.fromkeys(prompt.text for prompt in prompts))}
  seed_of = lambda prompt, index: SEED_STEP * numbers[prompt.text] + index
  task = workdirs.read_config(pathlib.Path(workdir)).task
  if task == "video_dit":
    from kling_jax.generate import sample

    model = sample.Model(workdir, step)
    fps = float(settings.fps or model.config.data.fps)

    def film(prompt: vbench.Prompt, index: int) -> np.ndarray:
      image = paths[prompt.image] if prompt.image else None
      return model([sample.Request(prompt.text, seed=seed_of(prompt, index), image=image)], settings)[0]

  elif task == "owl":
    from kling_jax.generate import rollout

    world = rollout.Model(workdir, step)
    fps = world.fps

    def film(prompt: vbench.Prompt, index: int) -> np.ndarray:
      image = world.read_image(paths[prompt.image]) if prompt.image else None
      live = rollout.Rollout(world, prompt.text, image, seed=seed_of(prompt, index))
      return np.concatenate([clip.frames_THWC for clip in live.stream(clips)])

  else:
    raise UsageError(f"{workdir} trained the task {task!r}; VBench looks at videos of video_dit or owl runs")
  names = vbench.export(out, prompts, film, fps)
  asked = sorted({name for prompt in prompts for name in prompt.dimensions})
  program = "evaluate_i2v.py" if needed else "evaluate.py"
  return {
    "videos": len(names), "folder": out, "fps": fps,
    "command": f"python {program} --videos_path {out} --dimension {' '.join(asked)}",
  }  # fmt: skip


def totals(path: str, definition: str) -> dict[str, float]:
  """Quality, the other part and the total of VBench's scores.

  Args:
    path: JSON {dimension: score}, or VBench's own `*_eval_results.json`, {dimension: [score, ...]}.
    definition: vbench (also of VBench-Long), i2v, or i2v-owl1.

  Raises:
    UsageError: another definition. DataError: no scores, or a dimension is missing.
  """
  if definition not in TOTALS:
    raise UsageError(f"--total {definition!r}: one of {', '.join(TOTALS)}")
  try:
    held = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    if not isinstance(held, Mapping):
      raise ValueError("it is no object")
    scores = {name: float(value[0] if isinstance(value, list) else value) for name, value in held.items()}
  except (OSError, ValueError, TypeError, IndexError) as error:
    raise DataError(f"{path}: no scores of VBench ({type(error).__name__}: {error})") from error
  found = TOTALS[definition](scores)
  return {"quality": found.quality, "other": found.other, "total": found.total}
