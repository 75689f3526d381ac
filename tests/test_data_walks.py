"""Walks: pieces without gaps, cuts where they are, and batches that are functions of their step."""

import pathlib
import pickle

import numpy as np
import pytest

from kling_jax.data import cut, decode, dense_captions, encode, record, records
from kling_jax.data.dense_captions import DenseCaptions, Sentence
from kling_jax.data.memory_world_frames import MemoryWorld, walk_frames
from kling_jax.data.mixture import Mixture
from kling_jax.data.open import open_source
from kling_jax.data.tokens import ByteTokenizer
from kling_jax.data.walks import Walks
from kling_jax.errors import ConfigError, DataError

MEMORY = dict(clips=4, frames=3, height=16, width=16, fps=3.0, batch=4)
FILM = dict(clips=2, frames=4, height=16, width=16, fps=4.0, batch=1)


def memory(**changes) -> Walks:
  return Walks(Mixture((MemoryWorld(count=12, seed=1, clips=9),)), **(MEMORY | changes))


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> str:
  """Four seconds at 12 frames a second; frame k is grey of level 4 k + 20."""
  path = tmp_path_factory.mktemp("walks") / "videos" / "film.mp4"
  encode.write(path, (np.full((32, 32, 3), 4 * k + 20, np.uint8) for k in range(48)), fps=12, crf=4)
  return str(path)


def shown(frames: np.ndarray) -> np.ndarray:
  """Which frame of the film each picture is."""
  return np.rint((frames.astype(float).mean((-1, -2, -3)) - 20) / 4).astype(int)


def test_a_row_is_a_stretch_of_the_world():
  walks = memory()
  video, first = walks.at(7)
  row = walks.row(video, first)
  story = walks.sources.sources[0].story(int(video.rsplit("-", 1)[1]))
  times = first + np.arange(13) / 3
  expected = walk_frames(story, times, 16, 16)
  np.testing.assert_array_equal(row.image_HWC, expected[0])
  np.testing.assert_array_equal(row.frames_OTHWC.reshape(12, 16, 16, 3), expected[1:])
  assert row.dynamics == story.sentences[first : first + 4]
  assert tuple(row.cut_O) == story.cuts[first : first + 4] and not row.cut_O[0]
  assert tuple(row.determined_O) == story.determined[first : first + 4]
  assert len(row.truth) == 4 and row.truth[0].xy_TNC.shape == (3, 4, 2)
  assert tuple(row.fps_O) == (3.0,) * 4


def test_a_memory_in_front_of_the_world_changes_nothing():
  spec = "worlds:memory-v1?count=12&seed=1&clips=9"
  kept = Walks(Mixture.open([spec], memory_gib=0.01), **MEMORY, dynamics_tokenizer=ByteTokenizer(24))
  plain = Walks(Mixture.open([spec]), **MEMORY, dynamics_tokenizer=ByteTokenizer(24))
  for name, array in plain[3].items():
    np.testing.assert_array_equal(array, kept[3][name])


def test_rows_begin_where_nothing_is_away():
  walks = memory()
  for place in range(60):
    video, first = walks.at(place)
    state = walks.sources.sources[0].story(int(video.rsplit("-", 1)[1])).states[first]
    assert state.debts == () and state.room == 0


def test_batches_are_functions_of_the_step_for_any_number_of_processes():
  tokenizers = dict(prompt_tokenizer=ByteTokenizer(40), dynamics_tokenizer=ByteTokenizer(24))
  whole = memory(**tokenizers)
  parts = [memory(**tokenizers, process_index=k, process_count=2) for k in range(2)]
  batch = whole[5]
  assert batch["frames"].shape == (4, 4, 3, 16, 16, 3) and batch["dynamics"].shape == (4, 4, 24)
  assert batch["prompt"].shape == (4, 40) and batch["cut"].shape == batch["fps"].shape == (4, 4)
  for name, array in batch.items():
    np.testing.assert_array_equal(array, np.concatenate([part[5][name] for part in parts]))
    np.testing.assert_array_equal(array, pickle.loads(pickle.dumps(whole))[5][name])
  streamed = dict(whole.iterate(4, threads=2, stop=6))
  assert list(streamed) == [4, 5]
  np.testing.assert_array_equal(streamed[5]["frames"], batch["frames"])
  assert not np.array_equal(streamed[4]["frames"], batch["frames"])


def test_the_splits_share_no_walk_and_the_table_is_fixed():
  train, held = (memory(split=split, validation_fraction=0.3) for split in ("train", "validation"))
  assert not set(train.videos) & set(held.videos) and len(train.videos) + len(held.videos) == 12
  table = held.fixed_rows(6)
  assert sum(len(batch["index"]) for batch in table) == 8 and table[1]["index"].tolist() == [4, 5, 6, 7]
  np.testing.assert_array_equal(table[0]["frames"], held.fixed_rows(4)[0]["frames"])
  parts = [memory(split="validation", validation_fraction=0.3, process_index=k, process_count=2) for k in range(2)]
  np.testing.assert_array_equal(table[1]["frames"], np.concatenate([p.fixed_rows(6)[1]["frames"] for p in parts]))
  assert memory(split="validation").fixed_rows(3) == []


def test_every_video_comes_once_an_epoch():
  walks = memory()
  assert {walks.at(place)[0] for place in range(12)} == set(walks.videos)


def test_weights_choose_the_source():
  sources = (MemoryWorld(count=5, seed=1, clips=6), MemoryWorld(count=5, seed=2, clips=6))
  walks = Walks(Mixture(sources, weights=(3.0, 1.0)), **MEMORY)
  first = sum(walks.at(place)[0].startswith("0/") for place in range(64))
  assert first == 48


def test_pieces_of_a_file_follow_each_other_without_a_gap(film):
  walks = Walks(Mixture((open_source(film.rsplit("/", 1)[0]),)), **FILM)
  (pieces,) = walks.videos.values()
  assert [piece.cut for piece in pieces] == [True, False, False, False]
  row = walks.row("film.mp4", 1)
  assert shown(row.image_HWC[None]).tolist() == [12] and not row.cut_O.any()
  assert shown(row.frames_OTHWC).tolist() == [[15, 18, 21, 24], [27, 30, 33, 36]]


def test_pieces_fill_a_clip_whole_at_a_rate_near_the_wished_one(film):
  walks = Walks(Mixture((open_source(film.rsplit("/", 1)[0]),)), **(FILM | dict(fps=3.2)))
  (pieces,) = walks.videos.values()
  assert len(pieces) == 3 and sum(piece.length_s for piece in pieces) == pytest.approx(4.0)
  np.testing.assert_allclose(walks.row("film.mp4", 0).fps_O, 3.0)


def test_no_piece_straddles_a_cut_and_sentences_go_to_the_pieces_they_overlap(film, tmp_path):
  (tmp_path / "shots.json").write_text(
    '[{"video": "film.mp4", "shots": [{"start_s": 0, "end_s": 1.9}, {"start_s": 2.0, "end_s": 4.0}]}]'
  )
  shots = dense_captions.read_shots(tmp_path / "shots.json")
  captions = DenseCaptions([Sentence("film", 0, 2, "It is dark."), Sentence("film", 2.9, 4.5, "It is light.")])
  source = open_source(film.rsplit("/", 1)[0])
  walks = Walks(Mixture((source,)), **(FILM | dict(clips=4)), captions=captions, shots=shots)
  row = walks.row("film.mp4", 0)
  assert row.cut_O.tolist() == [False, False, True, False]
  assert row.dynamics == ("It is dark.", "It is dark.", "", "It is light.") and row.prompt == "It is dark."
  np.testing.assert_allclose(row.fps_O, [4 / 0.95, 4 / 0.95, 4, 4])
  assert shown(row.frames_OTHWC)[1, -1] == 22 and shown(row.frames_OTHWC)[2].tolist() == [27, 30, 33, 36]


def test_a_clip_set_is_walked_along_its_clips_with_a_cut_where_one_is_missing(film, tmp_path):
  info, content = decode.probe(film), record.content_hash(film)
  tick = (info.end_pts - info.start_pts) // 4
  with records.RecordWriter(tmp_path / "set", "test") as writer:
    for index in (0, 1, 3):  # the third second was dropped
      span = info.start_pts + index * tick, info.start_pts + (index + 1) * tick
      media = cut.cut(film, *span, crf=4).media
      clip = record.ClipRecord(
        clip_id=record.clip_id(content, *span, info.time_base, "test"), video_id="film", source=film,
        start_pts=span[0], end_pts=span[1], time_base=str(info.time_base), fps=12.0, width=32, height=32,
        num_frames=12, index=index, cut_before=index == 0, prev_clip_id="x" if index else "", caption=f"second {index}",
      )  # fmt: skip
      writer.write(clip, media)
  walks = Walks(Mixture((open_source(tmp_path / "set"),)), **(FILM | dict(clips=3)))
  row = walks.row("film", 0)
  assert row.cut_O.tolist() == [False, False, True] and row.dynamics == ("second 0", "second 1", "second 3")
  assert shown(row.frames_OTHWC)[1].tolist()[:3] == [15, 18, 21] and shown(row.frames_OTHWC)[2, 0] == 39


def test_scenes_of_vript_become_a_video_again(film, tmp_path):
  for k in (1, 2):
    (tmp_path / f"abc-Scene-00{k}.mp4").write_bytes(pathlib.Path(film).read_bytes())
  captions = DenseCaptions([Sentence(f"abc-Scene-00{k}", 0, 1e9, f"scene {k}") for k in (1, 2)])
  walks = Walks(Mixture((open_source(tmp_path),)), **(FILM | dict(clips=8)), captions=captions)
  row = walks.row("abc", 0)
  assert (
    row.dynamics == ("scene 1",) * 4 + ("scene 2",) * 4 and row.cut_O.tolist() == [False] * 4 + [True] + [False] * 3
  )


def test_an_unreadable_video_is_replaced_by_the_next(film, tmp_path):
  videos = tmp_path / "videos"
  videos.mkdir()
  for name in ("a.mp4", "b.mp4"):
    (videos / name).write_bytes(pathlib.Path(film).read_bytes())
  walks = Walks(Mixture((open_source(videos),)), **(FILM | dict(batch=2, clips=4)))
  (videos / "a.mp4").write_bytes(b"gone")
  batch = walks[0]
  np.testing.assert_array_equal(batch["frames"][0], batch["frames"][1])
  assert len(walks.failed) == 1


def test_wrong_sizes_name_the_legal_ones(film):
  with pytest.raises(DataError, match=r"no video has 30 pieces.* the longest has 9: lower `clips` to at most that"):
    memory(clips=30)
  with pytest.raises(ConfigError, match="must be a multiple of 3, for example 3 or 6"):
    memory(multiple_of=3)
  with pytest.raises(ConfigError, match=r"set fps to frames / 1$"):
    memory(fps=4.0)
  with pytest.raises(ConfigError, match="did you mean 'validation'"):
    memory(split="valdation")
  with pytest.raises(DataError, match="holds no walks"):
    memory(split="validation")[0]
  with pytest.raises(IndexError, match="has 9 pieces"):
    memory().row("memory-v1-1-0", 6)
