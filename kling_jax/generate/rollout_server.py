"""`kling rollout --serve`: a world in the browser; clips play as they are filmed, one acts, cuts, goes back and forks.

A *take* is one line of clips; the first one begins with the rollout, each fork is another one. One clip is filmed at a
time, in a thread of its own; the page waits for news of it. A request to film names the clip that it wants, so that one
that arrives twice films once.
"""

import dataclasses
import logging
import pathlib
import re
import secrets
import sys
import threading
from collections.abc import Callable
from typing import Any

from kling_jax import local_page
from kling_jax.data import encode, grid
from kling_jax.errors import UsageError
from kling_jax.generate import rollout as rollout_lib
from kling_jax.generate import rollout_page
from kling_jax.generate.rollout import Model, Rollout, Settings

log = logging.getLogger(__name__)

PATIENCE_S = 20.0  # that a question for news waits
LONGEST_TEXT = 2000  # characters of a request; the model's own limit is lower


@dataclasses.dataclass
class Take:
  """One line of clips.

  Attributes:
    rollout: what films it.
    media: number of each clip's film among those of the session.
    parent, at: the take that it was forked from, and after how many clips; None and 0 for the first.
  """

  rollout: Rollout
  media: list[int] = dataclasses.field(default_factory=list)
  parent: int | None = None
  at: int = 0


class Session:
  """The takes of one world; its methods may be called from any thread.

  Attributes:
    out: folder of the films: those of take 0 in it, those of take k in `take-k`.
    image: PNG of the first frame.
  """

  def __init__(self, rollout: Rollout, out: pathlib.Path):
    self.out, self.image = out, grid.png(rollout.image_HWC)
    self._takes, self._media = [Take(rollout)], list[bytes]()
    self._changed = threading.Condition()  # guards all of these
    self._version, self._trouble = 0, ""
    self._filming: tuple[int, int] | None = None  # take and number of the clip under way
    self._model = rollout.model

  @property
  def html(self) -> str:
    """The page; what changes comes later, by requests."""
    places, model = self._model.config.data.dynamics_tokens, self._model
    return rollout_page.html(self._takes[0].rollout.prompt, model.task.tokenizer(places).unit, places - 2)

  # ---- what is asked -------------------------------------------------------------------------------------------------

  def state(self, seen: int | None = None) -> dict[str, Any]:
    """Everything that the page shows; with `seen`, the number of a state, after waiting a while for another one."""
    with self._changed:
      if seen is not None:
        self._changed.wait_for(lambda: self._version != seen, PATIENCE_S)
      return self._state()

  def _state(self) -> dict[str, Any]:
    filming = self._filming
    return {
      "version": self._version,
      "filming": None if filming is None else {"take": filming[0], "number": filming[1]},
      "trouble": self._trouble,
      "writes": self._model.writes,
      "takes": [self._described(take) for take in self._takes],
    }

  def _described(self, take: Take) -> dict[str, Any]:
    clips = [
      {"media": media, "text": clip.dynamics, "given": clip.given, "cut": clip.cut, "seconds": round(clip.seconds, 2)}
      for media, clip in zip(take.media, take.rollout.clips, strict=False)  # one may be filmed and not yet encoded
    ]
    return {"parent": take.parent, "at": take.at, "first": take.rollout.earliest, "clips": clips}

  def media(self, number: int) -> bytes | None:
    """The film of a clip."""
    with self._changed:
      return self._media[number] if number < len(self._media) else None

  def film(self, asked: dict[str, Any]) -> dict[str, Any]:
    """Begins clip `number` of take `take`, after `text` ("" = the model writes) and a `cut`.

    Raises:
      UsageError: a text that the model cannot read, or another clip under way.
    """
    text, cut = asked.get("text", ""), asked.get("cut", False)
    if not isinstance(text, str) or len(text) > LONGEST_TEXT or not isinstance(cut, bool):
      raise UsageError(f"a text has at most {LONGEST_TEXT} characters, and a cut is true or false")
    with self._changed:
      name, take = self._asked(asked)
      number = _whole(asked, "number")
      if number < len(take.media) or self._filming == (name, number):
        return self._state()  # asked for before
      if number > len(take.media):
        raise UsageError(f"clip {number} cannot be filmed: the take has {len(take.media)} clips")
      self._idle()
      dynamics = text.strip() or None
      take.rollout.check_next(dynamics)
      self._filming = name, number
      self._tell()
      threading.Thread(target=self._work, args=(name, take, dynamics, cut), daemon=True).start()
      return self._state()

  def _work(self, name: int, take: Take, dynamics: str | None, cut: bool) -> None:
    try:
      filmed = take.rollout.next(dynamics, cut)
      media = encode.encode(filmed.frames_THWC, fps=self._model.fps)
      folder = self.folder(name)
      folder.mkdir(parents=True, exist_ok=True)
      (folder / rollout_lib.name(filmed.number)).write_bytes(media)
      trouble = ""
    except Exception as error:  # whatever it is, the page must hear of it, and the other clips are fine
      log.exception("clip %d of take %d", len(take.media), name)
      media, trouble = None, f"{type(error).__name__}: {error}"
    with self._changed:
      if media is not None:
        take.media.append(len(self._media))
        self._media.append(media)
      elif len(take.rollout.clips) > len(take.media):
        take.rollout.rewind(len(take.media))
      self._filming, self._trouble = None, trouble
      self._tell()

  def rewind(self, asked: dict[str, Any]) -> dict[str, Any]:
    """Drops the clips of take `take` from number `clips` on."""
    with self._changed:
      name, take = self._asked(asked)
      self._idle()
      take.rollout.rewind(_whole(asked, "clips"))
      for number in range(len(take.rollout.clips), len(take.media)):
        (self.folder(name) / rollout_lib.name(number)).unlink(missing_ok=True)
      del take.media[len(take.rollout.clips) :]
      self._tell()
      return self._state()

  def fork(self, asked: dict[str, Any]) -> dict[str, Any]:
    """Begins another take after `clips` clips of take `take`: the same past, other dice."""
    with self._changed:
      name, take = self._asked(asked)
      self._idle()
      clips, number = _whole(asked, "clips"), len(self._takes)
      other = take.rollout.fork()
      other.rewind(clips)
      self._takes.append(Take(other.fork(branch=number), take.media[:clips], name, clips))
      self._tell()
      return self._state()

  def _asked(self, asked: dict[str, Any]) -> tuple[int, Take]:
    name = _whole(asked, "take")
    if name >= len(self._takes):
      raise UsageError(f"there is no take {name}")
    return name, self._takes[name]

  def _idle(self) -> None:
    if self._filming is not None:
      raise UsageError("a clip is being filmed; wait for it")

  def _tell(self) -> None:
    self._version += 1
    self._changed.notify_all()

  # ---- the end -------------------------------------------------------------------------------------------------------

  def folder(self, take: int) -> pathlib.Path:
    """Where the films of a take lie."""
    return self.out / f"take-{take}" if take else self.out

  def finish(self) -> list[pathlib.Path]:
    """Waits for the clip under way and writes every take as `kling rollout` does; returns their folders."""
    with self._changed:
      self._changed.wait_for(lambda: self._filming is None)
      folders = []
      for name, take in enumerate(self._takes):
        folders.append(self.folder(name))
        folders[-1].mkdir(parents=True, exist_ok=True)
        for clip, media in zip(take.rollout.clips, take.media, strict=True):  # a fork has its parent's, too
          (folders[-1] / rollout_lib.name(clip.number)).write_bytes(self._media[media])
        rollout_lib.finish(take.rollout, folders[-1])
      return folders


def _whole(asked: dict[str, Any], name: str) -> int:
  value = asked.get(name)
  if type(value) is not int or not 0 <= value < 2**31:
    raise UsageError(f"a request needs a whole number {name!r}")
  return value


class Server(local_page.Server):
  """The page and what it asks for."""

  def __init__(self, session: Session, port: int = 0):
    """Binds to 127.0.0.1; see `local_page.Server`."""
    self.session = session
    super().__init__("kling rollout", secrets.token_urlsafe(16), port, Handler)


class Handler(local_page.Handler):
  """One connection."""

  server: Server

  def answer(self, path: str, fields: dict[str, str]) -> None:
    """The page, what there is, the first frame, or a clip."""
    session = self.server.session
    if path == "/":
      self.page(session.html)
    elif path == "/state":
      seen = fields.get("seen", "")
      self.json(200, session.state(int(seen) if re.fullmatch(r"\d{1,9}", seen, re.ASCII) else None))
    elif path == "/image":
      self.media(session.image, "image/png")
    elif match := re.fullmatch(r"/clip/(\d{1,9})", path, re.ASCII):
      media = session.media(int(match[1]))
      if media is None:
        self.nothing("there is no such clip")
      else:
        self.media(media)
    else:
      self.nothing()

  def action(self, path: str) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """To film, to go back, to fork."""
    session = self.server.session
    return {"/film": session.film, "/rewind": session.rewind, "/fork": session.fork}.get(path)


# ---- the verb --------------------------------------------------------------------------------------------------------


def serve(
  folder: str,
  prompt: str,
  out: str,
  *,
  image: str | None = None,
  seed: int = 0,
  step: int | None = None,
  settings: Settings = Settings(),
  port: int = 0,
) -> list[pathlib.Path]:
  """Serves until Ctrl-C or SIGTERM, then writes all takes below `out`; returns their folders. For the main thread.

  Raises:
    UsageError, ConfigError, WeightsError: as `rollout.run`, and where the port is taken.
  """
  model = Model(folder, step, settings)
  picture = None if image is None else model.read_image(image)
  model.check(1, [], picture, asked=True)
  session = Session(Rollout(model, prompt, picture, seed), pathlib.Path(out))
  session.out.mkdir(parents=True, exist_ok=True)
  with Server(session, port) as server:
    print("Ctrl-C ends and writes the films", file=sys.stderr)
    server.serve_until_ended()
  return session.finish()
