"""Field accuracy of captions in the procedural world: what a caption states, thing by thing, against the script."""

import collections
import re
from collections.abc import Mapping, Sequence

from kling_jax.data.named import COLOURS
from kling_jax.data.worlds import SHAPES, TEXTURES

Parts = Mapping[str, str]
MANNER = r"stays still|moves (?:slowly |quickly )?(?:to the \w+|up|down)"


def fields(parts: Parts) -> dict[str, tuple[str, ...]]:
  """What a caption in six parts states, field by field; a part that says nothing has no fields.

  objects: (colour, shape, ...) in order. colours, shapes: which, whatever the order. motion: what each object does, in
  order. texture, background: of the background. camera: what it does. camera_kind: the same without its speed.
  """
  said: dict[str, tuple[str, ...]] = {}
  if parts.get("subject"):
    words = re.findall(r"\w+", parts["subject"])
    said["objects"] = tuple(word for word in words if word in COLOURS or word in SHAPES)
    said["colours"] = tuple(sorted(word for word in words if word in COLOURS))
    said["shapes"] = tuple(sorted(word for word in words if word in SHAPES))
  if parts.get("action"):
    said["motion"] = tuple(re.findall(MANNER, parts["action"]))
  if parts.get("environment"):
    words = re.findall(r"\w+", parts["environment"].split(" background")[0])
    said["texture"] = tuple(word for word in words if word in TEXTURES)
    said["background"] = tuple(word for word in words if word in COLOURS)
  if parts.get("camera"):
    words = re.findall(r"\w+", parts["camera"])
    said["camera"] = tuple(words)
    said["camera_kind"] = tuple(word for word in words if word not in ("slowly", "quickly"))
  return said


def field_accuracy(written: Sequence[Parts], true: Sequence[Parts]) -> dict[str, float]:
  """{field: share of the captions that state it as the truth does}, over those whose truth states it."""
  right: collections.Counter[str] = collections.Counter()
  asked: collections.Counter[str] = collections.Counter()
  for ours, theirs in zip(written, true, strict=True):
    said = fields(ours)
    for name, value in fields(theirs).items():
      asked[name] += 1
      right[name] += said.get(name) == value
  return {name: right[name] / count for name, count in asked.items()}


def commonest(true: Sequence[Parts]) -> dict[str, float]:
  """{field: accuracy of always stating its commonest value}: what a captioner reaches that looks at nothing."""
  values: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for parts in true:
    for name, value in fields(parts).items():
      values[name][value] += 1
  return {name: counts.most_common(1)[0][1] / counts.total() for name, counts in values.items()}
