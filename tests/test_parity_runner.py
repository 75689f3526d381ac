"""The runner of `make parity`: what it lets pass, what it writes, and what it says where libraries are missing."""

import importlib
import json
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def parity(monkeypatch, tmp_path):
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  module = importlib.import_module("parity")
  page = tmp_path / "weights.md"
  page.write_text(
    f"before\n\n{module.BEGIN}\n{module.HEAD}\n| old | x | 1e-6 | 1e-04 | - | - | kept |\n{module.END}\n\nafter\n"
  )
  monkeypatch.setattr(module, "PAGE", page)
  monkeypatch.setattr(module, "missing", list)
  return module


def row(part, error, **others):
  return {"part": part, "reference": "r", "max_rel_error": error, "cosine_bf16": 0.999, "note": "a | b", **others}


def broken():
  raise RuntimeError("no such layer")


def run(parity, monkeypatch, cases, *arguments, fixtures=None):
  monkeypatch.setattr(parity, "collected", lambda kind: cases if kind == "CASES" else fixtures or {})
  monkeypatch.setattr("sys.argv", ["parity.py", *arguments])
  return parity.main()


def test_the_exit_code_tells_of_every_bound(parity, monkeypatch, capsys, tmp_path):
  good = {"a": lambda: row("A", 9e-5), "deep": lambda: row("D", 1e-3, bound=2e-3, seconds=3.0, reference_seconds=2.0)}
  assert run(parity, monkeypatch, good, "--json", str(tmp_path / "rows.json")) == 0
  assert [one["part"] for one in json.loads((tmp_path / "rows.json").read_text())] == ["A", "D"]
  assert "1.50" in capsys.readouterr().out  # times PyTorch's
  for bad, why in (
    (lambda: row("B", 2e-4), "above 1e-04"),
    (lambda: row("B", float("nan")), "above"),
    (lambda: row("B", 1e-5) | {"cosine_bf16": 0.9}, "below 0.99"),
    (broken, "no such layer"),
  ):
    assert run(parity, monkeypatch, good | {"b": bad}) == 1
    said = capsys.readouterr()
    assert "FAILED b" in said.err and why in said.err
  assert run(parity, monkeypatch, good | {"b": broken}, "--only", "a") == 0
  assert run(parity, monkeypatch, good, "--only", "c") == 2 and "there are: a, deep" in capsys.readouterr().err


def test_rows_of_parts_that_did_not_run_stay(parity, monkeypatch):
  assert run(parity, monkeypatch, {"new": lambda: row("new", 2e-6)}, "--write") == 0
  assert run(parity, monkeypatch, {"new": lambda: row("new", 3e-6)}, "--write") == 0
  lines = parity.PAGE.read_text().splitlines()
  assert lines[0] == "before" and lines[-1] == "after"
  assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == ["new", "old"]
  assert "3.0e-06" in "\n".join(lines) and "a / b" in "\n".join(lines)  # a bar would end the cell


def test_fixtures_are_made_afresh_and_compared(parity, monkeypatch, capsys, tmp_path):
  agreement = parity.agreement
  monkeypatch.setattr(agreement, "FIXTURES", tmp_path)
  monkeypatch.setattr(parity, "HERE", tmp_path / "benchmarks")
  outputs = {"y": np.array([1.0, -2.0])}
  make = lambda **new: (
    lambda: agreement.Fixture(
      **({"config": {"depth": 2}, "weights": {"w": np.ones(3)}, "inputs": {}, "outputs": outputs} | new)
    )
  )
  assert run(parity, monkeypatch, {}, fixtures={"p": make()}) == 1 and "not committed" in capsys.readouterr().err
  assert run(parity, monkeypatch, {}, "--fixtures", fixtures={"p": make()}) == 0
  assert run(parity, monkeypatch, {}, fixtures={"p": make(outputs={"y": outputs["y"] + 1e-6})}) == 0
  for new, why in (
    ({"outputs": {"y": outputs["y"] + 1e-3}}, "another outputs.y"),
    ({"weights": {"w": np.ones(3) + 1e-9}}, "another weights.w"),
    ({"config": {"depth": 3}}, "another config"),
    ({"weights": {"v": np.ones(3)}}, "other tensors"),
  ):
    capsys.readouterr()
    assert run(parity, monkeypatch, {}, fixtures={"p": make(**new)}) == 1 and why in capsys.readouterr().err
  with pytest.raises(ValueError, match="make its config smaller"):
    agreement.write_fixture("p", make(weights={"w": np.ones(10**5)})())


def test_an_error_is_relative_to_the_largest_value(parity):
  agreement = parity.agreement
  assert agreement.relative_error([0.0, 4.1], [0.1, 4.0]) == pytest.approx(0.1 / 4)
  assert agreement.cosine([[1.0, 0.0]], [[1.0, 1.0]]) == pytest.approx(0.5**0.5)
  for ours, theirs in (([1.0], [1.0, 1.0]), ([np.nan], [1.0]), ([0.0], [0.0])):
    with pytest.raises(ValueError, match="shape|finite"):
      agreement.relative_error(ours, theirs)


def test_missing_libraries_are_named_with_the_mend(parity, monkeypatch, capsys):
  monkeypatch.setattr(parity, "missing", lambda: ["torch", "peft"])
  assert run(parity, monkeypatch, {"b": broken}) == 1
  assert "torch, peft" in (said := capsys.readouterr().err) and "pip install 'kling_jax[parity]'" in said
