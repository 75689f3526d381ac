"""The verbs of curation: the flags of each; what a verb needs is imported when it runs."""

import argparse
from collections.abc import Callable
from typing import Any

from kling_jax import answers


def _add_split(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("video", nargs="+", help="video files")
  parser.add_argument("--method", default="default", help="default, css: Color-Struct SVM of Koala-36M, content: "
                      "changes of colour, as Panda-70M")  # fmt: skip
  parser.add_argument("--output", help="folder for shot lists")
  parser.add_argument("--format", action="append", default=[], metavar="FORMAT",
                      help="csv (as PySceneDetect's), edl, otio, stats (a row a frame); repeat for others")  # fmt: skip
  parser.add_argument("--workers", type=int, help="processes (default: one a core)")
  parser.add_argument("--weights", metavar="FILE", help="what --fit wrote (css)")
  parser.add_argument("--fit", metavar="FILE", help="train css's SVM on these videos, without labels; write it here")
  parser.add_argument("--seed", type=int, default=0, help="of --fit's choice of pairs")
  answers.add_flag(parser)


def _split(args: argparse.Namespace) -> int:
  from kling_jax.curation import split_command

  if args.fit:
    return split_command.fit(args.video, args.fit, seed=args.seed, as_json=args.json)
  return split_command.command(
    args.video, method=args.method, as_json=args.json, weights=args.weights, output=args.output, formats=args.format,
    workers=args.workers,
  )  # fmt: skip


def _add_curate(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--input", required=True, help="folder of videos, one video, WebDataset tars, or a table that "
                      "names videos by file, url or videoID")  # fmt: skip
  parser.add_argument("--method", help="who splits: default, css, content, or table: cut exactly the "
                      "table's spans")  # fmt: skip
  parser.add_argument("--videos", help="folder with the videos of a table (default: the table's)")
  parser.add_argument("--output", required=True, help="clip set to write; started again, it goes on")
  parser.add_argument("--engine", help="local (default), or ray: the CPUs of a Ray cluster")
  parser.add_argument("--workers", type=int, help="processes (default: one a core)")
  parser.add_argument("--merge", type=float, metavar="COSINE", help="joins shots that a cut parts although its two "
                      "sides look alike, e.g. 0.97 (default: never)")  # fmt: skip
  parser.add_argument("--embedding", help="of --merge: colours (default), or package.module:function")
  parser.add_argument("--min_seconds", type=float, help="shortest clip (default: 1)")
  parser.add_argument("--max_seconds", type=float, help="longest clip (default: 10)")
  parser.add_argument("--min_side", type=int, help="smallest shorter side of a video in pixels (default: 32)")
  parser.add_argument("--short_side", type=int, help="clips are shrunk to it; 0 keeps the source's size (default: 720)")
  parser.add_argument("--crf", type=float, help="H.264 quality of what is encoded (default: 18)")
  parser.add_argument("--no_copy", action="store_true", help="encode all clips anew instead of copying H.264 packets")
  parser.add_argument(
    "--scorers", help="default, presets, jax, raft:WEIGHTS, names, your package.module:NAME; by commas"
  )
  parser.add_argument("--model", help="suitability model of VTSS: weak-label (default), or a folder")
  parser.add_argument("--keep", action="append", metavar="RULE",
                      help="what is kept, e.g. 'motion >= 0.01'; repeat for others (see `kling select`)")  # fmt: skip
  parser.add_argument("--seconds_per_video", type=float, help="longer ones are quarantined as timeout (default: 3600)")
  parser.add_argument("--memory_per_video", type=float, metavar="GIB",
                      help="videos that need more are quarantined as out_of_memory (default: 8)")  # fmt: skip
  parser.add_argument("--cache", metavar="DIR", help="keeps splits for other sets of the same videos")
  parser.add_argument("--no_report", action="store_true", help="write no report page")
  answers.add_flag(parser)


def _curate(args: argparse.Namespace) -> int:
  from kling_jax.curation import curate, rules
  from kling_jax.curation.video import Recipe

  names = (
    "method",
    "min_seconds",
    "max_seconds",
    "min_side",
    "short_side",
    "crf",
    "merge",
    "embedding",
    "scorers",
    "model",
  )
  given = {name: getattr(args, name) for name in (*names, "model") if getattr(args, name) is not None}
  if given.get("short_side") == 0:
    given["short_side"] = None
  given["copy"] = not args.no_copy
  changes: dict[str, Any] = {"recipe": Recipe(**given), "workers": args.workers, "report": not args.no_report}
  changes |= {"cache": args.cache} | ({"engine": args.engine} if args.engine else {})
  changes["videos"] = args.videos
  if args.keep:
    changes["rules"] = rules.parse_all(args.keep)
  if args.seconds_per_video is not None:
    changes["seconds_per_video"] = args.seconds_per_video
  if args.memory_per_video is not None:
    changes["memory_gib"] = args.memory_per_video
  funnel = curate.curate(args.input, args.output, curate.Options(**changes))
  if args.json:
    answers.show(funnel.to_json())
  else:
    print(funnel.text())
  return 0


def _add_select(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--input", required=True, help="clip set; with --what_if also a table (.parquet, .csv, .jsonl)")
  parser.add_argument("--keep", action="append", default=[], metavar="RULE",
                      help="what is kept, e.g. 'vtss >= 2.5', 'slow: quantile(motion, 0.05) <= motion', "
                      "'cap(100, source)'; repeat for others, tried in order")  # fmt: skip
  parser.add_argument("--rules", metavar="FILE", help="JSON list of rules: 'name: expression' or {name, keep}")
  parser.add_argument("--preset", action="append", default=[], help="published rules: cosmos, datajuicer, koala, ...")
  parser.add_argument("--without", action="append", default=[], metavar="NAME", help="rule of a preset to leave out")
  parser.add_argument("--seed", type=int, help="of balancing (default: that of the last time, or 0)")
  parser.add_argument("--what_if", action="store_true", help="only print what the rules would do")
  parser.add_argument("--explain", metavar="CLIP_ID", help="only print what every rule says of one clip")
  parser.add_argument("--weights", metavar="TEMPER", help="write sampling weights, e.g. 'temper(0.5, source)'")
  answers.add_flag(parser)


def _select(args: argparse.Namespace) -> int:
  from kling_jax.curation import select_command

  return select_command.run(
    args.input, keep=args.keep, file=args.rules, presets=args.preset, without=args.without, seed=args.seed,
    what_if=args.what_if, explain=args.explain, weights=args.weights, as_json=args.json,
  )  # fmt: skip


def _add_dedup(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--input", required=True, nargs="+", metavar="SET_OR_FILES",
                      help="clip set; or video files and folders, whose groups are told")  # fmt: skip
  parser.add_argument("--against", action="append", default=[], metavar="SET", help="another set whose clips stay")
  parser.add_argument("--embeddings", metavar="FILE", help=".npy (a row a clip), or a table: clip_id, embedding")
  parser.add_argument("--least_embedding", type=float, default=0.95, help="cosine of copies (default: 0.95)")
  parser.add_argument("--prefer", action="append", metavar="EXPRESSION",
                      help="larger is better, the first counts most (default: width * height, clarity, vtss, "
                      "duration_s)")  # fmt: skip
  parser.add_argument("--workers", type=int, help="processes (default: one a core)")
  parser.add_argument("--what_if", action="store_true", help="only say what would go")
  answers.add_flag(parser)


def _dedup(args: argparse.Namespace) -> int:
  from kling_jax.curation import dedup, duplicates

  found = dedup.run(
    args.input, args.what_if, against=args.against, embeddings=args.embeddings, least_embedding=args.least_embedding,
    prefer=args.prefer or duplicates.PREFER, workers=args.workers,
  )  # fmt: skip
  if args.json:
    answers.show(found)
  else:
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["pairs"].items()) or "no"
    verb = "would go" if args.what_if else "dropped"
    print(f"{found['clips']} clips: {kinds} pairs, {found['groups']} groups, {found['dropped']} clips {verb}")
    if args.what_if or not found["dropped"]:
      for group in found["largest"]:
        print("  " + "  ".join(group))
    print(f"copies are: {found['stated']}")
  return 0


def _add_caption(parser: argparse.ArgumentParser) -> None:
  from kling_jax.curation import caption_command  # flags only, nothing heavy

  caption_command.add(parser)
  answers.add_flag(parser)


def _caption(args: argparse.Namespace) -> int:
  from kling_jax.curation import caption_command

  summary = caption_command.run(args)
  if args.json:
    answers.show(summary.to_json())
  else:
    print(summary.text())
  return 1 if summary.failed else 0


def _add_score(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--input", required=True, nargs="+", metavar="SET_OR_FILES",
                      help="clip set, which gets the scores it lacks; or video files and folders of them")  # fmt: skip
  parser.add_argument("--scorers", default="default",
                      help="default, presets, jax, raft:WEIGHTS, names such as motion, your package.module:NAME; "
                           "by commas")  # fmt: skip
  parser.add_argument("--aesthetic_weights", metavar="FILE_OR_FOLDER",
                      help="safetensors of CLIP ViT-L/14 and LAION's head (default: a classical stand-in)")  # fmt: skip
  parser.add_argument("--model", metavar="NAME_OR_FOLDER", help="suitability model that says VTSS: weak-label "
                      "(default), or a folder that training exported")  # fmt: skip
  parser.add_argument("--why", action="store_true", help="of loose files: what moved their VTSS, and how far")
  parser.add_argument("--workers", type=int, help="processes (default: one a core)")
  answers.add_flag(parser)


def _score(args: argparse.Namespace) -> int:
  from kling_jax.curation import score_command

  words = tuple(word.strip() for word in args.scorers.split(",") if word.strip())
  wanted = score_command.Wanted(words, args.aesthetic_weights, args.model)
  return score_command.command(args.input, wanted=wanted, workers=args.workers, as_json=args.json, why=args.why)


def _add_annotate(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--db", required=True, metavar="FILE", help="where ratings are kept (SQLite)")
  parser.add_argument("--input", help="clip set to rate; with --import: whose clips the table rates")
  parser.add_argument("--port", type=int, help="of 127.0.0.1 (default: that of the last time, else a free one)")
  parser.add_argument("--export", metavar="FILE", help="write labels to a .parquet or .csv, and raw ratings beside "
                      "it (..._raw); serve nothing")  # fmt: skip
  parser.add_argument("--import", dest="table", metavar="FILE", help="take raw ratings of a .csv or .parquet with the "
                      "columns clip_id, rater, rating; serve nothing")  # fmt: skip
  parser.add_argument("--skip_unknown", action="store_true", help="--import: leave out clips that the set lacks")
  answers.add_flag(parser)


def _annotate(args: argparse.Namespace) -> int:
  from kling_jax.curation import annotate_command

  return annotate_command.run(args)


VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int], str]] = {
  "split": (_add_split, _split, "Transitions and shots of videos."),
  "curate": (_add_curate, _curate, "Raw videos to a scored, selected clip set."),
  "score": (_add_score, _score, "Scores of a clip set, of loose videos, of generated videos."),
  "select": (_add_select, _select, "Which clips of a set are kept, by rules; or what rules would do."),
  "caption": (_add_caption, _caption, "Captions in six parts for a clip set or loose videos."),
  "dedup": (_add_dedup, _dedup, "Copies in a set, or of another set: equal, near, or close in an embedding."),
  "annotate": (_add_annotate, _annotate, "A page on which people rate clips; labels out of ratings."),
}
