"""A clip set with weak labels: good shots and their degradations (`data.degrade`), measured, beside a table of ratings.

    python -m kling_jax.curation.weak_labels --videos DIR_OR_FILES --scenes 12 --output SET

SET is a clip set like any other; SET/ratings.parquet has what training reads: clip_id, video_id, rating (5 less the
strength), and what makes the order known: reference (clip_id of the original), degradation, strength. The rating is a
convention, the order within a shot and a degradation is knowledge. Started again, it goes on.
"""

import argparse
import dataclasses
import fractions
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kling_jax import files, measure, progress
from kling_jax.data import decode, degrade, encode, folder, leaves, record, records
from kling_jax.data.record import ClipRecord
from kling_jax.errors import UsageError

TABLE = "ratings.parquet"
ORIGINAL = "original"
BEST = 5.0  # rating of an original; each strength takes one off
SIDES = (180, 270, 360)  # pixels of the shorter side of clips
SHOTS = 2  # of a video, at most
LEAST_CHANGE = 0.7  # levels between frames half a second apart: less, and standing still is no degradation
CRF = 20.0
RECIPE = "weak v1"
SCORERS = tuple(scorer for scorer in measure.SCORERS if not scorer.needs)


@dataclasses.dataclass(frozen=True)
class Shot:
  """A piece of a source.

  Attributes:
    video_id: the source; splits part by it. source: a file, or a word for a scene of dead leaves.
    number: of the shot within its source. seed: of its degradations.
  """

  video_id: str
  source: str
  number: int
  seed: int

  @property
  def key(self) -> str:
    """What decides the frames, for the clips' ids."""
    content = record.content_hash(self.source) if os.path.isfile(self.source) else self.source
    return f"{content} {self.number} {self.seed}"

  def load(self) -> tuple[np.ndarray, fractions.Fraction]:
    """(uint8 frames (T, H, W, 3), frame rate); few frames where the source has no such shot."""
    side = SIDES[self.seed % len(SIDES)]
    if not os.path.isfile(self.source):
      return leaves.scene((self.seed, self.number), degrade.MOST_FRAMES // 2, side, side * 16 // 9), fractions.Fraction(
        24
      )
    info = decode.probe(self.source, decode=False)
    scale = side / min(info.height, info.width)
    size = round(info.height * scale / 2) * 2, round(info.width * scale / 2) * 2
    start = info.num_frames * self.number // SHOTS
    stop = min(start + degrade.MOST_FRAMES, info.num_frames * (self.number + 1) // SHOTS)
    frames = [f for _, _, f in itertools.islice(decode.iterate(self.source, size=size), start, stop)]
    rate = fractions.Fraction(min(max(info.fps, 8), 30)).limit_denominator(1001)
    return np.array(frames), rate


def shots(videos: Sequence[str], scenes: int, seed: int) -> list[Shot]:
  """All first shots, then all second ones, so that a run that is stopped has something of every source."""
  sources = [(pathlib.Path(path).name, path) for path in videos]
  sources += [(f"leaves-{index}", f"leaves {index}") for index in range(scenes)]
  return [
    Shot(name, source, number, seed * 1_000_003 + 7919 * place + number)
    for number in range(SHOTS)
    for place, (name, source) in enumerate(sources)
    if number == 0 or os.path.isfile(source)
  ]


def variants(shot: Shot, kinds: Sequence[str]) -> Iterator[tuple[str, int, str]]:
  """(degradation, strength, clip_id): the original first."""
  name = lambda kind, strength: record.clip_id(shot.key, 0, degrade.FRAMES, "1/24", f"{RECIPE} {kind} {strength}")
  yield ORIGINAL, 0, name(ORIGINAL, 0)
  for kind in kinds:
    for strength in degrade.STRENGTHS:
      yield kind, strength, name(kind, strength)


def moves(frames_THWC: np.ndarray) -> bool:
  """Whether enough changes within the frames that speed, shake and standing still are something to see."""
  small = np.stack([cv2.resize(frame, (64, 36), interpolation=cv2.INTER_AREA) for frame in frames_THWC])
  small = small.astype(np.float32)
  return len(small) > 12 and float(np.abs(small[12:] - small[:-12]).mean()) >= LEAST_CHANGE


def make(
  videos: Sequence[str], output: str | os.PathLike[str], *, scenes: int = 0, seed: int = 0,
  kinds: Sequence[str] = tuple(degrade.KINDS), scorers: Sequence[measure.Scorer] = SCORERS,
) -> int:  # fmt: skip
  """Writes the set and its table; returns the number of clips.

  Args:
    videos: files of one shot each. output: the set. scenes: of dead leaves, beside the videos. seed: of all draws.
    kinds: degradations. scorers: who measures the clips.

  Raises:
    UsageError: nothing to degrade. MediaError: a video that cannot be read.
  """
  plan = shots(videos, scenes, seed)
  if not plan:
    raise UsageError("no videos and no scenes: name at least one")
  output = pathlib.Path(output)
  rows: list[dict[str, object]] = []
  with progress.bar("degrade", len(plan)) as line:
    for place, shot in enumerate(plan):
      wanted = list(variants(shot, kinds))
      with records.RecordWriter(output, RECIPE) as writer:
        if wanted[-1][2] not in writer:
          others = [s for s in plan[place + 1 :] + plan[:place] if s.video_id != shot.video_id][:2]
          _write(writer, shot, others, wanted, scorers)
        there = wanted[-1][2] in writer
      if there:
        rows += [
          {"clip_id": clip_id, "video_id": shot.video_id, "rating": BEST - strength, "reference": wanted[0][2],
           "degradation": kind, "strength": strength}
          for kind, strength, clip_id in wanted
        ]  # fmt: skip
        with files.whole(output / TABLE) as path:
          pq.write_table(pa.Table.from_pylist(rows), path)
      line.advance(1, note=shot.video_id)
  if not rows:
    raise UsageError("nothing moves in any of the videos; weak labels want moving footage")
  return len(rows)


def local() -> pathlib.Path:
  """A small set (two scenes, three degradations) in the user's cache, for trying things out; made where missing."""
  output = pathlib.Path.home() / ".cache" / "kling_jax" / RECIPE.replace(" ", "-")
  if not (output / TABLE).exists():
    cheap = {"blur", "borders", "clarity"}  # and what is measured with them: all that `:runlocal` reads
    scorers = [scorer for scorer in SCORERS if cheap & set(scorer.conditions)]
    make([], output, scenes=2, kinds=("blur", "noise", "borders"), scorers=scorers)
  return output


def _write(
  writer: records.RecordWriter, shot: Shot, others: Sequence[Shot], wanted: Sequence[tuple[str, int, str]],
  scorers: Sequence[measure.Scorer],
) -> None:  # fmt: skip
  frames, rate = shot.load()
  if len(frames) < 2 or not moves(degrade.walked(frames, 1.0)):
    return
  elsewhere = [found for found in (other.load()[0][: degrade.FRAMES] for other in others) if len(found) > 1]
  for kind, strength, clip_id in wanted:
    name = kind if kind != ORIGINAL else "blur"  # of strength 0, whatever the kind
    media = encode.encode(degrade.degraded(frames, name, strength, shot.seed, elsewhere), fps=rate, crf=CRF)
    info = decode.probe(media, decode=False)
    clip = ClipRecord(
      clip_id=clip_id, video_id=shot.video_id, source=f"{shot.source} {shot.number} {kind} {strength}", start_pts=0,
      end_pts=degrade.FRAMES, time_base=str(1 / rate), fps=info.fps, width=info.width, height=info.height,
      num_frames=info.num_frames, scores=measure.score_media(media, scorers),
    )  # fmt: skip
    writer.write(clip, media)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--videos", nargs="*", default=[], help="files of one shot each, or folders of them")
  parser.add_argument("--scenes", type=int, default=0, help="scenes of dead leaves beside them")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--output", required=True, help="clip set to write")
  args = parser.parse_args()
  cv2.setNumThreads(1)
  videos = [path for name in args.videos for path in (folder.find_videos(name) if os.path.isdir(name) else [name])]
  print(make(videos, args.output, scenes=args.scenes, seed=args.seed), "clips")


if __name__ == "__main__":
  main()
