"""Selection: thresholds, reasons, and a set that keeps all its rows."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kling_jax.curation import select
from kling_jax.curation.select import Threshold
from kling_jax.data import encode, records
from kling_jax.data.record import ClipRecord
from kling_jax.data.source import Score
from kling_jax.errors import DataError, UsageError


def clip(name: str = "a", **scores: float) -> ClipRecord:
  values = {key: Score(value, "test", "1") for key, value in scores.items()}
  return ClipRecord(name, "v", "v.mp4", 0, 5, "1/10", 10.0, 16, 16, 5, scores=values)


def test_thresholds_decide_with_their_ends_included():
  limits = {"motion": Threshold(0.1, 0.5)}
  for value, status, reason in (
    (0.1, "kept", ""),
    (0.5, "kept", ""),
    (0.05, "dropped", "motion below 0.1"),
    (0.6, "dropped", "motion above 0.5"),
  ):
    judged = select.judge(clip(motion=value), limits)
    assert (judged.status, judged.status_reason) == (status, reason)


def test_an_unknown_score_drops_only_where_it_is_asked_for():
  assert select.judge(clip(), {}).status == "kept"
  assert select.judge(clip(), {"clarity": Threshold(0.0)}).status_reason == "clarity unknown"


def test_judging_again_forgets_the_former_status():
  dropped = select.judge(clip(motion=0.0), {"motion": Threshold(0.1)})
  assert select.judge(dropped, {"motion": Threshold(0.0)}) == clip(motion=0.0)


def test_select_keeps_every_row_and_every_frame(tmp_path):
  media = {n: encode.encode([np.full((16, 16, 3), 20 * k, np.uint8)] * 5, fps=10) for k, n in enumerate("abc")}
  with records.RecordWriter(tmp_path, "test") as writer:
    for k, name in enumerate("abc"):
      writer.write(clip(name, motion=k / 10), media[name])
  counts = select.select(tmp_path, {"motion": Threshold(least=0.05, most=0.15)})
  assert counts == {"motion below 0.05": 1, "": 1, "motion above 0.15": 1}
  found = {header.clip_id: (header.status, data) for header, data in records.read_all(tmp_path)}
  assert found == {"a": ("dropped", media["a"]), "b": ("kept", media["b"]), "c": ("dropped", media["c"])}
  assert select.select(tmp_path, {}) == {"": 3}
  with pytest.raises(DataError):
    select.select(tmp_path / "none", {})


@given(st.floats(-10, 10), st.floats(-10, 10))
def test_thresholds_parse_as_they_are_written(a, b):
  low, high = sorted((a, b))
  assert select.parse_threshold(f"motion>={low!r}") == ("motion", Threshold(least=low))
  assert select.parse_threshold(f" clarity <= {high!r}") == ("clarity", Threshold(most=high))
  assert select.parse_threshold(f"{low!r}<=vtss<={high!r}") == ("vtss", Threshold(low, high))


@pytest.mark.parametrize(
  "text", ["", "motion", "motion>0.1", "motion>=x", ">=1", "0.1>=motion>=0", "1<=motion<=0", "a>=1<=2"]
)
def test_other_forms_are_usage_errors(text):
  with pytest.raises(UsageError):
    select.parse_threshold(text)


def test_json_form_has_null_for_open_ends():
  assert select.to_json({"a": Threshold(0.5), "b": Threshold(-math.inf, 2.0)}) == {"a": [0.5, None], "b": [None, 2.0]}
