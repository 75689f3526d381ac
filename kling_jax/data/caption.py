"""A caption in six parts: what is cleaned from text of strangers, how parts become one paragraph, how tokens count."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kling_jax import errors
from kling_jax.data.record import CAPTION_FIELDS, ClipRecord

PART_LETTERS = 2_000  # characters a part may have; released Koala-36M captions have at most 3,320 in all
TEXT_LETTERS = 8_000  # characters of a caption that came as one text

_SENTENCE_ENDS = tuple(".!?…。！？")
_CLOSING = "\"'”’)]»"


@dataclasses.dataclass(frozen=True)
class Caption:
  """What is said of a clip, and who said it.

  Attributes:
    subject, action, environment, visual, camera, world: Koala-36M's six parts (section 4.2); empty where unsaid.
    text: the caption as one paragraph; `merge` of the parts where it is not given.
    captioner: who wrote it: server, local, facts, sidecar, or "" where it is not known.
    model: that captioner's model or version. prompt: digest of what it was asked.
  """

  subject: str = ""
  action: str = ""
  environment: str = ""
  visual: str = ""
  camera: str = ""
  world: str = ""
  text: str = ""
  captioner: str = ""
  model: str = ""
  prompt: str = ""

  def __post_init__(self) -> None:
    for name in CAPTION_FIELDS:
      object.__setattr__(self, name, clean(getattr(self, name), PART_LETTERS))
    object.__setattr__(self, "text", clean(self.text, TEXT_LETTERS) or merge(self.parts.values()))

  def __bool__(self) -> bool:
    return bool(self.text)

  @property
  def parts(self) -> dict[str, str]:
    """{part: text} in Koala's order."""
    return {name: getattr(self, name) for name in CAPTION_FIELDS}


def of_parts(parts: Mapping[str, str], **origin: str) -> Caption:
  """The caption with these parts; `origin`: captioner, model, prompt."""
  return Caption(**{name: parts.get(name, "") for name in CAPTION_FIELDS}, **origin)


def of_record(clip: ClipRecord) -> Caption:
  """The caption that stands in a record."""
  parts = {name: getattr(clip, name) for name in CAPTION_FIELDS}
  return Caption(
    **parts, text=clip.caption, captioner=clip.captioner, model=clip.caption_model, prompt=clip.caption_prompt
  )


def of_json(text: str, **origin: str) -> Caption:
  """The caption that a JSON text holds: a string, or an object with "caption" or some of the six parts.

  Raises:
    DataError: it holds none.
  """
  try:
    held: Any = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise errors.DataError(f"no JSON ({error})") from error
  held = {"caption": held} if isinstance(held, str) else held
  values = {n: held[n] for n in ("caption", *CAPTION_FIELDS) if n in held} if isinstance(held, dict) else {}
  if not values or not all(isinstance(value, str) for value in values.values()):
    raise errors.DataError(f'wants {{"caption": "..."}} or the fields {", ".join(CAPTION_FIELDS)}')
  said = Caption(text=values.pop("caption", ""), **values, **origin)
  return said if said else Caption()


def merge(parts: Iterable[str]) -> str:
  """One paragraph out of parts, in their order.

  Empty parts and repetitions are left out. A part that ends without a full stop (or another end of a sentence) gets
  one, except where the next part starts with a small letter: there the sentence goes on.
  """
  said = list(dict.fromkeys(part for part in (" ".join(part.split()) for part in parts) if part))
  paragraph = ""
  for place, part in enumerate(said):
    follows = said[place + 1] if place + 1 < len(said) else ""
    stop = "" if part.rstrip(_CLOSING).endswith(_SENTENCE_ENDS) or follows[:1].islower() else "."
    paragraph += f"{part}{stop} "
  return paragraph.rstrip()


def clean(text: str, letters: int) -> str:
  """Plain text on one line: no control characters, no marks that turn the reading direction, bounded in length.

  White space becomes single blanks; half a surrogate pair becomes U+FFFD. A text that is too long ends after its last
  whole sentence that fits, or its last whole word. Markup is left as it is: whoever shows a caption escapes it.
  """
  text = text[: 16 * letters].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
  text = "".join(" " if c.isspace() else c for c in text if c.isspace() or c in _JOINERS or not _is_control(c))
  text = " ".join(text.split())
  if len(text) <= letters:
    return text
  head = text[:letters]
  sentence = max((match.end() for match in re.finditer(r"[.!?。！？](?=\s)", head)), default=0)
  if sentence < letters // 2:
    sentence = head.rfind(" ") if " " in head else letters
  return head[:sentence].rstrip()


_JOINERS = "\u200c\u200d"  # letters of Persian, Hindi and others, and emoji, need them


def _is_control(character: str) -> bool:
  return unicodedata.category(character) in ("Cc", "Cf")


@dataclasses.dataclass(frozen=True)
class TokenCount:
  """Counts the tokens that a text encoder gets of a text, special ones included.

  Attributes:
    name: of the tokenizer; stands beside the counts.
    count: text -> tokens.
  """

  name: str
  count: Callable[[str], int]

  def of(self, text: str) -> int:
    """0 for an empty text: a part that is not said costs nothing."""
    return self.count(text) if text else 0


BYTES = TokenCount("bytes", lambda text: len(text.encode("utf-8", "replace")) + 2)


def token_count(path: str | os.PathLike[str] | None) -> TokenCount:
  """The counter of a `tokenizer.json` (Hugging Face tokenizers, as T5 and CLIP ship it); None: our bytes.

  Raises:
    UsageError: the package `tokenizers` is missing. DataError: the file is no tokenizer.
  """
  if path is None:
    return BYTES
  try:
    import tokenizers
  except ImportError as error:
    raise errors.UsageError("--tokenizer needs the package tokenizers: pip install 'kling_jax[caption]'") from error
  try:
    data = pathlib.Path(path).read_bytes()
    tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
  except Exception as error:  # the library raises bare Exception
    raise errors.DataError(f"{path}: no tokenizer.json ({str(error)[:200]})") from error
  tokenizer.no_truncation()
  tokenizer.no_padding()
  name = f"{pathlib.Path(path).stem}-{hashlib.sha256(data).hexdigest()[:8]}"
  return TokenCount(name, lambda text: len(tokenizer.encode(text).ids))


def put(clip: ClipRecord, caption: Caption, counter: TokenCount = BYTES) -> ClipRecord:
  """The record with this caption, its origin, and its tokens counted; an empty caption clears all of them."""
  parts: dict[str, Any] = dict(caption.parts)
  return dataclasses.replace(
    clip,
    **parts,
    caption=caption.text,
    caption_tokens=counter.of(caption.text),
    caption_part_tokens=tuple(counter.of(part) for part in caption.parts.values()) if caption else (),
    caption_tokenizer=counter.name if caption else "",
    captioner=caption.captioner,
    caption_model=caption.model,
    caption_prompt=caption.prompt,
  )
