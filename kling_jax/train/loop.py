"""The train loop, for every task: read it from top to bottom, it runs in that order."""

import dataclasses
import pathlib
import time
from collections.abc import Generator
from typing import Any

import jax
import ml_collections
from flax import nnx

from kling_jax import progress
from kling_jax.config import plain
from kling_jax.errors import DataError
from kling_jax.nn import params as params_lib
from kling_jax.train import allocator, peak, sharding, task, validation, warm_start, workdir
from kling_jax.train import metrics as metrics_lib
from kling_jax.train.checkpoint import Checkpoints
from kling_jax.train.histograms import Watch
from kling_jax.train.preemption import Preemption
from kling_jax.train.state import Update
from kling_jax.train.trace import Trace


@dataclasses.dataclass(frozen=True)
class Summary:
  """How a call of `run` ended: `finished` is False when SIGTERM ended it (the state is saved, run again to go on)."""

  step: int
  finished: bool
  metrics: dict[str, float]


class DivergenceError(DataError):
  """A run that no longer learns: its loss or gradients are not finite, or jump, step after step."""


@dataclasses.dataclass
class Counters:
  """What the host counts; saved with the state, so that a resumed run goes on counting."""

  tokens: int = 0
  flops: float = 0.0
  seconds: float = 0.0


def run(config: ml_collections.ConfigDict, folder: str | pathlib.Path) -> Summary:
  """Trains what `config` says in the work directory `folder`, or goes on where an earlier call stopped.

  Raises:
    ConfigError, DataError, MeshError, WeightsError: before anything is trained, where config, data, mesh or weights
      do not fit.
    DivergenceError: later, where updates had to be skipped too many times in a row.
  """
  # ---- Task and mesh: everything that can be refused is refused before an array is made --------------------------
  job = task.make(config)
  mesh = sharding.make_mesh(config.mesh)
  allocator.keep_freed_memory()
  update = Update(job, mesh)
  ways = sharding.batch_ways(mesh) * config.optimizer.accumulate
  part, parts = sharding.data_part(mesh)
  batches = job.batches("train", part, parts, ways)
  table = validation.Table(job, mesh, ways) if config.validation.every else None
  histograms = Watch(config, update)

  # ---- Work directory --------------------------------------------------------------------------------------------
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  main = jax.process_index() == 0
  workdir.claim(folder, config, write=main)
  checkpoints = Checkpoints(folder, config.checkpoint)
  trace = Trace(config.log.profile, folder)

  # ---- State: resume, else warm start, else random ---------------------------------------------------------------
  counters = Counters()
  start = checkpoints.latest()
  if start is not None:
    state = checkpoints.restore(start, update.abstract, update.shardings)
    counters = Counters(**checkpoints.meta(start)["counters"])
  else:
    key = jax.random.fold_in(jax.random.key(config.seed), 0x696E6974)  # "init"
    params = params_lib.create(lambda: job.init(nnx.Rngs(params=key)), update.parameter_shardings)
    params = warm_start.apply(params, config, folder, update.parameter_shardings, job.pretrained())
    state = update.fresh(params)
    del params
  start = start or 0

  # ---- The loop: dispatch step n, then write the numbers of step n - 1, so that the host never blocks the device --
  writer = _writer(folder, config, start) if main else metrics_lib.Fan([])
  peak_flops = peak.device_peak()
  log = _Log(writer, counters, peak_flops * jax.device_count() if peak_flops else None, config.guard.max_skipped)
  meta = lambda: {
    "config": plain(config), "counters": dataclasses.asdict(counters), "constants": job.constants(),
    "trained": update.trained, "origins": warm_start.origins(folder),
  }  # fmt: skip
  step, failed = start, True
  with Preemption() as preemption, progress.bar(f"train {config.task}", config.steps) as bar:
    bar.advance(start)
    stream = _stream(batches, config, start)
    try:
      while step < config.steps:
        waited = time.perf_counter()
        _, batch = next(stream)
        log.waited(time.perf_counter() - waited)
        trace.at(step)
        tokens, flops = job.step_cost(_global_shapes(batch, parts))
        rows = sharding.put_batch(mesh, batch)
        if shown := histograms.at(step, state, rows):
          writer.histograms(step, shown)
        with jax.transfer_guard("disallow"):
          state, metrics = update.step(state, rows)
        step += 1
        counters.tokens += tokens
        counters.flops += flops

        leave = preemption.requested() or step == config.steps
        row: dict[str, Any] = {}
        if table is not None and table.rows and (leave or step % config.validation.every == 0):
          row |= table.evaluate(update, state, step, folder)
          if (film := table.sample(update, state, step, folder)) is not None:
            writer.video(step, "samples", film)
        bar.advance(1, note=log.note)
        due = step % config.log.every == 0 or bool(row) or leave
        failures = getattr(batches, "failed", ())  # of clips; batches that decode none have none
        log.push(step, metrics, {**row, "failed_clips": len(failures)}, write=due)
        if leave or (config.checkpoint.every and step % config.checkpoint.every == 0):
          log.flush()
          checkpoints.save(step, state, meta())
        if leave:
          break
      failed = False
    finally:
      stream.close()
      trace.close()
      if failed and jax.process_count() > 1:
        writer.close()  # nothing that waits for the other processes: they may be gone, or wait for this one
      else:
        log.flush()
        writer.close()
        checkpoints.close()
  return Summary(step, finished=step >= config.steps, metrics=log.last)


class _Log:
  """Holds the numbers of the newest step until the next one is dispatched."""

  def __init__(self, writer: metrics_lib.Writer, counters: Counters, peak_flops: float | None, max_skipped: int):
    self.note, self.last = "", dict[str, float]()
    self._writer, self._counters, self._peak, self._max_skipped = writer, counters, peak_flops, max_skipped
    self._pending: tuple[int, Any, dict, bool, tuple[int, float]] | None = None
    self._clock = self._window = time.perf_counter()
    self._window_start = (0, counters.tokens, counters.flops)
    self._wait = self._seconds = 0.0
    self._steps = 0

  def waited(self, seconds: float) -> None:
    self._wait += seconds

  def push(self, step: int, metrics: Any, row: dict, write: bool) -> None:
    previous, self._pending = self._pending, (step, metrics, row, write, (self._counters.tokens, self._counters.flops))
    self._steps += 1
    if previous is not None:
      self._emit(*previous)

  def flush(self) -> None:
    if self._pending is not None:
      previous, self._pending = self._pending, None
      self._emit(*previous)

  def _emit(self, step: int, metrics: Any, row: dict, write: bool, done: tuple[int, float]) -> None:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    now = time.perf_counter()
    self._counters.seconds += now - self._clock
    self._clock = now
    if values.pop("streak") >= self._max_skipped:
      raise DivergenceError(
        f"step {step}: the last {self._max_skipped} updates were skipped (loss {values['loss']:.4g}, gradient norm "
        f"{values['grad_norm']:.4g}); lower optimizer.lr or look at the data, then resume from the last checkpoint"
      )
    if not write:
      return
    span, steps = max(now - self._window, 1e-9), max(self._steps, 1)
    tokens, flops = done[0] - self._window_start[1], done[1] - self._window_start[2]
    values |= {"tokens": done[0], "flops": done[1], "seconds": round(self._counters.seconds, 3)}
    values |= {"steps_per_s": steps / span, "tokens_per_s": tokens / span, "data_wait": self._wait / span}
    if self._peak:
      values["mfu"] = flops / span / self._peak
    self._window, self._window_start, self._wait, self._steps = now, (step, *done), 0.0, 0
    self.last = {**values, **row}
    self.note = f"loss {values['loss']:.4f}"
    self._writer.write(step, self.last)


def _stream(
  batches: task.Batches, config: ml_collections.ConfigDict, start: int
) -> Generator[tuple[int, task.Batch], None, None]:
  return batches.iterate(start, threads=config.data.threads, workers=config.data.workers, stop=config.steps)


def _global_shapes(batch: task.Batch, parts: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of the global batch of which this process holds one of `parts` equal parts."""
  return {
    name: jax.ShapeDtypeStruct((value.shape[0] * parts, *value.shape[1:]), value.dtype) for name, value in batch.items()
  }


def _writer(folder: pathlib.Path, config: ml_collections.ConfigDict, start: int) -> metrics_lib.Fan:
  writers: list[metrics_lib.Writer] = [metrics_lib.JsonLines(folder / "metrics.jsonl", start)]
  if config.log.tensorboard:
    writers.append(metrics_lib.TensorBoard(folder / "tensorboard", start))
  if config.log.wandb:
    writers.append(metrics_lib.WandB(config.log.wandb, folder, plain(config)))
  return metrics_lib.Fan(writers)
