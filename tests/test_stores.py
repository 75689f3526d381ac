"""Mirrors of object stores: fsspec's file system in memory, and in the drill a local S3 server."""

import json
import os
import pathlib
import socket
import threading

import fsspec
import pytest

from kling_jax import cli, stores
from kling_jax.data import films
from kling_jax.errors import DataError, UsageError

ADDRESS = "memory://bucket/some/place"


@pytest.fixture
def store(tmp_path, monkeypatch):
  """An empty store in memory, and a cache folder of this test's own."""
  monkeypatch.setenv("KLING_CACHE", str(tmp_path / "cache"))
  memory = fsspec.filesystem("memory")
  memory.store.clear()
  stores._mirrors.clear()
  yield memory
  memory.store.clear()
  stores._mirrors.clear()


def put(store, names: dict[str, str], root: str = "/bucket/some/place") -> None:
  for name, text in names.items():
    store.pipe_file(f"{root}/{name}", text.encode())


def held(store, root: str = "/bucket/some/place") -> dict[str, str]:
  return {path.removeprefix(root).lstrip("/"): store.cat_file(path).decode() for path in store.find(root)}


def below(folder: pathlib.Path) -> dict[str, str]:
  return {
    path.relative_to(folder).as_posix(): path.read_text()
    for path in folder.rglob("*")
    if path.is_file() and not path.name.startswith(".")
  }


def test_a_mirror_has_what_the_store_has_and_the_store_what_was_written(store):
  put(store, {"a.txt": "1", "deep/b.txt": "2", "deep/c.txt": "3"})
  with stores.Session():
    local = pathlib.Path(stores.here(ADDRESS))
    assert below(local) == {"a.txt": "1", "deep/b.txt": "2", "deep/c.txt": "3"}
    assert stores.here(ADDRESS + "/") == str(local) and stores.address_of(local / "deep") == ADDRESS
    (local / "a.txt").write_text("changed")
    (local / "deep" / "c.txt").unlink()
    (local / "new").mkdir()
    (local / "new" / "d.txt").write_text("4")
    (local / "new" / ".hidden.tmp").write_text("not yet")
  assert held(store) == {"a.txt": "changed", "deep/b.txt": "2", "new/d.txt": "4"}
  assert stores.address_of(local) is None
  # Another process of this machine finds its mirror as it was, and fetches what is other there.
  put(store, {"deep/b.txt": "later"})
  store.rm_file("/bucket/some/place/new/d.txt")
  stamp = (local / "a.txt").stat().st_mtime_ns
  with stores.Session():
    stores.here(ADDRESS)
    assert below(local) == {"a.txt": "changed", "deep/b.txt": "later"}
    assert (local / "a.txt").stat().st_mtime_ns == stamp, "what is equal is not fetched again"


def test_what_was_not_pushed_is_pushed_later_and_two_changes_are_refused(store):
  put(store, {"a.txt": "1", "b.txt": "2"})
  local = pathlib.Path(stores.here(ADDRESS))
  (local / "a.txt").write_text("mine")
  (local / "new.txt").write_text("mine too")
  stores._mirrors.clear()  # as a kill leaves it
  with stores.Session():
    stores.here(ADDRESS)
    assert below(local) == {"a.txt": "mine", "b.txt": "2", "new.txt": "mine too"}
  assert held(store) == {"a.txt": "mine", "b.txt": "2", "new.txt": "mine too"}
  (local / "b.txt").write_text("mine")
  put(store, {"b.txt": "theirs"})
  with pytest.raises(DataError, match=r"b\.txt was changed in the store and in its mirror"):
    stores.here(ADDRESS)
  assert held(store)["b.txt"] == "theirs"


def test_checkpoints_appear_with_their_metadata_last_and_torn_ones_are_not_fetched(store, monkeypatch):
  put(store, {"checkpoints/4/state/x": "whole", f"checkpoints/4/{stores.COMMITS[0]}": "{}"})
  put(store, {"checkpoints/8/state/x": "torn", "config.json": "{}"})
  order = []
  with stores.Session():
    local = pathlib.Path(stores.here(ADDRESS))
    assert not (local / "checkpoints" / "8").exists() and (local / "checkpoints" / "4" / "state" / "x").exists()
    for name in ("12", "16.orbax-checkpoint-tmp-1"):
      (local / "checkpoints" / name / "state").mkdir(parents=True)
      for file in ("state/x", stores.COMMITS[0], "zz"):
        (local / "checkpoints" / name / file).write_text("new")
    real = type(store).put_file
    monkeypatch.setattr(type(store), "put_file", lambda *args, **kw: (order.append(args[2]), real(*args, **kw))[1])
  assert [path.split("checkpoints/")[1] for path in order] == ["12/state/x", "12/zz", f"12/{stores.COMMITS[0]}"]
  assert not any("orbax-checkpoint-tmp" in name for name in held(store))


def test_a_long_run_pushes_while_it_runs(store):
  arrived = threading.Event()
  real = type(store).put_file

  def noting(*args, **kw):
    found = real(*args, **kw)
    arrived.set()
    return found

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(type(store), "put_file", noting)
    with stores.Session(every_s=0.01):
      local = pathlib.Path(stores.here(ADDRESS))
      (local / "metrics.jsonl").write_text("{}\n")
      assert arrived.wait(120)
      assert held(store) == {"metrics.jsonl": "{}\n"}


def test_single_objects_and_places_that_are_not_there_yet(store):
  put(store, {"one.txt": "1"})
  with stores.Session():
    path = pathlib.Path(stores.here(f"{ADDRESS}/one.txt"))
    assert path.read_text() == "1" and path.name == "one.txt"
    empty = pathlib.Path(stores.here("memory://bucket/not/yet"))
    assert empty.is_dir() and below(empty) == {}
    path.write_text("2")
    out = pathlib.Path(stores.here("memory://bucket/out/film.mp4"))
    out.write_text("film")
    out.with_suffix(".png").write_text("sheet")
  assert held(store) == {"one.txt": "2"} and held(store, "/bucket/not/yet") == {}
  assert held(store, "/bucket/out") == {"film.mp4": "film", "film.png": "sheet"}, "and what was written beside it"
  assert stores.here("plain/path") == "plain/path" and not stores.is_remote("http://a/b")


def test_stores_that_fail_and_odd_addresses_cost_one_line(store, monkeypatch):
  for address in ("memory://bucket/a/../b", "memory://bucket/a//b"):
    with pytest.raises(UsageError, match="without empty parts"):
      stores.here(address)

  def broken(*_, **__):
    raise PermissionError("no key for you")

  monkeypatch.setattr(type(store), "find", broken)
  with pytest.raises(DataError, match=r"memory://bucket/x.*PermissionError: no key for you"):
    stores.here("memory://bucket/x")


def test_what_processes_lock_is_refused(store, capsys):
  for words in (["sweep", "run", "shapes_tiny", "--workdir"], ["annotate", "--db"]):
    assert cli.main([*words, f"{ADDRESS}/x"]) == 2
    assert "an object store cannot do" in capsys.readouterr().err


def through_the_verbs(address: str, tmp_path: pathlib.Path, list_names, capsys) -> None:
  """Footage to a clip set to latents to an evaluation, all in the store."""
  base = ["--input", f"{address}/raw", "--output", f"{address}/set", "--workers", "1", "--scorers", "motion", "--keep",
          "duration_s > 0", "--json"]  # fmt: skip
  capsys.readouterr()  # the server says where it listens
  assert cli.main(["curate", *base]) == 0
  assert json.loads(capsys.readouterr().out)["kept"] >= 2
  names = list_names("set")
  assert {"clips.parquet", "report/index.html"} <= names and any(name.endswith(".array_record") for name in names)
  assert cli.main(["data", "verify", "--input", f"{address}/set"]) == 0
  source = f"--config.data.sources=('{address}/set',)"
  flags = ["--config.data.buckets=((5,16,16),)", "--config.data.fps=8.0", source]
  assert cli.main(["encode", "--config", "video_dit:runlocal", *flags]) == 0
  assert any(name.startswith("cache/latents/") and name.endswith(".safetensors") for name in list_names("set"))
  words = ["eval", "videos", "--made", f"{address}/raw", "--out", f"{address}/eval", "--frames", "6", "--json"]
  assert cli.main(words) == 0
  assert list_names("eval") == {"eval.json", "index.html"}


@pytest.mark.drill
def test_verbs_take_addresses_and_a_run_goes_on_from_the_store(store, tmp_path, monkeypatch, capsys):
  films.render_films(tmp_path / "raw", count=1, seconds=4.0, size=(72, 128), seed=1)
  store.put(str(tmp_path / "raw") + "/", "/bucket/some/place/raw/", recursive=True)
  names = lambda part: set(held_names(store, f"/bucket/some/place/{part}"))
  through_the_verbs(ADDRESS, tmp_path, names, capsys)
  train = ["train", "--config", "video_dit:runlocal", "--workdir", f"{ADDRESS}/run", "--config.validation.every=0",
           "--config.checkpoint.every=2"]  # fmt: skip
  assert cli.main([*train, "--config.steps=2"]) == 0
  assert "config.json" in names("run") and any(stores.COMMITS[0] in name for name in names("run"))
  monkeypatch.setenv("KLING_CACHE", str(tmp_path / "another machine"))
  assert cli.main([*train, "--config.steps=4"]) == 0
  rows = [json.loads(line) for line in store.cat_file("/bucket/some/place/run/metrics.jsonl").splitlines()]
  assert rows[-1]["step"] == 4 and [row["step"] for row in rows] == sorted({row["step"] for row in rows})
  assert "work directory of several processes" in refused(train, capsys)


def refused(train: list[str], capsys) -> str:
  words = ["--distributed", "flags", "--coordinator", "localhost:1", "--processes", "2", "--process", "0"]
  capsys.readouterr()
  assert cli.main([*train, *words]) == 2
  return capsys.readouterr().err


def held_names(store, root: str) -> list[str]:
  return [path.removeprefix(root).lstrip("/") for path in store.find(root)]


@pytest.mark.drill
def test_the_same_through_a_server_that_speaks_s3(tmp_path, monkeypatch, capsys):
  moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server,s3]' s3fs")
  pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'kling_jax[cloud]'")
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  server = moto.ThreadedMotoServer(port=port)
  server.start()
  try:
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    places = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "KLING_CACHE": str(tmp_path / "cache")}
    for name, value in (keys | places).items():
      monkeypatch.setenv(name, value)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.mkdir("bucket")
    films.render_films(tmp_path / "raw", count=1, seconds=4.0, size=(72, 128), seed=1)
    for path in (tmp_path / "raw").iterdir():
      fs.put_file(str(path), f"bucket/place/raw/{path.name}")

    def names(part: str) -> set[str]:
      fs.invalidate_cache()
      return set(held_names(fs, f"bucket/place/{part}"))

    through_the_verbs("s3://bucket/place", tmp_path, names, capsys)
    assert os.environ["KLING_CACHE"] and (tmp_path / "cache" / "mirrors" / "s3" / "bucket").is_dir()
  finally:
    server.stop()
