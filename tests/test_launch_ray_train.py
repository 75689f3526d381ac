"""The start of jobs on Ray, as far as it needs no cluster; tests/test_train_jobs.py trains on a real one."""

import pathlib
import sys

import pytest

from kling_jax.launch import ray_train


def test_the_words_of_kling_train_stand_behind_two_dashes(capsys: pytest.CaptureFixture[str]) -> None:
  with pytest.raises(SystemExit, match="2"):
    ray_train.main(["--processes", "2"])
  assert "behind --" in capsys.readouterr().err


def test_without_ray_one_line_says_how_to_get_it(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  monkeypatch.setitem(sys.modules, "ray", None)
  assert ray_train.main(["--processes", "2", "--", "--config", "c", "--workdir", "w"]) == 2
  assert capsys.readouterr().err == "kling: UsageError: training on Ray needs ray: pip install 'kling_jax[ray]'\n"


def test_a_task_is_told_its_place_by_the_variables_that_detect_reads(tmp_path: pathlib.Path) -> None:
  """A config that says what it finds, and an exit code that comes back."""
  (tmp_path / "config.py").write_text(
    "import os, pathlib\nfrom kling_jax.train.distributed import detect\n"
    "def get_config(arg=''):\n  pathlib.Path('seen').write_text(f'{detect()} {os.environ[\"XLA_FLAGS\"]}')\n"
  )
  words = ["--config", "config.py", "--workdir", "run"]
  code = ray_train._train(words, "10.0.0.1:123", 4, 3, {"XLA_FLAGS": "--flags_of_the_driver"}, str(tmp_path))
  assert code != 0
  job = "coordinator='10.0.0.1:123', count=4, index=3"
  assert job in (tmp_path / "seen").read_text() and "--flags_of_the_driver" in (tmp_path / "seen").read_text()
