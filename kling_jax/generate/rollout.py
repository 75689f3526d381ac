"""`kling rollout`: a world model goes on, clip after clip, and writes each one as soon as it is filmed."""

import dataclasses
import json
import pathlib
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kling_jax import files
from kling_jax.data import decode, encode, grid
from kling_jax.errors import DataError, UsageError, WeightsError
from kling_jax.models import owl as owl_lib
from kling_jax.nn import params as params_lib
from kling_jax.nn import rng
from kling_jax.train import sharding, task, workdir
from kling_jax.train.checkpoint import Checkpoints
from kling_jax.train.tasks.owl import OwlTask
from kling_jax.world import film
from kling_jax.world.rollout import Action, Clip, RolloutState, fork

FILMED = ("generate", "world", "self_rollout")  # stages whose checkpoints can film
WRITES = ("world", "self_rollout")  # and those that can write dynamics
LENGTHS = {"2s": (2.0, 0), "8s": (8.0, 0), "24s": (24.0, 2)}  # ready lengths: seconds, scene cuts


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to roll out; None = the training config's value.

  Attributes:
    steps, method, context_noise: of the sampler and the noise on its context.
    state, history, form, level, rescale: of guidance.
    temperature, top_p, repetition: of written dynamics.
  """

  steps: int | None = None
  method: str | None = None
  context_noise: float | None = None
  state: float | None = None
  history: float | None = None
  form: str | None = None
  level: float | None = None
  rescale: float | None = None
  temperature: float | None = None
  top_p: float | None = None
  repetition: float | None = None


WRITING = ("temperature", "top_p", "repetition")
MOMENTS = 32  # that a rollout can go back to; each holds a cache of the language model


@dataclasses.dataclass(frozen=True)
class Filmed:
  """One finished clip.

  Attributes:
    number: from 0.
    frames_THWC: uint8.
    dynamics: the text that led to it; `given` by the user, or written by the model.
    cut: whether it opens a new scene.
    seconds: from asking for it to its frames.
  """

  number: int
  frames_THWC: np.ndarray
  dynamics: str
  given: bool
  cut: bool
  seconds: float


class Model:
  """A trained world model, loaded once."""

  def __init__(self, folder: str | pathlib.Path, step: int | None = None, settings: Settings = Settings()):
    """Loads the EMA weights of a work directory's newest (or given) checkpoint; nothing is compiled yet.

    Raises:
      UsageError: the work directory is of another task, or of a stage that films nothing.
      WeightsError: there is no checkpoint, or it is of another preset.
    """
    folder = pathlib.Path(folder)
    self.config = workdir.read_config(folder)
    if self.config.task != "owl":
      raise UsageError(f"{folder} trained the task {self.config.task!r}; a rollout needs an owl work directory")
    if self.config.stage not in FILMED:
      raise UsageError(
        f"{folder} is of stage {self.config.stage!r}, whose Video DiT was never trained; train the stage 'generate' "
        "from it, then 'world'"
      )
    job = task.make(self.config)
    assert isinstance(job, OwlTask)
    self.task = job
    changes = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    writing = {name: changes.pop(name) for name in WRITING if name in changes}
    self.world = self.task.world(self.task.camera(**changes), **writing)
    checkpoints = Checkpoints(folder)
    self.step = checkpoints.latest() if step is None else step
    if self.step is None:
      raise WeightsError(f"{folder} holds no complete checkpoint yet")
    mesh = sharding.make_mesh({"replica": 1, "fsdp": -1, "context": 1, "tensor": 1})
    placed = sharding.parameter_shardings(mesh, self.task.shapes, self.task.axes)
    shapes = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[name])
      for name, leaf in self.task.shapes.items()
    }
    self.params = jax.jit(owl_lib.adapted)(checkpoints.restore_params(self.step, shapes))
    self.name = f"{folder.resolve()}@{self.step}"
    self.begin = jax.jit(self.world.begin)
    self.advance = jax.jit(self.world.step)
    self.first_frame = jax.jit(self._first_frame)

  @property
  def fps(self) -> float:
    return self.config.data.fps

  @property
  def writes(self) -> bool:
    """Whether it was taught to write dynamics."""
    return self.config.stage in WRITES

  @property
  def clip_seconds(self) -> float:
    return self.config.data.frames / self.fps

  def clips_of(self, seconds: float) -> int:
    """The number of clips that last so long, at least 1."""
    return max(round(seconds / self.clip_seconds), 1)

  def check(self, clips: int, dynamics: Sequence[str | None], image: np.ndarray | None, *, asked: bool = False) -> None:
    """Refuses, before anything is compiled, what the model cannot do; `asked`: texts come later, clip by clip.

    Raises:
      ConfigError: more clips than there are positions; names the largest legal number.
      UsageError: texts, an image or dynamics that do not fit.
    """
    self.task.check_length(clips, self.config.lm.context, "--clips")
    if len(dynamics) > clips:
      raise UsageError(f"{len(dynamics)} --dynamics for {clips} clips; give at most one a clip")
    for number, text in enumerate(dynamics):
      if text is not None:
        self.check_text(text, self.config.data.dynamics_tokens, f"--dynamics of clip {number}")
    missing = next((number for number in range(clips) if number >= len(dynamics) or dynamics[number] is None), None)
    if missing is not None and not asked:
      self.check_writes(missing)
    if image is not None:
      self.check_image(image)

  def check_writes(self, clip: int) -> None:
    """UsageError where clip `clip` has no text and the model was never taught to write one."""
    if not self.writes:
      raise UsageError(
        f"stage {self.config.stage!r} was never taught to write dynamics, and clip {clip} has none: give --dynamics "
        "for every clip or --repeat_prompt, or train the stage 'world' from it"
      )

  def check_text(self, text: str, places: int, what: str) -> None:
    """UsageError where a text is empty, longer than its places, or has words that the model does not know."""
    tokenizer, most = self.task.tokenizer(places), places - 2
    if not text.strip():
      raise UsageError(f"{what} is empty; give a text of 1 to {most} {tokenizer.unit}")
    length = tokenizer.count(text)
    if length > most:
      raise UsageError(f"{what} has {length} {tokenizer.unit}; this model takes at most {most}")
    try:
      tokenizer([text])
    except DataError as error:
      raise UsageError(f"{what}: {error}") from error

  def check_image(self, image_HWC: np.ndarray) -> None:
    """UsageError where an image is not uint8 in the model's size."""
    wanted = (self.config.data.height, self.config.data.width, 3)
    if image_HWC.shape != wanted or image_HWC.dtype != np.uint8:
      raise UsageError(f"the image is {image_HWC.dtype} {image_HWC.shape}; this model takes uint8 {wanted}")

  def read_image(self, path: str) -> np.ndarray:
    """The picture in a file, scaled and cropped to the model's size.

    Raises:
      UsageError: there is no such file. DataError: it is no picture.
    """
    if not pathlib.Path(path).is_file():
      raise UsageError(f"there is no file {path}")
    return decode.image(path, (self.config.data.height, self.config.data.width))

  def tokens(self, texts: Sequence[str], places: int) -> tuple[np.ndarray, np.ndarray]:
    return self.task.tokenizer(places)(texts)

  def _first_frame(self, params, tokens_BL, mask_BL, fps_B, keys_B):
    model = params_lib.merge(self.task.graph, params)
    codec = self.task.codec(model)
    latents = film.first_frame(model, self.world.process, self.world.camera, codec, tokens_BL, mask_BL, fps_B, keys_B)
    return film.pixels(codec, latents)[:, 0]


class Rollout:
  """One rollout under way: clips are made when asked for, and the last `MOMENTS` can be gone back to.

  Attributes:
    clips: what was filmed, in order.
    image_HWC: what it began with.
    prompt, seed: as given.
  """

  def __init__(self, model: Model, prompt: str, image_HWC: np.ndarray | None = None, seed: int = 0):
    """Reads prompt and image; without an image the Video DiT films one frame of the prompt.

    Raises:
      UsageError: an empty or too long prompt, an image of another shape.
    """
    model.check_text(prompt, model.config.data.prompt_tokens, "--prompt")
    self.model, self.prompt, self.seed = model, prompt, seed
    self.clips: list[Filmed] = []
    self._fps_B = np.array([model.fps], np.float32)
    keys_B = rng.sample_keys(jax.random.key(seed), 0, np.zeros(1, np.uint32))
    prompt_BL = model.tokens([prompt], model.config.data.prompt_tokens)
    if image_HWC is None:
      frames = model.first_frame(model.params, *prompt_BL, self._fps_B, rng.stream(keys_B, "first_frame"))
      image_HWC = np.asarray(frames)[0]
    model.check_image(image_HWC)
    self.image_HWC = image_HWC
    self._states: list[RolloutState] = [
      model.begin(model.params, image_HWC[None], *prompt_BL, self._fps_B, keys_B)
    ]  # fmt: skip

  @property
  def state(self) -> RolloutState:
    """The present moment."""
    return self._states[-1]

  @property
  def earliest(self) -> int:
    """The earliest moment that is held: after so many clips."""
    return len(self.clips) + 1 - len(self._states)

  def check_next(self, dynamics: str | None) -> None:
    """Refuses what `next` would refuse."""
    model, number = self.model, len(self.clips)
    model.task.check_length(number + 1, model.config.lm.context, "--clips")
    if dynamics is None:
      model.check_writes(number)
    else:
      model.check_text(dynamics, model.config.data.dynamics_tokens, f"--dynamics of clip {number}")

  def next(self, dynamics: str | None = None, cut: bool = False) -> Filmed:
    """Films the next clip: after `dynamics`, or after what the model writes.

    Raises:
      UsageError: an empty or too long text. ConfigError: no positions are left.
    """
    self.check_next(dynamics)
    model, number = self.model, len(self.clips)
    started = time.perf_counter()
    tokens_BL, mask_BL = model.tokens([dynamics or ""], model.config.data.dynamics_tokens)
    action = Action(*map(jnp.asarray, (tokens_BL, mask_BL, [dynamics is not None], [cut])))
    clip, after = model.advance(model.params, self.state, action)
    frames_THWC = np.asarray(clip.frames_BTHWC)[0]
    filmed = Filmed(number, frames_THWC, self._text(clip), dynamics is not None, cut, time.perf_counter() - started)
    self.clips.append(filmed)
    self._states = [*self._states[-MOMENTS:], after]
    return filmed

  def _text(self, clip: Clip) -> str:
    real_L = np.asarray(clip.dynamics_mask_BL)[0]
    return self.model.task.tokenizer(len(real_L)).decode(np.asarray(clip.dynamics_BL)[0][real_L])

  def stream(self, clips: int, dynamics: Sequence[str | None] = (), cuts: Sequence[int] = ()) -> Iterator[Filmed]:
    """Yields `clips` clips as they finish; `cuts` are the numbers of those that open a scene."""
    for number in range(clips):
      yield self.next(dynamics[number] if number < len(dynamics) else None, cut=number in cuts)

  def rewind(self, clips: int) -> None:
    """Goes back to the moment after `clips` clips.

    Raises:
      UsageError: that moment is not among those that were lived.
    """
    first = self.earliest
    if not first <= clips <= len(self.clips):
      raise UsageError(f"cannot go back to clip {clips}: this rollout holds {first} to {len(self.clips)}")
    del self._states[clips - first + 1 :], self.clips[clips:]

  def fork(self, branch: int | None = None) -> "Rollout":
    """A second rollout from the same moment; with `branch`, under other dice."""
    other = object.__new__(Rollout)
    other.__dict__ = {**self.__dict__, "clips": list(self.clips), "_states": list(self._states)}
    if branch is not None:
      other._states[-1] = fork(self.state, branch)
    return other

  # ---- files ---------------------------------------------------------------------------------------------------------

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the present moment (not the past ones) and the films as one .npz, whole or not at all."""
    leaves = [_plain(leaf) for leaf in jax.tree.leaves(self.state)]
    facts = [{**dataclasses.asdict(clip), "frames_THWC": None} for clip in self.clips]
    about = {"model": self.model.name, "prompt": self.prompt, "seed": self.seed, "clips": facts}
    arrays: dict[str, Any] = {f"leaf_{number}": leaf for number, leaf in enumerate(leaves)}
    shape = (0, *self.image_HWC.shape)
    films = np.concatenate([clip.frames_THWC for clip in self.clips]) if self.clips else np.zeros(shape, np.uint8)
    with files.whole(path) as temporary, temporary.open("wb") as file:
      np.savez(file, about=np.array(json.dumps(about)), image=self.image_HWC, films=films, **arrays)

  @classmethod
  def load(cls, model: Model, path: str | pathlib.Path) -> "Rollout":
    """The rollout that was saved at `path`, to go on with the same model.

    Raises:
      DataError: it is no saved rollout, or damaged. WeightsError: it was saved with another model.
    """
    try:
      with np.load(path, allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files}
      about = json.loads(str(arrays["about"]))
      films, image, saved_with = arrays["films"], arrays["image"], about["model"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
      raise DataError(f"{path} is no saved rollout ({str(error)[:200]})") from error
    if saved_with != model.name:
      raise WeightsError(f"{path} was saved with {saved_with}, not with {model.name}; load that one")
    rollout = cls(model, about["prompt"], image, about["seed"])
    shapes, structure = jax.tree.flatten(rollout.state)
    leaves = [arrays.get(f"leaf_{number}") for number in range(len(shapes))]
    typed = []
    for leaf, wanted in zip(leaves, shapes, strict=True):
      if leaf is None or leaf.shape != _plain(wanted).shape:
        raise DataError(f"{path} is damaged: it lacks a part of the rollout, or has it in another size")
      typed.append(_typed(leaf, wanted))
    rollout._states = [jax.tree.unflatten(structure, typed)]
    each = np.split(films, len(about["clips"])) if about["clips"] else []
    rollout.clips = [Filmed(**{**facts, "frames_THWC": part}) for facts, part in zip(about["clips"], each, strict=True)]
    return rollout


def _plain(leaf: Any) -> np.ndarray:
  is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  value = jax.random.key_data(leaf) if is_key else leaf
  return np.asarray(value, np.float32) if value.dtype == jnp.bfloat16 else np.asarray(value)


def _typed(value: np.ndarray, like: Any) -> jax.Array:
  if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(like))
  return jnp.asarray(value, like.dtype)


# ---- the verb ------------------------------------------------------------------------------------------------------


def scenes(clips: int, cuts: int) -> tuple[int, ...]:
  """The numbers of the clips that open the second and later of `cuts` + 1 scenes of about equal length."""
  return tuple(sorted({round(clips * part / (cuts + 1)) for part in range(1, cuts + 1)} - {0, clips}))


def run(
  folder: str,
  prompt: str,
  out: str,
  *,
  clips: int | None = None,
  length: str | None = None,
  image: str | None = None,
  dynamics: Sequence[str] = (),
  repeat_prompt: bool = False,
  cuts: Sequence[int] | None = None,
  seed: int = 0,
  step: int | None = None,
  settings: Settings = Settings(),
  ask: Callable[[str], str] | None = None,
  tell: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Rolls out and writes `out`/clip-000.mp4, ... as they finish, then film.mp4, film.png and rollout.json and .npz.

  Args:
    clips: how many; or `length`: "2s", "8s" or "24s", the last with two scene cuts.
    dynamics: texts of the first clips, "" where the model shall write; `repeat_prompt`: the prompt for all others.
    cuts: numbers of clips that open a scene.
    ask: interactive: called before each clip; returns a text, "" (the model writes), "/cut TEXT", "/back", "/quit".
    tell: called with a line a clip.

  Returns:
    What rollout.json holds: prompt, seed, clips (number, file, dynamics, given, cut, seconds), first_clip_s, clip_s.

  Raises:
    UsageError, ConfigError, WeightsError: before anything is compiled.
  """
  if (clips is None) == (length is None):
    raise UsageError("give either --clips or --length")
  model = Model(folder, step, settings)
  if length is not None:
    if length not in LENGTHS:
      raise UsageError(f"--length {length!r}: ready ones are {', '.join(LENGTHS)}; or give --clips")
    seconds, scene_cuts = LENGTHS[length]
    clips = model.clips_of(seconds)
    cuts = scenes(clips, scene_cuts) if cuts is None else cuts
  assert clips is not None
  texts: list[str | None] = [text or None for text in dynamics]
  if repeat_prompt:
    texts += [prompt] * (clips - len(texts))
  wrong = next((number for number in cuts or () if not 0 <= number < clips), None)
  if wrong is not None:
    raise UsageError(f"--cut {wrong}: the clips are 0 to {clips - 1}")
  picture = None if image is None else model.read_image(image)
  model.check(clips, texts, picture, asked=ask is not None)
  folder_out = pathlib.Path(out)
  folder_out.mkdir(parents=True, exist_ok=True)
  rollout = Rollout(model, prompt, picture, seed)
  while len(rollout.clips) < clips:
    number = len(rollout.clips)
    text, cut = texts[number] if number < len(texts) else None, number in (cuts or ())
    if ask is not None:
      said = ask(f"clip {number}> ").strip()
      if said == "/quit":
        break
      if said == "/back":
        rollout.rewind(max(number - 1, 0))
        (folder_out / name(len(rollout.clips))).unlink(missing_ok=True)
        continue
      cut = cut or said.startswith("/cut")
      text = said.removeprefix("/cut").strip() or None
    filmed = rollout.next(text, cut)
    encode.write(folder_out / name(filmed.number), filmed.frames_THWC, fps=model.fps)
    tell(f"{folder_out / name(filmed.number)}  {filmed.seconds:.2f} s  {'cut, ' * cut}{filmed.dynamics}")
  return finish(rollout, folder_out)


def name(number: int) -> str:
  """The file of clip `number`."""
  return f"clip-{number:03d}.mp4"


def finish(rollout: Rollout, out: pathlib.Path) -> dict[str, Any]:
  """Writes the whole film, a contact sheet, the rollout's moment, and what was said and how long it took."""
  seconds = [clip.seconds for clip in rollout.clips]
  facts = [
    {"number": clip.number, "file": name(clip.number), "dynamics": clip.dynamics, "given": clip.given, "cut": clip.cut,
     "seconds": round(clip.seconds, 4)}
    for clip in rollout.clips
  ]  # fmt: skip
  report = {
    "prompt": rollout.prompt, "seed": rollout.seed, "model": rollout.model.name, "fps": rollout.model.fps,
    "first_clip_s": round(seconds[0], 4) if seconds else None,  # with compilation, where the program is new
    "clip_s": round(float(np.median(seconds[1:])), 4) if len(seconds) > 1 else None,
    "clips": facts,
  }  # fmt: skip
  if rollout.clips:
    films = np.stack([clip.frames_THWC for clip in rollout.clips])
    encode.write(out / "film.mp4", films.reshape(-1, *films.shape[2:]), fps=rollout.model.fps)
    grid.write_png(out / "film.png", grid.contact_sheet(films))
  rollout.save(out / "rollout.npz")
  files.write_json(out / "rollout.json", report)
  return report
