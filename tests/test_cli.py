"""The command line: help without JAX, one clear line an error, the exit codes that the house promises."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from kling_jax import cli

ROOT = pathlib.Path(__file__).parents[1]


def kling(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
  done = subprocess.run([sys.executable, "-m", "kling_jax", *words], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == code, done.stderr
  return done


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_help_of_each_verb_imports_nothing_heavy(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
  script = (
    "import sys; from kling_jax import cli\n"
    f"try: cli.main([{verb!r}, '--help'])\n"
    "except SystemExit as end: assert end.code == 0\n"
    "heavy = {'jax', 'flax', 'numpy', 'av', 'cv2', 'pyarrow'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
  )
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  assert "usage: kling" in done.stdout


@pytest.mark.parametrize(
  ("words", "code", "message"),
  [
    (["trian"], 2, "unknown verb 'trian'; did you mean 'train'?"),
    ([], 2, "VERB"),
    (["train", "--config", "nowhere.py", "--workdir", "w"], 2, "no config file at nowhere.py"),
    (["train", "--config", "configs/video_dit.py", "--workdir", "w", "--config.stpes=3"], 2, "did you mean 'steps'"),
    (["sample", "--workdir", "w", "--prompt", "x", "--out", "x.mp4"], 2, "is no work directory"),
    (["sample", "--workdir", "w", "--out", "x.mp4"], 2, "give --prompt or --prompts"),
    (["sample", "--workdir", "w", "--prompt", "x", "--out", "x.avi"], 2, "must end in .mp4"),
    (["sample", "--workdir", "w", "--prompt", "x", "--out", "x.mp4", "--size", "big"], 2, "WIDTHxHEIGHT"),
    (["sample", "--workdir", "w", "--prompt", "x", "--out", "x.mp4", "--stepz", "3"], 2, "unknown argument '--stepz'"),
  ],
)
def test_mistakes_cost_one_clear_line(
  words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.chdir(ROOT)
  assert cli.main(words) == code
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and message in lines[0], lines


def test_prompt_file_with_bad_json_names_the_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  for text, message in (
    ('{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
    ('{"negative": "a"}', 'line 1 has no "prompt"'),
    ('{"prompt": "a", "sede": 3}', "unknown key 'sede'; did you mean 'seed'"),
    ("\n", "holds no prompts"),
  ):
    (tmp_path / "p.jsonl").write_text(text)
    assert cli.main(["sample", "--workdir", "w", "--prompts", str(tmp_path / "p.jsonl"), "--out", "x.mp4"]) == 1
    assert message in capsys.readouterr().err
  assert not (tmp_path / "x.mp4").exists()


def test_doctor_answers_in_json() -> None:
  facts = json.loads(kling("doctor", "--json").stdout)
  assert facts["decoders"]["h264"] and facts["encoders"]["libx264"] and facts["devices"]
  assert facts["extras"]["test"]["installed"] and facts["peak_flops_per_device"] > 1e9


def test_unexpected_errors_are_one_line_and_debug_shows_the_rest(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  def broken(_):
    raise RuntimeError("boom")

  add, _, summary = cli.VERBS["doctor"]
  monkeypatch.setitem(cli.VERBS, "doctor", (add, broken, summary))
  assert cli.main(["doctor"]) == 1
  assert capsys.readouterr().err.count("\n") == 1
  assert cli.main(["doctor", "--debug"]) == 1
  assert "Traceback" in capsys.readouterr().err


def test_closed_pipe_is_no_error() -> None:
  environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
  command = f"{sys.executable} -m kling_jax doctor --json | head -c 1"
  done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, env=environment)
  assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
