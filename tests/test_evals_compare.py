"""Figures of videos, pairs and sets against independent formulas, on arrays, on files and on the page."""

import json
import pathlib

import numpy as np
import parity_fixture
import pytest
import scipy.linalg
import scipy.signal
from browser import launch

from kling_jax import cli
from kling_jax.data import decode, encode, memory_world
from kling_jax.data.memory_world_frames import walk_frames
from kling_jax.errors import DataError
from kling_jax.evals import compare, fidelity, frechet, perceptual, rollouts, seams

SIDE, FRAMES, FPS = 20, 12, 6.0


def moving(seed: int, frames: int = FRAMES, side: int = SIDE) -> np.ndarray:
  """Smooth colour waves that run; no two seeds alike."""
  draw = np.random.default_rng(seed)
  t, y, x = np.mgrid[0:frames, 0:side, 0:side]
  waves = [np.sin(draw.uniform(0.2, 0.6) * x + draw.uniform(0.1, 0.5) * y + draw.uniform(0.2, 0.8) * t) for _ in "rgb"]
  return np.stack([128 + draw.uniform(40, 90) * wave for wave in waves], -1).round().astype(np.uint8)


def test_gmsd_is_the_published_formula():
  made, true = moving(0, 2, 20), moving(1, 2, 20)
  prewitt = np.array([[1, 0, -1]] * 3) / 3
  expected = []
  for pair in zip(made, true, strict=True):
    lengths = []
    for frame in pair:
      luma = frame @ [0.299, 0.587, 0.114]
      halved = scipy.signal.convolve2d(luma, np.full((2, 2), 0.25), "valid")[::2, ::2]
      sides = [scipy.signal.convolve2d(halved, kernel, "same") for kernel in (prewitt, prewitt.T)]
      lengths.append(np.sqrt(sides[0] ** 2 + sides[1] ** 2))
    a, b = lengths
    expected.append(np.std((2 * a * b + 170) / (a**2 + b**2 + 170)))
  np.testing.assert_allclose(perceptual.gmsd(made, true), expected, rtol=1e-10)
  assert perceptual.gmsd(made, made).max() == 0
  soft = (made.astype(int) + np.roll(made, 1, 2) + np.roll(made, -1, 2)) // 3
  assert (perceptual.gmsd(soft.astype(np.uint8), made) < perceptual.gmsd(true, made)).all()
  np.testing.assert_allclose(perceptual.gmsd(true, made), perceptual.gmsd(made, true))
  with pytest.raises(DataError, match="must be alike"):
    perceptual.gmsd(made, true[:1])
  with pytest.raises(DataError, match="at least 6"):
    perceptual.gmsd(made[:, :4], true[:, :4])


def test_a_video_alone_drifts_by_what_was_put_into_it():
  still = np.repeat(moving(2, 1), FRAMES, axis=0)
  figures = compare.alone(still, FPS)
  assert figures["temporal_flickering"] == figures["motion_smoothness"] == 1 and figures["dynamic_degree"] == 0
  assert all(abs(figures[name]) < 1e-9 for name in figures if name.endswith("_drift"))
  brighter = np.full((FRAMES, SIDE, SIDE, 3), 100, np.uint8)
  brighter[-FRAMES // compare.PARTS :] = 160
  figures = compare.alone(brighter, FPS)
  assert figures["luma_drift"] == pytest.approx(60) and figures["colour_drift"] == 1
  assert figures["temporal_flickering"] == pytest.approx(1 - 60 / 255 / (FRAMES - 1))
  assert "luma_drift" not in compare.alone(brighter[:5], FPS), "too short for quarters"
  assert "dynamic_degree" not in compare.alone(brighter[:3], 30.0), "one frame at the verdict's rate"


def test_figures_are_means_with_their_standard_errors():
  found = compare.summary([{"psnr": 20.0, "ssim": 0.5}, {"psnr": 30.0}, {"psnr": 28.0, "ssim": float("nan")}])
  assert found["psnr"].mean == 26 and found["psnr"].count == 3
  assert found["psnr"].error == pytest.approx(np.std([20, 30, 28], ddof=1) / np.sqrt(3))
  assert found["ssim"].count == 1 and np.isnan(found["ssim"].error)
  assert compare.summary([{"psnr": float("inf")}, {"psnr": 20.0}])["psnr"].mean == float("inf")
  with pytest.raises(DataError, match="no videos"):
    compare.summary([])


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> pathlib.Path:
  """Folders `true` and `made`; of the made ones, 0 is a copy of its truth and 1 and 2 are other films."""
  top = tmp_path_factory.mktemp("films")
  for number in range(3):
    for kind, seed in (("true", number), ("made", number if number == 0 else 10 + number)):
      encode.write(top / kind / "sub" / f"{number}.mp4", moving(seed), fps=FPS, crf=4)
  return top


def kling_eval(*words: str, code: int = 0) -> None:
  assert cli.main(["eval", *words]) == code


@pytest.fixture(scope="module")
def paired(films) -> dict:
  words = ["--made", str(films / "made"), "--true", str(films / "true"), "--out", str(films / "out")]
  kling_eval("videos", *words, "--paired")
  return json.loads((films / "out" / "eval.json").read_text())


def read(folder: pathlib.Path) -> list[np.ndarray]:
  return [np.stack([f for _, _, f in decode.iterate(path)]) for path in sorted(folder.rglob("*.mp4"))]


def test_pairs_and_sets_of_files_are_the_formulas_on_their_frames(films, paired):
  made, true = read(films / "made"), read(films / "true")
  rows = {row["name"]: row["figures"] for row in paired["rows"] if row["set"] == "made"}
  assert list(rows) == ["sub/0.mp4", "sub/1.mp4", "sub/2.mp4"]
  copy = rows["sub/0.mp4"]
  assert copy["psnr"] is None and copy["ssim"] == pytest.approx(1) and copy["gmsd"] == 0, "inf has no JSON"
  for number in (1, 2):
    error = np.square(made[number].astype(float) - true[number]).mean((1, 2, 3))
    figures = rows[f"sub/{number}.mp4"]
    assert figures["psnr"] == pytest.approx((10 * np.log10(255**2 / error)).mean())
    assert figures["ssim"] == pytest.approx(fidelity.ssim(made[number], true[number]).mean())
    assert figures["gmsd"] == pytest.approx(perceptual.gmsd(made[number], true[number]).mean())
  features = [np.stack([frechet.low_frequency(video[None])[0] for video in held]) for held in (made, true)]
  means, covariances = [x.mean(0) for x in features], [np.cov(x.T) for x in features]
  root = np.trace(scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real)
  expected = np.square(means[0] - means[1]).sum() + sum(map(np.trace, covariances)) - 2 * root
  assert set(paired["distances"]) == {"low_frequency_frechet", "low_frequency_kernel"}, "never called FVD"
  assert paired["distances"]["low_frequency_frechet"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
  assert paired["videos"] == {"made": 3, "true": 3}


def test_the_page_shows_truth_made_and_difference_and_asks_for_nothing(films, paired, tmp_path):
  with launch(tmp_path / "profile") as browser:
    for width in (1280, 390):
      browser.open(films / "out" / "index.html", width)
      loaded = "[...document.querySelectorAll('video')].every(video => video.readyState >= 1)"
      while not browser.run(loaded):
        pass
      sizes = browser.run("[...document.querySelectorAll('video')].map(v => [v.videoWidth, v.videoHeight])")
      side = SIDE * 4  # enlarged by a whole factor
      assert sizes == [[(3 * side + 8) // 2 * 2, side]] * 3
      assert browser.problems == [] and {url.split(":")[0] for url in browser.requests} <= {"file", "data"}
      assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    captions = browser.run("[...document.querySelectorAll('figcaption')].map(c => c.textContent)")
    assert captions[-1].startswith("sub/0.mp4: psnr inf"), "the worst stands first, the copy last"
    text = browser.run("document.body.textContent")
    assert "This is no FVD" in text and "no LPIPS" in text


def test_fvd_is_the_distance_of_video_mae_s_features(films, tmp_path, capsys):
  (tmp_path / "weights").mkdir()
  parity_fixture.load("video_mae_tuned", tmp_path / "weights")
  words = ["--made", str(films / "made"), "--true", str(films / "true"), "--out", str(tmp_path / "out")]
  capsys.readouterr()
  kling_eval("videos", *words, "--video_mae", str(tmp_path / "weights"), "--json")
  answer = json.loads(capsys.readouterr().out)
  of, version = frechet.video_mae(tmp_path / "weights")
  features = [np.concatenate([of(video[None]) for video in read(films / kind)]) for kind in ("made", "true")]
  means, covariances = [x.mean(0) for x in features], [np.cov(x.T) for x in features]
  root = np.trace(scipy.linalg.sqrtm(covariances[0].astype(complex) @ covariances[1]).real)
  expected = np.square(means[0] - means[1]).sum() + sum(map(np.trace, covariances)) - 2 * root
  assert answer["distances"]["fvd_video_mae"] == pytest.approx(expected, rel=1e-3)
  assert answer["features"] == {"name": "video_mae", "version": version}
  assert "psnr" not in answer["figures"]["made"], "without --paired nothing is paired"


def test_what_cannot_be_compared_is_refused_in_one_line(films, tmp_path, capsys):
  encode.write(tmp_path / "other" / "0.mp4", moving(0)[:5], fps=FPS)
  made, out = str(films / "made" / "sub"), ["--out", str(tmp_path / "out")]
  for words, code, message in (
    ([made, "--true", str(tmp_path / "other"), "--paired"], 1, "2 of 3 videos have no truth of their name"),
    ([f"{made}/0.mp4", "--true", str(tmp_path / "other"), "--paired"], 1, "give --size, --fps and --frames that fit"),
    ([made, "--paired"], 2, "--paired needs --true"),
    ([made, "--size", "0x4"], 2, "WIDTHxHEIGHT"),
    ([made, "--frames", "0"], 2, "at least 1"),
    ([str(tmp_path / "nowhere")], 2, "no file or folder"),
    ([made, "--video_mae", made], 1, "safetensors"),
  ):
    kling_eval("videos", "--made", *words, *out, code=code)
    assert message in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
  kling_eval("videos", "--made", f"{made}/0.mp4", "--true", str(tmp_path / "other"), "--paired", "--frames", "5", *out)


# ---- rollouts --------------------------------------------------------------------------------------------------------


CLIPS = 8


@pytest.fixture(scope="module")
def told() -> tuple[memory_world.Story, np.ndarray]:
  story = memory_world.story(3, 0, CLIPS)
  times_s = np.arange(1, 4 * CLIPS + 1) / 4
  return story, walk_frames(story, times_s, SIDE, SIDE).reshape(CLIPS, 4, SIDE, SIDE, 3)


def test_the_world_s_own_film_follows_and_a_frozen_one_does_not(told):
  story, frames = told
  own = rollouts.in_memory_world(frames, story)
  assert own["following"] == 1 and own["reappearance"] == own["stayed"] == 1 and own["returns"] >= 1
  frozen = rollouts.in_memory_world(np.broadcast_to(frames[:1, :1], frames.shape), story)
  assert frozen["following"] < 0.5 and own["following_by_chance"] < 0.5


def test_rollouts_on_disk_have_the_figures_of_their_frames(told, tmp_path, capsys):
  story, frames = told
  facts = []
  for number, clip in enumerate(frames):
    encode.write(tmp_path / "film" / f"clip-{number:03d}.mp4", clip, fps=4.0, crf=0)
    facts.append({"number": number, "file": f"clip-{number:03d}.mp4", "dynamics": "the same" if number % 2 else "x y",
                  "given": number == 0, "cut": story.cuts[number], "seconds": 1.0})  # fmt: skip
  about = {"prompt": "a <b>room</b>", "seed": 0, "fps": 4.0, "clips": facts}
  (tmp_path / "film" / "rollout.json").write_text(json.dumps(about))
  words = ["rollout", "--input", str(tmp_path), "--out", str(tmp_path / "out")]
  kling_eval(*words, "--json")
  answer = json.loads(capsys.readouterr().out)
  [row] = answer["rows"]
  decoded = np.stack(read(tmp_path / "film"))
  ratio = seams.seams(decoded, np.array(story.cuts)).ratio
  assert row["name"] == "film" and row["figures"]["seam_ratio"] == pytest.approx(ratio)
  assert row["figures"]["repeat_rate"] == 0 and row["figures"]["distinct_2"] == pytest.approx(2 / 7), "of written texts"
  page = (tmp_path / "out" / "index.html").read_text()
  assert "a &lt;b&gt;room" in page and page.count("<video") == 1
  (tmp_path / "film" / "clip-003.mp4").unlink()
  kling_eval(*words, code=1)
  about["clips"][0]["file"] = "../../secret.mp4"
  (tmp_path / "film" / "rollout.json").write_text(json.dumps(about))
  kling_eval(*words, code=1)
  assert "outside of its folder" in capsys.readouterr().err
  kling_eval("rollout", "--input", str(tmp_path / "nowhere"), code=2)
