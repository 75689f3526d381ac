"""Ratings: the formula of the labels, agreement against a published example, tables with errors, the store."""

import csv
import math
import multiprocessing
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest

from kling_jax import cli
from kling_jax.curation import ratings
from kling_jax.curation.rating_store import RatingStore
from kling_jax.curation.ratings import Rating
from kling_jax.errors import DataError, UsageError

VIDEOS = {f"c{k}": f"v{k // 2}" for k in range(40)}


def some(raters: int = 3, clips: int = 20, seed: int = 0) -> list[Rating]:
  """Raters of different strictness, each on their own part of the clips."""
  rng = np.random.default_rng(seed)
  return [
    Rating(f"c{k}", VIDEOS[f"c{k}"], f"rater {r}", float(np.clip(rng.integers(1, 6) + r - 1, 1, 5)), 10.0)
    for r in range(raters)
    for k in rng.permutation(clips)[: clips - 3 * r]
  ]


def by_formula(rows: list[Rating]) -> dict[str, float]:
  """Koala-36M, appendix B, in plain NumPy over a matrix of raters and clips."""
  raters, clips = sorted({one.rater for one in rows}), sorted({one.clip_id for one in rows})
  y_RC = np.full((len(raters), len(clips)), np.nan)
  for one in rows:
    y_RC[raters.index(one.rater), clips.index(one.clip_id)] = one.rating
  everything = y_RC[np.isfinite(y_RC)]
  z_RC = (y_RC - np.nanmean(y_RC, 1, keepdims=True)) / np.nanstd(y_RC, 1, keepdims=True)
  return dict(zip(clips, np.nanmean(z_RC * everything.std() + everything.mean(), 0).tolist(), strict=True))


def test_labels_follow_the_formula():
  rows = some()
  found = ratings.labels(rows)
  expected = by_formula(rows)
  assert found.table["clip_id"].to_pylist() == sorted(expected)
  np.testing.assert_allclose(found.table["rating"].to_numpy(), [expected[c] for c in sorted(expected)], rtol=1e-12)
  for row in found.table.to_pylist():
    assert row["raters"] == sum(one.clip_id == row["clip_id"] for one in rows)
    assert row["video_id"] == VIDEOS[row["clip_id"]]
  assert not found.left_out and not found.warnings()
  shuffled = ratings.labels([rows[k] for k in np.random.default_rng(1).permutation(len(rows))])
  np.testing.assert_allclose(shuffled.table["rating"].to_numpy(), found.table["rating"].to_numpy(), rtol=1e-12)


def test_raters_without_a_deviation_are_left_out_and_named():
  rows = some()
  once, constant = Rating("c30", "v15", "once", 5.0), [Rating(f"c{k}", VIDEOS[f"c{k}"], "same", 3.0) for k in (1, 31)]
  found = ratings.labels([*rows, once, *constant])
  assert found.table == ratings.labels(rows).table, "they change no other label"
  assert set(found.left_out) == {"once", "same"} and found.unlabelled == ("c30", "c31")
  warnings = " ".join(found.warnings())
  assert "'once' is left out: a single rating" in warnings and "all 2 ratings are 3" in warnings
  assert "2 clips have no label" in warnings and "'c30', 'c31'" in warnings
  with pytest.raises(DataError, match="no labels: rater 'once': a single rating .*; rater 'same': all 2"):
    ratings.labels([once, *constant])
  with pytest.raises(DataError, match="no ratings yet"):
    ratings.labels([])


def test_alpha_is_that_of_krippendorff():
  """The example of Computing Krippendorff's Alpha-Reliability (2011), section C with missing values: 0.849."""
  table = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
  )
  rows = [(f"u{u}", value) for row in table for u, value in enumerate(row) if value is not None]
  assert ratings.agreement(rows) == pytest.approx(0.849, abs=5e-4)
  assert ratings.agreement([("a", 1), ("a", 1), ("b", 4), ("b", 4)]) == 1
  rng = np.random.default_rng(0)
  chance = ratings.agreement((f"u{k % 2000}", value) for k, value in enumerate(rng.integers(1, 6, 6000)))
  assert abs(chance) < 0.03
  assert math.isnan(ratings.agreement([("a", 1), ("b", 2)])) and math.isnan(ratings.agreement([("a", 2), ("a", 2)]))


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_tables_come_back_as_they_were_written(tmp_path, suffix):
  rows = [*some(), Rating("c7", "v3", 'Zoë, "NA"', 4.5, 1.25), Rating("c8", "v4", 'Zoë, "NA"', 2.0, 2.5)]
  found, raw = ratings.write(tmp_path / f"labels{suffix}", rows)
  assert raw.name == f"labels_raw{suffix}"
  back = ratings.read(raw, VIDEOS)
  assert sorted(back, key=repr) == sorted(rows, key=repr)
  assert ratings.labels(back).table == found.table
  if suffix == ".parquet":
    assert pq.read_table(tmp_path / "labels.parquet") == found.table
  else:
    held = list(csv.DictReader((tmp_path / "labels.csv").open(encoding="utf-8")))
    assert [float(row["rating"]) for row in held] == found.table["rating"].to_pylist()
  with pytest.raises(UsageError, match="must end in .parquet or .csv"):
    ratings.write(tmp_path / "labels.json", rows)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("clip_id,rater,rating\nc1,a,nan\n", "row 2: the rating of clip 'c1' is nan; legal are numbers from 1 to 5"),
    ("clip_id,rater,rating\nc1,a,3\nc2,a,6\n", "row 3: the rating of clip 'c2' is 6"),
    ("clip_id,rater,rating\nc1,a,\n", "is None; legal"),
    ("clip_id,rater,rating\nc1,a,good\n", "cannot be read as a table of ratings"),
    ("clip_id,rater,rating\nc1,a,3\nc1,a,4\n", "row 3: 'a' rated clip 'c1' in an earlier row already"),
    ("clip_id,rater,rating\nc1,,3\n", "row 2: a rater's name has 1 to 64"),
    ("clip_id,name,rating\nc1,a,3\n", "has no column 'rater'"),
    ("clip_id,rater,rating\n", "holds no rating"),
    ("", "cannot be read"),
    ("clip_id,rater,rating\nc1,a\n", "cannot be read"),
    ("clip_id,rater,rating\nzz,a,3\nc1,a,4\nyy,b,2\n",
     "2 of 3 ratings are of clips that the set does not have: 'yy', 'zz'"),
  ],
)  # fmt: skip
def test_tables_with_errors_are_refused_and_say_where(tmp_path, text, message):
  (tmp_path / "r.csv").write_text(text)
  with pytest.raises(DataError, match=message):
    ratings.read(tmp_path / "r.csv", VIDEOS)


def test_unknown_clips_can_be_left_out(tmp_path):
  (tmp_path / "r.csv").write_text("clip_id,rater,rating,mood\nzz,a,3,x\nc1,a,4,y\n")
  assert ratings.read(tmp_path / "r.csv", VIDEOS, skip_unknown=True) == [Rating("c1", "v0", "a", 4.0)]


def test_the_store_does_every_request_once_and_takes_the_newest_back(tmp_path):
  with RatingStore(tmp_path / "r.db") as store:
    assert store.rate("request-1", Rating("c1", "v0", "a", 3.0, 1.0))
    assert not store.rate("request-1", Rating("c1", "v0", "a", 5.0, 2.0)), "a retry, whatever it says"
    assert store.rate("request-2", Rating("c2", "v1", "a", 4.0, 3.0))
    assert store.rate("request-3", Rating("c1", "v0", "b", 1.0, 4.0))
    assert store.rate("request-4", Rating("c1", "v0", "a", 2.0, 5.0)), "a change of mind"
    assert store.of("a") == {"c1": 2.0, "c2": 4.0} and store.counts() == {"a": 2, "b": 1}
    assert store.undo("request-5", "a") == "c1" and store.undo("request-5", "a") is None
    assert store.of("a") == {"c2": 4.0}
    token = store.token
    assert not store.rate("request-4", Rating("c1", "v0", "a", 2.0, 5.0)), "a late retry does not bring it back"
  with RatingStore(tmp_path / "r.db") as store:
    assert store.of("a") == {"c2": 4.0} and store.token == token and store.undo("request-6", "nobody") is None
    assert store.add([Rating("c2", "v1", "a", 4.0), Rating("c3", "v1", "a", 1.0)], "r.csv") == 1
    assert store.add([Rating("c2", "v1", "a", 4.0), Rating("c3", "v1", "a", 1.0)], "r.csv") == 0
    with pytest.raises(DataError, match="r.csv: 'a' rated clip 'c3' 1 here and 2 there"):
      store.add([Rating("c4", "v2", "a", 4.0), Rating("c3", "v1", "a", 2.0)], "r.csv")
    assert "c4" not in store.of("a"), "all or none"
    name = "x'); DROP TABLE ratings; --"
    assert store.rate("request-7", Rating("c1", "v0", name, 3.0)) and store.of(name) == {"c1": 3.0}
  (tmp_path / "other.db").write_bytes(b"no database, but long enough to be looked at" * 100)
  with pytest.raises(DataError, match="cannot be used for ratings"):
    RatingStore(tmp_path / "other.db")


def rate_many(path: str, number: int) -> None:
  with RatingStore(path) as store:
    for k in range(30):
      store.rate(f"process {number} request {k}", Rating(f"c{k}", "v", f"rater {number}", 1.0 + k % 5))


def test_processes_may_share_a_store(tmp_path):
  context = multiprocessing.get_context("spawn")
  workers = [context.Process(target=rate_many, args=(str(tmp_path / "r.db"), number)) for number in range(2)]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join()
    assert worker.exitcode == 0
  with RatingStore(tmp_path / "r.db") as store:
    assert store.counts() == {"rater 0": 30, "rater 1": 30}


def test_the_verb_exports_and_refuses(tmp_path, capsys):
  with RatingStore(tmp_path / "r.db") as store:
    store.add([*some(), Rating("c30", "v15", "once", 5.0)], "test")
  db, out = str(tmp_path / "r.db"), str(tmp_path / "labels.parquet")
  assert cli.main(["annotate", "--db", db, "--export", out]) == 0
  shown = capsys.readouterr()
  assert "20 labels in" in shown.out and "rater 'once' is left out" in shown.err
  expected = by_formula(some())
  for row in pq.read_table(out).to_pylist():
    assert row["rating"] == pytest.approx(expected[row["clip_id"]], rel=1e-12)
  assert len(pq.read_table(tmp_path / "labels_raw.parquet")) == len(some()) + 1
  for words, code in (
    (["--export", out, "--import", "x.csv"], 2),
    ([], 2),
    (["--export", str(tmp_path / "labels.txt")], 2),
    (["--input", str(tmp_path)], 1),
  ):
    assert cli.main(["annotate", "--db", db, *words]) == code
  assert cli.main(["annotate", "--db", str(tmp_path / "none.db"), "--export", out]) == 1
  assert not (tmp_path / "none.db").exists(), "asking for an export makes no file"
  assert isinstance(pathlib.Path(db).stat().st_mode, int) and pathlib.Path(db).stat().st_mode & 0o077 == 0
