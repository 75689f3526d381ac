"""`kling encode` by many workers: processes of this machine, or the nodes of a Ray cluster.

The clips that a cache lacks are cut into jobs by their order in the set and by bytes alone, and each job becomes one
shard that is named by what it holds. So the shards are the same whatever the number of workers, a job that is done
twice writes one file, and a run that was killed goes on with the jobs whose shards are not there.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from kling_jax import config as config_lib
from kling_jax import progress, stores
from kling_jax.curation import engine, ray_engine
from kling_jax.data import buckets as buckets_lib
from kling_jax.data.cache import Card, Writer, chunk_path, text_variant, write_chunk
from kling_jax.data.source import ClipSource
from kling_jax.errors import DataError, UsageError, nearest
from kling_jax.generate import encode
from kling_jax.train import encoders

CHUNK_BYTES = 64 * 2**20  # of latents a job, about
MOST_CLIPS = 1024  # a job
ENGINES = ("local", "ray")


def run(
  config: ml_collections.ConfigDict, source: str | None, where: str, workers: int | None, needs: Mapping[str, float]
) -> str:
  """As `encode.run`, by workers that each load the encoder once.

  Args:
    where: "local", or "ray": the cluster that RAY_ADDRESS names, which must see the sets at the same paths.
    workers: processes; None: as many as there are cores, or as `needs` allows.
    needs: resources of Ray that each worker takes, such as {"GPU": 1}.

  Raises:
    as `encode.run`. DataError: also where jobs had no answer; a second call goes on.
  """
  if where not in ENGINES:
    raise UsageError(f"--engine {where!r} is unknown{nearest(where, ENGINES)}")
  if needs and where != "ray":
    raise UsageError("--per_worker is of --engine ray")
  sets = encode.opened(config, source)
  cards = [("latents", encoders.latent_encoder(config).card)]
  if config.text.encoder == "cached":
    cards.append(("text", encoders.text_encoder(config).card))
  plain = config_lib.plain(config)
  reports: list[encode.Report] = []
  lost: list[str] = []
  names = (source,) if source else config.data.sources
  for name, (clips, folder) in zip(names, sets, strict=True):
    for kind, card in cards:
      report, jobs = missing_jobs(kind, card, clips, folder, config)
      shared = {"config": plain, "source": name, "kind": kind}
      todo = [{**shared, **job} for job in jobs]
      lost += _do(todo, report, where, workers, needs)
      reports.append(report)
  if lost:
    raise DataError(
      f"{len(lost)} jobs have no answer, the first one: {lost[0]}; run again to go on\n" + "\n".join(map(str, reports))
    )
  return encode.told(reports)


def missing_jobs(
  kind: str, card: Card, clips: ClipSource, folder: str, config: ml_collections.ConfigDict
) -> tuple[encode.Report, list[dict[str, Any]]]:
  """What the cache holds already, and the jobs for the rest; makes the cache where there is none."""
  report = encode.Report(card.folder(folder))
  jobs: list[dict[str, Any]] = []
  with Writer(report.folder, card) as held:  # compares the card; writes nothing else
    if kind == "latents":
      asked = encode.asked_of(config)
      members, _ = buckets_lib.assign((clips.info(index) for index in range(len(clips))), asked)
      for number, (bucket, found) in enumerate(zip(asked, members, strict=True)):
        shape = encoders.latent_encoder(config).geometry.latent_shape(bucket.frames, bucket.height, bucket.width)
        size = max(1, min(MOST_CLIPS, CHUNK_BYTES // (2 * math.prod(shape))))
        for chunk in _chunks(found.tolist(), size):
          missing = [clip for clip in chunk if (bucket.name, clips.info(clip).clip_id) not in held]
          report.held += len(chunk) - len(missing)
          jobs += [{"clips": missing, "bucket": number}] if missing else []
    else:
      for chunk in _chunks([*range(len(clips)), -1], MOST_CLIPS):  # -1: the empty caption
        missing = [clip for clip in chunk if _text_key(clips, clip) not in held]
        report.held += len(chunk) - len(missing)
        jobs += [{"clips": missing}] if missing else []
  return report, jobs


def _do(
  jobs: list[dict[str, Any]], report: encode.Report, where: str, workers: int | None, needs: Mapping[str, float]
) -> list[str]:
  """Runs jobs and adds what they did to the report; returns what became of those without an answer."""
  function = f"{__name__}:work"
  running: Iterator[engine.Answer] = (
    ray_engine.run(function, jobs, workers, needs=needs) if where == "ray" else engine.run(function, jobs, workers)
  )
  moments, lost = encode.Moments(), []
  for _, answer in progress.track(running, report.folder.name, len(jobs)):
    if isinstance(answer, engine.Failure):
      lost.append(answer.detail)
      continue
    report.encoded += answer["encoded"]
    report.failed |= answer["failed"]
    moments += encode.Moments(**answer["moments"])
  report.mean, report.std = moments.result()
  return lost


# ---- in a worker -----------------------------------------------------------------------------------------------------


def work(job: dict[str, Any]) -> dict[str, Any]:
  """Does one job: encodes its clips and writes their shard, unless it is there."""
  config, clips, folder, program, card = _loaded(json.dumps(job["config"]), job["source"], job["kind"])
  failed: dict[str, str] = {}
  moments = encode.Moments()
  entries: dict[tuple[str, str], np.ndarray] = {}
  if job["kind"] == "latents":
    bucket = encode.asked_of(config)[job["bucket"]]
    keys = [(bucket.name, clips.info(clip).clip_id) for clip in job["clips"]]
  else:
    keys = [_text_key(clips, clip) for clip in job["clips"]]
  path = chunk_path(folder, keys)
  if not path.exists():
    if job["kind"] == "latents":
      for ids, latents in program(clips, bucket, job["clips"], failed):
        entries |= {(bucket.name, clip_id): array for clip_id, array in zip(ids, latents, strict=True)}
    else:
      infos = [clips.info(clip) for clip in job["clips"] if clip >= 0]
      told = [(info.clip_id, info.caption) for info in infos] + [("", "")] * (-1 in job["clips"])
      entries = {(text_variant(caption), clip_id): text_LD for clip_id, caption, text_LD in program(told)}
    for array in entries.values():
      moments.add(array)
    if entries:
      write_chunk(path, card, entries)
      stores.push()  # of another node the mirror is another
  return {"encoded": len(entries), "failed": failed, "moments": dataclasses.asdict(moments)}


@functools.lru_cache(maxsize=4)
def _loaded(
  plain: str, source: str, kind: str
) -> tuple[ml_collections.ConfigDict, ClipSource, pathlib.Path, Any, Card]:
  """The config, the clips, their cache's folder, the compiled encoder and its card: once a process."""
  config = config_lib.restore(json.loads(plain))
  [(clips, folder)] = encode.opened(config, source)
  if kind == "latents":
    codec = encoders.latent_encoder(config)
    return config, clips, codec.card.folder(folder), encode.LatentProgram(codec), codec.card
  text = encoders.text_encoder(config)
  return config, clips, text.card.folder(folder), encode.TextProgram(text), text.card


def _text_key(clips: ClipSource, clip: int) -> tuple[str, str]:
  """(variant, clip id) of a clip's caption; of the empty caption for -1."""
  if clip < 0:
    return text_variant(""), ""
  info = clips.info(clip)
  return text_variant(info.caption), info.clip_id


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
  return (items[start : start + size] for start in range(0, len(items), size))


def parse_needs(words: Sequence[str]) -> dict[str, float]:
  """{"GPU": 1.0} of ["GPU=1"].

  Raises:
    UsageError: a word of another form.
  """
  found = {}
  for word in words:
    name, equals, value = word.partition("=")
    try:
      found[name] = float(value)
    except ValueError as error:
      raise UsageError(f"--per_worker {word!r} is not of the form NAME=NUMBER, e.g. GPU=1") from error
    if not (name and equals and found[name] > 0):
      raise UsageError(f"--per_worker {word!r} is not of the form NAME=NUMBER, e.g. GPU=1")
  return found
