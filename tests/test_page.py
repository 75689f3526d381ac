"""Pages: nothing from the network, everything escaped, media and charts inlined, a clear error without plotly."""

import builtins
import html.parser
import json
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kling_jax import page
from kling_jax.data import encode
from kling_jax.errors import UsageError


class Reader(html.parser.HTMLParser):
  """Collects tags, attributes and visible text; remembers open elements to check the nesting."""

  VOID = ("meta", "img", "br")

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[tuple[str, dict]] = []
    self.text: list[str] = []
    self.open: list[str] = []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] not in ("script", "style"):
      self.text.append(data)


def png() -> bytes:
  return cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()


def full_page() -> page.Page:
  document = page.Page("Run <1>", "a & b")
  document.section("First", 'text with "quotes"')
  document.facts({"clips": 3, "seconds": "4.5"})
  document.table(["name", "value"], [("a<b", 3), ("c", 0.123456)])
  document.funnel([("videos", 10, "10"), ("clips", 4, "4")], [{"broken": 6}])
  document.section("Second")
  movie = encode.encode([np.full((16, 16, 3), k * 20, np.uint8) for k in range(5)], fps=10)
  document.gallery([page.Tile(png(), "a picture", "low motion", bad=True), page.Tile(movie, "a film")])
  document.code("kling split <video>")
  return document


def test_a_page_is_well_formed_and_asks_nothing_of_the_network(tmp_path):
  full_page().write(tmp_path / "p.html")
  text = (tmp_path / "p.html").read_text()
  reader = Reader(text)
  assert reader.open == []
  for tag, attributes in reader.tags:
    for name in ("src", "href", "action", "poster", "data"):
      assert not attributes.get(name) or attributes[name].startswith(("#", "data:")), (tag, attributes[name][:80])
  assert not re.search(r"@import|url\(\s*['\"]?http", text)
  assert "<script" not in text  # no chart, no script: a page with pictures alone stays small
  assert len(text) < 40_000


def test_media_are_inlined_and_videos_play_muted_in_loops():
  reader = Reader(full_page().html())
  [image] = [attributes for tag, attributes in reader.tags if tag == "img"]
  assert image["src"].startswith("data:image/png;base64,") and image["alt"] == "a picture"
  [video] = [attributes for tag, attributes in reader.tags if tag == "video"]
  assert video["src"].startswith("data:video/mp4;base64,")
  assert {"muted", "loop", "autoplay", "playsinline"} <= set(video)
  with pytest.raises(ValueError, match="PNG"):
    document = page.Page("x")
    document.gallery([page.Tile(b"plain text, no media", "c")])


def test_numbers_are_shown_short_and_sections_listed():
  reader = Reader(full_page().html())
  assert {"0.1235", "3", "a<b"} <= set(reader.text)
  links = [attributes["href"] for tag, attributes in reader.tags if tag == "a"]
  anchors = {"#" + attributes["id"] for _, attributes in reader.tags if "id" in attributes}
  assert len(links) == 2 and set(links) <= anchors


@given(st.text(min_size=1, max_size=60))
def test_every_text_is_escaped(text):
  document = page.Page(text, text)
  document.section(text, text)
  document.facts({text: text})
  document.table([text], [[text]])
  document.funnel([(text, 1, text)], [{text: 1}])
  document.gallery([page.Tile(png(), text, text)])
  document.code(text)
  assert [tag for tag, _ in Reader(document.html()).tags] == [tag for tag, _ in Reader(page_of_words()).tags]


def page_of_words() -> str:
  document = page.Page("w", "w")
  document.section("w", "w")
  document.facts({"w": "w"})
  document.table(["w"], [["w"]])
  document.funnel([("w", 1, "w")], [{"w": 1}])
  document.gallery([page.Tile(png(), "w", "w")])
  document.code("w")
  return document.html()


def test_the_funnel_narrows_in_proportion():
  text = full_page().html()
  assert [float(width) for width in re.findall(r"width:([\d.]+)%\"", text)] == [100.0, 40.0]
  assert "6 broken" in text
  empty = page.Page("x")
  empty.funnel([("videos", 0, "0")])
  assert "width:0.00%" in empty.html()


def test_charts_carry_their_data_and_plotly_once():
  document = page.Page("x")
  document.chart(page.lines({"loss </script><b>": ([0, 1], [2.0, 1.0])}, "step", "loss"))
  document.charts(
    [("h", page.histogram({"kept": [1, 2, 2], "dropped": [0.5]}, "motion")), ("b", page.bars({"a": 1}, "s"))]
  )
  text = document.html()
  assert text.count("<script>") == 2 and text.count("</script>") == 2
  data = json.loads(re.search(r"const CHARTS=(\[.*?\]);\n", text).group(1))
  assert data[0]["data"][0]["name"] == "loss </script><b>" and data[0]["data"][0]["y"] == [2.0, 1.0]
  assert len(data) == 3 and all(f'id="c{k}"' in text for k in range(3))


def test_a_plotly_figure_object_is_taken_too():
  figure = pytest.importorskip("plotly.graph_objects").Figure(data=[{"type": "bar", "x": [1], "y": [np.float64(2)]}])
  document = page.Page("x")
  document.chart(figure)
  assert '"type":"bar"' in document.html().replace(" ", "")


def test_values_that_are_not_finite_become_gaps():
  document = page.Page("x")
  document.chart(page.lines({"loss": ([0, 1, 2], np.array([1.0, np.nan, np.inf]))}, "step", "loss"))
  document.chart(page.histogram({"a": [1.0, float("nan"), 2.0]}, "v"))
  assert '"y": [1.0, null, null]' in document.html()


def test_every_value_lies_in_a_bin_of_the_histogram():
  values = list(np.random.default_rng(0).normal(size=100)) + [5.0]
  for bins in (None, 7):
    [trace] = page.histogram({"a": values}, "v", bins)["data"]
    edges = trace["xbins"]
    assert edges["start"] <= min(values) and edges["end"] > max(values)
  [same] = page.histogram({"a": [2.0, 2.0]}, "v")["data"]
  assert same["xbins"]["size"] > 0


def test_without_plotly_charts_say_how_to_get_it(monkeypatch):
  real = builtins.__import__

  def missing(name, *args, **kwargs):
    if name.split(".")[0] == "plotly":
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", missing)
  with pytest.raises(UsageError, match=r"kling_jax\[demo\]"):
    page.require()
  full_page().html()  # needs none


def test_importing_the_module_loads_neither_plotly_nor_numpy():
  code = "import sys, kling_jax.page; print(sorted({'plotly', 'numpy', 'jax'} & set(sys.modules)))"
  assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
