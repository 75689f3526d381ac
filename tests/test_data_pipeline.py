"""Batches: a pure function of the step, whatever the processes, threads, workers and restarts."""

import dataclasses
import functools
import logging
import pickle
import threading
import time

import ml_dtypes
import numpy as np
import pytest

from kling_jax.data import cache as cache_lib
from kling_jax.data import conditions, mixture, pipeline
from kling_jax.data.buckets import Bucket
from kling_jax.data.mixture import Mixture
from kling_jax.data.source import ClipInfo, Score
from kling_jax.data.tokens import ByteTokenizer
from kling_jax.errors import ConfigError, DataError

FPS, DURATION_S, SIZE = 24.0, 3.0, 16


@dataclasses.dataclass(frozen=True)
class Plates:
  """Clips whose pixels say clip number (red), time in 1/64 s (green) and column (blue)."""

  count: int = 20
  name: str = "plates"
  videos: int = 10
  broken: frozenset[int] = frozenset()
  wide: frozenset[int] = frozenset()
  wrong: str = ""  # message of an error that is no DataError

  @property
  def fingerprint(self):
    return f"{self.name}-{self.count}"

  def __len__(self):
    return self.count

  def info(self, index):
    return ClipInfo(
      f"{self.name}-{index}", f"plate {index}", DURATION_S, FPS, round(FPS * DURATION_S), 64,
      32 if index in self.wide else 64, {"motion": Score(float(index), "plates", "1")},
      f"{self.name}-v{index % self.videos}", index,
    )  # fmt: skip

  def frames(self, index, times_s, height, width):
    if self.wrong:
      raise LookupError(self.wrong)
    if index in self.broken:
      raise DataError(f"plate {index} is broken")
    assert times_s[0] >= 0 and times_s[-1] <= DURATION_S - 1 / FPS + 1e-9, times_s
    frames = np.zeros((len(times_s), height, width, 3), np.uint8)
    frames[..., 0] = index
    frames[..., 1] = np.floor(times_s * 64 + 1e-6).astype(np.uint8)[:, None, None]
    frames[..., 2] = np.arange(width)
    return frames


def make(*sources, weights=(), **options):
  options = {"buckets": [(5, SIZE, SIZE)], "fps": 8.0, "batch": 8, "tokenizer": ByteTokenizer(16)} | options
  return pipeline.Batches(Mixture(sources or (Plates(),), weights), **options)


TWO = {"buckets": [(5, SIZE, SIZE), (9, SIZE, 2 * SIZE)]}
wide = functools.partial(Plates, wide=frozenset(range(0, 20, 3)))


def clips_of(batch):
  return batch["frames"][:, 0, 0, 0, 0].tolist()


def assert_same(left, right):
  assert left.keys() == right.keys()
  for name in left:
    assert type(left[name]) is np.ndarray is type(right[name])
    assert left[name].dtype == right[name].dtype
    np.testing.assert_array_equal(left[name], right[name], name)


def joined(parts):
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_a_batch_has_the_keys_types_and_shapes_of_the_contract():
  percentiles = conditions.fit(Mixture((Plates(),)).infos(), ("motion",))
  batch = make(percentiles=percentiles)[3]
  assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
    "frames": ((8, 5, SIZE, SIZE, 3), "uint8"), "tokens": ((8, 16), "int32"), "tokens_mask": ((8, 16), "bool"),
    "scores": ((8, 1), "float32"), "scores_known": ((8, 1), "bool"), "fps": ((8,), "float32"),
    "index": ((8,), "uint32"),
  }  # fmt: skip
  assert batch["index"].tolist() == list(range(8)) and set(batch["fps"]) == {8.0}
  for clip, u, tokens in zip(clips_of(batch), batch["scores"][:, 0], batch["tokens"], strict=True):
    assert u == np.float32(percentiles.normalise("motion", clip))
    assert ByteTokenizer(16).decode(tokens) == f"plate {clip}"


def test_batches_depend_on_nothing_but_sources_seed_and_step():
  batches = make(wide(), **TWO)
  steps = [0, 1, 7, 10**6, 10**9]
  first = {step: batches[step] for step in steps}
  again = pickle.loads(pickle.dumps(batches))
  for step in reversed(steps):
    assert_same(first[step], again[step])
    assert_same(first[step], make(wide(), **TWO)[step])
  other = make(wide(), seed=1, **TWO)
  assert any(clips_of(first[step]) != clips_of(other[step]) for step in steps)


def test_the_order_is_pinned():
  """Other numbers here mean that runs resume on other data : bump nothing, find out why."""
  assert [clips_of(make()[step]) for step in (0, 3)] == [[1, 19, 3, 6, 13, 8, 9, 10], [18, 4, 19, 5, 14, 12, 9, 13]]
  assert make()[0]["frames"][:, 0, 0, 0, 1].tolist() == [110, 67, 140, 155, 140, 144, 95, 151]


def test_every_clip_once_an_epoch_and_nothing_dropped_at_its_end():
  batches = make(wide(), **TWO)
  rows = {b: [] for b in range(2)}
  for step in range(200):
    b, places = batches.at(step)
    batch = batches[step]
    assert places.start == len(rows[b]) and batch["frames"].shape[1:4] == [(5, 16, 16), (9, 16, 32)][b]
    rows[b] += clips_of(batch)
  epochs = []
  for b, members in enumerate(batches.clips):
    n = len(members)
    for epoch in range(len(rows[b]) // n):
      part = rows[b][epoch * n : (epoch + 1) * n]
      assert sorted(part) == members.tolist()
      epochs.append(tuple(part))
    # Every bucket is shown in proportion to its clips (by whole steps of a round).
    assert len(rows[b]) / 1600 == pytest.approx(n / 20, abs=0.06)
  assert len(set(epochs)) > 0.98 * len(epochs)  # each epoch has an order of its own; of 7 clips two may agree


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_the_slices_of_all_processes_are_the_whole_batch(ways):
  options = TWO | {"multiple_of": 8}
  whole = make(wide(), **options)
  parts = [make(wide(), process_index=p, process_count=ways, **options) for p in range(ways)]
  for step in (0, 5, 1001):
    assert_same(whole[step], joined([part[step] for part in parts]))


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_streams_give_the_batches_of_the_index(threads):
  batches = make(wide(), **TWO)
  steps = list(batches.iterate(37, threads=threads, stop=45))
  assert [step for step, _ in steps] == list(range(37, 45))
  for step, batch in steps:
    assert_same(batches[step], batch)
  assert list(batches.iterate(45, threads=threads, stop=45)) == []


def test_a_worker_process_gives_the_same_bytes():
  batches = make(wide(), **TWO)
  with_worker = list(batches.iterate(11, threads=1, workers=1, stop=14))
  assert [step for step, _ in with_worker] == [11, 12, 13]
  for step, batch in with_worker:
    assert_same(batches[step], batch)


@pytest.mark.drill
@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(workers):
  batches = make(wide(broken=frozenset({4, 9})), **TWO)
  steps = list(batches.iterate(5, threads=2, workers=workers, stop=16))
  assert [step for step, _ in steps] == list(range(5, 16)) and batches.failed.keys() <= {"plates-4", "plates-9"}
  for step, batch in steps:
    assert_same(batches[step], batch)


@pytest.mark.drill
def test_errors_of_a_worker_arrive_whatever_they_are():
  for source, kind, text in (
    (Plates(wrong="no such frame"), RuntimeError, "no such frame"),
    (Plates(broken=frozenset(range(20))), DataError, "cannot be decoded"),
  ):
    with pytest.raises(kind, match=text):
      next(make(source).iterate(0, threads=1, workers=1))


class Counting(Plates):
  """Notes which clips were decoded, and waits until it may go on."""

  seen: list[int] = []  # noqa: RUF012  one list for the test
  gate = threading.Event()

  def frames(self, index, times_s, height, width):
    Counting.seen.append(index)
    return super().frames(index, times_s, height, width)


def test_resuming_reads_nothing_of_the_steps_before():
  batches = make(Counting())
  Counting.seen.clear()
  stream = batches.iterate(5000, threads=0, stop=5001)
  (_, batch), *_ = stream
  assert sorted(Counting.seen) == sorted(clips_of(batch)) and len(Counting.seen) == 8


def until(condition, seconds=20.0):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.01)
  return condition()


def test_the_next_batches_are_built_while_the_caller_computes_and_threads_end():
  before = threading.active_count()
  batches = make(Counting())
  Counting.seen.clear()
  stream = batches.iterate(0, threads=2)
  next(stream)
  assert until(lambda: len(Counting.seen) >= 3 * 8)  # two further batches, with no further call
  stream.close()
  assert until(lambda: threading.active_count() <= before)
  built = len(Counting.seen)
  time.sleep(0.1)
  assert len(Counting.seen) == built


def test_frames_lie_inside_their_clip_at_the_rate_of_the_bucket():
  batches = make(Plates(200), batch=200)
  green = batches[0]["frames"][:, :, 0, 0, 1].astype(int)
  steps = np.diff(green, axis=1)
  assert set(np.unique(steps)) == {8}  # 64 ticks a second at 8 frames a second
  slack = (DURATION_S - 1 / FPS - 4 / 8) * 64
  starts = green[:, 0]
  assert starts.min() < 0.1 * slack and 0.9 * slack < starts.max() <= slack
  assert starts.mean() == pytest.approx(slack / 2, rel=0.1)
  # The same clip starts elsewhere in another epoch.
  later = batches[1]["frames"][:, :, 0, 0, :2].astype(int)
  first_start, later_start = (dict(zip(r[:, 0, 0], r[:, 0, 1], strict=True)) for r in (
    batches[0]["frames"][:, :, 0, 0, :2].astype(int), later))  # fmt: skip
  assert np.mean([first_start[clip] != later_start[clip] for clip in range(200)]) > 0.9


def test_flips_mirror_half_of_the_rows_and_are_off_unless_asked():
  straight, mirrored = make(Plates(200), batch=200)[0], make(Plates(200), batch=200, flip=True)[0]
  turned = mirrored["frames"][:, 0, 0, 0, 2] == SIZE - 1
  assert 0.4 < turned.mean() < 0.6
  np.testing.assert_array_equal(
    np.where(turned[:, None, None, None, None], mirrored["frames"][:, :, :, ::-1], mirrored["frames"]),
    straight["frames"],
  )


def test_mixtures_keep_their_weights_and_every_clip_of_a_source_its_share():
  sources = (Plates(10, "small"), Plates(200, "big", wide=frozenset(range(100, 200))))
  batches = make(*sources, weights=(0.75, 0.25), batch=16, **TWO)
  rows = np.concatenate([
    [batches._row(b, place).clip for place in places] for b, places in map(batches.at, range(1500))
  ])  # fmt: skip
  small = rows < 10
  assert small.mean() == pytest.approx(0.75, abs=0.02)
  counts = np.bincount(rows[small], minlength=10)
  assert counts.min() > 0.97 * counts.max()
  assert np.mean(rows[~small] < 110) == pytest.approx(0.5, abs=0.03)  # the big source's halves lie in two buckets
  plain = make(*sources, batch=16, **TWO)
  rows = np.concatenate([[plain._row(b, p).clip for p in places] for b, places in map(plain.at, range(400))])
  assert np.mean(rows < 10) == pytest.approx(10 / 210, abs=0.01)


def test_weighing_by_tokens_shows_long_buckets_in_proportion():
  by_clips, by_tokens = (make(wide(), weigh=weigh, **TWO) for weigh in ("clips", "tokens"))
  share = lambda batches: batches.schedule.counts[1] / batches.schedule.period
  assert share(by_clips) == pytest.approx(7 / 20, abs=0.02)
  cost = 9 * 2 / 5
  assert share(by_tokens) == pytest.approx(7 * cost / (7 * cost + 13), abs=0.02)


def test_token_budgets_give_each_bucket_its_batch():
  batches = make(wide(), batch=None, token_budget=80, tokens_of=lambda bucket: bucket.frames, multiple_of=2, **TWO)
  assert batches.sizes == (16, 8)
  assert {batches[step]["frames"].shape[:2] for step in range(12)} == {(16, 5), (8, 9)}
  # Equal clips a unit of time: fewer, but larger batches of short clips.
  steps = [batches.at(step)[0] for step in range(batches.schedule.period)]
  assert 16 * steps.count(0) / (8 * steps.count(1)) == pytest.approx(13 / 7, rel=0.1)


def test_a_broken_clip_gives_its_row_to_the_next_and_is_counted(caplog):
  sound, hurt = make(Plates()), make(Plates(broken=frozenset({4, 5, 19})))
  instead = {4: 6, 5: 6, 19: 0}
  with caplog.at_level(logging.WARNING):
    for step in (9, 0, 3, 4, 5):
      batch = hurt[step]
      assert clips_of(batch) == [instead.get(clip, clip) for clip in clips_of(sound[step])]
      for clip, tokens in zip(clips_of(batch), batch["tokens"], strict=True):
        assert ByteTokenizer(16).decode(tokens) == f"plate {clip}"  # caption and scores follow the frames
  assert hurt.failed == {f"plates-{clip}": f"plate {clip} is broken" for clip in (4, 5, 19)}
  assert sum("is replaced by the next" in record.message for record in caplog.records) == 3  # each clip once
  streamed = make(Plates(broken=frozenset({4, 5, 19})))
  for step, batch in streamed.iterate(0, threads=2, stop=6):
    assert_same(batch, hurt[step])
  assert set(streamed.failed) == set(hurt.failed)
  halves = [make(Plates(broken=frozenset({4, 5, 19})), process_index=p, process_count=2)[4] for p in range(2)]
  assert_same(joined(halves), hurt[4])


@pytest.mark.parametrize("threads", [0, 2])
def test_too_many_broken_clips_end_the_run(threads):
  with pytest.raises(DataError, match="8 clips of bucket 5x16x16@8 that follow each other"):
    list(make(Plates(broken=frozenset(range(20)))).iterate(0, threads=threads, stop=3))
  with pytest.raises(DataError, match=r"\d+ of 200 clips cannot be decoded, more than the 8"):
    list(make(Plates(200, broken=frozenset(range(0, 200, 3)))).iterate(0, threads=threads, stop=20))


def test_other_errors_are_not_taken_for_broken_clips():
  with pytest.raises(LookupError, match="bug"):
    make(Plates(wrong="bug"))[0]
  with pytest.raises(RuntimeError, match="bug"):
    next(make(Plates(wrong="bug")).iterate(0, threads=1))


def test_clips_of_one_video_never_straddle_the_splits():
  source = Plates(60, videos=12)
  splits = {name: make(source, split=name, validation_fraction=0.3) for name in mixture.SPLITS}
  members = {name: set(batches.clips[0].tolist()) for name, batches in splits.items()}
  assert members["train"] | members["validation"] == set(range(60)) and not members["train"] & members["validation"]
  videos = {name: {clip % 12 for clip in clips} for name, clips in members.items()}
  assert videos["train"] and videos["validation"] and not videos["train"] & videos["validation"]
  assert set(clips_of(splits["validation"][5])) <= members["validation"]


def test_the_held_out_videos_are_a_fraction_and_stay_when_others_come():
  few, many = [f"v{n}" for n in range(1000)], [f"v{n}" for n in range(4000)]
  held = mixture.held_out(few, 0.1)
  assert 70 < len(held) < 130
  assert mixture.held_out(many, 0.1) & set(few) == held
  assert held < mixture.held_out(few, 0.2)
  assert mixture.held_out(few, 0) == frozenset()
  for fraction in (-0.1, 1.0):
    with pytest.raises(ConfigError, match="validation_fraction"):
      mixture.held_out(few, fraction)


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_small_sets_keep_both_sides_and_one_video_is_trained_on(fraction, caplog):
  assert 0 < len(mixture.held_out(["a", "b", "c"], fraction)) < 3
  assert mixture.held_out(["a", "a"], fraction) == frozenset() and "one video" in caplog.text
  alone = Plates(4, videos=1)
  assert len(make(alone, validation_fraction=fraction).clips[0]) == 4
  empty = make(alone, validation_fraction=fraction, split="validation")
  assert empty.fixed_rows(8) == []
  with pytest.raises(DataError, match="the validation split holds no clips"):
    empty[0]


def test_fixed_rows_are_centred_numbered_and_the_same_for_all_processes():
  options = {"split": "validation", "validation_fraction": 0.5, "multiple_of": 4, **TWO}
  table = make(wide(), **options).fixed_rows(20)
  assert all(len(batch["index"]) in (4, 8) for batch in table)
  assert np.concatenate([batch["index"] for batch in table]).tolist() == list(range(sum(len(b["fps"]) for b in table)))
  rows = sum(len(batch["index"]) for batch in table)
  assert 20 <= rows <= 28
  for batch in table:
    frames = batch["frames"].shape[1]
    centre = (DURATION_S - 1 / FPS - (frames - 1) / 8) / 2
    assert set(batch["frames"][:, 0, 0, 0, 1]) == {int(centre * 64)}
  parts = [make(wide(), process_index=p, process_count=2, **options).fixed_rows(20) for p in range(2)]
  for whole, *halves in zip(table, *parts, strict=True):
    assert_same(whole, joined(halves))
  for left, right in zip(table, make(wide(), seed=5, **options).fixed_rows(20), strict=True):
    assert_same(left, right)
  (small,) = make(batch=64).fixed_rows(6)
  assert len(small["fps"]) == 6  # no larger than asked for
  many = make(Plates(3), batch=8).fixed_rows(16)
  assert [sorted(set(clips_of(batch))) for batch in many] == [[0, 1, 2]] * 2


def test_scores_of_another_version_stop_the_run_at_its_start():
  fitted = conditions.fit(Mixture((Plates(),)).infos(), ("motion",))
  other = conditions.Percentiles((dataclasses.replace(fitted.conditions[0], version="0"),))
  with pytest.raises(DataError, match="clip plates-0: motion comes from plates 1, the percentiles from plates 0"):
    make(percentiles=other)


def test_cached_latents_and_texts_stand_in_for_frames_and_tokens(tmp_path):
  source, name = Plates(6), "5x16x16@8"
  cards = {kind: cache_lib.Card(kind, "toy", "abc") for kind in ("latents", "text")}
  write = {kind: cache_lib.Writer(tmp_path / kind, card) for kind, card in cards.items()}
  for index in range(6):
    info = source.info(index)
    if index < 5:
      write["latents"].add(info.clip_id, name, np.full((2, 4, 4, 3), index))
    write["text"].add(info.clip_id, cache_lib.text_variant(info.caption), np.full((1 + index, 2), index))
  for writer in write.values():
    writer.flush()
  latents, texts = cache_lib.LatentCache(tmp_path / "latents"), cache_lib.TextCache(tmp_path / "text")
  with pytest.raises(DataError, match=r"lacks the latents of 1 of 6 clips, first 'plates-5'"):
    make(source, latents=(latents,))
  source = dataclasses.replace(source, count=5)
  batches = make(source, latents=(latents,), texts=(texts,), text_length=6)
  batch = batches[2]
  assert set(batch) == {"latents", "text", "text_mask", "scores", "scores_known", "fps", "index"}
  assert batch["latents"].shape == (8, 2, 4, 4, 3) and batch["latents"].dtype == ml_dtypes.bfloat16
  clips = batch["latents"][:, 0, 0, 0, 0].astype(int)
  assert clips.tolist() == clips_of(make(source)[2])
  np.testing.assert_array_equal(batch["text_mask"].sum(1), clips + 1)
  np.testing.assert_array_equal(batch["text"][:, 0, 0].astype(int), clips)
  ((_, streamed),) = batches.iterate(2, threads=1, stop=3)
  assert_same(streamed, batch)
  with pytest.raises(ConfigError, match="flip"):
    make(source, latents=(latents,), flip=True)
  with pytest.raises(ConfigError, match="give one a source"):
    make(source, latents=(latents, latents))


def test_wrong_arguments_name_the_legal_ones():
  for options, text in (
    ({"split": "val"}, "known: train, validation"),
    ({"weigh": "clip"}, "did you mean 'clips'"),
    ({"batch": 12, "multiple_of": 8}, "use 8 or 16"),
    ({"batch": 10, "multiple_of": 2, "process_count": 4}, "multiple of 4"),
    ({"process_index": 2, "process_count": 2}, "not one of 2"),
    ({"fps": None}, r"data\.fps"),
    ({"buckets": [(5, 16)]}, r"\(frames, height, width\)"),
  ):
    with pytest.raises(ConfigError, match=text):
      make(**options)
  with pytest.raises(ConfigError, match=r"data\.sources is empty"):
    Mixture(())
  for weights in ((1.0,), (1.0, 0.0), (1.0, -1.0)):
    with pytest.raises(ConfigError, match=r"data\.weights"):
      Mixture((Plates(), Plates()), weights)


def test_dropped_clips_and_empty_buckets_are_said(caplog):
  batches = make(Plates(), buckets=[Bucket(5, SIZE, SIZE, 8.0), Bucket(99, SIZE, 2 * SIZE, 8.0)])
  assert "kept 20 of 20" in caplog.text and "99x16x32@8" in caplog.text
  assert batches.buckets == (Bucket(5, SIZE, SIZE, 8.0),)
  with pytest.raises(DataError, match="no clip fits any bucket: kept 0 of 20 clips, dropped 20: 20 too_short"):
    make(Plates(), buckets=[(99, SIZE, SIZE)])


def test_sources_are_opened_by_name_and_know_their_folder(tmp_path):
  opened = Mixture.open(("worlds:shapes-v1?count=8&seed=3", "worlds:shapes-v1?count=4&seed=1"), (1.0, 2.0))
  assert len(opened) == 12 and opened.folders == (None, None)
  assert [opened.find(number) for number in (0, 7, 8, 11)] == [(0, 0), (0, 7), (1, 0), (1, 3)]
  assert opened.info(9) == opened.sources[1].info(1)
  assert [info.clip_id for info in opened.infos()] == [opened.info(n).clip_id for n in range(12)]
  assert opened.fingerprint != Mixture(opened.sources[::-1]).fingerprint
  (tmp_path / "clips.csv").write_text("x")
  assert mixture.home(f"tfds:{tmp_path}") == mixture.home(str(tmp_path)) == tmp_path
  assert mixture.home(str(tmp_path / "clips.csv")) == mixture.home(str(tmp_path / "records")) == tmp_path
