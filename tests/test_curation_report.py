"""The report in a real browser: hostile texts do nothing, limits drag and count right, its size is bounded."""

import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from browser import Browser, launch
from test_page import Reader

from kling_jax import cli, page
from kling_jax.curation import explorer, report, rules, select
from kling_jax.curation.clip_columns import ClipColumns
from kling_jax.data import encode, records
from kling_jax.data.record import ClipRecord
from kling_jax.data.source import Score

HOSTILE = (
  "../../x.mp4", "<script>window.hacked = 1</script>", "</script><script>window.hacked = 2</script>",
  "<img src=x onerror='window.hacked=3'>.mp4", "a\nb\r\nc", "\u202egpj.evil\u2066", "n" * 10_000,
  "'\"><svg onload=alert(1)>",
  "javascript:window.hacked=4", "https://example.com/x.mp4",
)  # fmt: skip
COUNT = 30


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
  """A set whose every text is hostile."""
  folder = tmp_path_factory.mktemp("report") / "<b>set"
  rng = np.random.default_rng(0)
  media = encode.encode([np.full((32, 48, 3), 40 * k, np.uint8) for k in range(5)], fps=10)
  with records.RecordWriter(folder, "test") as writer:
    for k in range(COUNT):
      word = HOSTILE[k % len(HOSTILE)]
      values = {"motion": k / COUNT, "clarity": float(rng.random()), word[:50]: float(rng.random())}
      scores = {name: Score(value, "<script>" if name == word[:50] else "flow", "1") for name, value in values.items()}
      writer.write(
        ClipRecord(f"c{k:02d}", word, word, 0, 5, "1/10", 10.0, 48, 32, 5, index=k, caption=word, scores=scores), media
      )
  journal = [
    {"name": word, "path": word, "bytes": 1, "modified": 1, "reason": "", "detail": "", "damage": [], "content": "x",
     "seconds": 1.0, "frames": 5, "shots": 1, "short_shots": 0, "transitions": [], "clips": [], "duplicate_of": "",
     "timings": {"split": 1.0 + k, "<b>": 0.5}}
    for k, word in enumerate(HOSTILE)
  ]  # fmt: skip
  (folder / "videos.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in journal))
  refused = [{"source": word, "reason": "unreadable", "detail": word} for word in HOSTILE]
  (folder / "quarantine.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in refused))
  chosen = [
    *rules.parse_all(["motion >= 0.2", "shape: fps < 30 and caption != '<script>x</script>'"]),
    rules.Rule("</script><script>window.hacked=5</script>", "caption != 'a\\nb\\r\\nc'"),
    rules.Rule("<img src=x onerror=window.hacked=6>", "len(source) < 5000"),
  ]
  select.select(folder, chosen)
  assert cli.main(["report", "--input", str(folder)]) == 0
  return folder / "report" / "index.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  with launch(tmp_path_factory.mktemp("profile")) as one:
    yield one


def test_hostile_texts_stay_texts(made):
  text = made.read_text()
  reader = Reader(text)
  assert reader.open == []
  for tag, attributes in reader.tags:
    assert not any(name.startswith("on") for name in attributes), tag
    for name in ("src", "href"):
      assert not attributes.get(name) or attributes[name].startswith(("#", "data:"))
  assert [tag for tag, _ in reader.tags].count("script") == 1  # the explorer's own; no chart library
  assert "\u202e" not in text and "\u2066" not in text
  assert "n" * 500 not in text and len(text) < 400_000


def test_in_a_browser_nothing_runs_that_is_not_ours_and_nothing_is_asked_for(made, browser: Browser):
  for width in (1280, 390):
    browser.open(made, width)
    assert browser.run("window.hacked === undefined && document.querySelectorAll('.explorer svg').length >= 2")
    assert browser.problems == []
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")  # nothing sticks out
    assert browser.run("[...document.images].every(image => image.loading === 'lazy' || image.naturalWidth > 0)")


def grip(browser: Browser, name: str, end: str) -> tuple[float, float]:
  """The middle of a limit's handle on the screen."""
  find = f"""(() => {{ const grip = document.querySelector('[aria-label="{end} {name}"] circle');
    grip.scrollIntoView({{block: 'center'}}); const box = grip.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""
  return tuple(browser.run(find))


def kept(browser: Browser) -> int:
  return int(browser.run("document.querySelector('[data-kept]').dataset.kept"))


def test_limits_start_at_the_rules_drag_and_count_what_select_counts(made, browser: Browser):
  browser.open(made)
  motion = np.arange(COUNT) / COUNT
  assert kept(browser) == (motion >= 0.2).sum()
  x, y = grip(browser, "motion", "least")
  browser.drag((x, y), (x + 60, y))
  moved = kept(browser)
  command = browser.run("document.querySelector('.explorer .command').textContent")
  [rule] = rules.parse_all([command.split("--keep '")[1].split("'")[0]])
  least = rules.limits(rule)[1]
  assert 0.2 < least < 1 and moved == (motion >= least).sum() < (motion >= 0.2).sum()
  assert "alone drops" in browser.run("document.querySelector('.explorer').textContent")
  x, y = grip(browser, "motion", "most")
  browser.drag((x, y), (x - 30, y))
  assert kept(browser) < moved
  assert select.evaluate(select.load(made.parents[1]), rules.parse_all([
    browser.run("document.querySelector('.explorer .command').textContent").split("--keep '")[1].split("'")[0]
  ])).kept.sum() == kept(browser)  # fmt: skip
  browser.run("document.querySelector('[aria-label=\"least motion\"]').focus()")
  before = kept(browser)
  for _ in range(2):
    browser.press("PageDown")
  assert kept(browser) > before
  browser.press("Home")
  assert browser.run("document.activeElement.getAttribute('aria-valuetext')") == "no limit"


def test_the_page_stays_small_however_many_clips_there_are():
  rng = np.random.default_rng(0)
  sizes = {}
  for count in (1000, 100_000):
    table = pa.table({name: rng.random(count) for name in ("vtss", "fps", "width")} | {"duration_s": rng.random(count)})
    document = page.Page("x")
    found = explorer.data(ClipColumns(table), (), "kling select")
    explorer.add(document, found)
    sizes[count] = len(document.html())
    assert found["sample"] == min(count, explorer.SAMPLE) and len(found["columns"]) == 4
    for entry, name in zip(found["columns"], [e["name"] for e in found["columns"]], strict=True):
      values, edges = table[name].to_numpy(), entry["edges"]
      inner = np.histogram(values, edges[1:-1])[0]
      assert np.array_equal(entry["counts"][1:-1][: len(inner) - 1], inner[:-1]) and sum(entry["counts"]) == count
  assert sizes[100_000] < 200_000


def test_levels_hold_the_limits_of_rules_exactly_and_mark_what_is_missing():
  table = pa.table({"x": pa.array([*np.geomspace(1e-3, 10, 500), None])})
  cut = explorer.levels("x", ClipColumns(table)["x"], (0.123456789,))
  assert cut.logarithmic and 0.123456789 in cut.edges and cut.level[-1] == explorer.MISSING
  assert np.all(np.diff(cut.edges) > 0) and len(cut.edges) <= explorer.LEVELS + 1
  for value, level in zip(table["x"].to_pylist()[:-1], cut.level[:-1], strict=True):
    assert (level == 0 or cut.edges[level] <= value) and (level == len(cut.edges) - 2 or value < cut.edges[level + 1])


def test_plain_ranges_are_told_from_other_rules():
  for text, wanted in (
    ("a >= 1", ("a", 1, None)), ("1 <= a < 2", ("a", 1, 2)), ("2 > a", ("a", None, 2)), ("a > -1", ("a", -1, None)),
    ("a == 1", None), ("a > b", None), ("a > 1 and b > 1", None), ("a in (1, 2)", None), ("1 > a < 3", None),
  ):  # fmt: skip
    assert rules.limits(rules.parse(text)) == wanted, text


def test_a_set_without_a_journal_or_scores_has_a_page(tmp_path):
  media = encode.encode([np.full((16, 16, 3), 90, np.uint8)] * 5, fps=10)
  with records.RecordWriter(tmp_path, "test") as writer:
    writer.write(ClipRecord("a", "v", "v", 0, 5, "1/10", 10.0, 16, 16, 5), media)
  text = report.write(tmp_path).read_text()
  assert "Kept clips" in text and "explorer" not in text.split("</style>")[1]
