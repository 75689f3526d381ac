"""Buckets: every clip is placed or accounted for, and the schedule is a pure function of the step."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_jax.data import buckets as buckets_lib
from kling_jax.data.buckets import Bucket, Limits
from kling_jax.data.cache import latent_variant
from kling_jax.data.source import ClipInfo
from kling_jax.errors import ConfigError, DataError

LIMITS = Limits()


def clip(seconds=4.0, fps=24.0, width=640, height=360, name="c"):
  return ClipInfo(name, "", seconds, fps, round(seconds * fps), width, height)


def test_nearest_aspect_then_most_frames_then_most_pixels():
  buckets = [Bucket(17, 128, 224, 8), Bucket(33, 128, 128, 8), Bucket(9, 256, 448, 8), Bucket(17, 256, 448, 8)]
  assert buckets_lib.best(clip(), buckets, LIMITS) == 3
  assert buckets_lib.best(clip(5.0, width=448, height=448), buckets, LIMITS) == 1
  assert buckets_lib.best(clip(seconds=1.2), buckets, LIMITS) == 2
  assert buckets_lib.best(clip(width=256, height=144), buckets, LIMITS) == 0  # the larger ones would enlarge it


def test_a_clip_of_exactly_the_bucket_fits_and_one_frame_less_does_not():
  for fps in (24.0, 23.976, 30.0, 25.0):
    bucket = Bucket(33, 64, 64, fps)
    assert buckets_lib.refusal(clip(33 / fps, fps), bucket, LIMITS) is None
    assert buckets_lib.slack_s(clip(33 / fps, fps), bucket) == pytest.approx(0, abs=1e-9)
    assert buckets_lib.refusal(clip(32 / fps, fps), bucket, LIMITS) == "too_short"


def test_images_take_buckets_of_one_frame_whatever_their_rate():
  image = ClipInfo("i", "", 0.04, 25.0, 1, 512, 512)
  assert buckets_lib.refusal(image, Bucket(1, 256, 256, 60.0), LIMITS) is None
  assert buckets_lib.refusal(image, Bucket(2, 256, 256, 8.0), LIMITS) == "too_short"


def test_reasons():
  bucket = Bucket(9, 256, 256, 24.0)
  assert buckets_lib.refusal(clip(fps=12.0), bucket, LIMITS) == "low_fps"
  assert buckets_lib.refusal(clip(fps=23.976), bucket, LIMITS) is None
  assert buckets_lib.refusal(clip(width=200, height=200), bucket, LIMITS) == "too_small"
  assert buckets_lib.refusal(clip(width=220, height=220), bucket, LIMITS) is None  # enlarged by 1.16
  assert buckets_lib.refusal(clip(width=2560, height=512), bucket, LIMITS) == "aspect"  # a fifth would remain
  assert buckets_lib.refusal(clip(width=0, height=0), bucket, LIMITS) == "too_small"


clips_st = st.builds(
  clip, st.floats(0.05, 20), st.sampled_from([8.0, 12.5, 24.0, 60.0]), st.integers(16, 4000), st.integers(16, 4000)
)
buckets_st = st.lists(
  st.builds(Bucket, st.integers(1, 81), st.sampled_from([32, 64, 256]), st.sampled_from([32, 64, 448]),
            st.sampled_from([4.0, 8.0, 24.0])), min_size=1, max_size=5, unique=True
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(infos=st.lists(clips_st, min_size=1, max_size=12), buckets=buckets_st)
def test_every_clip_is_kept_once_or_counted_once(infos, buckets):
  try:
    members, report = buckets_lib.assign(infos, buckets)
  except DataError as error:
    assert all(buckets_lib.best(info, buckets, LIMITS) is None for info in infos)
    assert f"kept 0 of {len(infos)} clips" in str(error)
    return
  kept = np.concatenate(members)
  assert len(set(kept.tolist())) == len(kept) == report.kept and report.kept + report.dropped == len(infos)
  assert sum(sum(refused.values()) for refused in report.refused) == report.dropped * len(buckets)
  for bucket, numbers in zip(buckets, members, strict=True):
    for info in (infos[n] for n in numbers):
      assert (bucket.frames - 1) / bucket.fps <= max(info.duration_s - 1 / info.fps, 0) + 1e-3
      assert bucket.width <= 1.25 * info.width and bucket.height <= 1.25 * info.height
      distance = lambda b, i=info: abs(math.log(i.width / i.height * b.height / b.width))
      for other in buckets:
        nearer = distance(other) < distance(bucket) - 2e-3
        assert not nearer or buckets_lib.refusal(info, other, LIMITS) is not None


def test_the_report_is_a_table_and_a_dict():
  infos = [clip()] * 5 + [clip(seconds=0.5)] * 2 + [clip(width=10, height=10)]
  _, report = buckets_lib.assign(infos, [Bucket(17, 64, 64, 8), Bucket(81, 64, 128, 8)])
  assert report.to_json() == {
    "kept": 5, "dropped": 3, "reasons": {"too_short": 2, "too_small": 1},
    "buckets": [
      {"bucket": "17x64x64@8", "clips": 5, "hours": 20 / 3600, "refused": {"too_short": 2, "too_small": 1}},
      {"bucket": "81x64x128@8", "clips": 0, "hours": 0.0, "refused": {"too_short": 3}},
    ],
  }  # fmt: skip
  lines = str(report).splitlines()
  assert len(lines) == 4 and lines[1].split()[:2] == ["17x64x64@8", "5"]
  assert lines[-1].startswith("kept 5 of 8 clips, dropped 3: ")


@pytest.mark.parametrize(
  ("infos", "bucket", "pattern", "mended"),
  [
    ([clip(0.8), clip(0.5)], Bucket(33, 64, 64, 8), r"at most (\d+) frames", lambda x: Bucket(int(x), 64, 64, 8)),
    ([clip(fps=10.0)] * 3, Bucket(9, 64, 64, 24), r"at most ([\d.]+) fps", lambda x: Bucket(9, 64, 64, float(x))),
    ([clip(width=99, height=90)], Bucket(9, 256, 256, 8), r"largest clip is (\d+)x", lambda x: Bucket(9, 64, 64, 8)),
    ([clip(width=900, height=90)], Bucket(9, 64, 64, 8), r"near ([\d.]+)", lambda x: Bucket(9, 64, 640, 8)),
  ],
)
def test_when_nothing_is_left_the_advice_mends_it(infos, bucket, pattern, mended):
  with pytest.raises(DataError) as raised:
    buckets_lib.assign(infos, [bucket])
  assert "\n" not in str(raised.value)
  advice = re.search(pattern, str(raised.value))
  assert advice, str(raised.value)
  _, report = buckets_lib.assign(infos, [mended(advice[1])])
  assert report.kept >= 1


def test_empty_sets_and_wrong_buckets_are_errors():
  with pytest.raises(DataError, match="has no clips"):
    buckets_lib.assign([], [Bucket(1, 8, 8, 8)])
  for wrong in ([], [Bucket(1, 8, 8, 8)] * 2):
    with pytest.raises(ConfigError, match="at least one"):
      buckets_lib.assign([clip()], wrong)
  for values in ((0, 8, 8, 8), (1, 0, 8, 8), (1, 8, 8, 0), (1, 8, 8, math.nan)):
    with pytest.raises(ConfigError, match="above 0"):
      Bucket(*values)


def test_caches_know_a_bucket_by_its_name():
  for bucket in (Bucket(17, 64, 96, 8.0), Bucket(81, 480, 832, 23.976)):
    assert bucket.name == latent_variant(bucket.frames, bucket.height, bucket.width, bucket.fps)


def test_batch_sizes_divide_or_name_the_legal_ones():
  buckets = [Bucket(9, 32, 32, 8), Bucket(17, 32, 32, 8)]
  assert buckets_lib.batch_sizes(buckets, batch=24, multiple_of=8) == (24, 24)
  with pytest.raises(ConfigError, match="multiple of 8; use 16 or 24"):
    buckets_lib.batch_sizes(buckets, batch=20, multiple_of=8)
  with pytest.raises(ConfigError, match="use 8"):
    buckets_lib.batch_sizes(buckets, batch=3, multiple_of=8)
  sizes = buckets_lib.batch_sizes(buckets, token_budget=1000, tokens=[9, 31], multiple_of=8)
  assert sizes == (104, 32)  # the largest multiples of 8 with size * tokens <= 1000
  with pytest.raises(ConfigError, match="use at least 248"):
    buckets_lib.batch_sizes(buckets, token_budget=240, tokens=[9, 31], multiple_of=8)
  for both in ({}, {"batch": 8, "token_budget": 9}):
    with pytest.raises(ConfigError, match="one of the two"):
      buckets_lib.batch_sizes(buckets, **both)
