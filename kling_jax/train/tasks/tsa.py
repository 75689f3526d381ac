"""Task `tsa`: a suitability score learnt from ratings, or from weak labels whose order is known."""

import functools
import zlib
from collections.abc import Generator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from kling_jax.curation import weak_labels
from kling_jax.data import records
from kling_jax.errors import ConfigError
from kling_jax.measure import fragments, vtss_labels, vtss_network
from kling_jax.measure.vtss_labels import ORIGINAL, Rated
from kling_jax.models import tsa
from kling_jax.nn import params as params_lib
from kling_jax.nn import rng
from kling_jax.nn.params import Params
from kling_jax.train.task import Batch, Task

BACKBONES = ("swin.", "convnext.")
LADDER = 5  # clips of a shot that a batch takes together: the original and four strengths of one degradation


class TSATask(Task):
  """See configs/tsa.py for the keys.

  Loss of a batch: plcc * L_plcc + rank * L_rank + pair * L_pair, see the functions below. All three tie the rows of a
  batch together, which each row's share of them does not show; so a batch must not be cut up (`accumulate` = 1).
  """

  reference = "tsa"

  def __init__(self, config: ml_collections.ConfigDict):
    if config.optimizer.accumulate != 1:
      raise ConfigError("config key 'optimizer.accumulate' must be 1: the loss compares the rows of a batch")
    names = tuple(config.labels.features)
    self.shape = vtss_network.shape(config.model.preset, tuple(config.model.branches), config.model.fusion, len(names))
    c = config.sampling
    self.plan = fragments.Plan(tuple(c.grid), c.patch, c.frames, c.stride, 1, c.image, c.small_video_bug)
    super().__init__(config)

  def init(self, rngs: nnx.Rngs) -> tsa.TSA:
    return tsa.TSA(self.shape, rngs=rngs)

  def lr_scale(self, path: str) -> float:
    return self.config.model.backbone_lr if path.startswith(BACKBONES) else 1.0

  # ---- data ----------------------------------------------------------------------------------------------------------

  @functools.cached_property
  def source(self) -> records.RecordSource:
    """The rated set; `data.set` = "" is a small one of weak labels over scenes of dead leaves, made once."""
    return records.RecordSource(self.config.data.set or weak_labels.local(), status=None)

  @functools.cached_property
  def rated(self) -> list[Rated]:
    return vtss_labels.read(self.config.labels.table or weak_labels.local() / weak_labels.TABLE, self.source)

  @functools.cached_property
  def features(self) -> tuple[vtss_labels.Feature, ...]:
    """Percentiles come from the training split alone."""
    return vtss_labels.features(tuple(self.config.labels.features), self.split("train"), self.source)

  def split(self, name: str) -> list[Rated]:
    """The rows of "train" or "validation", parted by source video; with `fold` = -1 everything is for training.

    Raises:
      ConfigError: a fold that does not exist, or one that leaves nothing to train on.
    """
    folds, held = self.config.labels.folds, self.config.labels.fold
    if held < 0:
      return self.rated if name == "train" else []
    if held >= folds:
      raise ConfigError(f"config key 'labels.fold' = {held}: there are {folds} (0 to {folds - 1}); -1 holds out none")
    inside = lambda row: vtss_labels.fold(row.video_id, folds) == held
    rows = [row for row in self.rated if inside(row) == (name == "validation")]
    if name == "train" and not rows:
      raise ConfigError(f"config key 'labels.fold' = {held} of {folds} holds out every source video; take more folds")
    return rows

  def batches(self, split: str, process_index: int, process_count: int, multiple_of: int) -> "Batches":
    needed = int(np.lcm(multiple_of, process_count))
    if self.config.data.batch % needed:
      raise ConfigError(f"config key 'data.batch' = {self.config.data.batch} must be a multiple of {needed}")
    share = self.config.data.batch // process_count
    return Batches(self, self.split(split), range(process_index * share, (process_index + 1) * share))

  def validation_rows(self, process_index: int, process_count: int, multiple_of: int) -> list[Batch]:
    if not self.split("validation"):
      return []
    batches = self.batches("validation", process_index, process_count, multiple_of)
    count = max(1, self.config.validation.rows // self.config.data.batch)
    return [batches.fixed(number) for number in range(count)]

  def batch_spec(self, bucket: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    del bucket  # mosaics have one size
    c, plan = self.config, self.plan
    array = lambda *shape, dtype: jax.ShapeDtypeStruct((c.data.batch, *shape), dtype)
    spec = {name: array(dtype=jnp.int32) for name in ("reference", "degradation")}
    spec |= {"rating": array(dtype=jnp.float32), "index": array(dtype=jnp.uint32)}
    spec["features"] = array(len(c.labels.features), dtype=jnp.float32)
    if {"dynamic", "static"} & set(c.model.branches):
      spec["fragments"] = array(1, plan.frames, *plan.size, 3, dtype=jnp.uint8)
      spec["image"] = array(plan.image, plan.image, 3, dtype=jnp.uint8)
    return spec

  def step_cost(self, batch: Batch) -> tuple[int, float]:
    rows = batch["index"].shape[0]
    return rows, 6.0 * rows * tsa.products(self.shape, self.plan.frames, *self.plan.size, self.plan.image)

  # ---- loss ----------------------------------------------------------------------------------------------------------

  def losses(self, params: Params, batch: Batch, keys_B: jax.Array, train: bool) -> tuple[jax.Array, dict[str, Any]]:
    model: tsa.TSA = params_lib.merge(self.graph, params)
    c = self.config.labels
    features_BM = batch["features"]
    if train and c.drop:
      gone_BM = jax.vmap(lambda key: jax.random.bernoulli(key, c.drop, features_BM.shape[1:]))(
        rng.stream(keys_B, "gone")
      )
      features_BM = jnp.where(gone_BM, jnp.nan, features_BM)
    pixels = {name: normalised(batch[name]) for name in ("fragments", "image") if name in batch}
    raw_B = model(
      pixels.get("fragments"), pixels.get("image"), features_BM, keys_B if train else None, dtype=self.dtype
    )
    rating_B = batch["rating"]
    plcc_B, rank_B = plcc_loss(raw_B, rating_B), rank_loss(raw_B, rating_B)
    pair_B = pair_loss(raw_B, rating_B, known(batch["reference"], batch["degradation"], rating_B))
    loss_B = c.plcc * plcc_B + c.rank * rank_B + c.pair * pair_B
    return loss_B, {"plcc": jnp.mean(plcc_B), "rank": jnp.mean(rank_B), "pair": jnp.mean(pair_B)}


def normalised(pixels: jax.Array) -> jax.Array:
  """`fragments.normalised` inside the step, so that bytes travel to the device."""
  return (pixels.astype(jnp.float32) - jnp.array(fragments.MEAN)) / jnp.array(fragments.DEVIATION)


def standard(x_B: jax.Array) -> jax.Array:
  """Less its mean, over its population deviation."""
  centred_B = x_B - jnp.mean(x_B)
  return centred_B * jax.lax.rsqrt(jnp.mean(centred_B**2) + 1e-8)


def plcc_loss(raw_B: jax.Array, rating_B: jax.Array) -> jax.Array:
  """Each row's share of (1 - rho) / 4 + (1 - rho^2) / 8, rho Pearson's correlation; the mean over rows is the loss.

  FAST-VQA's form: with p and y standardised, (mean (p - y)^2 / 4 + mean (rho p - y)^2 / 4) / 2.
  """
  p_B, y_B = standard(raw_B), standard(rating_B)
  rho = jnp.mean(p_B * y_B)
  return ((p_B - y_B) ** 2 + (rho * p_B - y_B) ** 2) / 8


def rank_loss(raw_B: jax.Array, rating_B: jax.Array) -> jax.Array:
  """Each row's share of sum_ij relu((p_i - p_j) sign(y_j - y_i)) / (n (n - 1)) / (1 + its largest term)."""
  p_B = standard(raw_B)
  terms_BB = jax.nn.relu((p_B[:, None] - p_B[None]) * jnp.sign(rating_B[None] - rating_B[:, None]))
  return jnp.sum(terms_BB, axis=1) / (len(raw_B) - 1) / (1 + jnp.max(terms_BB))


def pair_loss(raw_B: jax.Array, rating_B: jax.Array, known_BB: jax.Array) -> jax.Array:
  """Each row's mean of log(1 + exp(worse - better)) over the pairs whose order is known (Bradley-Terry)."""
  better_BB = jnp.sign(rating_B[:, None] - rating_B[None])
  terms_BB = jax.nn.softplus(-better_BB * (raw_B[:, None] - raw_B[None]))
  return jnp.sum(jnp.where(known_BB, terms_BB, 0), axis=1) / jnp.maximum(jnp.sum(known_BB, axis=1), 1)


def known(reference_B: jax.Array, degradation_B: jax.Array, rating_B: jax.Array) -> jax.Array:
  """(B, B): whether the order of two rows is knowledge.

  Of ratings by people (reference 0) wherever they differ. Of weak labels within a shot, where the degradation is the
  same or one of the two is the original (0): which of two damages is worse nobody has said.
  """
  same = reference_B[:, None] == reference_B[None]
  kinds = degradation_B[:, None], degradation_B[None]
  alike = (kinds[0] == kinds[1]) | (kinds[0] == 0) | (kinds[1] == 0)
  return same & alike & (rating_B[:, None] != rating_B[None])


# ---- batches ---------------------------------------------------------------------------------------------------------


class Batches:
  """Rows of rated clips; row r of step s is a pure function of (set, table, seed, s, r).

  Keys of a batch: rating float32 (B,), reference and degradation int32 (B,), features float32 (B, M) with NaN, index
  uint32 (B,), and what the branches look at: fragments uint8 (B, 1, T, H, W, 3), image uint8 (B, S, S, 3).

  Of weak labels a batch holds whole ladders: an original and four strengths of one degradation. Of each clip
  `data.views` draws of fragments are made and kept in memory; a step takes one of them.
  """

  def __init__(self, task: TSATask, rows: list[Rated], numbers: range):
    self._task, self._rows, self._numbers = task, rows, numbers
    config = task.config
    self._seed, self._views = config.seed, config.data.views
    self._looks = {"dynamic", "static"} & set(config.model.branches)
    self._kept: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    self._ladders: list[list[Rated]] = []
    if rows and rows[0].reference:
      by_kind: dict[tuple[str, str], list[Rated]] = {}
      originals = {row.reference: row for row in rows if row.degradation == ORIGINAL}
      for row in rows:
        if row.degradation != ORIGINAL and row.reference in originals:
          by_kind.setdefault((row.reference, row.degradation), [originals[row.reference]]).append(row)
      self._ladders = list(by_kind.values())

  def __getitem__(self, step: int) -> Batch:
    return self._batch([self._row(step, number) for number in self._numbers])

  def fixed(self, number: int) -> Batch:
    """Batch `number` of the validation table: the rows in their order, round and round."""
    first = number * self._task.config.data.batch
    units = [row for ladder in self._ladders for row in ladder] or self._rows
    return self._batch([(units[(first + r) % len(units)], 0) for r in self._numbers], first)

  def _row(self, step: int, number: int) -> tuple[Rated, int]:
    if self._ladders:
      draw = np.random.Generator(np.random.PCG64([self._seed, step, number // LADDER]))
      ladder = self._ladders[int(draw.integers(len(self._ladders)))]
      row = ladder[number % LADDER % len(ladder)]
    else:
      # A permutation for each pass over the clips.
      place = step * self._task.config.data.batch + number
      epoch, place = divmod(place, len(self._rows))
      row = self._rows[_permutation(len(self._rows), self._seed, epoch)[place]]
    view = int(np.random.Generator(np.random.PCG64([self._seed, step, number, 1])).integers(self._views))
    return row, view

  def _batch(self, picks: list[tuple[Rated, int]], first: int = 0) -> Batch:
    task = self._task
    rows = [row for row, _ in picks]
    code = lambda text: np.int32(zlib.crc32(text.encode()) & 0x7FFFFFFF) if text and text != ORIGINAL else np.int32(0)
    batch: Batch = {
      "rating": np.array([row.rating for row in rows], np.float32),
      "reference": np.array([code(row.reference) for row in rows], np.int32),
      "degradation": np.array([code(row.degradation) for row in rows], np.int32),
      "features": np.stack([vtss_labels.values(task.features, task.source.info(row.clip).scores) for row in rows]),
      "index": np.array([first + number for number in self._numbers], np.uint32),
    }
    if self._looks:
      seen = [self._pictures(row, view) for row, view in picks]
      batch["fragments"] = np.stack([mosaics for mosaics, _ in seen])
      batch["image"] = np.stack([image for _, image in seen])
    return batch

  def _pictures(self, row: Rated, view: int) -> tuple[np.ndarray, np.ndarray]:
    held = self._kept.get((row.clip, view))
    if held is None:
      seed = fragments.seed_of(f"{row.clip_id} {view}")
      held = self._kept[row.clip, view] = vtss_labels.pictures(self._task.source.media(row.clip), self._task.plan, seed)
    return held

  def iterate(
    self, start_step: int, *, threads: int = 4, workers: int = 0, stop: int | None = None
  ) -> Generator[tuple[int, Batch], None, None]:
    """Yields (step, batch) from `start_step` up to before `stop`; `workers` are not used: the views are in memory."""
    del workers
    stop = 2**31 if stop is None else stop
    if start_step >= stop:
      return
    steps = grain.MapDataset.range(start_step, stop).map(lambda step: (step, self[step]))
    yield from steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1))


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.Generator(np.random.PCG64([seed, epoch, 2])).permutation(count)


TASK = TSATask
