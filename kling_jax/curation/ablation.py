"""The clip sets of Koala-36M's study (table 2) out of one folder of raw videos, for `configs/koala_ablation.py`.

  panda       cuts by the change of colour at 25, shots joined where their sides look alike, pieces of 5 s, the first
              sentence of a caption (at most 13 words, as long as Panda-70M's are on average)
  unfiltered  the house's splitter, whole captions, every clip
  manual      of these, the clips above low limits of clarity, aesthetic and motion
  vtss        of these, the clips with a VTSS of at least 2.5

It is called again when the sets were captioned and scored: what is there is kept, what follows from it is made anew.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence

from kling_jax import answers
from kling_jax.curation import curate, rules, select
from kling_jax.curation.video import Recipe
from kling_jax.data import clip_table, records
from kling_jax.data.record import ClipRecord
from kling_jax.errors import DataError, KlingError

# Panda-70M's features are ImageBind's; `merge` knows colours only, so two sides must look nearly alike to be joined.
PANDA = Recipe(method="content", max_seconds=5.0, merge=0.97)
SHORT = 13  # words
# Limits that leave about as many clips as Koala's own manual ones, which nobody knows: 37 of 48 million.
MANUAL = tuple(f"{name}: quantile({name}, 0.085) <= {name}" for name in ("clarity", "aesthetic", "motion"))
SUITABLE = ("vtss >= 2.5",)


@dataclasses.dataclass(frozen=True)
class Made:
  """Clips kept in each set; `missing`: what has to be done before the rest can be made."""

  clips: dict[str, int]
  missing: str = ""


def build(
  videos: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  unfiltered: Recipe | None = None,
  panda: Recipe = PANDA,
  manual: Sequence[str] = MANUAL,
  suitable: Sequence[str] = SUITABLE,
  workers: int | None = None,
) -> Made:
  """Makes the four sets below `output`, or goes on where an earlier call stopped.

  Args:
    videos: folder of raw videos, with captions beside them or without.
    output: their folder.
    unfiltered, panda: recipes of the two curations.
    manual, suitable: rules of the two selections.
    workers: processes.

  Raises:
    UsageError, DataError: see `curate.curate` and `select.select`.
  """
  output = pathlib.Path(output)
  for name, recipe in (("unfiltered", unfiltered or Recipe()), ("panda", panda)):
    curate.curate(videos, output / name, curate.Options(recipe=recipe, rules=(), workers=workers, report=False))
  captions = clip_table.Index.load(output / "panda").table["caption"].to_pylist()
  if any(_first(text) != text for text in captions):
    records.rewrite(output / "panda", _short)
  select.select(output / "panda", ())
  derive(output / "unfiltered", output / "manual", manual)
  rated = [vtss is not None for vtss in clip_table.Index.load(output / "unfiltered").table["vtss"].to_pylist()]
  if not all(rated):
    missing = f"{len(rated) - sum(rated)} clips of {output / 'unfiltered'} have no VTSS: score them with a suitability "
    return Made(_kept(output), f"{missing}model (kling score --model), then start this again")
  derive(output / "unfiltered", output / "vtss", suitable)
  return Made(_kept(output))


def derive(source: pathlib.Path, target: pathlib.Path, texts: Sequence[str]) -> None:
  """Makes `target` the set `source` under other rules: the same record files (hard links), a table of its own.

  Raises:
    DataError: no clip is kept.
  """
  index = clip_table.Index.load(source)
  shutil.rmtree(target, ignore_errors=True)  # it follows from the source
  (target / clip_table.RECORDS).mkdir(parents=True)
  for shard in index.shards:
    place = pathlib.Path(clip_table.RECORDS) / shard.file
    try:
      os.link(source / place, target / place)
    except OSError:  # another file system
      shutil.copyfile(source / place, target / place)
  clip_table.write_table(target, index.table, index.recipe, index.shards)
  selection = select.select(target, rules.parse_all(list(texts)))
  if not selection.kept.any():
    raise DataError(f"{target}: no clip of {source} is kept by {'; '.join(texts)}")


def _short(clip: ClipRecord) -> ClipRecord:
  text = _first(clip.caption)
  return clip if text == clip.caption else dataclasses.replace(clip, caption=text, caption_tokens=0)


def _first(caption: str) -> str:
  """The first sentence of a caption, at most 13 words."""
  return " ".join(caption.split(". ")[0].split()[:SHORT]).rstrip(".,;: ")


def _kept(output: pathlib.Path) -> dict[str, int]:
  found = {}
  for name in ("panda", "unfiltered", "manual", "vtss"):
    if (output / name / clip_table.TABLE).exists():
      status = clip_table.Index.load(output / name).table["status"].to_pylist()
      found[name] = sum(one == "kept" for one in status)
  return found


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m kling_jax.curation.ablation", description=__doc__.split("\n")[0])
  parser.add_argument("--input", required=True, help="folder of raw videos")
  parser.add_argument("--output", default="runs/koala/sets", help="folder of the four sets (default: runs/koala/sets)")
  parser.add_argument("--workers", type=int, help="processes (default: one a core)")
  answers.add_flag(parser)
  args = parser.parse_args(argv)
  try:
    made = build(args.input, args.output, workers=args.workers)
  except KlingError as error:
    print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code
  if args.json:
    answers.show(dataclasses.asdict(made))
  else:
    print(", ".join(f"{name} {count} clips" for name, count in made.clips.items()))
  if made.missing:
    print(made.missing, file=sys.stderr)
  return 1 if made.missing else 0


if __name__ == "__main__":
  sys.exit(main())
