"""The closed list of reasons why a file is kept out, and the error that carries one."""

import typing

from kling_jax import errors

Reason = typing.Literal[
  "unreadable",  # no container that we read: empty, text, noise, a folder, no permission
  "truncated",  # cut before its index: nothing in it can be located
  "no_video_stream",  # audio only, subtitles only, or a still picture
  "zero_frames",  # opens, but holds no data for a single frame
  "decode_error",  # holds data, but not one frame decodes
  "too_short",  # fewer frames than the caller asks for
  "too_small",  # fewer pixels than the caller asks for
  "timeout",  # decoding ran past its time limit
  "out_of_memory",  # frames larger than the limit, or memory ran out
  "unsupported_codec",  # a container or codec that this build cannot read
  "hostile_name",  # control characters, undecodable bytes, or a way out of the folder
]
REASONS: tuple[str, ...] = typing.get_args(Reason)


class MediaError(errors.DataError):
  """Media that cannot be used; `reason` is one of `REASONS`, `detail` says what was seen, `source` names the file."""

  def __init__(self, source: str, reason: Reason, detail: str):
    if reason not in REASONS:
      raise ValueError(f"{reason!r} is no quarantine reason; legal: {', '.join(REASONS)}")
    super().__init__(f"{source!r}: {reason}: {detail}")
    self.source, self.reason, self.detail = source, reason, detail

  def __reduce__(self) -> tuple[type["MediaError"], tuple[str, Reason, str]]:
    return MediaError, (self.source, self.reason, self.detail)  # Errors cross process borders.
