"""Self-contained HTML pages: text, tables, charts, images, videos; one file that opens from disk without a network."""

import base64
import dataclasses
import html
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kling_jax import files
from kling_jax.errors import UsageError

MENDING = "charts need plotly: run `pip install 'kling_jax[demo]'`"
_KINDS = ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"GIF8", "image/gif"), (b"RIFF", "image/webp"))
# Distinct in light and dark, and to the colour-blind (Okabe & Ito, the light ones darkened a little).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8609a", "#c58b00", "#3d9fd6")
# Control characters, and marks that turn the reading direction: a name shall not lie about itself.
_MARKS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclasses.dataclass(frozen=True)
class Tile:
  """A picture or video of a gallery.

  Attributes:
    media: encoded bytes: PNG, JPEG, GIF, WebP; or MP4.
    caption: text below it, also what screen readers say.
    note: a short remark in a badge; bad: the badge warns.
  """

  media: bytes
  caption: str
  note: str = ""
  bad: bool = False


class Page:
  """A page under construction; every text is escaped.

  Args:
    title: heading and window title. subtitle: one line below it.
  """

  def __init__(self, title: str, subtitle: str = ""):
    self._title = title
    self._parts: list[str] = []
    self._contents: list[tuple[str, str]] = []
    self._charts: list[dict[str, Any]] = []
    self._widgets: list[tuple[Any, str]] = []
    self._styles: dict[str, None] = {}
    self._subtitle = subtitle

  def section(self, title: str, text: str = "") -> None:
    """Starts a section; it is listed at the top of the page."""
    anchor = f"s{len(self._contents)}"
    self._contents.append((anchor, title))
    self._parts.append(f'</section><section id="{anchor}"><h2>{_text(title)}</h2>')
    if text:
      self.text(text)

  def text(self, text: str) -> None:
    """A paragraph."""
    self._parts.append(f"<p>{_text(text)}</p>")

  def code(self, text: str) -> None:
    """A block of a fixed-width font: a command, a config."""
    self._parts.append(f"<pre>{_text(text)}</pre>")

  def facts(self, facts: Mapping[str, object]) -> None:
    """A row of figures, each with its name: {"clips kept": 48}."""
    cells = "".join(f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for name, value in facts.items())
    self._parts.append(f'<div class="facts">{cells}</div>')

  def table(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; numbers stand at the right, floats are shown with four significant digits."""
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    self._parts.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')

  def heatmap(
    self, names: Sequence[str], cells: Sequence[Sequence[float | None]], rows: Sequence[str] | None = None
  ) -> None:
    """A table of numbers, each cell coloured by its number, fully from -1 or 1 on; None is a gap.

    Args:
      names: of the columns. cells: row by row. rows: names of the rows; None: those of the columns.
    """
    head = "".join(f"<th><span>{_text(name)}</span></th>" for name in names)
    body = []
    for name, row in zip(names if rows is None else rows, cells, strict=True):
      shown = "".join(_shaded(value) for value in row)
      body.append(f"<tr><th>{_text(name)}</th>{shown}</tr>")
    self._parts.append(
      f'<div class="wide"><table class="heat"><thead><tr><th></th>{head}</tr></thead>'
      f"<tbody>{''.join(body)}</tbody></table></div>"
    )

  def funnel(self, stages: Sequence[tuple[str, float, str]], losses: Sequence[Mapping[str, float]] = ()) -> None:
    """Bars that narrow from stage to stage.

    Args:
      stages: (name, amount, how the amount is written).
      losses: for each stage {reason: amount} of what does not reach the next one; shown below its bar.
    """
    rows = []
    for k, (name, amount, written) in enumerate(stages):
      largest = max((stage[1] for stage in stages), default=0) or 1
      share = 100 * amount / largest
      lost = losses[k] if k < len(losses) else {}
      chips = "".join(f"<li>{_text(f'{value:g}')} {_text(reason)}</li>" for reason, value in lost.items())
      below = f"<ul>{chips}</ul>" if chips else ""
      bar = f'<div class="bar"><i style="width:{share:.2f}%"></i></div>'
      rows.append(f"<div><span>{_text(name)}</span>{bar}<b>{_text(written)}</b>{below}</div>")
    self._parts.append(f'<div class="funnel">{"".join(rows)}</div>')

  def chart(self, figure: Any, title: str = "", height: int = 320) -> None:
    """A Plotly figure: an object with `to_plotly_json`, or {"data": [...], "layout": {...}}.

    Colours of background, text and grid follow the reader's light or dark mode.
    """
    spec = figure.to_plotly_json() if hasattr(figure, "to_plotly_json") else figure
    self._charts.append({"data": spec["data"], "layout": spec.get("layout", {})})
    heading = f"<h3>{_text(title)}</h3>" if title else ""
    number = len(self._charts) - 1
    self._parts.append(f'<div class="chart">{heading}<div id="c{number}" style="height:{height}px"></div></div>')

  def charts(self, figures: Sequence[tuple[str, Any]], height: int = 240) -> None:
    """Several (title, figure) side by side where the screen is wide enough."""
    self._parts.append('<div class="charts">')
    for title, figure in figures:
      self.chart(figure, title, height)
    self._parts.append("</div>")

  def gallery(self, tiles: Iterable[Tile], width: int = 220) -> None:
    """Pictures and videos in a grid of columns at least `width` pixels wide; videos play muted, in loops."""
    cells = []
    for tile in tiles:
      note = f'<span class="{"bad" if tile.bad else "good"}">{_text(tile.note)}</span> ' if tile.note else ""
      cells.append(f"<figure>{_media(tile)}<figcaption>{note}{_text(tile.caption)}</figcaption></figure>")
    self._parts.append(f'<div class="gallery" style="--tile:{width}px">{"".join(cells)}</div>')

  def widget(self, markup: str, data: Any, script: str, style: str = "") -> None:
    """A part with a script of its own.

    Args:
      markup, script, style: trusted text of this project, written as it is. The script finds its element as `root` and
        its data as `DATA`, and puts texts into the page by `textContent` alone.
      data: anything JSON-ready; no text in it can end the script.
    """
    self._styles[style] = None
    self._parts.append(f'<div id="w{len(self._widgets)}">{markup}</div>')
    self._widgets.append((data, script))

  def html(self) -> str:
    """The whole page.

    Raises:
      UsageError: it holds charts, and plotly is not installed.
    """
    links = "".join(f'<a href="#{anchor}">{_text(title)}</a>' for anchor, title in self._contents)
    menu = f"<nav>{links}</nav>" if len(self._contents) > 1 else ""
    subtitle = f"<p>{_text(self._subtitle)}</p>" if self._subtitle else ""
    script = _script(self._charts) if self._charts else ""
    for number, (data, body) in enumerate(self._widgets):
      element = f"document.getElementById('w{number}')"
      script += f"<script>((root, DATA) => {{{body}}})({element}, {_json(data)});</script>"
    return (
      f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(self._title)}</title>\n'
      '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
      f"<style>{_STYLE}{''.join(self._styles)}</style></head>\n"
      f"<body><header><h1>{_text(self._title)}</h1>{subtitle}{menu}</header><main><section>"
      f"{''.join(self._parts)}</section></main>{script}</body></html>\n"
    )

  def write(self, path: str | os.PathLike[str]) -> None:
    """Writes the page, whole or not at all."""
    files.write_text(path, self.html())


def require() -> None:
  """Raises UsageError where charts cannot be made, so that a long run can say so before it starts."""
  _plotly()


def lines(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, log_y: bool = False) -> dict:
  """A figure of curves {name: (xs, ys)} with axis titles."""
  data = [
    {"type": "scatter", "mode": "lines", "name": name, "x": list(xs), "y": list(ys), "line": {"color": colour}}
    for (name, (xs, ys)), colour in zip(curves.items(), _cycle(len(curves)), strict=True)
  ]
  axis = {"title": {"text": y}, "type": "log" if log_y else "linear"}
  return {"data": data, "layout": {"xaxis": {"title": {"text": x}}, "yaxis": axis, "showlegend": len(data) > 1}}


def histogram(groups: Mapping[str, Sequence[float]], x: str, bins: int | None = None) -> dict:
  """A stacked histogram of groups {name: values} over common bins; by default about 2 sqrt(values) of them."""
  values = [value for group in groups.values() for value in group if math.isfinite(value)]
  bins = bins or max(6, min(40, round(2 * len(values) ** 0.5)))
  low, high = (min(values), max(values)) if values else (0.0, 1.0)
  size = (high - low) / bins or 1.0
  data = [
    {
      "type": "histogram",
      "name": name,
      "x": list(group),
      "xbins": {"start": low, "end": high + size, "size": size},
      "marker": {"color": colour},
    }
    for (name, group), colour in zip(groups.items(), _cycle(len(groups)), strict=True)
  ]
  axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": "clips"}}}
  return {"data": data, "layout": {"barmode": "stack", "showlegend": len(data) > 1, "bargap": 0.05} | axes}


def bars(values: Mapping[str, float], x: str) -> dict:
  """A figure of horizontal bars {name: value}, the first on top."""
  names = [name if len(name) <= 28 else name[:27] + "…" for name in values]
  data = [{"type": "bar", "orientation": "h", "x": list(values.values()), "y": names, "marker": {"color": COLOURS[0]}}]
  return {
    "data": data,
    "layout": {"xaxis": {"title": {"text": x}}, "yaxis": {"autorange": "reversed", "automargin": True}},
  }


def _cycle(count: int) -> list[str]:
  return [COLOURS[k % len(COLOURS)] for k in range(count)]


def _text(value: object) -> str:
  return html.escape(_MARKS.sub(" ", str(value)), quote=True)


def _cell(value: object) -> str:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return f"<td>{_text(value)}</td>"
  return f'<td class="n">{_text(value if isinstance(value, int) else format(value, ".4g"))}</td>'


def _shaded(value: float | None) -> str:
  if value is None:
    return "<td></td>"
  colour = COLOURS[0] if value >= 0 else COLOURS[1]
  style = f"background:color-mix(in srgb,{colour} {round(70 * min(abs(value), 1))}%,transparent)"
  shown = re.sub(r"^(-?)0\.", r"\1.", f"{value:.2f}")
  return f'<td style="{style}">{shown}</td>'


def _media(tile: Tile) -> str:
  kind = next((name for magic, name in _KINDS if tile.media.startswith(magic)), "")
  if not kind and tile.media[4:8] == b"ftyp":
    kind = "video/mp4"
  if not kind:
    raise ValueError(f"media of a page must be PNG, JPEG, GIF, WebP or MP4 bytes, not {tile.media[:8]!r}...")
  source = f"data:{kind};base64,{base64.b64encode(tile.media).decode('ascii')}"
  if kind == "video/mp4":
    return f'<video src="{source}" autoplay muted loop playsinline controls aria-label="{_text(tile.caption)}"></video>'
  return f'<img src="{source}" alt="{_text(tile.caption)}" loading="lazy">'


def _plotly() -> str:
  try:
    from plotly import offline
  except ImportError as error:
    raise UsageError(MENDING) from error
  return offline.get_plotlyjs()


def _script(charts: list[dict[str, Any]]) -> str:
  """Plotly once, the charts as data, and the few lines that draw them in the reader's colours."""
  return f"<script>{_plotly()}</script><script>const CHARTS={_json(charts)};{_DRAW}</script>"


def _json(value: Any) -> str:
  """JSON for a script element: "<" is escaped, so that no text in it can end the element."""
  return json.dumps(_plain(value), allow_nan=False).replace("<", "\\u003c")


def _plain(value: Any) -> Any:
  """JSON-ready: arrays become lists, values that are not finite become gaps."""
  if hasattr(value, "tolist"):
    value = value.tolist()
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


_DRAW = """
const dark = matchMedia('(prefers-color-scheme: dark)');
function draw() {
  const ink = dark.matches ? '#c9d1d9' : '#3b4252', grid = dark.matches ? '#2b313b' : '#e6e9ef';
  CHARTS.forEach((chart, k) => {
    const axis = {gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true};
    const layout = Object.assign({
      margin: {l: 48, r: 12, t: 8, b: 44}, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
      font: {color: ink, family: 'system-ui, sans-serif', size: 12}, hovermode: 'closest',
      legend: {orientation: 'h', y: 1.12, x: 0},
    }, chart.layout);
    layout.xaxis = Object.assign({}, axis, chart.layout.xaxis);
    layout.yaxis = Object.assign({}, axis, chart.layout.yaxis);
    Plotly.react('c' + k, chart.data, layout, {responsive: true, displaylogo: false, displayModeBar: false});
  });
}
draw();
dark.addEventListener('change', draw);
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --soft: #667085; --page: #f6f7f9; --card: #fff; --line: #e4e7ec;
  --mark: #0072b2; --good: #067647; --goodback: #e3f6ec; --bad: #b42318; --badback: #fdebe9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --page: #0f1217; --card: #171b22;
  --line: #2b313b; --mark: #3d9fd6; --good: #6bd6a0; --goodback: #12301f; --bad: #f7958c; --badback: #3a1714; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; padding-bottom: 4px; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; margin: 0; }
h2 { font-size: 1.2rem; letter-spacing: -.01em; margin: 0 0 10px; }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 4px; }
header p { color: var(--soft); margin: 6px 0 0; }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; margin-top: 14px; }
nav a { color: var(--mark); text-decoration: none; font-size: .92rem; }
nav a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin: 16px 0;
  padding: 20px 22px; }
section:empty { display: none; }
p { margin: 0 0 12px; max-width: 75ch; }
pre { background: var(--page); border-radius: 8px; padding: 12px 14px; overflow-x: auto; font-size: .85rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 14px; margin: 4px 0 8px; }
.facts b { display: block; font-size: 1.55rem; letter-spacing: -.02em; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; margin: 0 -4px 8px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; overflow-wrap: normal; }
th { color: var(--soft); font-weight: 500; text-align: left; }
th, td { padding: 6px 10px 6px 4px; border-bottom: 1px solid var(--line); vertical-align: top; }
td { max-width: 46ch; overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
.wide td { min-width: 5.5em; } .wide td.n, .heat td { min-width: 0; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.heat { width: auto; font-size: .78rem; font-variant-numeric: tabular-nums; }
.heat td { text-align: center; padding: 4px 3px; border: 1px solid var(--card); overflow-wrap: normal; }
.heat th { padding: 2px 6px; border: 0; font-weight: 400; } .heat tbody th { text-align: right; white-space: nowrap; }
.heat thead th { vertical-align: bottom; text-align: center; }
.heat thead span { writing-mode: vertical-rl; transform: rotate(180deg); white-space: nowrap; display: inline-block; }
.funnel > div { display: grid; grid-template-columns: 9em 1fr auto; gap: 2px 14px; align-items: center;
  padding: 5px 0; }
.funnel span { color: var(--soft); font-size: .92rem; }
.funnel b { font-variant-numeric: tabular-nums; min-width: 6.5em; text-align: right; }
.funnel + .funnel, .funnel + .facts { margin-top: 16px; }
.bar { background: var(--page); border-radius: 5px; height: 22px; overflow: hidden; }
.bar i { display: block; height: 100%; min-width: 2px; border-radius: 5px; background: var(--mark); }
.funnel ul { grid-column: 2 / 4; list-style: none; display: flex; flex-wrap: wrap; gap: 5px; margin: 0; padding: 0; }
.funnel li { background: var(--badback); color: var(--bad); border-radius: 99px; padding: 0 9px; font-size: .8rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(245px, 1fr)); gap: 18px; }
.chart { min-width: 0; margin-bottom: 8px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(var(--tile), 100%), 1fr)); gap: 16px; }
figure { margin: 0; min-width: 0; }
img, video { display: block; width: 100%; height: auto; border-radius: 8px; background: #000; }
figcaption { color: var(--soft); font-size: .82rem; line-height: 1.4; margin-top: 6px; }
.good, .bad { border-radius: 10px; padding: 1px 8px; font-size: .78rem; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
.good { color: var(--good); background: var(--goodback); } .bad { color: var(--bad); background: var(--badback); }
@media (max-width: 560px) { header, main { padding: 0 12px; } header { padding-top: 22px; }
  section { padding: 16px 14px; }
  .funnel > div { grid-template-columns: 1fr auto; } .bar { grid-column: 1 / 3; grid-row: 2; }
  .funnel ul { grid-column: 1 / 3; } }
"""
