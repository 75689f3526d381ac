"""The page of a rollout: clips play one after the other while the next is filmed; a box for what happens next."""

from kling_jax import page


def html(prompt: str, unit: str, most: int) -> str:
  """The page of a world; `most` is the longest text of a clip in `unit`."""
  document = page.Page("A world goes on", prompt)
  document.widget(_MARKUP, {"unit": unit, "most": most}, _SCRIPT, _STYLE)
  return document.html()


_MARKUP = """
<div class="takes" role="tablist" aria-label="takes"></div>
<div class="stage">
  <div class="screen"><img alt="the first frame"><video muted playsinline></video><video muted playsinline></video>
    <div class="veil" role="status" hidden></div></div>
  <div class="side">
    <p class="now"></p>
    <form><label for="text">What happens next</label>
      <input id="text" maxlength="2000" autocomplete="off" spellcheck="false">
      <div class="buttons"><button class="film">Film it</button>
        <label><input type="checkbox" class="cut"> new scene (cut)</label>
        <label><input type="checkbox" class="auto"> let it go on</label></div></form>
    <p class="soft limit"></p>
    <p class="trouble" role="alert" hidden></p>
  </div>
</div>
<ol class="clips"></ol>
<p class="soft help">A click on a clip plays from there. <b>Back to here</b> drops what follows; <b>Fork</b> tries
  another future from there and keeps this one. Space pauses.</p>
"""

_STYLE = """
.stage { display: grid; grid-template-columns: minmax(0, 1fr) minmax(260px, 380px); gap: 24px; align-items: start; }
.screen { position: relative; background: #000; border-radius: 12px; overflow: hidden; margin: 0 auto;
  aspect-ratio: var(--aspect, 1); width: min(100%, calc(52vh * (var(--aspect, 1)))); }
.screen img, .screen video { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain;
  image-rendering: pixelated; border-radius: 0; max-width: none; }
.screen video { visibility: hidden; } .screen video.front { visibility: visible; }
.veil { position: absolute; left: 12px; bottom: 12px; color: #fff; background: #000a; padding: 5px 12px;
  border-radius: 999px; font-size: .86rem; }
.now { min-height: 3.2em; font-size: 1.1rem; margin: 0 0 14px; } .now small { color: var(--soft); display: block; }
.side form > label { display: block; font-weight: 600; margin-bottom: 6px; }
.side #text { width: 100%; box-sizing: border-box; font: inherit; padding: 10px 12px; border: 1px solid var(--line);
  border-radius: 8px; background: var(--page); color: var(--ink); }
.buttons { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 16px; margin: 12px 0; }
.buttons label { font-size: .92rem; }
.side button, .clips button, .takes button { font: inherit; cursor: pointer; color: inherit; border-radius: 8px;
  border: 1px solid var(--line); background: var(--page); padding: 3px 10px; }
.side button.film { background: var(--mark); border-color: var(--mark); color: #fff; font-weight: 600;
  padding: 9px 20px; }
.takes { display: flex; flex-wrap: wrap; gap: 8px; margin-bottom: 14px; }
.takes button[aria-selected=true] { background: var(--mark); border-color: var(--mark); color: #fff; }
.clips { list-style: none; display: flex; gap: 12px; overflow-x: auto; padding: 4px 2px 12px; margin: 20px 0 0; }
.clips li { flex: 0 0 168px; border: 1px solid var(--line); border-radius: 10px; padding: 8px; cursor: pointer; }
.clips li.on { outline: 2px solid var(--mark); } .clips li.cut { border-left: 5px solid var(--bad); }
.clips video, .clips img { width: 100%; aspect-ratio: var(--aspect, 1); object-fit: contain; background: #000;
  border-radius: 6px;
  image-rendering: pixelated; display: block; }
.clips p { font-size: .84rem; line-height: 1.35; margin: 6px 0; min-height: 2.7em; overflow-wrap: anywhere; }
.clips small { color: var(--soft); } .clips div { display: flex; gap: 6px; }
.clips button { font-size: .78rem; padding: 2px 8px; }
.soft { color: var(--soft); font-size: .88rem; margin: 6px 0 0; max-width: none; }
.trouble { background: var(--badback); color: var(--bad); border-radius: 8px; padding: 9px 14px; margin: 14px 0 0; }
[hidden] { display: none !important; }
@media (max-width: 820px) { .stage { grid-template-columns: 1fr; } }
"""

_SCRIPT = """
const find = selector => root.querySelector(selector), token = new URLSearchParams(location.search).get('token');
const wait = ms => new Promise(go => setTimeout(go, ms));
const make = (tag, text, parent) => { const e = document.createElement(tag); e.textContent = text; parent.append(e);
  return e; };
const path = (name, more = {}) => name + '?' + new URLSearchParams({token, ...more});
const screen = find('.screen'), veil = find('.veil'), trouble = find('.trouble'), input = find('#text');
const players = [...screen.querySelectorAll('video')], auto = find('.auto'), cut = find('.cut');
let state = null, take = 0, playing = -1, loading = -1, front = 0, turn = 0, played = [];
let begun = false, wish = null;  // a clip was asked for and not yet answered; what to film as soon as nothing is
window.world = () => ({take, playing, played, filming: begun || wish || (state && state.filming),
  takes: state ? state.takes : [], time: players[front].currentTime, size: players[front].videoWidth});
const picture = screen.querySelector('img');
picture.onload = () => root.style.setProperty('--aspect', picture.naturalWidth + ' / ' + picture.naturalHeight);
picture.src = path('image');
find('.limit').textContent = 'At most ' + DATA.most + ' ' + DATA.unit + '. Empty: the model writes it.';

function complain(text) { trouble.textContent = text; trouble.hidden = !text; }

// Asks until there is an answer; to film is asked by the number of the clip, so that twice is once.
async function ask(name, body, more) {
  for (let pause = 250; ; pause = Math.min(2 * pause, 4000)) {
    try {
      const answer = await fetch(path(name, more), body ? {method: 'POST', body: JSON.stringify(body),
        headers: {'Content-Type': 'application/json'}} : {});
      const value = await answer.json();
      if (!answer.ok) { complain(value.error); return null; }
      return value;
    } catch (error) {
      complain('No answer from kling rollout. Start it again; its films are in its folder.');
      await wait(pause);
    }
  }
}

const clips = () => state ? state.takes[take].clips : [];

async function act(name, body) {
  complain('');
  const next = await ask(name, {take, ...body});
  if (next) show(next);
  return next;
}

// Films what was said, else lets the world go on by itself, one clip ahead of what is played.
async function ahead() {
  if (!state || state.filming || begun || !(wish || (auto.checked && playing >= clips().length - 2))) return;
  const {text, scene} = wish || {text: '', scene: false};
  begun = true; wish = null;
  const next = await act('film', {number: clips().length, text, cut: scene});
  begun = false;
  if (!next) { auto.checked = false; if (!input.value) input.value = text; }
  tell(); ahead();
}

function choose(number) {
  take = number; wish = null;
  stop();
  show(state, true);
  if (clips().length) play(clips().length - 1);
}

function stop() {
  playing = loading = -1;
  turn++;  // what is loading comes too late
  players.forEach(player => { player.pause(); player.classList.remove('front'); player.onended = null;
    player.removeAttribute('src'); player.dataset.media = ''; });
  tell();
}

function load(player, number) {
  const media = String(clips()[number].media);
  if (player.dataset.media !== media) { player.dataset.media = media; player.src = path('clip/' + media); }
}

// Two players take turns, so that the next clip is there when the last one ends.
async function play(number) {
  if (!clips()[number]) return;
  loading = number;
  const mine = ++turn, next = players[1 - front];
  load(next, number);
  next.currentTime = 0;
  try { await next.play(); } catch (error) {
    if (mine !== turn) return;
    loading = -1;
    if (error.name !== 'AbortError') complain('This browser cannot play the clip (H.264).');
    return;
  }
  if (mine !== turn) return;
  players[front].pause();
  players[front].classList.remove('front');
  next.classList.add('front');
  front = 1 - front; playing = number; loading = -1;
  played.push(clips()[number].media);
  next.onended = () => { if (clips()[playing + 1]) play(playing + 1); else tell(); };
  if (clips()[number + 1]) load(players[1 - front], number + 1);
  tell(); ahead();
}

function tell() {
  const clip = clips()[playing], now = find('.now');
  now.textContent = clip ? clip.text : 'Say what happens, or leave it to the model.';
  if (clip) make('small', (clip.given ? 'you said so' : 'written by the model') + ', clip ' + playing +
    (clip.cut ? ', after a cut' : '') + ', filmed in ' + clip.seconds + ' s', now);
  const filming = state && state.filming;
  veil.hidden = !filming && !wish;
  veil.textContent = filming ? 'filming clip ' + filming.number + (filming.take === take ? '' : ' of take ' +
    filming.take) + (clips().length ? '' : ' (the first one compiles)') +
    (wish ? ', next: ' + (wish.text || 'what the model writes') : '') : '';
  input.placeholder = state && !state.writes ? 'this model cannot write: say something' : 'empty: the model writes';
  find('.clips').querySelectorAll('li').forEach((item, number) =>
    item.classList.toggle('on', number === playing + 1));
}

let drawn = '';
function show(next, anew) {
  if (state && next.version < state.version) return;
  const before = clips().length, ended = playing < 0 || (playing === before - 1 && players[front].ended);
  state = next;
  if (take >= state.takes.length) take = 0;
  if (next.trouble) { complain(next.trouble); auto.checked = false; }
  if (playing >= clips().length) { stop(); if (clips().length) play(clips().length - 1); }
  const now = JSON.stringify([take, state.takes]);
  if (now !== drawn || anew) { drawn = now; draw(); }
  if (ended && loading < 0 && clips().length > before && !anew) play(clips().length - 1);
  else if (clips()[playing + 1] && playing >= 0) load(players[1 - front], playing + 1);
  tell(); ahead();
}

function draw() {
  const tabs = find('.takes'), list = find('.clips');
  tabs.replaceChildren(); list.replaceChildren();
  tabs.hidden = state.takes.length < 2;
  state.takes.forEach((one, number) => { const b = make('button', 'take ' + number + (one.parent === null ? '' :
    ' (from take ' + one.parent + ' after ' + one.at + ')'), tabs);
    b.type = 'button'; b.role = 'tab'; b.ariaSelected = number === take; b.onclick = () => choose(number); });
  [null, ...clips()].forEach((clip, after) => {  // the first card is the picture that the world begins with
    const item = make('li', '', list), small = document.createElement(clip ? 'video' : 'img');
    if (clip && clip.cut) item.className = 'cut';
    if (clip) { small.muted = true; small.preload = 'auto'; }
    small.src = clip ? path('clip/' + clip.media) + '#t=999' : path('image');
    item.append(small);
    make('p', clip ? clip.text : 'The first frame.', item);
    const row = make('div', '', item);
    if (after >= state.takes[take].first) {
      const back = make('button', 'Back to here', row), fork = make('button', 'Fork', row);
      back.type = fork.type = 'button';
      back.disabled = after === clips().length;
      back.onclick = event => { event.stopPropagation(); act('rewind', {clips: after}); };
      fork.onclick = async event => { event.stopPropagation();
        if (await act('fork', {clips: after})) choose(state.takes.length - 1); };
    }
    item.onclick = () => clip ? play(after - 1) : stop();
  });
  list.scrollLeft = list.scrollWidth;
}

find('form').onsubmit = event => {
  event.preventDefault();
  wish = {text: input.value, scene: cut.checked};
  input.value = '';
  cut.checked = false;
  tell(); ahead();
};
auto.onchange = ahead;
document.addEventListener('keydown', event => {
  if (event.key !== ' ' || event.target.tagName === 'INPUT' || event.target.tagName === 'BUTTON') return;
  const player = players[front];
  player.paused ? player.play() : player.pause();
  event.preventDefault();
});

(async () => {
  for (let seen = {}; ; seen = {seen: state.version}) {
    const next = await ask('state', null, seen);
    if (!next) return;
    show(next);
  }
})();
"""
