"""`kling eval rollout` and `kling eval world`: rollouts on disk, and a checkpoint told the stories of memory-v1.

Both write `eval.json`, and `index.html` with the films.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np

from kling_jax import progress
from kling_jax.data import decode, memory_world
from kling_jax.data.memory_world_frames import CLIP_S, walk_frames
from kling_jax.errors import DataError, UsageError
from kling_jax.evals import compare_page, rollouts
from kling_jax.generate import evaluate

SHOWN = 12
ABOUT = "rollout.json"  # what `kling rollout` writes beside its clips


def on_disk(places: list[str], out: str) -> tuple[dict[str, Any], str]:
  """Evaluates the folders that `kling rollout` wrote; a folder of such folders counts as all of them.

  Raises:
    UsageError: a folder without a rollout. DataError: a damaged one.
  """
  found = [folder for place in places for folder in _rollouts(pathlib.Path(place))]
  rows: list[dict[str, float]] = []
  shown: list[compare_page.Shown] = []
  for folder in progress.track(found, "evaluate", len(found)):
    frames_OTHWC, about = read(folder)
    written = [clip["dynamics"] for clip in about["clips"] if not clip["given"]]
    cuts = [bool(clip["cut"]) for clip in about["clips"]]
    rows.append(rollouts.alone(frames_OTHWC, about["fps"], cuts, written))
    if len(shown) < SHOWN:
      film = frames_OTHWC.reshape(-1, *frames_OTHWC.shape[2:])
      shown.append(compare_page.Shown(f"{folder.name}: {about['prompt']}", "Whole films.", [film], about["fps"]))
  notes = ["Texts are those that the model wrote; given ones are left out."]
  names = [folder.name for folder in found]
  return evaluate.write(out, "Evaluation of rollouts", "", {"rollouts": rows}, {"rollouts": names}, shown, notes=notes)


def read(folder: pathlib.Path) -> tuple[np.ndarray, dict[str, Any]]:
  """(frames uint8 (O, T, H, W, 3), what rollout.json says) of one rollout.

  Raises:
    DataError: it is damaged, or its clips differ in shape.
  """
  path = folder / ABOUT
  try:
    about = json.loads(path.read_text(encoding="utf-8"))
    names = [clip["file"] for clip in about["clips"]]
    about["fps"], about["prompt"], [(clip["dynamics"], clip["given"], clip["cut"]) for clip in about["clips"]]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); roll out again") from error
  if not names or any(os.path.basename(name) != name for name in names):
    raise DataError(f"{path} names no clips, or files outside of its folder")
  clips = [np.stack([frame for _, _, frame in decode.iterate(folder / name)]) for name in names]
  if len({clip.shape for clip in clips}) > 1:
    raise DataError(f"{folder}: clips of differing shape")
  return np.stack(clips), about


def _rollouts(place: pathlib.Path) -> list[pathlib.Path]:
  if (place / ABOUT).is_file():
    return [place]
  below = sorted(path.parent for path in place.glob(f"*/{ABOUT}"))
  if not below:
    raise UsageError(f"{place} holds no rollout ({ABOUT}); write one with `kling rollout --out {place}`")
  return below


def world(
  workdir: str, out: str | None, *, worlds: int, clips: int, seed: int, step: int | None, settings: Any
) -> tuple[dict[str, Any], str]:
  """Tells a world model the sentences of unseen stories of memory-v1 and judges what it films.

  Beside it stand the figures of the world's own films, which an ideal model would reach.

  Args:
    worlds: stories. clips: of each. seed: of the stories; take another one than training's. settings: of the rollout.

  Raises:
    UsageError: less than one story or two clips; a model whose clips do not last as long as those of memory-v1, or
      that cannot read its texts.
  """
  from kling_jax.generate import rollout

  if worlds < 1 or clips < 2:
    raise UsageError(f"--worlds {worlds} --clips {clips}: at least 1 story of 2 clips")
  model = rollout.Model(workdir, step, settings)
  data = model.config.data
  if abs(model.clip_seconds - CLIP_S) > 1e-6:
    raise UsageError(f"{workdir} films clips of {model.clip_seconds:g} s; those of memory-v1 last {CLIP_S:g} s")
  times_s = np.arange(1, clips * data.frames + 1) / data.frames * CLIP_S
  rows: dict[str, list[dict[str, float]]] = {"made": [], "true": []}
  names: list[str] = []
  shown: list[compare_page.Shown] = []
  stories = [memory_world.story(seed, index, clips) for index in range(worlds)]
  for story in stories:  # what a model cannot read is said before anything is filmed
    model.check_text(memory_world.scene(story.states[0]), data.prompt_tokens, "the first scene")
    model.check(clips, story.sentences, None)
  for index, story in enumerate(progress.track(stories, "worlds", worlds)):
    shape = (clips, data.frames, data.height, data.width, 3)
    true_OTHWC = walk_frames(story, times_s, data.height, data.width).reshape(shape)
    image_HWC = walk_frames(story, np.zeros(1), data.height, data.width)[0]
    live = rollout.Rollout(model, memory_world.scene(story.states[0]), image_HWC, seed=index)
    cut_numbers = [number for number, cut in enumerate(story.cuts) if cut]
    filmed = list(live.stream(clips, story.sentences, cut_numbers))
    made_OTHWC = np.stack([clip.frames_THWC for clip in filmed])
    for name, frames in (("made", made_OTHWC), ("true", true_OTHWC)):
      told = rollouts.in_memory_world(frames, story)
      rows[name].append(rollouts.alone(frames, model.fps, story.cuts, []) | told)
    names.append(f"memory-v1 {seed}/{index}")
    if len(shown) < SHOWN:
      films = [frames.reshape(-1, *frames.shape[2:]) for frames in (true_OTHWC, made_OTHWC)]
      text = f"{names[-1]}: {'; '.join(story.sentences)}"
      shown.append(compare_page.Shown(text, "The world's own film, and the model's.", films, model.fps))
  where = pathlib.Path(workdir)
  notes = [f"{worlds} stories of {clips} clips, seed {seed}; their sentences were given to the model."]
  title, subtitle = f"Evaluation of {where.name} in memory-v1", f"step {model.step}"
  place = out or str(where / "report" / "world")
  sets = {"made": names, "true": names}
  return evaluate.write(place, title, subtitle, rows, sets, shown, notes=notes)
