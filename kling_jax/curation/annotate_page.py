"""The rating page: one clip at a time, keys 1 to 5, and what raters look at."""

import functools

from kling_jax import page

WORDS = ("unfit", "poor", "usable", "good", "ideal")
# Koala-36M, section 4.3.1.
HINTS = (
  ("Dynamic quality", "What moves fills more than about 30 % of the frame, and moves in a clear way. Less for a still "
   "picture, for little motion, for shake and jerks of an amateur's camera."),
  ("Static quality", "A distinct subject with detail, a composed picture, good light, rich colours. Less for blur, "
   "blocking, noise, over-exposure, clutter."),
  ("Naturalness", "As the camera saw it. Less for effects, transitions inside the clip, subtitles, logos, borders, "
   "collages, speed-up. 1 for violence, gore, and political or terrorist content."),
)  # fmt: skip


@functools.cache
def html() -> str:
  """The page; everything that depends on set and rater comes later, by requests."""
  document = page.Page("Clip ratings", "How fit is this clip for training a video generator?")
  document.widget(_MARKUP, {"words": WORDS, "hints": HINTS}, _SCRIPT, _STYLE)
  return document.html()


_MARKUP = """
<form class="who" hidden><label for="name">Your name</label>
  <div><input id="name" maxlength="64" autocomplete="off" spellcheck="false"><button>Start</button></div>
  <p class="known"></p><p class="soft">The name decides your order of clips. With the same name you go on where you
  stopped.</p></form>
<div class="work" hidden>
  <div class="top"><b class="me"></b><div class="bar"><i></i></div><span class="count"></span>
    <span class="alpha" title="Krippendorff's alpha of all raters: 1 is full agreement, 0 that of chance"></span></div>
  <div class="stage">
    <div class="screen"><video muted loop playsinline autoplay></video><div class="veil" hidden></div></div>
    <div class="hints"></div>
  </div>
  <div class="keys"></div>
  <p class="help"><kbd>1</kbd>–<kbd>5</kbd> rate · <kbd>U</kbd> undo · <kbd>Space</kbd> pause · <kbd>R</kbd> from the
    start · <kbd>,</kbd> <kbd>.</kbd> frame by frame · <kbd>F</kbd> full size</p>
</div>
<div class="done" hidden><h2>All clips are rated</h2><p>Thank you. <kbd>U</kbd> takes the last rating back.</p></div>
<p class="trouble" role="alert" hidden></p>
<video class="ahead" preload="auto" muted hidden></video>
"""

_STYLE = """
.who label { display: block; font-weight: 600; margin-bottom: 6px; }
.who div { display: flex; gap: 10px; max-width: 480px; }
.who input { flex: 1; font: inherit; padding: 9px 12px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--page); color: var(--ink); }
.who button, .keys button { font: inherit; color: inherit; cursor: pointer; border: 1px solid var(--line);
  border-radius: 10px; background: var(--page); }
.who button { padding: 9px 20px; background: var(--mark); border-color: var(--mark); color: #fff; font-weight: 600; }
.known { margin: 14px 0; } .known button { padding: 3px 12px; margin: 0 8px 8px 0; background: var(--page);
  color: var(--ink); font-weight: 400; border-color: var(--line); }
.soft, .help { color: var(--soft); font-size: .88rem; }
.top { display: flex; align-items: center; gap: 14px; margin-bottom: 14px; font-variant-numeric: tabular-nums; }
.top .bar { flex: 1; height: 10px; } .top .bar i { min-width: 0; transition: width .2s; }
.alpha { color: var(--soft); font-size: .88rem; }
.stage { display: grid; grid-template-columns: minmax(0, 1fr) 250px; gap: 22px; align-items: start; }
.screen { position: relative; background: #000; border-radius: 10px; overflow: hidden;
  aspect-ratio: 16 / 9; max-height: 62vh; width: 100%; }
.screen video { width: 100%; height: 100%; object-fit: contain; border-radius: 0; }
.screen:fullscreen { border-radius: 0; max-height: none; }
.veil { position: absolute; inset: 0; display: grid; place-items: center; color: #fff; background: #0008;
  padding: 20px; text-align: center; }
.hints h3 { margin: 0 0 2px; } .hints p { color: var(--soft); font-size: .86rem; line-height: 1.42; margin: 0 0 14px; }
.keys { display: grid; grid-template-columns: repeat(5, 1fr); gap: 10px; margin: 16px 0 10px; }
.keys button { padding: 9px 4px; } .keys b { display: block; font-size: 1.35rem; line-height: 1.2; }
.keys span { color: var(--soft); font-size: .84rem; }
.keys button:hover { border-color: var(--mark); } .keys button.hit { background: var(--mark); color: #fff; }
.keys button.hit span { color: #fff; }
kbd { font: inherit; font-size: .82rem; border: 1px solid var(--line); border-bottom-width: 2px; border-radius: 5px;
  padding: 0 6px; background: var(--page); }
.trouble { background: var(--badback); color: var(--bad); border-radius: 8px; padding: 9px 14px; margin: 14px 0 0; }
[hidden] { display: none !important; } .help { margin: 0; max-width: none; }
@media (max-width: 820px) { .stage { grid-template-columns: 1fr; } }
"""

_SCRIPT = """
const find = selector => root.querySelector(selector), token = new URLSearchParams(location.search).get('token');
const who = find('.who'), work = find('.work'), done = find('.done'), trouble = find('.trouble'), veil = find('.veil');
const video = find('.screen video'), ahead = find('.ahead'), input = find('#name');
const wait = ms => new Promise(go => setTimeout(go, ms));
const part = (tag, text, parent) => { const e = document.createElement(tag); e.textContent = text; parent.append(e);
  return e; };
const path = (name, more = {}) => name + '?' + new URLSearchParams({token, ...more});
let rater = null, state = null, busy = false;
window.rating = () => ({rater, busy, done: state && state.done, total: state && state.total,
  clip: state && state.next.length ? state.next[0].clip : null});
DATA.hints.forEach(([title, text]) => { part('h3', title, find('.hints')); part('p', text, find('.hints')); });
const keys = DATA.words.map((word, k) => { const b = part('button', '', find('.keys')); b.type = 'button';
  part('b', k + 1, b); part('span', word, b); b.onclick = () => rate(k + 1); return b; });

function complain(text) { trouble.textContent = text; trouble.hidden = !text; }

// Asks until there is an answer. The same request may arrive twice: its id tells the server.
async function ask(name, body, more) {
  for (let pause = 250; ; pause = Math.min(2 * pause, 4000)) {
    try {
      const answer = await fetch(path(name, more), body ? {method: 'POST', body: JSON.stringify(body),
        headers: {'Content-Type': 'application/json'}} : {});
      const value = await answer.json();
      if (!answer.ok) { complain(value.error); return null; }
      complain('');
      return value;
    } catch (error) {
      complain(body ? 'Not saved yet: no answer from kling annotate. Start it again; this page keeps trying.'
        : 'No answer from kling annotate. Start it again; this page keeps trying.');
      await wait(pause);
    }
  }
}

// What was not answered outlives the page, too.
async function send(name, body) {
  busy = true;
  localStorage.setItem('kling-unsent-' + rater, JSON.stringify([name, body]));
  const answer = await ask(name, body);
  localStorage.removeItem('kling-unsent-' + rater);
  busy = false;
  if (answer) show(answer);
  return answer;
}

function rate(value) {
  if (busy || !state || !state.next.length) return;
  keys[value - 1].classList.add('hit');
  send('rate', {request: crypto.randomUUID(), rater, clip: state.next[0].clip, rating: value})
    .then(() => keys[value - 1].classList.remove('hit'));
}

function undo() {
  if (!busy && state) send('undo', {request: crypto.randomUUID(), rater});
}

function show(next) {
  const before = state && state.next.length ? state.next[0].number : null;
  state = next;
  find('.me').textContent = rater;
  find('.count').textContent = next.done + ' / ' + next.total;
  find('.top .bar i').style.width = 100 * next.done / next.total + '%';
  const others = Object.keys(next.raters).length;
  find('.alpha').textContent = next.alpha === null ? ''
    : 'agreement ' + next.alpha.toFixed(2) + ' (' + others + ' raters)';
  who.hidden = true;
  work.hidden = !next.next.length;
  done.hidden = !work.hidden;
  if (!next.next.length) { video.removeAttribute('src'); return; }
  if (next.next[0].number !== before) {
    veil.hidden = true;
    video.src = path('clip/' + next.next[0].number);
    if (next.next.length > 1) ahead.src = path('clip/' + next.next[1].number);
  }
}

video.onerror = () => { if (video.getAttribute('src')) { veil.hidden = false; veil.textContent =
  'This browser cannot play the clip (H.264). Try Chrome, Chromium, Edge, Safari or Firefox.'; } };

async function start(name) {
  rater = name.trim();
  const key = 'kling-unsent-' + rater, unsent = localStorage.getItem(key);
  if (unsent) { const [what, body] = JSON.parse(unsent); await send(what, body); }
  const first = await ask('state', null, {rater});
  if (first) { show(first); input.blur(); history.replaceState(null, '', path('/', {rater: first.rater}));
    rater = first.rater; } else { rater = null; who.hidden = false; }
}

who.onsubmit = event => { event.preventDefault(); start(input.value); };

document.addEventListener('keydown', event => {
  if (!rater || event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target === input) return;
  const key = event.key.toLowerCase();
  if (key >= '1' && key <= '5' && key.length === 1) rate(Number(key));
  else if (key === 'u' || key === 'backspace') undo();
  else if (key === ' ') video.paused ? video.play() : video.pause();
  else if (key === 'r') { video.currentTime = 0; video.play(); }
  else if (key === ',' || key === '.') { video.pause(); video.currentTime += key === '.' ? 1 / 24 : -1 / 24; }
  else if (key === 'f') document.fullscreenElement ? document.exitFullscreen() : find('.screen').requestFullscreen();
  else return;
  event.preventDefault();
});

(async () => {
  const name = new URLSearchParams(location.search).get('rater');
  if (name) return start(name);
  who.hidden = false;
  input.focus();
  const all = await ask('everybody');
  for (const [one, count] of Object.entries(all ? all.raters : {})) {
    const b = part('button', one + ' (' + count + ')', find('.known'));
    b.type = 'button';
    b.onclick = () => start(one);
  }
})();
"""
