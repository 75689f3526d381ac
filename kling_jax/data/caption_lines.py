"""The six parts of a caption as lines of one text: what a captioner of our own learns to write, and how it is read."""

from collections.abc import Mapping

from kling_jax.data.record import CAPTION_FIELDS

MOVING = ("action", "camera")  # parts that a single picture does not show


def text_of(parts: Mapping[str, str], caption: str = "") -> str:
  """The parts in Koala-36M's order, one a line and empty where unsaid; without parts the caption, on one line."""
  lines = [" ".join(parts.get(name, "").split()) for name in CAPTION_FIELDS]
  return "\n".join(lines).rstrip("\n") if any(lines) else " ".join(caption.split())


def parts_of(text: str) -> dict[str, str]:
  """{part: text} of the lines; a text of one line is a subject. Lines beyond six are left out."""
  said = (line.strip() for line in text.split("\n"))
  return {name: line for name, line in zip(CAPTION_FIELDS, said, strict=False) if line}


def still_text(text: str) -> str:
  """The text as far as a picture shows it: without action and camera."""
  return text_of({name: said for name, said in parts_of(text).items() if name not in MOVING})
