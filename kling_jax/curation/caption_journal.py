"""What a captioning server answered, a line an answer: written as it comes, so that nothing is asked twice."""

import fcntl
import json
import os
import pathlib
import re
import threading
from typing import Any

from kling_jax import errors
from kling_jax.data.record import CAPTION_FIELDS


class Journal:
  """The answers to one prompt by one model.

  Every answer is flushed to the disk before it is used: a kill loses at most what is on its way. A line that a kill cut
  short is removed when the journal is opened again.

  Args:
    folder: where journals lie; None: remembered until the process ends.
    model, prompt: who was asked, and the digest of what; part of the file's name.

  Attributes:
    prompt_tokens, completion_tokens: of all answers, useless ones too: they cost as much.
    answers: lines of the journal.
    uncounted: answers whose server did not say what they cost.

  Raises:
    DataError: another process writes it, or it is damaged.
  """

  def __init__(self, folder: str | os.PathLike[str] | None, model: str, prompt: str):
    self.prompt_tokens = self.completion_tokens = self.answers = self.uncounted = 0
    self._lock = threading.Lock()
    self._parts: dict[str, dict[str, str]] = {}
    self._file: int | None = None
    if folder is None:
      return
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")[:60] or "model"
    self.path = pathlib.Path(folder) / f"{name}-{prompt}.jsonl"
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
      self._load(model)
    except OSError as error:
      self.close()
      raise errors.DataError(f"{self.path}: another `kling caption` is asking; wait until it is done") from error
    except errors.DataError:
      self.close()
      raise

  def _load(self, model: str) -> None:
    data = self.path.read_bytes()
    whole = data.rfind(b"\n") + 1
    os.truncate(self.path, whole)
    for number, line in enumerate(data[:whole].splitlines(), start=1):
      try:
        entry = json.loads(line)
        if entry["model"] != model:
          raise ValueError(f"asked was {entry['model']!r}, not {model!r}")
        self._note(entry)
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.DataError(f"{self.path}, line {number}: no answer ({error}); remove the line") from error

  def _note(self, entry: dict[str, Any]) -> None:
    self.answers += 1
    counts = entry["prompt_tokens"], entry["completion_tokens"]
    self.prompt_tokens += counts[0] or 0
    self.completion_tokens += counts[1] or 0
    self.uncounted += None in counts
    if entry["parts"] is not None:
      self._parts[entry["clip"]] = {name: str(entry["parts"][name]) for name in CAPTION_FIELDS}

  def get(self, clip_id: str) -> dict[str, str] | None:
    """The six parts of a clip that was answered for."""
    return self._parts.get(clip_id)

  def add(self, entry: dict[str, Any]) -> None:
    """Notes one answer: clip, model, parts (None where they are of no use), why, prompt_tokens, completion_tokens."""
    line = json.dumps(entry).encode() + b"\n"
    with self._lock:
      if self._file is not None:
        os.write(self._file, line)
        os.fsync(self._file)
      self._note(entry)

  def close(self) -> None:
    """Lets another process write."""
    if self._file is not None:
      os.close(self._file)
      self._file = None
