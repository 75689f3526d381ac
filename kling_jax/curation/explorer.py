"""Histograms with limits to drag, for the report of a set: counts follow while a limit moves, without a server.

Every column is cut into at most LEVELS levels; the page holds exact counts of each level over all clips, and the levels
of a sample of at most SAMPLE clips, one byte a value, from which it counts what all limits together keep. Its size is
so bounded whatever the size of the set: about 27 kB of base64 a column.
"""

import base64
import dataclasses
from typing import Any

import numpy as np

from kling_jax import page
from kling_jax.curation import rules
from kling_jax.curation.clip_columns import ClipColumns, Column

SAMPLE = 20_000  # clips whose values the page holds
LEVELS, BARS = 250, 50  # of a column; level 255 is a missing value
COLUMNS = 32  # at most; scores first
MISSING = 255


@dataclasses.dataclass(frozen=True)
class Levels:
  """One column in levels: level k holds edges[k] <= x < edges[k + 1], the first and last also what lies beyond."""

  name: str
  edges: np.ndarray
  level: np.ndarray  # (N,) uint8
  logarithmic: bool


def levels(name: str, column: Column, limits: tuple[float, ...] = ()) -> Levels:
  """Cuts a column between its 0.5th and 99.5th percentile, evenly in x or, where it is spread far, in log x.

  Args:
    limits: values that shall be edges exactly: those of the rules in force.
  """
  values = column.values[column.known]
  low, middle, high = np.quantile(values, (0.005, 0.5, 0.995))
  logarithmic = bool(low > 0 and high / low > 50 and high / max(middle, 1e-300) > 4)
  if high <= low:
    low, high = low - 0.5, high + 0.5
  spread = np.geomspace(low, high, LEVELS - 7) if logarithmic else np.linspace(low, high, LEVELS - 7)
  edges = np.unique([*(float(f"{edge:.4g}") for edge in spread), *limits[:6]])
  found = np.clip(np.searchsorted(edges, column.values, "right") - 1, 0, len(edges) - 2)
  return Levels(name, edges, np.where(column.known, found, MISSING).astype(np.uint8), logarithmic)


def data(columns: ClipColumns, chosen: tuple[rules.Rule, ...], command: str, seed: int = 0) -> dict[str, Any]:
  """What the page's script is given.

  Args:
    chosen: the rules in force; those that are plain ranges of one column set the limits at the start.
    command: what stands before the rules in the command that the page writes.
  """
  numbers = [name for name in named(columns) if _varies(columns[name])]
  for name in ("vtss", "duration_s", "fps", "width", "height", "caption_tokens"):
    if name not in numbers and columns.has(name) and columns[name].kind == "number" and _varies(columns[name]):
      numbers.append(name)
  limits = {found[0]: found[1:] for rule in chosen if (found := rules.limits(rule)) is not None}
  rng = np.random.Generator(np.random.PCG64(seed))
  total = len(columns)
  picks = np.arange(total) if total <= SAMPLE else np.sort(rng.choice(total, SAMPLE, replace=False))
  entries = []
  for name in numbers[:COLUMNS]:
    ends = limits.get(name, (None, None))
    cut = levels(name, columns[name], tuple(end for end in ends if end is not None))
    counts = np.bincount(cut.level, minlength=256)
    entries.append({
      "name": name, "who": ", ".join(columns.scorers(name)), "edges": cut.edges.tolist(), "log": cut.logarithmic,
      "counts": counts[: len(cut.edges) - 1].tolist(), "missing": int(counts[MISSING]), "limits": list(ends),
      "rows": base64.b64encode(cut.level[picks].tobytes()).decode("ascii"),
    })  # fmt: skip
  left_out = [rule.name for rule in chosen if rules.limits(rule) is None]
  return {"total": total, "sample": len(picks), "columns": entries, "command": command, "others": left_out,
          "bars": BARS, "more": max(0, len(numbers) - COLUMNS)}  # fmt: skip


def named(columns: ClipColumns) -> list[str]:
  """The scores of a table that a rule can name."""
  return [name for name in sorted(columns.scores) if name.isidentifier()]


def _varies(column: Column) -> bool:
  values = column.values[column.known]
  return len(values) > 0 and float(values.min()) < float(values.max())


def add(document: page.Page, found: dict[str, Any]) -> None:
  """Adds the histograms to a page."""
  document.widget(_MARKUP, found, _SCRIPT, _STYLE)


_MARKUP = """<div class="explorer"><p class="sum" aria-live="polite"></p><pre class="command"></pre>
<div class="grid"></div></div>"""

_SCRIPT = """
const make = (tag, attributes, parent, text) => {
  const one = document.createElementNS(tag === 'div' || tag === 'h3' || tag === 'p' || tag === 'span'
    ? 'http://www.w3.org/1999/xhtml' : 'http://www.w3.org/2000/svg', tag);
  for (const key in attributes) one.setAttribute(key, attributes[key]);
  if (text !== undefined) one.textContent = text;
  if (parent) parent.appendChild(one);
  return one;
};
const W = 300, H = 96, PAD = 8, number = x => x.toLocaleString('en'), short = x => String(+x.toPrecision(4));
const columns = DATA.columns.map(c => {
  const raw = atob(c.rows), rows = new Uint8Array(raw.length);
  for (let k = 0; k < raw.length; k++) rows[k] = raw.charCodeAt(k);
  const last = c.edges.length - 1;
  const near = (value, otherwise) => {
    if (value === null) return otherwise;
    let best = 0;
    c.edges.forEach((edge, k) => { if (Math.abs(edge - value) < Math.abs(c.edges[best] - value)) best = k; });
    return best;
  };
  return Object.assign({}, c, {rows, last, low: near(c.limits[0], 0), high: near(c.limits[1], last)});
});
const scale = DATA.total / DATA.sample;
const limited = c => c.low > 0 || c.high < c.last;
const inside = (c, level) => level === 255 ? !limited(c) : level >= c.low && level < c.high;
const place = (c, edge) => PAD + (W - 2 * PAD) * edge / c.last;

function keptRows() {
  const kept = new Uint8Array(DATA.sample).fill(1);
  for (const c of columns) if (limited(c)) for (let k = 0; k < kept.length; k++) if (!inside(c, c.rows[k])) kept[k] = 0;
  return kept;
}

function barsOf(c, counts) {
  const bars = new Float64Array(DATA.bars);
  counts.forEach((count, level) => { bars[Math.floor(level * DATA.bars / c.last)] += count; });
  return bars;
}

function update() {
  const kept = keptRows();
  let count = 0;
  for (const one of kept) count += one;
  const about = DATA.sample < DATA.total ? 'about ' : '';
  const clips = Math.round(count * scale);
  root.querySelector('.sum').textContent = `Within these limits: ${about}${number(clips)} of ${number(DATA.total)}`
    + ` clips (${(100 * count / Math.max(DATA.sample, 1)).toFixed(1)} %).`;
  root.dataset.kept = clips;
  const rules = [];
  for (const c of columns) {
    const now = new Float64Array(c.last);
    for (let k = 0; k < kept.length; k++) if (kept[k] && c.rows[k] !== 255) now[c.rows[k]] += scale;
    const all = barsOf(c, c.counts), some = barsOf(c, now), top = Math.max(...all, 1);
    const step = (W - 2 * PAD) / DATA.bars;
    let behind = '', front = '';
    for (let k = 0; k < DATA.bars; k++) {
      const x = PAD + k * step, a = (H - 4) * all[k] / top, b = Math.min((H - 4) * some[k] / top, a || H);
      if (a) behind += `M${x} ${H}v${-Math.max(a, 1)}h${step * .86}v${Math.max(a, 1)}z`;
      if (b) front += `M${x} ${H}v${-Math.max(b, 1)}h${step * .86}v${Math.max(b, 1)}z`;
    }
    c.behind.setAttribute('d', behind);
    c.front.setAttribute('d', front);
    let dropped = limited(c) ? c.missing : 0;
    c.counts.forEach((n, level) => { if (!inside(c, level)) dropped += n; });
    c.grips.forEach((grip, end) => {
      const edge = end ? c.high : c.low, free = end ? edge === c.last : edge === 0;
      grip.setAttribute('transform', `translate(${place(c, edge)} 0)`);
      grip.setAttribute('aria-valuenow', edge);
      grip.setAttribute('aria-valuetext', free ? 'no limit' : short(c.edges[edge]));
    });
    const from = c.low > 0 ? short(c.edges[c.low]) : '', to = c.high < c.last ? short(c.edges[c.high]) : '';
    const range = [from ? '\\u2265 ' + from : '', to ? '< ' + to : ''].filter(word => word).join(' and ');
    c.note.textContent = limited(c) ? `${range}`
      + ` alone drops ${number(dropped)}` : (c.missing ? `${number(c.missing)} without a value` : 'no limit');
    if (limited(c)) rules.push(` --keep '${from ? from + ' <= ' : ''}${c.name}${to ? ' < ' + to : ''}'`);
  }
  root.querySelector('.command').textContent = DATA.command + rules.join('');
}

function drag(c, end) {
  const grip = make('g', {class: 'grip', tabindex: 0, role: 'slider', 'aria-valuemin': 0, 'aria-valuemax': c.last,
    'aria-label': `${end ? 'most' : 'least'} ${c.name}`}, c.svg);
  make('line', {x1: 0, x2: 0, y1: 0, y2: H}, grip);
  make('rect', {x: -11, y: 0, width: 22, height: H + 14, class: 'area'}, grip);
  make('circle', {cx: 0, cy: H + 6, r: 6}, grip);
  const set = edge => {
    edge = Math.round(edge);
    if (end) c.high = Math.min(Math.max(edge, c.low + 1), c.last); else c.low = Math.max(Math.min(edge, c.high - 1), 0);
    update();
  };
  let held = false;
  grip.addEventListener('pointerdown', event => {
    held = true; grip.setPointerCapture(event.pointerId); event.preventDefault();
  });
  grip.addEventListener('pointermove', event => {
    if (!held) return;
    const box = c.svg.getBoundingClientRect();
    set(((event.clientX - box.left) * W / box.width - PAD) / (W - 2 * PAD) * c.last);
  });
  for (const name of ['pointerup', 'pointercancel']) grip.addEventListener(name, () => { held = false; });
  grip.addEventListener('keydown', event => {
    const step = {ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10}[event.key];
    if (step) { set((end ? c.high : c.low) + step); event.preventDefault(); }
    if (event.key === 'Home') { set(0); event.preventDefault(); }
    if (event.key === 'End') { set(c.last); event.preventDefault(); }
  });
  return grip;
}

for (const c of columns) {
  const cell = make('div', {class: 'cell'}, root.querySelector('.grid'));
  const head = make('h3', {}, cell, c.name);
  make('span', {}, head, c.who);
  c.svg = make('svg', {viewBox: `0 0 ${W} ${H + 30}`}, cell);
  c.behind = make('path', {class: 'behind'}, c.svg);
  c.front = make('path', {class: 'front'}, c.svg);
  make('line', {class: 'axis', x1: PAD, x2: W - PAD, y1: H, y2: H}, c.svg);
  const ends = [0, Math.round(c.last / 2), c.last];
  ends.forEach((edge, k) => make('text', {x: place(c, edge), y: H + 27, 'text-anchor': ['start', 'middle', 'end'][k]},
    c.svg, short(c.edges[edge]) + (k === 1 && c.log ? ' (log)' : '')));
  c.grips = [drag(c, 0), drag(c, 1)];
  c.note = make('p', {class: 'note'}, cell);
}
update();
"""

_STYLE = """
.explorer .sum { font-size: 1.15rem; font-weight: 600; position: sticky; top: 0; background: var(--card);
  padding: 6px 0; z-index: 1; font-variant-numeric: tabular-nums; }
.explorer .grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(270px, 100%), 1fr));
  gap: 14px 22px; }
.explorer .cell { min-width: 0; }
.explorer h3 span { color: var(--soft); font-weight: 400; font-size: .8rem; margin-left: 8px; }
.explorer svg { display: block; width: 100%; height: auto; overflow: visible; user-select: none; }
.explorer .behind { fill: var(--line); } .explorer .front { fill: var(--mark); }
.explorer .axis { stroke: var(--soft); stroke-width: 1; } .explorer text { fill: var(--soft); font-size: 11px; }
.explorer .grip { cursor: ew-resize; touch-action: none; outline: none; }
.explorer .grip line { stroke: var(--bad); stroke-width: 1.5; } .explorer .area { fill: transparent; }
.explorer .grip circle { fill: var(--bad); stroke: var(--card); stroke-width: 2; }
.explorer .grip:focus-visible circle { stroke: var(--ink); }
.explorer .note { color: var(--soft); font-size: .82rem; margin: 2px 0 0; }
.explorer .command { white-space: pre-wrap; margin: 0 0 18px; }
"""
