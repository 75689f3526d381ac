"""`engine.run` on a Ray cluster: each CPU of the cluster gets an actor, and each actor a worker process of its own.

The worker process is the same as on one machine, so that a job that hangs or dies costs that job; an actor that dies
costs nothing, because its job is done again elsewhere. Input and output lie on storage that all nodes see.
"""

import collections
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kling_jax.curation import engine
from kling_jax.errors import DataError, UsageError

GROW_S = 10.0  # between two looks at the size of the cluster


def run(
  function: str,
  jobs: Sequence[dict[str, Any]],
  workers: int | None = None,
  deadline_s: float | None = None,
  memory_bytes: float | None = None,
  needs: Mapping[str, float] | None = None,
) -> Iterator[engine.Answer]:
  """As `engine.run`; workers: actors of one CPU each, None: as many as the cluster has room for, also when it grows.

  With `needs`, such as {"GPU": 1} or {"TPU": 4}, each actor takes these resources of Ray as well.

  The cluster is the one that RAY_ADDRESS names or this machine belongs to; without one, Ray starts on this machine.

  Raises:
    UsageError: Ray is not installed.
    DataError: the cluster cannot be reached.
  """
  try:
    import ray
  except ImportError as error:
    raise UsageError("--engine ray needs the extra ray: pip install 'kling_jax[ray]'") from error
  if not jobs:
    return
  if not ray.is_initialized():
    try:
      ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
      raise DataError(f"the Ray cluster cannot be reached ({error}); see RAY_ADDRESS") from error
  wants = {"CPU": 1.0} | dict(needs or {})
  others = {name: value for name, value in wants.items() if name not in ("CPU", "GPU")}
  make: Any = ray.remote(engine.Lane).options(
    num_cpus=wants["CPU"], num_gpus=wants.get("GPU", 0), resources=others, max_restarts=0
  )
  waiting = collections.deque(enumerate(jobs))
  tries: collections.Counter[int] = collections.Counter()
  crew: dict[Any, int | None] = {}  # actor -> index of its job; None: it is not up yet
  busy: dict[Any, Any] = {}  # what is awaited -> actor
  grown = float("-inf")

  def hire() -> None:
    actor = make.remote(function, deadline_s, memory_bytes)
    crew[actor] = None
    busy[actor.__ray_ready__.remote()] = actor

  def give(actor: Any) -> None:
    if waiting:
      index, job = waiting.popleft()
      crew[actor] = index
      busy[actor.do.remote(job)] = actor

  try:
    while waiting or any(index is not None for index in crew.values()):
      if time.monotonic() - grown > GROW_S:
        grown = time.monotonic()
        held = ray.cluster_resources()
        room = min(int(held.get(name, 0) // value) for name, value in wants.items())
        wanted = min(workers or max(room, 1), len(jobs))
        for _ in range(wanted - len(crew)):
          hire()
      done, _ = ray.wait(list(busy), num_returns=1, timeout=GROW_S)
      for reference in done:
        actor = busy.pop(reference)
        index = crew[actor]
        try:
          answer = ray.get(reference)
        except ray.exceptions.RayActorError as error:
          del crew[actor]
          grown = float("-inf")
          if index is not None:
            tries[index] += 1
            if tries[index] < engine.TRIES:
              waiting.appendleft((index, jobs[index]))
            else:
              yield (
                index,
                engine.Failure("died", f"{engine.TRIES} actors died over it, the last one so: {_line(error)}"),
              )
          continue
        crew[actor] = None
        give(actor)
        if index is not None:
          yield index, answer
  finally:
    for actor in crew:
      ray.kill(actor)


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:300]
