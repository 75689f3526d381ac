"""Configs: arguments, overrides, the schema check, and what they say when something is wrong."""

import pathlib

import ml_collections
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kling_jax import config
from kling_jax.errors import ConfigError
from kling_jax.train import task, workdir

ROOT = pathlib.Path(__file__).parents[1]
FILE = str(ROOT / "configs" / "video_dit.py")


def test_arguments_are_typed_by_their_defaults() -> None:
  parsed = config.parse_arg("size=B,runlocal,rows=3", size="S", runlocal=False, rows=1)
  assert parsed.to_dict() == {"size": "B", "runlocal": True, "rows": 3}
  with pytest.raises(ConfigError, match="'siz' is unknown; did you mean 'size'"):
    config.parse_arg("siz=B", size="S")
  with pytest.raises(ConfigError, match="rows='many' is not of type int"):
    config.parse_arg("rows=many", rows=1)


def test_overrides_keep_the_types_of_the_file() -> None:
  c = config.load(FILE + ":runlocal", ["--config.optimizer.lr=1e-5", "--config.data.sources=('a','b')"])
  assert c.optimizer.lr == 1e-5 and c.data.sources == ("a", "b") and c.model.size == "XS"


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("--config.optimizer.lrr=1", "'optimizer.lrr' is unknown; did you mean 'optimizer.lr'"),
    ("--config.steps=many", "steps"),
    ("--steps=3", "is not of the form --config.key=value"),
  ],
)
def test_wrong_overrides_name_the_key(override: str, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    config.load(FILE, [override])


def test_missing_file_names_the_nearest_config() -> None:
  with pytest.raises(ConfigError, match="did you mean 'video_dit'"):
    config.load("video_ditt.py")
  assert config.locate("video_dit").name == "video_dit.py"


def test_a_config_with_unknown_keys_or_types_is_refused_before_anything_is_built() -> None:
  c = config.load(FILE + ":runlocal")
  with c.unlocked():
    c.optimizer.lerning_rate = 1.0
  with pytest.raises(ConfigError, match="'optimizer.lerning_rate' is unknown"):
    task.make(c)
  c = config.load(FILE + ":runlocal")
  with c.ignore_type():
    c.data.batch = "eight"
  with pytest.raises(ConfigError, match="'data.batch' must be int, not str 'eight'"):
    task.make(c)
  c = config.load(FILE + ":runlocal")
  with c.unlocked():
    del c.drop
  with pytest.raises(ConfigError, match="lacks 'drop'"):
    task.make(c)
  with pytest.raises(ConfigError, match="'task' = 'video_dot' is unknown; did you mean 'video_dit'"):
    task.make(ml_collections.ConfigDict({"task": "video_dot"}))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
  LEAVES | st.lists(LEAVES).map(tuple), lambda inner: st.dictionaries(st.text("abc", min_size=1), inner)
)


@given(st.dictionaries(st.text("abc", min_size=1), VALUES))
def test_json_round_trip(values: dict) -> None:
  c = ml_collections.ConfigDict(values)
  assert config.plain(config.restore(config.plain(c))) == config.plain(c)


def test_work_directory_belongs_to_one_config(tmp_path: pathlib.Path) -> None:
  c = config.load(FILE + ":runlocal")
  workdir.claim(tmp_path, c)
  workdir.claim(tmp_path, c)
  with c.unlocked():
    c.log.every, c.steps, c.mesh.fsdp = 7, 120, 4  # free keys under a constant learning rate
  workdir.claim(tmp_path, c)
  assert workdir.read_config(tmp_path).log.every == 7
  c.optimizer.lr = 0.5
  with pytest.raises(ConfigError, match=r"another config \(optimizer.lr: 0.002 -> 0.5\); use a new --workdir"):
    workdir.claim(tmp_path, c)
