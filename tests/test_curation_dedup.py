"""Duplicates: laws of the signature, searches against brute force, who stays, sets in reality, caches."""

import json
import pathlib

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_jax import cli
from kling_jax.curation import dedup, duplicates, engine, neighbours, rules, select, signature
from kling_jax.curation.clip_columns import ClipColumns
from kling_jax.curation.signature import Signature
from kling_jax.data import clip_table, encode, records, worlds
from kling_jax.data.record import ClipRecord
from kling_jax.data.source import Score
from kling_jax.errors import DataError, UsageError

SIDE, FPS = 96, 8.0


def film(index: int, start_s: float = 0.0, seconds: float = 2.5, fps: float = FPS, side: int = SIDE) -> np.ndarray:
  """A clip of the procedural world, uint8 (T, H, W, 3)."""
  times_s = start_s + np.arange(round((seconds - start_s) * fps)) / fps
  return worlds.render(worlds.script("shapes-v1", 5, index), times_s, side, side * 4 // 3)


def signed(frames_THWC: np.ndarray, fps: float = FPS, crf: float = 23) -> Signature:
  """Through a real encoder."""
  return signature.of_media(encode.encode(list(frames_THWC), fps=fps, crf=crf))


def looks(index: int) -> np.ndarray:
  """Grey frames uint8 (T, 96, 96) as signatures are taken of, without an encoder."""
  grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in film(index)[::2]]
  return np.stack([cv2.resize(frame, (96, 96), interpolation=cv2.INTER_AREA) for frame in grey])


def grey_signature(looks_THW: np.ndarray) -> Signature:
  return signature.of_frames(np.stack([looks_THW, *[np.full_like(looks_THW, 128)] * 2], axis=1))


CHANGES = {
  "quality": lambda k: signed(film(k), crf=38),
  "size": lambda k: signed(film(k, side=48)),
  "rate": lambda k: signed(film(k, fps=15.0), fps=15.0),
  "start": lambda k: signed(film(k, start_s=0.4)),
  "excerpt": lambda k: signed(film(k, start_s=0.6, seconds=2.1)),
  "brightness": lambda k: signed((film(k) * 0.7 + 30).astype(np.uint8)),
  "crop": lambda k: signed(np.stack([cv2.resize(f[5:-5, 6:-6], (128, 96)) for f in film(k)])),
  "bars": lambda k: signed(np.pad(film(k), ((0, 0), (16, 16), (0, 0), (0, 0)))),
  "mirror": lambda k: signed(np.ascontiguousarray(film(k)[:, :, ::-1])),
}


@pytest.fixture(scope="module")
def originals() -> list[Signature]:
  return [signed(film(k)) for k in range(10)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_a_copy_and_other_films_are_not(change, originals):
  found = [signature.match(originals[k], CHANGES[change](k)) for k in range(3)]
  assert all(match.copy for match in found), found
  if change == "start":
    assert {match.shift for match in found} <= {-1, -2}  # 0.4 s are 1.6 steps
  other = CHANGES[change](3)
  assert not any(signature.match(one, other).copy for k, one in enumerate(originals) if k != 3)


def test_films_of_one_world_are_told_apart(originals):
  alike = [
    (i, j) for i in range(len(originals)) for j in range(i) if signature.match(originals[i], originals[j]).copy
  ]  # fmt: skip
  assert alike == []


def test_brightness_and_contrast_leave_the_vectors_alone():
  plain = looks(0)
  brighter = (plain.astype(np.float32) * 0.5 + 60).astype(np.uint8)
  a, b = grey_signature(plain), grey_signature(brighter)
  assert (a.units * b.units).sum(1).min() > 0.99


def test_mirror_and_crop_maps_are_what_they_say():
  grey = looks(1)
  mirrored = grey_signature(np.ascontiguousarray(grey[:, :, ::-1]))
  assert (grey_signature(grey).units * signature.mirror() * mirrored.units).sum(1).min() > 0.999
  smooth = np.stack([cv2.GaussianBlur(frame, (0, 0), 9) for frame in grey])
  spans = signature._CROPS
  for number, ((top, bottom), (left, right)) in enumerate((a, b) for a in spans for b in spans):
    rows, columns = slice(round(96 * top), round(96 * bottom)), slice(round(96 * left), round(96 * right))
    cropped = np.stack([cv2.resize(f[rows, columns], (96, 96), interpolation=cv2.INTER_CUBIC) for f in smooth])
    mapped = signature._mapped(signature._crops()[number][None], grey_signature(smooth).units)[0]
    cosine = (mapped * grey_signature(cropped).units).sum(1)
    assert cosine.min() > 0.9, (number, cosine.min())


def test_signatures_survive_bytes_and_flat_frames_say_nothing():
  one = grey_signature(np.concatenate([looks(0), np.full((2, 96, 96), 90, np.uint8)]))
  again = Signature.from_bytes(one.to_bytes())
  assert (
    np.array_equal(one.vectors, again.vectors)
    and np.array_equal(one.flat, again.flat)
    and np.array_equal(one.colours, again.colours)
  )
  assert one.flat[-2:].all() and not one.units[-2:].any() and one.distinct().max() < len(one) - 2
  black = grey_signature(np.zeros((8, 96, 96), np.uint8))
  assert not signature.match(black, black).copy and len(black.distinct()) == 0


def test_a_signature_has_four_frames_a_second_whatever_the_rate():
  for rate, count in ((1.0, 5), (2.0, 5), (12.0, 30), (30.0, 75), (8.0, 1)):
    frames = [np.full((32, 32, 3), 50 + k, np.uint8) for k in range(count)]
    media = encode.encode(frames, fps=rate)
    assert abs(len(signature.of_media(media)) - max(1, count / rate / signature.STEP_S)) <= 1, rate


def test_two_moments_before_a_still_camera_are_no_copies():
  rng = np.random.default_rng(0)
  scene = cv2.resize(rng.integers(0, 255, (12, 12), np.uint8), (96, 96), interpolation=cv2.INTER_CUBIC)
  clips = []
  for path in (np.linspace(5, 60, 12), np.linspace(60, 5, 12)):
    frames = np.repeat(scene[None], 12, 0)
    for frame, x in zip(frames, path, strict=True):
      frame[30:66, int(x) : int(x) + 30] = 255
    clips.append(grey_signature(frames))
  assert signature.match(clips[0], clips[0]).copy
  found = signature.match(*clips)
  assert found.similarity > 0.5 and not found.copy


# ---- search ----------------------------------------------------------------------------------------------------------


def brute(vectors: np.ndarray, owners: np.ndarray, least: float) -> set[tuple[int, int]]:
  units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  near = np.argwhere(units @ units.T >= least)
  return {(int(owners[i]), int(owners[j])) for i, j in near if owners[i] != owners[j]}


def test_all_pairs_are_found_in_blocks(monkeypatch):
  monkeypatch.setattr(neighbours, "_BLOCK", 37)
  monkeypatch.setattr(neighbours, "_WIDE", 41)
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(300, 8)).astype(np.float32)
  owners = np.repeat(np.arange(100), 3)
  found = neighbours.pairs(vectors, owners, vectors, owners, 0.8)
  assert {tuple(pair) for pair in found.tolist()} == brute(vectors, owners, 0.8)


def test_cells_find_nearly_all_close_pairs(monkeypatch):
  monkeypatch.setattr(neighbours, "EXACT", 1000)
  rng = np.random.default_rng(1)
  vectors = rng.normal(size=(6000, 63)).astype(np.float32)
  units = neighbours.units(vectors)
  vectors[3000:] = 0.85 * units[:3000] + np.sqrt(1 - 0.85**2) * units[3000:]
  owners = np.arange(6000)
  found = {tuple(pair) for pair in neighbours.pairs(vectors, owners, vectors, owners, 0.7).tolist()}
  assert found <= brute(vectors, owners, 0.7 - 1e-5)
  assert sum((k, k + 3000) in found or (k + 3000, k) in found for k in range(3000)) > 0.95 * 3000


# ---- who stays -------------------------------------------------------------------------------------------------------


def pairs_of(rows: list[dict], prefer: tuple[str, ...] = ("quality",)) -> duplicates.Pairs:
  full = {"other_set": "", "kind": "near", "similarity": 1.0, "offset_s": 0.0, "share": 1.0, "other_share": 1.0}
  return duplicates.Pairs(pa.Table.from_pylist([full | row for row in rows], duplicates.SCHEMA), "test", prefer)


@settings(max_examples=80)
@given(
  st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from([0.3, 1.0]), st.sampled_from([0.3, 1.0]))),
  st.lists(st.integers(0, 3), min_size=10, max_size=10),
  st.lists(st.booleans(), min_size=10, max_size=10),
)
def test_what_goes_is_a_copy_of_what_stays_and_what_stays_is_no_copy_of_a_better_one(edges, quality, left):
  ids = [f"c{k}" for k in range(10)]
  rows = [{"clip_id": ids[a], "other": ids[b], "share": s, "other_share": t} for a, b, s, t in edges if a != b]
  table = ClipColumns(pa.table({"clip_id": ids, "quality": np.array(quality, float)}))
  mask = np.array(left)
  gone = pairs_of(rows).resolve(mask, table, ids)
  within = {(ids.index(r["clip_id"]), ids.index(r["other"])) for r in rows if r["share"] == 1}
  within |= {(ids.index(r["other"]), ids.index(r["clip_id"])) for r in rows if r["other_share"] == 1}
  stays = {k for k in range(10) if mask[k] and k not in gone}
  for k, name in gone.items():
    assert mask[k] and ids.index(name) in stays and (k, ids.index(name)) in within
    assert quality[k] <= quality[ids.index(name)]
  best_first = sorted(stays, key=lambda k: (-quality[k], ids[k]))
  for place, k in enumerate(best_first):
    assert not any((k, better) in within for better in best_first[:place])


def test_clusters_are_the_connected_parts():
  chain = pairs_of([{"clip_id": a, "other": b} for a, b in ("ab", "bc", "de")])
  assert chain.clusters(list("abcdef")) == [["a", "b", "c"], ["d", "e"]]
  with pytest.raises(UsageError):
    pairs_of([], ("quality >",))


# ---- sets ------------------------------------------------------------------------------------------------------------


def write(folder: pathlib.Path, clips: dict[str, tuple[bytes, float]]) -> None:
  with records.RecordWriter(folder, "test") as writer:
    for k, (name, (media, clarity)) in enumerate(clips.items()):
      scores = {"clarity": Score(clarity, "test", "1"), "motion": Score(1.0, "test", "1")}
      writer.write(ClipRecord(name, f"v{k}", "s", 0, 20, "1/8", FPS, 128, 96, 20, scores=scores), media)


@pytest.fixture(scope="module")
def media() -> dict[str, bytes]:
  """Three films, a copy of the first in worse quality, and its mirror image."""
  made = {f"film{k}": encode.encode(list(film(k)), fps=FPS) for k in range(3)}
  worse = encode.encode(list(film(0, start_s=0.4)), fps=FPS, crf=40)
  mirror = encode.encode(list(film(0)[:, :, ::-1]), fps=FPS)
  return made | {"worse": worse, "mirror": mirror, "broken": b"no video"}


def reasons(folder: pathlib.Path) -> dict[str, str]:
  table = clip_table.Index.load(folder).table
  return dict(zip(table["clip_id"].to_pylist(), table["status_reason"].to_pylist(), strict=True))


def test_a_set_keeps_the_best_of_its_copies_and_works_again_without_decoding(media, tmp_path, capsys, monkeypatch):
  folder = tmp_path / "set"
  clips = {"film0": 0.9, "film1": 0.5, "film2": 0.5, "worse": 0.2, "mirror": 0.8}
  write(folder, {name: (media[name], clarity) for name, clarity in clips.items()} | {
    "twin": (media["film1"], 0.6), "broken": (media["broken"], 0.5), "broken2": (media["broken"], 0.4)
  })  # fmt: skip
  flags = ["dedup", "--input", str(folder), "--workers", "1"]
  assert cli.main([*flags, "--what_if", "--json"]) == 0
  answer = json.loads(capsys.readouterr().out)
  assert answer["pairs"]["exact"] == 2 and answer["dropped"] == 4 and answer["groups"] == 3
  assert set(reasons(folder).values()) == {""} and not (folder / duplicates.FILE).exists()

  def never(*_, **__):
    raise AssertionError("decoded again")

  monkeypatch.setattr(engine, "run", never)
  assert cli.main(flags) == 0
  wanted = {"film0": "", "film1": "duplicate of twin", "film2": "", "worse": "duplicate of film0"}
  wanted |= {"mirror": "duplicate of film0", "twin": "", "broken": "", "broken2": "duplicate of broken"}
  assert reasons(folder) == wanted
  assert cli.main([*flags, "--prefer", "1 - clarity"]) == 0
  assert reasons(folder)["film0"] == "duplicate of worse" and reasons(folder)["twin"] == "duplicate of film1"
  select.select(folder, rules.parse_all(["clarity <= 0.7"]))  # a copy is not dropped for a clip that another rule drops
  assert reasons(folder)["worse"] == "" and rules.rule_of(reasons(folder)["film0"]) == "clarity"
  (folder / duplicates.FILE).write_bytes(b"x")
  with pytest.raises(DataError, match="kling dedup"):
    select.select(folder)


def test_against_another_set_and_with_embeddings(media, tmp_path, capsys):
  old, new = tmp_path / "old", tmp_path / "new"
  write(old, {"film0": (media["film0"], 0.9), "film1": (media["film1"], 0.1)})
  select.select(old, rules.parse_all(["clarity > 0.5"]))  # film1 is not kept there, so nothing is a copy of it
  write(new, {"worse": (media["worse"], 1.0), "same": (media["film0"], 1.0), "film1": (media["film1"], 1.0),
              "film2": (media["film2"], 1.0)})  # fmt: skip
  vectors = np.array([[1, 0], [1, 0], [0, 1], [0.02, 1]], np.float32)
  np.save(tmp_path / "e.npy", vectors)
  flags = ["dedup", "--input", str(new), "--against", str(old), "--workers", "1"]
  assert cli.main([*flags, "--embeddings", str(tmp_path / "e.npy")]) == 0
  assert reasons(new) == {
    "worse": "duplicate of old:film0", "same": "duplicate of old:film0", "film1": "", "film2": "duplicate of film1"
  }  # fmt: skip
  table = pa.table({"clip_id": ["film2", "film1", "same", "worse"], "embedding": vectors[::-1].tolist()})
  pq.write_table(table, tmp_path / "e.parquet")
  again = dedup.dedup(new, embeddings=tmp_path / "e.parquet")
  assert {frozenset((r["clip_id"], r["other"])) for r in again.table.to_pylist() if r["kind"] == "embedding"} == {
    frozenset(("film1", "film2"))
  }
  np.save(tmp_path / "short.npy", vectors[:2])
  assert cli.main([*flags, "--embeddings", str(tmp_path / "short.npy")]) == 1
  assert cli.main(["dedup", "--input", str(new), "--against", str(new)]) == 2
  assert cli.main([*flags, "--least_embedding", "2"]) == 2
  capsys.readouterr()


def test_moments_of_one_video_are_no_copies_of_each_other(media, tmp_path):
  with records.RecordWriter(tmp_path, "test") as writer:
    for k, name in enumerate(("film0", "mirror")):
      writer.write(ClipRecord(name, "v", "s", 20 * k, 20 * k + 20, "1/8", FPS, 128, 96, 20, index=k), media[name])
  assert len(dedup.dedup(tmp_path, workers=1)) == 0


def test_a_clip_that_ends_its_process_is_left_out_alone(media, tmp_path, monkeypatch, capsys):
  write(tmp_path, {name: (media[name], 1.0) for name in ("film0", "film1", "worse")})

  def fragile(function, jobs, workers=None, **_):
    for number, job in enumerate(jobs):
      died = any(row["clip_id"] == "film1" for row in job["rows"])
      yield number, engine.Failure("died", "a crash") if died else dedup.work(job)

  monkeypatch.setattr(engine, "run", fragile)
  [pair] = dedup.dedup(tmp_path).table.to_pylist()
  assert {pair["clip_id"], pair["other"]} == {"film0", "worse"} and pair["offset_s"] == pytest.approx(-0.4, abs=0.2)
  assert "film1: left out: a crash" in capsys.readouterr().err
  assert set(pq.read_table(tmp_path / dedup.CACHE)["clip_id"].to_pylist()) == {"film0", "worse"}


def test_loose_videos_are_grouped(media, tmp_path, capsys):
  for name, data in media.items():
    (tmp_path / f"{name}.mp4").write_bytes(data)
  assert cli.main(["dedup", "--input", str(tmp_path), "--workers", "1", "--json"]) == 0
  groups = json.loads(capsys.readouterr().out)["largest"]
  assert [sorted(pathlib.Path(path).stem for path in group) for group in groups] == [["film0", "mirror", "worse"]]
  assert cli.main(["dedup", "--input", str(tmp_path), "--against", "x"]) == 2
  assert cli.main(["dedup", "--input", str(tmp_path / "none.mp4")]) == 1
