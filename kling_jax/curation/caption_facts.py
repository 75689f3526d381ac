"""A captioner without weights: says in words what was measured of a clip, and nothing else.

A score that a clip does not have is a fact that is not said. Thresholds are in the units of the scorers in `measure`.
"""

import cv2
import numpy as np

from kling_jax.data.caption import Caption
from kling_jax.data.source import ClipSource
from kling_jax.measure import camera

NAME, VERSION = "facts", "facts-1"
PLACES = 5  # frames whose colours are counted, spread over the clip
SIDE = 64  # pixels of their longer side
LEAST_SHARE = 0.15  # of the pixels that a colour must have to be named
MOST_COLOURS = 3

SLOW, FAST = 0.03, 0.12  # diagonals per second
STILL = 0.003  # diagonals per second; sensor noise reads as about so much
# Upper ends of mean luma / 255.
LIGHT = ((0.12, "very dark"), (0.3, "dark"), (0.6, "of medium brightness"), (0.8, "bright"), (1.01, "very bright"))
GREY_FILM = 0.98  # share of pixels without colour
PALE, VIVID = 0.15, 0.5  # mean saturation

COLOURS = (
  *("black", "grey", "white", "red", "pink", "orange", "brown", "beige", "yellow", "green", "turquoise", "blue"),
  "purple",
)


class Facts:
  """See the module's first lines; implements `caption.Captioner`."""

  name = NAME

  def caption(self, source: ClipSource, index: int) -> Caption:
    """The caption of clip `index`; its colours are looked up in a few small frames."""
    info = source.info(index)
    scale = SIDE / max(info.width, info.height)
    size = max(8, round(info.height * scale)), max(8, round(info.width * scale))
    times_s = (np.arange(PLACES) + 0.5) / PLACES * info.duration_s
    shares = colour_shares(source.frames(index, times_s, *size))
    values = {name: score.value for name, score in info.scores.items()}
    return describe(values, info.duration_s, shares)


def describe(scores: dict[str, float], duration_s: float, shares: dict[str, float]) -> Caption:
  """The caption that these facts make.

  Args:
    scores: values by name; motion, object_motion, camera_*, brightness, saturation and grey are used.
    shares: {colour: share of the pixels}, the largest first.
  """
  return Caption(
    action=_action(scores),
    visual=_visual(scores, duration_s, shares),
    camera=_camera(scores),
    captioner=NAME,
    model=VERSION,
  )


def _action(scores: dict[str, float]) -> str:
  what, speed = "What is filmed", scores.get("object_motion")
  if speed is None:
    what, speed = "The picture", scores.get("motion")
  if speed is None:
    return ""
  if speed < STILL:
    return f"{what} hardly moves."
  return f"{what} moves {'slowly' if speed < SLOW else 'fast' if speed > FAST else 'at a moderate speed'}."


def _visual(scores: dict[str, float], duration_s: float, shares: dict[str, float]) -> str:
  grey = scores.get("grey", 0.0) >= GREY_FILM
  said = [f"A {'black-and-white ' if grey else ''}shot of {duration_s:.1f} seconds"]
  if "brightness" in scores:
    said.append(next(word for end, word in LIGHT if scores["brightness"] < end))
  if "saturation" in scores and not grey:
    saturation = scores["saturation"]
    said += ["in pale colours"] if saturation < PALE else ["in vivid colours"] if saturation > VIVID else []
  named = [name for name, share in shares.items() if share >= LEAST_SHARE][:MOST_COLOURS]
  if named and not grey:
    said.append(f"mostly {named[0] if len(named) == 1 else ', '.join(named[:-1]) + ' and ' + named[-1]}")
  return ", ".join(said) + "."


def _camera(scores: dict[str, float]) -> str:
  label = camera.label(scores)
  if not label:
    return ""
  if label == "static":
    return "The camera does not move."
  if label in ("handheld", "shake"):
    return "The camera trembles." if label == "handheld" else "The camera shakes."
  value = scores[f"camera_{label}"]
  ways = {"pan": ("left", "right"), "tilt": ("down", "up"), "zoom": ("out", "in")}
  way = ways.get(label, ("counterclockwise", "clockwise"))[value > 0]
  speed = abs(value)
  if label in ("zoom", "roll"):
    speed = camera.MEAN_RADIUS * (speed if label == "zoom" else float(np.radians(speed)))
  pace = " slowly" if speed < SLOW else " fast" if speed > FAST else ""
  return f"The camera {label}s {way}{pace}."


def colour_shares(frames_THWC: np.ndarray) -> dict[str, float]:
  """{name of a colour: share of the pixels}, the largest first; names of `COLOURS`.

  Pixels are named by CIELAB lightness, chroma and hue angle (sRGB, D65): below chroma 12 black, grey or white; else by
  hue, where light reds are pink, and dark oranges and yellows brown, pale ones beige.

  Args:
    frames_THWC: uint8 RGB.
  """
  flat_PC = np.ascontiguousarray(frames_THWC).reshape(1, -1, 3).astype(np.float32) / 255
  light, a, b = np.moveaxis(cv2.cvtColor(flat_PC, cv2.COLOR_RGB2LAB)[0], -1, 0)
  chroma, hue = np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360
  warm = (hue >= 45) & (hue < 112)
  rules = [
    ((light < 12) | ((chroma < 12) & (light < 22)), "black"),
    ((chroma < 12) & (light > 85), "white"),
    (chroma < 12, "grey"),
    (warm & (chroma < 35) & (light > 60), "beige"),
    (warm & ((light < 50) | (chroma < 35)), "brown"),
    (warm & (hue < 82), "orange"),
    (warm, "yellow"),
    ((hue >= 112) & (hue < 175), "green"),
    ((hue >= 175) & (hue < 215), "turquoise"),
    ((hue >= 215) & (hue < 312), "blue"),
    ((hue >= 312) & (hue < 345), "purple"),
    (light > 65, "pink"),
  ]
  number_P = np.select([rule for rule, _ in rules], [COLOURS.index(name) for _, name in rules], COLOURS.index("red"))
  counts = np.bincount(number_P, minlength=len(COLOURS)) / number_P.size
  order = sorted(range(len(COLOURS)), key=lambda k: (-counts[k], k))
  return {COLOURS[k]: float(counts[k]) for k in order if counts[k] > 0}
