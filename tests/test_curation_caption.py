"""`kling caption` against a real HTTP server that misbehaves, with kills and resumes; measured facts; sidecars."""

import base64
import collections
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import cv2
import loopback
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kling_jax import chat, cli, web
from kling_jax.curation import caption, caption_facts, caption_server
from kling_jax.curation.caption_journal import Journal
from kling_jax.data import encode, record, records, verify
from kling_jax.data.source import Score
from kling_jax.errors import DataError, UsageError

CLIPS = 6
PARTS = {name: f"the {name}" for name in record.CAPTION_FIELDS}


@pytest.fixture(scope="module")
def media() -> list[bytes]:
  """Clips of two seconds whose red rises from clip to clip, and whose green rises with time."""
  green = np.linspace(0, 200, 20).astype(np.uint8)
  frame = lambda k, t: np.broadcast_to(np.array([40 * k, green[t], 30], np.uint8), (48, 64, 3))
  return [encode.encode([frame(k, t) for t in range(20)], fps=10) for k in range(CLIPS)]


@pytest.fixture
def clips(media: list[bytes], tmp_path: pathlib.Path) -> pathlib.Path:
  with records.RecordWriter(tmp_path / "set", "r") as writer:
    for k, data in enumerate(media):
      scores = {"motion": Score(0.01, "flow", "1")}
      clip = record.ClipRecord(f"{k:032x}", "v.mp4", "/v.mp4", 20 * k, 20 * k + 20, "1/10", 10.0, 64, 48, 20, k)
      writer.write(record.dataclasses.replace(clip, scores=scores, status="kept" if k else "dropped"), data)
  return tmp_path / "set"


def completion(content: object, prompt: int = 100, done: int = 10, finish: str = "stop") -> bytes:
  text = content if isinstance(content, str) else json.dumps(content)
  choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
  return json.dumps({"choices": [choice], "usage": {"prompt_tokens": prompt, "completion_tokens": done}}).encode()


@pytest.fixture
def serve() -> Iterator[Callable[..., loopback.Server]]:
  running = []

  def start(answer: Callable[[loopback.Handler, bytes], None]) -> loopback.Server:
    running.append(loopback.Server(answer))
    return running[-1]

  yield start
  for server in running:
    server.__exit__()


def good(handler: loopback.Handler, body: bytes) -> None:
  handler.say(200, completion(PARTS))


def options(server: loopback.Server, **changes: object) -> caption.Options:
  values = {
    "captioners": ["server"],
    "server": server.address("/v1"),
    "model": "vl",
    "concurrency": 2,
    "timeout_s": 5.0,
  }
  return caption.Options(**(values | changes))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
  """Pauses of hundredths of a second; the tries stay the user's."""
  monkeypatch.setattr(web.Patience, "pause_s", lambda self, number, key: 0.01)


def test_frames_go_out_and_six_parts_come_back(clips, serve, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
  server = serve(good)
  summary = caption.run(clips, options(server, question=caption_server.Question(frames=4, side=32)))
  assert summary.captioned == {"server": 5} and summary.skipped == 1 and not summary.failed
  assert (summary.answers, summary.prompt_tokens, summary.completion_tokens) == (5, 500, 50)
  method, path, headers, body, _ = server.seen[0]
  assert (method, path, headers["Authorization"]) == ("POST", "/v1/chat/completions", "Bearer sk-secret")
  request = json.loads(body)
  schema = request["response_format"]["json_schema"]["schema"]
  assert schema["required"] == list(record.CAPTION_FIELDS) and schema["additionalProperties"] is False
  _, user = request["messages"]
  assert user["content"][0]["text"] == "A clip of 2.00 seconds; frames at 0.25, 0.75, 1.25, 1.75 seconds."
  pictures = [part["image_url"]["url"] for part in user["content"][1:]]
  assert all(url.startswith("data:image/jpeg;base64,") for url in pictures)
  frames = [cv2.imdecode(np.frombuffer(base64.b64decode(url.split(",")[1]), np.uint8), 1) for url in pictures]
  assert frames[0].shape == (24, 32, 3)
  true = np.linspace(0, 200, 20)[[2, 7, 12, 17]]
  np.testing.assert_allclose([frame[..., 1].mean() for frame in frames], true, atol=8)
  assert verify.verify(clips).ok
  for clip, _ in records.read_all(clips):
    assert clip.caption == ("" if clip.index == 0 else ". ".join(PARTS.values()).replace(". t", " t") + ".")
    if clip.index:
      digest = caption_server.Question(frames=4, side=32).digest
      assert (clip.captioner, clip.caption_model, clip.caption_prompt) == ("server", "vl", digest)
      assert clip.caption_tokens == len(clip.caption) + 2 and clip.caption_part_tokens[0] == len("the subject") + 2
  everything = "".join(path.read_text(errors="replace") for path in clips.rglob("*") if path.is_file())
  assert "sk-secret" not in everything


def test_a_second_run_asks_only_for_what_is_missing(clips, serve) -> None:
  server = serve(good)
  caption.run(clips, options(server))
  assert caption.run(clips, options(server)).skipped == 6 and len(server.seen) == 5
  summary = caption.run(clips, options(server, dropped=True))
  assert summary.captioned == {"server": 1} and len(server.seen) == 6
  again = caption.run(clips, options(server, again=True, dropped=True))  # the same question: the journal knows
  assert again.captioned == {"server": 6} and len(server.seen) == 6
  other = caption.run(clips, options(server, again=True, model="vl2"))
  assert other.answers == 5 and len(server.seen) == 11
  assert {clip.caption_model for clip, _ in records.read_all(clips)} == {"vl", "vl2"}


BAD = {
  "no JSON": lambda h: h.say(200, b"<html>502 Bad Gateway</html>"),
  "answer is no JSON": lambda h: h.say(200, completion("Sure! Here is the caption.")),
  "wrong fields": lambda h: h.say(200, completion({"title": "x"})),
  "a part is missing": lambda h: h.say(200, completion({k: v for k, v in PARTS.items() if k != "camera"})),
  "a part is a list": lambda h: h.say(200, completion(PARTS | {"camera": ["pan"]})),
  "empty parts": lambda h: h.say(200, completion(dict.fromkeys(PARTS, " \x00"))),
  "a key twice": lambda h: h.say(200, completion('{"subject": "a", ' + json.dumps(PARTS)[1:])),
  "deep nesting": lambda h: h.say(200, completion("[" * 100_000)),
  "no choices": lambda h: h.say(200, b'{"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}'),
  "a refusal": lambda h: h.say(200, b'{"choices": [{"message": {"content": null, "refusal": "no"}}]}'),
  "cut at max_tokens": lambda h: h.say(200, completion(PARTS, finish="length")),
  "a huge answer": lambda h: h.say(200, completion("x" * (5 * 2**20))),
  "busy": lambda h: h.say(429, b"busy", Retry_After="0"),
  "out of order": lambda h: h.say(500, b"<html>Internal Server Error</html>", Content_Type="text/html"),
  "connection cut at once": lambda h: h.cut(),
  "connection cut midway": lambda h: (h.say(200, completion(PARTS)[:40], length=999), h.cut()),
  "never ends": lambda h: (h.say(200, b"{", length=999), time.sleep(1.5)),
  "says nothing": lambda h: time.sleep(1.5),
}


@pytest.mark.parametrize("how", sorted(BAD))
def test_a_server_that_misbehaves_once_is_asked_again(how: str, clips, serve) -> None:
  turns = collections.Counter()

  def answer(handler: loopback.Handler, body: bytes) -> None:
    with handler.server.lock:
      turns["all"] += 1
      first = turns["all"] == 1
    if first:
      BAD[how](handler)
    else:
      good(handler, body)

  server = serve(answer)
  summary = caption.run(clips, options(server, timeout_s=0.5))
  assert summary.captioned == {"server": 5} and not summary.failed
  assert turns["all"] == 6 and summary.answers in (5, 6)
  billed = 100 if how not in ("no JSON", "a refusal", "a huge answer") and summary.answers == 6 else 0
  assert summary.prompt_tokens == 500 + billed
  assert summary.uncounted == (summary.answers == 6 and not billed)


def test_one_clip_without_a_usable_answer_costs_only_itself(clips, serve, capsys) -> None:
  first = threading.Event()

  def answer(handler: loopback.Handler, body: bytes) -> None:
    handler.say(200, completion({} if b"could not be used" in body or not first.is_set() else PARTS))
    first.set()

  summary = caption.run(clips, options(serve(answer), concurrency=1))
  assert summary.captioned == {"server": 4} and len(summary.failed) == 1
  assert summary.answers == 4 + 3 and summary.prompt_tokens == 700
  [(clip_id, why)] = summary.failed.items()
  assert "none of 3 answers can be used" in why and "no text under subject" in why
  assert "no caption for 'v.mp4'" in capsys.readouterr().err
  assert [clip.caption != "" for clip, _ in records.read_all(clips) if clip.clip_id == clip_id] == [False]


def test_facts_speak_where_the_server_cannot(clips, serve) -> None:
  def answer(handler: loopback.Handler, body: bytes) -> None:
    handler.say(400, b'{"error": "this request has too many images"}')

  summary = caption.run(clips, options(serve(answer), captioners=["server", "facts"]))
  assert summary.captioned == {"facts": 5} and not summary.failed


def test_retry_after_holds_everybody(clips, serve) -> None:
  turns = collections.Counter()

  def answer(handler: loopback.Handler, body: bytes) -> None:
    with handler.server.lock:
      turns["all"] += 1
      first = turns["all"] == 1
    if first:
      handler.say(429, b"slow down", Retry_After="1")
    else:
      time.sleep(0.1)
      good(handler, body)

  server = serve(answer)
  caption.run(clips, options(server, concurrency=1))
  times = [seen[-1] for seen in server.seen]
  assert times[1] - times[0] >= 1.0 and times[-1] - times[1] < 5


def test_rate_and_concurrency_are_kept(clips, serve) -> None:
  def answer(handler: loopback.Handler, body: bytes) -> None:
    time.sleep(0.05)
    good(handler, body)

  server = serve(answer)
  caption.run(clips, options(server, concurrency=5, rate=600.0))
  times = sorted(seen[-1] for seen in server.seen)
  assert times[-1] - times[0] >= 4 * 0.1 - 0.05 and server.busiest <= 5
  server = serve(answer)
  caption.run(clips, options(server, concurrency=1, again=True, model="other"))
  assert server.busiest == 1 and len(server.seen) == 5


def test_the_response_format_steps_down_only_when_the_server_refuses_it(clips, serve, capsys) -> None:
  def answer(handler: loopback.Handler, body: bytes) -> None:
    asked = json.loads(body).get("response_format", {}).get("type", "text")
    if asked != "text":
      handler.say(400, f'{{"error": "response_format {asked} is not supported"}}'.encode())
    else:
      handler.say(200, completion("```json\n" + json.dumps(PARTS | {"mood": "calm"}) + "\n```"))

  summary = caption.run(clips, options(serve(answer)))
  assert summary.captioned == {"server": 5} and summary.ignored_fields == 5
  told = capsys.readouterr().err
  assert told.count("refuses response_format json_schema; going on with json_object") == 1
  assert told.count("refuses response_format json_object; going on with text") == 1
  insist = caption_server.Question(response_format="json_schema", frames=2)
  with pytest.raises(UsageError, match="json_schema is not supported"):
    caption.run(clips, options(serve(answer), question=insist, again=True))


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_refusal_for_good_ends_the_run(status: int, clips, serve, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
  server = serve(lambda handler, body: handler.say(status, b"bad key sk-secret", Location="http://127.0.0.1:9/"))
  with pytest.raises(UsageError, match=f"answered {status}") as told:
    caption.run(clips, options(server))
  assert "sk-secret" not in str(told.value) and len(server.seen) <= 4  # of five clips


def test_a_server_that_is_gone_ends_the_run_and_what_came_is_kept(clips, serve) -> None:
  turns = collections.Counter()

  def answer(handler: loopback.Handler, body: bytes) -> None:
    with handler.server.lock:
      turns["all"] += 1
      alive = turns["all"] <= 2
    if alive:
      good(handler, body)
    else:
      handler.say(503, b"gone")

  server = serve(answer)
  five = options(server, tries=2, concurrency=1)
  monkey = pytest.MonkeyPatch()
  with monkey.context() as patch:
    patch.setattr(caption, "GIVE_UP", 2)
    with pytest.raises(DataError, match=r"answered 503 .* \(2 tries\); 2 clips in a row"):
      caption.run(clips, five)
  assert not any(clip.caption for clip, _ in records.read_all(clips))
  turns["all"] = -9
  asked = len(server.seen)
  summary = caption.run(clips, five)
  assert summary.captioned == {"server": 5} and len(server.seen) - asked == 3


def test_a_run_in_which_nothing_succeeds_ends_soon(clips, serve, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(caption, "HOPELESS", 3)
  server = serve(lambda handler, body: handler.say(400, b"use max_completion_tokens instead of max_tokens"))
  with pytest.raises(DataError, match="the first 3 clips failed, the last: server: .* max_completion_tokens"):
    caption.run(clips, options(server, concurrency=1))
  assert len(server.seen) <= 4


def test_hostile_captions_are_plain_bounded_text(clips, serve) -> None:
  evil = PARTS | {"subject": "<script>\x00\x1b]0;x\x07\u202eab\ud83d\n\n" + "z" * 10**5, "world": "'; DROP TABLE"}
  caption.run(clips, options(serve(lambda handler, body: handler.say(200, completion(evil)))))
  clip = records.RecordSource(clips).record(0)
  assert clip.subject.startswith("<script>]0;xab\ufffd") and len(clip.subject) <= 2000
  assert clip.world == "'; DROP TABLE" and verify.verify(clips).ok


def test_a_killed_run_goes_on_and_asks_nothing_twice(clips, serve) -> None:
  """kill -9 after three answers; the bill of both runs is what the server counted, but for what was on its way."""
  state = {"told": 0, "hang": True}

  def answer(handler: loopback.Handler, body: bytes) -> None:
    with handler.server.lock:
      state["told"] += 1
      number = state["told"]
    if number > 3 and state["hang"]:
      time.sleep(30)
    handler.say(200, completion(PARTS, prompt=100 + number, done=number))

  server = serve(answer)
  flags = ["--url", server.address("/v1"), "--model", "a/b c", "--concurrency", "2", "--prices", "1000,1e6", "--json"]
  command = [sys.executable, "-m", "kling_jax", "caption", "--input", str(clips), *flags]
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
  journal = clips / "captions" / f"a-b-c-{caption_server.Question().digest}.jsonl"
  deadline = time.monotonic() + 60
  while len(server.seen) < 5 and time.monotonic() < deadline:
    time.sleep(0.02)
  with pytest.raises(DataError, match="another `kling caption` is asking"):
    Journal(clips / "captions", "a/b c", caption_server.Question().digest)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert len(journal.read_text().splitlines()) == 3
  journal.write_bytes(journal.read_bytes() + b'{"clip": "torn')  # a kill in the middle of a line
  state["hang"] = False
  answered = {json.loads(line)["clip"] for line in journal.read_text().splitlines()[:3]}
  before = len(server.seen)
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  summary = json.loads(done.stdout)
  assert summary["captioned"] == {"server": 5} and len(server.seen) - before == 2
  assert summary["answers"] == 5 and answered < {clip.clip_id for clip, _ in records.read_all(clips)}
  counted = [1, 2, 3, *range(before + 1, before + 3)]
  assert summary["completion_tokens"] == sum(counted)
  assert summary["prompt_tokens"] == 500 + sum(counted)
  assert summary["dollars"] == pytest.approx((summary["prompt_tokens"] * 1000 + sum(counted) * 1e6) / 1e6)
  assert verify.verify(clips).ok


@pytest.mark.drill
def test_kills_at_any_time_lose_only_what_is_on_its_way(media, serve, tmp_path) -> None:
  """A clip is asked about again only if the kill met its answer on the way: at most three a kill, one a thread."""
  with records.RecordWriter(tmp_path / "set", "r") as writer:
    for k in range(60):
      writer.write(record.ClipRecord(f"{k:032x}", "v", "/v", 20 * k, 20 * k + 20, "1/10", 10.0, 64, 48, 20), media[0])

  def answer(handler: loopback.Handler, body: bytes) -> None:
    time.sleep(0.1)
    handler.say(200, completion(PARTS, prompt=7, done=3))

  server = serve(answer)
  flags = ["--url", server.address("/v1"), "--model", "m", "--concurrency", "3", "--json"]
  command = [sys.executable, "-m", "kling_jax", "caption", "--input", str(tmp_path / "set"), *flags]
  kills = 0
  for wanted in (4, 11, 25, 26, 44):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(server.seen) < wanted + 3 * kills and process.poll() is None and time.monotonic() < deadline:
      time.sleep(0.01)
    kills += process.poll() is None
    process.kill()
    process.wait()
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  summary = json.loads(done.stdout)
  assert kills == 5 and summary["captioned"] == {"server": 60} and summary["answers"] == 60
  assert (summary["prompt_tokens"], summary["completion_tokens"]) == (420, 180)
  assert 60 <= len(server.seen) <= 60 + 3 * kills and verify.verify(tmp_path / "set").ok


JSON = st.recursive(
  st.none() | st.booleans() | st.floats() | st.text(max_size=9),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*PARTS, "x"]), inner, max_size=7),
  max_leaves=12,
)


@given(st.text(max_size=60) | JSON.map(json.dumps) | st.fixed_dictionaries(dict.fromkeys(PARTS, JSON)).map(json.dumps))
def test_any_answer_is_six_clean_parts_or_refused(text: str) -> None:
  try:
    parts, ignored = caption_server.parse(chat.Reply(text))
  except chat.BadReplyError:
    return
  held = json.loads(text.strip().removeprefix("```json").strip("`"))
  assert list(parts) == list(record.CAPTION_FIELDS) and any(parts.values()) and ignored == len(held) - 6
  assert all(isinstance(held[name], str) and parts[name] == parts[name].strip() for name in parts)


def test_a_damaged_journal_is_named(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "m-0.jsonl"
  path.write_text('{"clip": 1}\n')
  with pytest.raises(DataError, match=r"m-0\.jsonl, line 1: no answer"):
    Journal(tmp_path, "m", "0")


# ---- facts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("rgb", "name"),
  [
    *(((0, 0, 0), "black"), ((128, 128, 128), "grey"), ((255, 255, 255), "white"), ((255, 0, 0), "red")),
    *(((0, 128, 0), "green"), ((0, 0, 255), "blue"), ((135, 206, 235), "blue"), ((0, 0, 128), "blue")),
    *(((255, 165, 0), "orange"), ((255, 255, 0), "yellow"), ((139, 69, 19), "brown"), ((128, 0, 128), "purple")),
    *(((255, 192, 203), "pink"), ((64, 224, 208), "turquoise"), ((245, 222, 179), "beige"), ((34, 139, 34), "green")),
    *(((178, 34, 34), "red"), ((255, 105, 180), "pink"), ((20, 20, 20), "black")),
  ],
)
def test_colours_have_their_everyday_names(rgb: tuple[int, int, int], name: str) -> None:
  """The oracle is the name that the CSS colour table gives (skyblue, firebrick, wheat, ...)."""
  assert caption_facts.colour_shares(np.full((1, 4, 4, 3), rgb, np.uint8)) == {name: 1.0}


def test_facts_say_what_was_measured_and_nothing_else() -> None:
  scores = {"camera_pan": -0.2, "camera_tilt": 0.0, "camera_zoom": 0.0, "camera_roll": 0.0, "object_motion": 0.01}
  scores |= {"brightness": 0.2, "saturation": 0.7, "grey": 0.0}
  said = caption_facts.describe(scores, 3.25, {"blue": 0.6, "green": 0.3, "red": 0.1})
  assert said.text == (
    "What is filmed moves slowly. A shot of 3.2 seconds, dark, in vivid colours, mostly blue and green. "
    "The camera pans left fast."
  )
  assert (said.subject, said.environment, said.world) == ("", "", "") and said.captioner == "facts"
  assert caption_facts.describe({}, 1.0, {}).text == "A shot of 1.0 seconds."
  assert caption_facts.describe({"motion": 0.0}, 1.0, {}).action == "The picture hardly moves."
  film = caption_facts.describe({"grey": 1.0, "saturation": 0.0}, 2.0, {"grey": 1.0})
  assert film.text == "A black-and-white shot of 2.0 seconds."


@pytest.mark.parametrize(
  ("scores", "words"),
  [
    ({}, "The camera does not move."),
    ({"camera_pan": 0.05}, "The camera pans right."),
    ({"camera_tilt": 0.02}, "The camera tilts up slowly."),
    ({"camera_zoom": -0.3}, "The camera zooms out."),
    ({"camera_roll": 20.0}, "The camera rolls clockwise."),
    ({"camera_shake": 0.05}, "The camera trembles."),
    ({"camera_shake": 0.5}, "The camera shakes."),
  ],
)
def test_the_camera_is_told_by_its_label(scores: dict[str, float], words: str) -> None:
  still = {"camera_pan": 0.0, "camera_tilt": 0.0, "camera_zoom": 0.0, "camera_roll": 0.0, "camera_shake": 0.0}
  assert caption_facts.describe(still | scores, 1.0, {}).camera == words


def test_the_command_captions_loose_files_into_a_table_that_is_read_back(media, tmp_path, capsys) -> None:
  (tmp_path / "sub").mkdir()
  for k, name in enumerate(("a.mp4", "sub/b.mp4", "c.mp4")):
    (tmp_path / name).write_bytes(media[k])
  (tmp_path / "c.txt").write_text("Told by hand.")
  table = tmp_path / "captions.jsonl"
  flags = ["caption", "--input", str(tmp_path), "--captioner", "sidecar,facts", "--output", str(table), "--json"]
  assert cli.main(flags) == 0
  summary = json.loads(capsys.readouterr().out)
  assert summary["captioned"] == {"facts": 2} and summary["skipped"] == 1
  rows = [json.loads(line) for line in table.read_text().splitlines()]
  assert [row["file"] for row in rows] == ["a.mp4", "sub/b.mp4"]
  assert rows[0]["caption"].startswith("A shot of 2.0 seconds, mostly") and rows[0]["captioner"] == "facts"
  assert cli.main([*flags[:3], "--captioner", "facts", "--json"]) == 0  # the table speaks for the files now
  assert json.loads(capsys.readouterr().out)["skipped"] == 3
  assert cli.main(["caption", "--input", str(tmp_path), "--captioner", "fact"]) == 2
  assert "did you mean 'facts'" in capsys.readouterr().err
