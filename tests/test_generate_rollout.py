"""`kling rollout`: clips as they finish, going back, forks, saved moments, and refusals before anything is compiled."""

import contextlib
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import jax
import numpy as np
import pytest
import test_train_tasks_owl
from browser import Browser, launch

from kling_jax import cli
from kling_jax import config as config_lib
from kling_jax.data import decode, encode, grid
from kling_jax.errors import ConfigError, DataError, KlingError, UsageError, WeightsError
from kling_jax.generate import rollout
from kling_jax.generate.rollout import Model, Rollout, Settings, scenes
from kling_jax.generate.rollout_server import Server, Session
from kling_jax.train import loop, metrics, task, workdir
from kling_jax.train.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]
PROMPT = "a red circle, in a pink room"


def write_run(folder: pathlib.Path, **changes) -> pathlib.Path:
  """A work directory as training leaves it, with weights away from their initial values."""
  c = test_train_tasks_owl.config(sample__steps=2, **changes)
  job = task.make(c)
  values = test_train_tasks_owl.weights(job)
  trained = [name for name in values if job.trainable(name)]
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config_lib.plain(c)))
  checkpoints = Checkpoints(folder, c.checkpoint)
  state = {"params": values, "ema": {name: values[name] for name in trained}}
  checkpoints.save(7, state, {"trained": trained, "constants": {}})
  checkpoints.close()
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  return write_run(tmp_path_factory.mktemp("runs") / "world")


@pytest.fixture(scope="module")
def model(folder) -> Model:
  return Model(folder)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def lived(model, image) -> Rollout:
  made = Rollout(model, PROMPT, image, seed=3)
  list(made.stream(3, ["the red circle moves up", None], cuts=[2]))
  return made


def same(a, b) -> None:
  assert (a.dynamics, a.given, a.cut) == (b.dynamics, b.given, b.cut)
  np.testing.assert_array_equal(a.frames_THWC, b.frames_THWC)


def test_clips_stream_with_their_texts_and_cuts(lived) -> None:
  assert [clip.number for clip in lived.clips] == [0, 1, 2]
  assert [clip.given for clip in lived.clips] == [True, False, False]
  assert [clip.cut for clip in lived.clips] == [False, False, True]
  assert lived.clips[0].dynamics == "the red circle moves up"
  assert all(clip.frames_THWC.shape == (5, 16, 16, 3) and clip.seconds > 0 for clip in lived.clips)


def test_going_back_and_on_is_the_same_film_and_an_override_another(lived) -> None:
  again = lived.fork()
  again.rewind(1)
  assert len(again.clips) == 1 and len(lived.clips) == 3
  same(again.next(), lived.clips[1])
  same(again.next(cut=True), lived.clips[2])
  again.rewind(1)
  other = again.next("the camera pans left")
  assert other.given and not np.array_equal(other.frames_THWC, lived.clips[1].frames_THWC)
  same(again.clips[0], lived.clips[0])
  with pytest.raises(UsageError, match="cannot go back to clip 3: this rollout holds 0 to 2"):
    again.rewind(3)


def test_forks_under_other_dice_differ_and_under_the_same_do_not(lived) -> None:
  futures = [lived.fork(branch).next("nothing moves").frames_THWC for branch in (None, None, 1)]
  np.testing.assert_array_equal(futures[0], futures[1])
  assert not np.array_equal(futures[0], futures[2])


def test_a_saved_moment_goes_on_as_if_it_had_not_been(lived, model, tmp_path) -> None:
  lived.save(tmp_path / "moment.npz")
  back = Rollout.load(model, tmp_path / "moment.npz")
  for mine, theirs in zip(back.clips, lived.clips, strict=True):
    same(mine, theirs)
  same(back.next(), lived.fork().next())
  with pytest.raises(UsageError, match="holds 3 to 4"):
    back.rewind(1)
  (tmp_path / "torn.npz").write_bytes((tmp_path / "moment.npz").read_bytes()[:500])
  (tmp_path / "empty.npz").write_bytes(b"")
  for name in ("torn.npz", "empty.npz", "none.npz"):
    with pytest.raises(DataError, match="no saved rollout"):
      Rollout.load(model, tmp_path / name)
  other = object.__new__(Model)
  other.__dict__ = {**model.__dict__, "name": "elsewhere@1"}
  with pytest.raises(WeightsError, match="was saved with"):
    Rollout.load(other, tmp_path / "moment.npz")


def test_the_verb_writes_clips_film_and_report(folder, image, tmp_path, capsys) -> None:
  grid.write_png(tmp_path / "start.png", image)
  out = tmp_path / "film"
  words = ["rollout", "--workdir", str(folder), "--prompt", PROMPT, "--image", str(tmp_path / "start.png"), "--length",
           "2s", "--dynamics", "the red circle moves up", "--seed", "3", "--out", str(out), "--json"]  # fmt: skip
  assert cli.main(words) == 0
  report = json.loads(capsys.readouterr().out)
  assert report == json.loads((out / "rollout.json").read_text())
  assert [clip["given"] for clip in report["clips"]] == [True, False]
  assert report["first_clip_s"] > 0 and report["clip_s"] > 0
  assert decode.probe(out / "film.mp4").num_frames == 10
  assert {path.name for path in out.iterdir()} >= {"clip-000.mp4", "clip-001.mp4", "film.png", "rollout.npz"}


def test_interactive_takes_texts_cuts_and_steps_back(folder, tmp_path) -> None:
  """Without an image: the first frame is the model's own."""
  said = iter(["the red circle moves up", "/cut the fog", "/back", "", "/quit"])
  asked = []
  report = rollout.run(
    str(folder), PROMPT, str(tmp_path / "film"), clips=9, seed=3,
    ask=lambda question: (asked.append(question), next(said))[1], tell=lambda _: None,
  )  # fmt: skip
  assert [(clip["given"], clip["cut"]) for clip in report["clips"]] == [(True, False), (False, False)]
  assert asked == [f"clip {number}> " for number in (0, 1, 2, 1, 2)]


@pytest.mark.parametrize(("clips", "cuts", "expected"), [(24, 2, (8, 16)), (6, 2, (2, 4)), (2, 0, ()), (1, 2, ())])
def test_scenes_are_of_equal_length(clips, cuts, expected) -> None:
  assert scenes(clips, cuts) == expected


def refused(model: Model, *given) -> str:
  with pytest.raises(KlingError) as caught:
    model.check(*given)
  return str(caught.value)


def test_what_the_model_cannot_do_is_refused_with_the_largest_legal_value(model, folder, image, tmp_path) -> None:
  most = (65_536 - 44) // 44
  assert f"legal: 1 to {most}" in refused(model, most + 1, [], None)
  assert "2 --dynamics for 1 clips" in refused(model, 1, ["a", "b"], None)
  assert "is empty; give a text of 1 to 30 bytes" in refused(model, 1, [" "], None)
  assert "31 bytes; this model takes at most 30" in refused(model, 1, ["x" * 31], None)
  assert "(8, 16, 3); this model takes uint8 (16, 16, 3)" in refused(model, 1, [], image[:8])
  for words, message in (
    ({"clips": 1, "length": "2s"}, "either --clips or --length"),
    ({"length": "3s"}, "ready ones are 2s, 8s, 24s"),
    ({"clips": 2, "cuts": [2]}, "--cut 2: the clips are 0 to 1"),
    ({"clips": 2, "image": "nowhere.png"}, "there is no file nowhere.png"),
  ):
    with pytest.raises(UsageError, match=message):
      rollout.run(str(folder), PROMPT, str(tmp_path / "out"), **words)
  with pytest.raises(UsageError, match="--prompt is empty"):
    Rollout(model, "", image)
  for settings, message in (
    (Settings(context_noise=0.5), r"context_noise 0.5: this model was trained on contexts with noise of 0 to 0.1"),
    (Settings(form="fractional", level=0.3), "history_level 0.3"),
    (Settings(form="fraction"), "did you mean 'fractional'"),
    (Settings(temperature=-1.0), "temperature"),
  ):
    with pytest.raises(ConfigError, match=message):
      Model(folder, settings=settings)


@pytest.mark.parametrize(
  ("words", "code", "said"),
  [
    (["--clips", "1", "--image", "PICTURE"], 1, "picture.png"),
    (["--clips", "99999"], 2, "legal: 1 to 1488"),
    (["--clips", "1", "--dynamics", "x" * 31], 2, "31 bytes; this model takes at most 30"),
    (["--serve", "--clips", "2"], 2, "--clips and --serve do not go together"),
    (["--serve", "--image", "nowhere.png"], 2, "there is no file nowhere.png"),
    (["--serve", "--prompt", " "], 2, "--prompt is empty; give a text of 1 to 38 bytes"),
  ],
)
def test_bad_input_is_one_line_and_the_right_exit_code(folder, tmp_path, capsys, words, code, said) -> None:
  (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
  words = [str(tmp_path / "picture.png") if word == "PICTURE" else word for word in words]
  given = ["rollout", "--workdir", str(folder), "--prompt", PROMPT, "--out", str(tmp_path / "out"), *words]
  assert cli.main(given) == code
  lines = capsys.readouterr().err.strip().splitlines()
  assert said in lines[-1] and "Traceback" not in "".join(lines)
  assert not (tmp_path / "out").exists()


def test_checkpoints_of_other_stages_and_presets_are_refused(folder, tmp_path) -> None:
  values = json.loads((folder / "config.json").read_text())

  def run_of(name: str, **changes) -> pathlib.Path:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps({**values, **changes}))
    (tmp_path / name / "checkpoints").symlink_to(folder / "checkpoints")
    return tmp_path / name

  with pytest.raises(UsageError, match="of stage 'align', whose Video DiT was never trained"):
    Model(run_of("align", stage="align"))
  with pytest.raises(UsageError, match="trained the task 'video_dit'"):
    Model(run_of("base", task="video_dit"))
  with pytest.raises(WeightsError, match="is of another model"):
    Model(run_of("wide", state={**values["state"], "queries": 5}))
  generate = Model(run_of("generate", stage="generate"))
  assert "never taught to write dynamics, and clip 1 has none" in refused(generate, 2, ["up"], None)
  generate.check(2, ["up", "down"], None)


# ---- the page ------------------------------------------------------------------------------------------------------

PATIENCE_S = 240


def until(page: Browser, script: str) -> None:
  deadline = time.monotonic() + PATIENCE_S
  while not page.run(script):
    assert time.monotonic() < deadline, (script, page.run("JSON.stringify(world())"), page.problems)
    time.sleep(0.02)


def click(page: Browser, selector: str, number: int = 0) -> None:
  page.run(f"document.querySelectorAll({json.dumps(selector)})[{number}].click()")


def say(page: Browser, text: str, cut: bool = False) -> None:
  page.run(f"document.querySelector('#text').value = {json.dumps(text)}")
  if cut:
    click(page, ".cut")
  click(page, ".film")


@contextlib.contextmanager
def serving(session: Session) -> Iterator[Server]:
  with Server(session) as server:
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()


def test_the_page_plays_clips_as_they_come_takes_texts_goes_back_and_forks(lived, tmp_path) -> None:
  start = lived.fork()
  start.rewind(0)
  session = Session(start, tmp_path / "films")
  with serving(session) as server, launch(tmp_path / "profile") as page:
    page.open(server.address)
    until(page, "world().takes.length === 1 && document.querySelector('.screen img').naturalWidth === 16")
    say(page, "the red circle moves up")
    until(page, "world().playing === 0 && world().size === 16 && world().time > 0")
    assert page.run("document.querySelector('.now').textContent").startswith("the red circle moves upyou said so")
    say(page, "")
    until(page, "world().playing === 1")  # it comes up by itself once it is filmed
    say(page, "<b>x</b>", cut=True)
    until(page, "world().playing === 2 && document.querySelectorAll('.clips li.cut').length === 1")
    for mine, theirs in zip(start.clips[:2], lived.clips[:2], strict=True):
      same(mine, theirs)  # the page films what Rollout films
    assert page.run("document.querySelectorAll('.clips b').length") == 0
    assert page.run("world().played.join()") == "0,1,2"
    click(page, ".clips li:nth-child(2) button")  # back to after the first clip
    until(page, "world().takes[0].clips.length === 1")
    say(page, "y" * 31)
    until(page, "!document.querySelector('.trouble').hidden")
    assert "31 bytes; this model takes at most 30" in page.run("document.querySelector('.trouble').textContent")
    say(page, "the camera pans left")
    until(page, "world().takes[0].clips.length === 2 && world().playing === 1")
    click(page, ".clips li:nth-child(2) button", 1)  # fork after the first clip
    until(page, "world().take === 1 && world().takes.length === 2")
    say(page, "the camera pans left")
    say(page, "the fog")  # while the other is filmed
    until(page, "world().takes[1].clips.length === 3 && world().playing === 2")
    assert page.run("document.querySelector('.now').textContent").startswith("the fog")
    click(page, ".auto")
    until(page, "world().takes[1].clips.length >= 5 && world().playing >= 3")
    click(page, ".auto")
    until(page, "!world().filming")
    click(page, ".takes button", 0)
    until(page, "world().take === 0 && world().playing === 1")
    assert not page.problems, page.problems
    assert all(address.startswith(("http://127.0.0.1:", "data:", "about:")) for address in page.requests)
    takes = page.run("world().takes")
  assert [clip["text"] for clip in takes[0]["clips"]] == [clip.dynamics for clip in start.clips]
  assert takes[1]["parent"] == 0 and takes[1]["at"] == 1
  assert takes[0]["clips"][0]["media"] == takes[1]["clips"][0]["media"]
  first, second = (session.media(take["clips"][1]["media"]) for take in takes)
  assert first != second, "the same words under other dice"
  folders = session.finish()
  assert folders == [tmp_path / "films", tmp_path / "films" / "take-1"]
  for folder, take in zip(folders, takes, strict=True):
    assert decode.probe(folder / "film.mp4").num_frames == 5 * len(take["clips"])
    for number, clip in enumerate(take["clips"]):
      assert (folder / rollout.name(number)).read_bytes() == session.media(clip["media"])
    assert not (folder / rollout.name(len(take["clips"]))).exists(), "what was dropped leaves no film"


def test_what_the_page_may_not_ask_is_refused_and_asking_twice_is_once(lived, tmp_path) -> None:
  start = lived.fork()
  start.rewind(1)
  session = Session(start, tmp_path)
  with session._changed:
    session._takes[0].media.append(0)
    session._media.append(b"film")
  for act, asked, message in (
    (session.film, {"take": 1, "number": 1}, "there is no take 1"),
    (session.film, {"take": 0, "number": 3}, "clip 3 cannot be filmed: the take has 1 clips"),
    (session.film, {"take": 0, "number": True}, "a whole number 'number'"),
    (session.film, {"take": 0, "number": 1, "text": 7}, "a text has at most"),
    (session.film, {"take": 0, "number": 1, "cut": 1}, "a cut is true or false"),
    (session.rewind, {"take": 0, "clips": 2}, "cannot go back to clip 2: this rollout holds 0 to 1"),
    (session.fork, {"take": 0, "clips": -1}, "a whole number 'clips'"),
    (session.fork, {"clips": 0}, "a whole number 'take'"),
  ):
    with pytest.raises(UsageError, match=message):
      act(asked)
  assert session.state()["version"] == 0
  begun = session.film({"take": 0, "number": 1, "text": "up"})
  assert begun["filming"] == {"take": 0, "number": 1}
  if session.film({"take": 0, "number": 1, "text": "up"})["filming"]:  # unless the clip is there already
    assert session.state(begun["version"])["filming"] is None, "the question waits for the clip"
  session.finish()
  again = session.film({"take": 0, "number": 1, "text": "up"})
  assert len(again["takes"][0]["clips"]) == 2 and again["filming"] is None
  assert session.media(2) is None


def test_a_clip_that_fails_leaves_the_take_as_it_was(lived, tmp_path, monkeypatch) -> None:
  start = lived.fork()
  start.rewind(0)
  session = Session(start, tmp_path)
  monkeypatch.setattr(encode, "encode", lambda *_, **__: (_ for _ in ()).throw(DataError("no encoder")))
  version = session.film({"take": 0, "number": 0, "text": "up"})["version"]
  found = session.state(version)
  assert found["trouble"] == "DataError: no encoder" and found["filming"] is None
  assert found["takes"][0]["clips"] == [] and start.clips == [] and start.earliest == 0
  monkeypatch.undo()
  session.film({"take": 0, "number": 0, "text": "up"})
  session.finish()
  assert len(start.clips) == 1


# ---- the whole road ------------------------------------------------------------------------------------------------


def train(folder: pathlib.Path, c, steps: int) -> tuple[float, float]:
  """Mean loss of the first and of the last five of `steps` steps."""
  c.update_from_flattened_dict({"steps": steps, "log.every": 1, "checkpoint.every": 0, "validation.every": 0})
  loop.run(c, folder)
  losses = [row["loss"] for row in metrics.read(folder / "metrics.jsonl")]
  return sum(losses[:5]) / 5, sum(losses[-5:]) / 5


def weights_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The weights of a work directory's newest checkpoint."""
  job, checkpoints = task.make(workdir.read_config(folder)), Checkpoints(folder)
  return jax.tree.map(np.asarray, checkpoints.restore_params(checkpoints.latest(), job.shapes))


@pytest.mark.drill
def test_the_verb_serves_until_it_is_asked_to_end_and_leaves_films(folder, tmp_path) -> None:
  words = [sys.executable, "-m", "kling_jax", "rollout", "--workdir", str(folder), "--prompt", PROMPT, "--serve",
           "--out", str(tmp_path / "films")]  # fmt: skip
  process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
  try:
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:"), address
    root, token = address.split("/?")
    asked = json.dumps({"take": 0, "number": 0, "text": "the fog"}).encode()
    with urllib.request.urlopen(f"{root}/film?{token}", asked, timeout=PATIENCE_S) as answer:
      assert json.load(answer)["filming"] == {"take": 0, "number": 0}
  finally:
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE_S)
    process.stdout.close()
  assert process.returncode == 0
  assert decode.probe(tmp_path / "films" / "film.mp4").num_frames == 5
  assert json.loads((tmp_path / "films" / "rollout.json").read_text())["clips"][0]["dynamics"] == "the fog"


@pytest.mark.drill
def test_from_a_base_video_dit_through_every_stage_to_a_rollout(tmp_path, monkeypatch) -> None:
  monkeypatch.setattr(jax, "devices", lambda *_: [jax.local_devices()[0]])
  world = ("worlds:memory-v1?count=8&seed=0",)
  base = config_lib.load(f"{ROOT}/configs/video_dit.py:runlocal")
  base.update_from_flattened_dict({
    "data.sources": world, "data.buckets": ((5, 16, 16), (1, 16, 16)), "data.fps": 5.0, "model.size": "d32",
    "model.conditions": (), "text.width": 32, "text.tokens": 160, "data.validation_fraction": 0.0,
  })  # fmt: skip
  train(tmp_path / "base", base, 12)
  start = {f"video.{name}": value for name, value in weights_of(tmp_path / "base").items()}
  before = {"video.weights": str(tmp_path / "base")}
  for stage, steps in (("align", 20), ("generate", 20), ("world", 20), ("self_rollout", 8)):
    c = test_train_tasks_owl.config(stage)
    c.update_from_flattened_dict({**before, "data.sources": world, "text.tokens": 160, "data.batch": 4})
    first, last = train(tmp_path / stage, c, steps)
    assert last < (0.98 * first if steps > 10 else 1.2 * first), stage
    before = {"init_from": str(tmp_path / stage)}
    now = weights_of(tmp_path / stage)
    for name, value in start.items():
      frozen = stage == "align" or name.startswith("video.text.")
      assert not frozen or np.array_equal(now[name], value), (stage, name)
    moved = [name for name in start if not np.array_equal(now[name], start[name])]
    assert bool(moved) == (stage != "align"), stage
  report = json.loads((tmp_path / "align" / "init_report.json").read_text())
  assert "dit.blocks.state_attn.out.kernel" in report[0]["missing"] and "text.table" in report[0]["loaded"]
  done = rollout.run(str(tmp_path / "self_rollout"), PROMPT, str(tmp_path / "film"), length="2s", tell=lambda _: None)
  assert len(done["clips"]) == 2 and decode.probe(tmp_path / "film" / "film.mp4").num_frames == 10
