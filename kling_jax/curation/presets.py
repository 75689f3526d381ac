"""Published rules of other pipelines, each in the unit of its own scorer.

A rule whose column is missing, or was made by a scorer of another unit, is refused with the way to mend it; nothing
passes for want of a number. Sources and thresholds: docs/guide/select.md.
"""

from collections.abc import Sequence

from kling_jax.curation.rules import Rule
from kling_jax.errors import UsageError, nearest

_SCORE = "run `kling score --input SET --scorers presets`"
_AESTHETIC = "run `kling score --input SET --scorers aesthetic --aesthetic_weights FILE` with LAION's head"
_LAION = (("aesthetic", ("laion", "table")),)
_VTSS = "score the set with a suitability model, or read Koala-36M's own table"
_RELEASED = "it is about the columns of Koala-36M's released table"
_TABLE = "table"  # the scorer that stands beside numbers of a table that somebody else made

PRESETS: dict[str, tuple[Rule, ...]] = {
  # Koala-36M: VTSS alone; 48 M to 36 M clips.
  "koala": (Rule("vtss", "vtss >= 2.5", hint=_VTSS),),
  # NextFlow on Koala-36M's columns: 8 M of 36 M clips.
  "nextflow": (
    Rule("length", "duration_s <= 20"),
    Rule("aesthetic", "aesthetic > 4.3", _LAION, _AESTHETIC),
    Rule("clarity", "clarity > 0.7", (("clarity", (_TABLE,)),), _RELEASED),
    Rule("motion", "motion > 4", (("motion", (_TABLE,)),), _RELEASED),
  ),
  # Open-Sora 1.x: CLIP + LAION head, mean of three frames.
  "opensora": (Rule("aesthetic", "aesthetic >= 5", _LAION, _AESTHETIC),),
  # Cosmos and NeMo Curator: motion vectors, least side, CLIP + LAION head.
  "cosmos": (
    Rule("size", "min(width, height) >= 256"),
    Rule("motion", "cosmos_motion >= 0.00098", hint=_SCORE),
    Rule("motion patch", "cosmos_motion_patch >= 1e-6", hint=_SCORE),
    Rule("aesthetic", "aesthetic >= 3.5", _LAION, _AESTHETIC),
  ),
  # Data-Juicer: Farneback at 2 frames a second; its aesthetic score is a tenth of the LAION head's.
  "datajuicer": (
    Rule("motion", "datajuicer_motion >= 0.25", hint=_SCORE),
    Rule("aesthetic", "aesthetic / 10 >= 0.4", _LAION, _AESTHETIC),
  ),
  # UltraVideo: share of frames with text, borders, blown or crushed pixels, or without colour.
  "ultravideo": (Rule("bad frames", "ultravideo_bad_frames <= 0.05", hint=_SCORE),),
}


def rules(names: Sequence[str], without: Sequence[str] = ()) -> list[Rule]:
  """The rules of presets, named "preset rule".

  Args:
    names: presets. without: names of rules to leave out, with or without the preset's name.

  Raises:
    UsageError: an unknown preset, or a rule to leave out that none of them has.
  """
  found = []
  skipped = set()
  for name in names:
    if name not in PRESETS:
      raise UsageError(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    for rule in PRESETS[name]:
      full = f"{name} {rule.name}"
      if rule.name in without or full in without:
        skipped.update({rule.name, full})
        continue
      found.append(Rule(full, rule.keep, rule.scorers, rule.hint))
  for word in without:
    if word not in skipped:
      known = [f"{name} {rule.name}" for name in names for rule in PRESETS[name]]
      raise UsageError(f"no rule {word!r} to leave out{nearest(word, known)}")
  return found
