"""Selection: a set that keeps all its rows and frames, reasons, what-if, explanations, presets, hostile tables."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kling_jax import cli
from kling_jax.curation import presets, rules, select
from kling_jax.curation.clip_columns import ClipColumns
from kling_jax.curation.funnel import Funnel
from kling_jax.curation.rules import Rule
from kling_jax.data import clip_table, conditions, encode, records, verify
from kling_jax.data.record import ClipRecord
from kling_jax.data.source import Score
from kling_jax.errors import DataError, UsageError

HOSTILE = "</script><script>alert(1)</script>\u202e\n" + "x" * 10_000


def clip(name: str = "a", source: str = "v.mp4", **scores: float) -> ClipRecord:
  values = {key: Score(value, "test", "1") for key, value in scores.items() if key != "vtss"}
  return ClipRecord(
    name, "v", source, 0, 5, "1/10", 10.0, 16, 16, 5, scores=values, caption=HOSTILE, vtss=scores.get("vtss")
  )


def clips_of(names: str, **columns: list) -> list[ClipRecord]:
  return [clip(name, **{key: column[k] for key, column in columns.items()}) for k, name in enumerate(names)]


def write(folder, clips: list[ClipRecord]) -> dict[str, bytes]:
  media = {c.clip_id: encode.encode([np.full((16, 16, 3), 20 * k, np.uint8)] * 5, fps=10) for k, c in enumerate(clips)}
  with records.RecordWriter(folder, "test") as writer:
    for one in clips:
      writer.write(one, media[one.clip_id])
  return media


def status(folder) -> dict[str, str]:
  table = clip_table.Index.load(folder).table
  return dict(zip(table["clip_id"].to_pylist(), table["status_reason"].to_pylist(), strict=True))


def test_select_keeps_every_row_and_every_frame(tmp_path):
  media = write(tmp_path, clips_of("abc", motion=[0.0, 0.1, 0.2]))
  shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").glob("*.array_record")}
  select.select(tmp_path, rules.parse_all(["0.05 <= motion <= 0.15"]))
  assert status(tmp_path) == {
    "a": "motion: motion 0; wants 0.05 <= motion <= 0.15", "b": "",
    "c": "motion: motion 0.2; wants 0.05 <= motion <= 0.15",
  }  # fmt: skip
  found = {header.clip_id: (header.status, data) for header, data in records.read_all(tmp_path)}
  assert found == {"a": ("dropped", media["a"]), "b": ("kept", media["b"]), "c": ("dropped", media["c"])}
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "records").glob("*.array_record")} == shards
  assert verify.verify(tmp_path).ok
  assert len(records.RecordSource(tmp_path)) == 1
  assert Funnel.of_set(tmp_path).dropped == {"motion": 2}
  assert conditions.load(tmp_path / "conditions.json").conditions[0].clips == 1
  select.select(tmp_path, ())
  assert set(status(tmp_path).values()) == {""}
  records.rewrite(tmp_path, lambda c: c)  # whoever rewrites the records writes the table's status into them
  with pytest.raises(DataError):
    select.select(tmp_path / "none", ())


def test_the_first_rule_that_fails_is_the_reason_and_the_trail_has_all(tmp_path, capsys):
  write(tmp_path, clips_of("abc", motion=[0.0, 0.3, 0.2], clarity=[0.0, 0.5, 0.1]))
  flags = ["--keep", "motion >= 0.1", "--keep", "sharp: clarity >= 0.2"]
  assert cli.main(["select", "--input", str(tmp_path), *flags]) == 0
  said = capsys.readouterr().out
  assert "3 clips, 1 kept (33.3 %" in said
  assert {name: rules.rule_of(why) for name, why in status(tmp_path).items()} == {"a": "motion", "b": "", "c": "sharp"}
  assert cli.main(["select", "--input", str(tmp_path), "--explain", "a", "--json"]) == 0
  answer = json.loads(capsys.readouterr().out)
  assert answer["status"] == "dropped" and [step["verdict"] for step in answer["trail"]] == ["dropped", "dropped"]
  assert answer["trail"][1] == {
    "rule": "sharp", "wants": "clarity >= 0.2", "found": "clarity 0", "verdict": "dropped"
  }  # fmt: skip
  assert cli.main(["select", "--input", str(tmp_path), "--explain", "zzz"]) == 1


def test_what_if_counts_as_select_does_and_touches_nothing(tmp_path, capsys):
  write(tmp_path, clips_of("abcd", motion=[0.0, 0.1, 0.2, 0.3], clarity=[0.9, 0.1, 0.1, 0.8]))
  before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
  flags = ["select", "--input", str(tmp_path), "--keep", "motion >= 0.05", "--keep", "clarity >= 0.5"]
  assert cli.main([*flags, "--what_if", "--json"]) == 0
  would = json.loads(capsys.readouterr().out)
  assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
  assert [(s["name"], s["seen"], s["dropped"], s["alone"]) for s in would["steps"]] == [
    ("motion", 4, 1, 1), ("clarity", 3, 2, 2)
  ]  # fmt: skip
  assert cli.main([*flags, "--json"]) == 0
  assert json.loads(capsys.readouterr().out) == would
  assert would["kept"] == 1 and would["kept_seconds"] == pytest.approx(0.5)


def test_rules_are_remembered_and_no_rule_means_those(tmp_path):
  write(tmp_path, clips_of("abc", motion=[0.0, 0.1, 0.2], clarity=[1, 1, 1]))
  select.select(tmp_path, rules.parse_all(["motion >= 0.15", "cap(5, source)"]), seed=3)
  held, seed = select.stored(tmp_path)
  assert [rule.keep for rule in held] == ["motion >= 0.15", "cap(5, source)"] and seed == 3
  before = status(tmp_path)
  assert select.select(tmp_path).kept.sum() == 1 and status(tmp_path) == before
  (tmp_path / "select.json").write_text("{")
  with pytest.raises(DataError, match="select again"):
    select.select(tmp_path)


def test_an_unknown_value_drops_and_a_column_that_nobody_has_is_refused(tmp_path):
  write(tmp_path, [clip("a", motion=0.5), clip("b")])
  select.select(tmp_path, rules.parse_all(["motion >= 0"]))
  assert status(tmp_path)["b"] == "motion: motion unknown; wants motion >= 0"
  assert select.select(tmp_path, rules.parse_all(["motion >= 0 or missing(motion)"])).kept.all()
  for text in ("sharpness >= 0", "vtss >= 2.5", "missing(sharpness)"):
    with pytest.raises(DataError, match="kling score"):
      select.select(tmp_path, rules.parse_all([text]))
  assert not select.select(tmp_path, rules.parse_all(["sharpness >= 0"]), strict=False).kept.any()


def test_safety_is_never_passed_for_want_of_a_number(tmp_path):
  with pytest.raises(UsageError, match="safe"):
    rules.parse("safety >= 0.5 or missing(safety)")
  write(tmp_path, [clip("a", safety=0.9), clip("b")])
  select.select(tmp_path, rules.parse_all(["safety >= 0.5"]))
  assert status(tmp_path) == {"a": "", "b": "safety: safety unknown; wants safety >= 0.5"}


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_presets_refuse_what_was_not_measured_as_they_mean_it(name, tmp_path):
  write(tmp_path, clips_of("ab", motion=[0.1, 0.2], aesthetic=[5.0, 6.0], clarity=[0.5, 0.6]))
  with pytest.raises(DataError, match="kling score|suitability model|released table"):
    select.select(tmp_path, presets.rules([name]))
  assert set(status(tmp_path).values()) == {""}  # nothing was changed


def test_a_preset_judges_in_its_own_units_and_parts_can_be_left_out(tmp_path):
  one = clip("a", cosmos_motion=0.002, cosmos_motion_patch=1e-5)
  write(tmp_path, [one, clip("b", cosmos_motion=0.0005, cosmos_motion_patch=1e-5)])
  chosen = presets.rules(["cosmos"], ["aesthetic", "cosmos size"])
  assert select.select(tmp_path, chosen).kept.tolist() == [True, False]
  assert status(tmp_path)["b"] == "cosmos motion: cosmos_motion 0.0005; wants cosmos_motion >= 0.00098"
  with pytest.raises(UsageError, match="cosmos"):
    presets.rules(["cosmo"])
  with pytest.raises(UsageError, match="motion patch"):
    presets.rules(["cosmos"], ["motion pach"])


def test_koalas_released_table_can_be_looked_at(tmp_path, capsys):
  path = tmp_path / "koala.csv"
  path.write_text(
    "videoID,url,timestamp,caption,clarity_score,aesthetic_score,motion_score,video_training_suitability_score\n"
    'a_0,u,"[\'0:00:01.0\', \'0:00:05.5\']","a, ""b""\nline two",0.9,5.3,22.0,4.4\n'
    "a_1,u,\"['0:00:10.0', '0:00:40.0']\",c,0.8,4.0,3.0,2.0\n"
  )
  assert cli.main(["select", "--input", str(path), "--preset", "koala", "--preset", "nextflow", "--what_if"]) == 0
  assert "1 kept" in capsys.readouterr().out
  assert cli.main(["select", "--input", str(path), "--preset", "koala"]) == 2
  assert "--what_if" in capsys.readouterr().err


def test_rules_come_from_files_and_weights_are_written(tmp_path, capsys):
  write(tmp_path, [clip(name, source=where, motion=0.1) for name, where in zip("abcd", "xxxy", strict=True)])
  file = tmp_path / "rules.json"
  file.write_text(json.dumps({"rules": ["moves: motion > 0", {"name": "n", "keep": "num_frames >= 5"}]}))
  flags = ["select", "--input", str(tmp_path), "--rules", str(file), "--weights", "temper(1, source)"]
  assert cli.main([*flags, "--json"]) == 0
  assert [s["name"] for s in json.loads(capsys.readouterr().out)["steps"]] == ["moves", "n"]
  rows = {row["clip_id"]: row["weight"] for row in pq.read_table(tmp_path / "weights.parquet").to_pylist()}
  assert rows["d"] == pytest.approx(3 * rows["a"]) and sum(rows.values()) == pytest.approx(4)
  for bad in ('{"rules": 3}', "[1]", '[{"name": "x"}]', "no json"):
    file.write_text(bad)
    assert cli.main(flags) == 2
  capsys.readouterr()


def test_columns_read_scores_from_sliced_and_chunked_tables():
  rows = [
    clip_table.to_row(clip(str(k), motion=k / 10, **({"clarity": 1.0} if k % 2 else {})), "s", k) for k in range(6)
  ]
  whole = pa.Table.from_pylist(rows, clip_table.SCHEMA)
  for table in (whole, whole.slice(2, 3), pa.concat_tables([whole.slice(0, 2), whole.slice(4)])):
    columns = ClipColumns(table)
    names = [int(name) for name in table["clip_id"].to_pylist()]
    assert columns["motion"].values.tolist() == [k / 10 for k in names]
    assert columns["clarity"].known.tolist() == [k % 2 == 1 for k in names]
    assert columns.scorers("motion") == ("test 1",)
  assert not ClipColumns(whole)["vtss"].known.any()


def test_a_rule_in_another_unit_is_refused():
  rule = Rule("x", "motion > 4", (("motion", ("table",)),))
  with pytest.raises(DataError, match="test 1"):
    select.evaluate(
      ClipColumns(pa.Table.from_pylist([clip_table.to_row(clip(motion=5.0), "s", 0)], clip_table.SCHEMA)), [rule]
    )


def test_a_set_that_somebody_writes_to_is_left_alone(tmp_path):
  write(tmp_path, clips_of("ab", motion=[0.0, 0.5]))
  with records.RecordWriter(tmp_path, "test"), pytest.raises(DataError, match="another writer"):
    select.select(tmp_path, rules.parse_all(["motion > 0.1"]))
  assert set(status(tmp_path).values()) == {""}
