"""Notebooks: the pairs are in step, and each one runs on CPU in its small mode, with outputs as its text says."""

import os
import pathlib
import re
import sys

import pytest

jupytext = pytest.importorskip("jupytext")
ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "colabs").glob("*.py"))
QUICK = "--xla_backend_optimization_level=0"  # runs of seconds, whose cost is compiling
by_name = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def content(notebook) -> list[tuple[str, str, list[str]]]:
  """Kind, source and tags of each cell."""
  return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]


def test_every_notebook_has_its_script_and_stands_in_the_guide() -> None:
  page = (ROOT / "docs" / "guide" / "notebooks.md").read_text()
  names = {path.stem for path in (ROOT / "colabs").iterdir() if path.suffix in (".py", ".ipynb")}
  assert names == {path.stem for path in SCRIPTS} == set(re.findall(r"^\| `(\w+)`", page, re.M))


@by_name
def test_a_pair_is_in_step(script: pathlib.Path) -> None:
  notebook = jupytext.read(script.with_suffix(".ipynb"))
  assert content(notebook) == content(jupytext.read(script)), f"run: jupytext --to ipynb --update {script.name}"
  assert not any(cell.get("outputs") for cell in notebook.cells), "a committed notebook holds no outputs"


@by_name
def test_a_notebook_installs_first_and_checks_itself(script: pathlib.Path) -> None:
  cells = content(jupytext.read(script))
  code = [source for kind, source, _ in cells if kind == "code"]
  assert cells[0][0] == "markdown" and "pip" in code[0] and "KLING_SMALL" in code[0]
  assert sum("check" in tags for _, _, tags in cells) >= 2
  assert all("assert" in source for _, source, tags in cells if "check" in tags)


@pytest.mark.drill
@by_name
def test_a_notebook_runs(script: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  nbclient = pytest.importorskip("nbclient")
  for name, value in {
    "KLING_SMALL": "1", "XLA_FLAGS": QUICK, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    "IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
  }.items():  # fmt: skip
    monkeypatch.setenv(name, value)
  notebook = jupytext.read(script)
  client = nbclient.NotebookClient(
    notebook, timeout=1000, startup_timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
  )
  client.execute()
  outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
  said = "".join(output.get("text", "") for output in outputs)
  assert not re.findall(r"^kling: \w*(?:Error|unexpected).*", said, re.M), "no command of it fails"
  shown = [output.data for output in outputs if "data" in output]
  assert any("image/png" in data for data in shown) or any("<video" in data.get("text/html", "") for data in shown)
