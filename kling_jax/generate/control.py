"""The control matrix of a work directory: sampled at several levels of each score that the model is told."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from kling_jax import answers, files, measure
from kling_jax.errors import DataError, UsageError
from kling_jax.evals import control, control_page
from kling_jax.generate import held_out, sample

REAL_CLIPS = 192  # that the scale of scores is taken from


@dataclasses.dataclass(frozen=True)
class Options:
  """Of the control matrix.

  Attributes:
    pairs: texts and seeds. seed: of the first. levels: of the raised score. scorers: words of `measure.chosen`.
    settings: of the sampler. step: checkpoint of both; None: the newest ones.
  """

  pairs: int = 48
  seed: int = 0
  levels: tuple[float, ...] = control.LEVELS
  scorers: tuple[str, ...] = ("default",)
  settings: sample.Settings = dataclasses.field(default_factory=sample.Settings)
  step: int | None = None


def run(workdir: str, baseline: str | None, out: str, options: Options = Options()) -> tuple[dict[str, Any], str]:
  """The control matrix of a work directory, and of a baseline on the same texts, seeds and scale.

  Writes `control.json` and `index.html` into the folder `out`.

  Args:
    workdir: of a video_dit run that is told scores. baseline: another one, with the same scores and size.

  Returns:
    What control.json holds, and the matrices as text.

  Raises:
    UsageError: a model without scores, or two that differ in scores, size or rate.
    DataError: too few held-out clips.
  """
  model = sample.Model(workdir, options.step)
  told = model.percentiles.names
  if not told:
    raise UsageError(f"{workdir} is told no scores: model.conditions is empty")
  scorers = measure.chosen(options.scorers)
  fps = options.settings.fps or model.config.data.fps
  prompts, clips = _real(model, options)
  yardstick = control.Yardstick.of_clips(clips, fps, scorers)
  found = {_name(model, ()): _matrix(model, prompts, yardstick, options)}
  if baseline is not None:
    other = sample.Model(baseline, options.step)
    if other.percentiles.to_json() != model.percentiles.to_json() or other.size(options.settings) != model.size(
      options.settings
    ):
      raise UsageError(f"{baseline} was trained with other scores, percentiles or sizes than {workdir}")
    found[_name(other, found)] = _matrix(other, prompts, yardstick, options)
  answer = {
    "workdir": str(workdir),
    "baseline": None if baseline is None else str(baseline),
    "pairs": len(prompts),
    "real_clips": yardstick.clips,
    "told_by": {one.name: f"{one.scorer} {one.version}" for one in model.percentiles.conditions},
    "models": {name: one.to_json() for name, one in found.items()},
  }
  folder = pathlib.Path(out)
  files.write_json(folder / "control.json", answers.plain(answer))
  facts = {"pairs of text and seed": len(prompts), "levels": len(options.levels), "real clips": yardstick.clips}
  control_page.build(found, facts, fps).write(folder / "index.html")
  return answer, "\n".join(control.text(name, one) for name, one in found.items())


def _matrix(model: sample.Model, prompts: list[str], yardstick: control.Yardstick, options: Options) -> control.Matrix:
  def sampler(asks: Sequence[control.Ask]) -> list[np.ndarray]:
    requests = [
      sample.Request(ask.prompt, seed=ask.seed, scores={n: model.percentiles.raw(n, 1000 * u) for n, u in ask.told})
      for ask in asks
    ]
    return model(requests, options.settings)

  told = model.percentiles.names
  return control.matrix(sampler, told, prompts, yardstick, seed=options.seed, levels=options.levels)


def _real(model: sample.Model, options: Options) -> tuple[list[str], list[np.ndarray]]:
  """Captions for the pairs, and real clips at the size of the samples: both of held-out videos."""
  batches, chosen = held_out.fitting(model, options.settings)
  if len(chosen) < options.pairs:
    raise DataError(
      f"{len(chosen)} held-out clips are long enough, {options.pairs} pairs need as many; lower --pairs, or train "
      "with a larger data.validation_fraction"
    )
  prompts = [batches.sources.info(clip).caption for clip in chosen[: options.pairs]]
  picks = np.unique(np.linspace(0, len(chosen) - 1, min(REAL_CLIPS, len(chosen))).round().astype(int))
  return prompts, held_out.frames_of(model, options.settings, batches, [chosen[k] for k in picks])


def _name(model: sample.Model, taken: Any) -> str:
  name = "scores in the caption" if model.config.model.told == "caption" else "scores through AdaLN"
  return f"{name}, baseline" if name in taken else name
