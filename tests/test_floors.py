"""A room imports only from lower floors, folders are two deep, and no file is a drawer."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "kling_jax"
FLOORS = [
  (
    "errors",
    "answers",
    "files",
    "stores",
    "progress",
    "page",
    "config",
    "web",
    "chat",
    "local_page",
    "assets",
    "configs",
    "launch",
  ),
  ("nn",),
  ("models", "diffusion", "data"),
  ("interop", "measure"),
  ("curation", "world", "evals"),
  ("train",),
  ("generate", "scaling"),
  ("plan",),
  ("cli", "demo", "doctor", "__main__"),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Same-floor imports that the design names: networks are built around nothing but nn, data knows no networks.
APART = {("models", "data"), ("data", "models"), ("diffusion", "models"), ("diffusion", "data"), ("data", "diffusion")}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: pathlib.Path) -> set[str]:
  """The rooms of kling_jax that a file imports, also inside functions."""
  rooms = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module == "kling_jax":
      names = [f"kling_jax.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
      names = [node.module]
    rooms |= {name.split(".")[1] for name in names if name.startswith("kling_jax.") and "__" not in name}
  return rooms


def room_of(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_lower_floors(path: pathlib.Path) -> None:
  room = room_of(path)
  assert room in FLOOR, f"{room} has no floor; add it to FLOORS"
  for other in imported(path) - {room}:
    assert other in FLOOR, f"{path.name} imports the unknown room {other}"
    assert FLOOR[other] <= FLOOR[room], f"{room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})"
    assert (room, other) not in APART, f"{room} must not know {other}"


def test_the_rule_would_see_a_breach(tmp_path: pathlib.Path) -> None:
  file = tmp_path / "x.py"
  file.write_text("def f():\n  from kling_jax.train import loop\n  import kling_jax.cli\n  from kling_jax import nn\n")
  assert imported(file) == {"train", "cli", "nn"}


def test_folders_are_two_deep_and_files_have_a_subject() -> None:
  for path in FILES:
    parts = path.relative_to(PACKAGE).parts
    assert len(parts) <= 3, f"{path} lies deeper than two folders"
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}, f"{path} names no subject"
    if path.stem != "__init__" or path.stat().st_size:
      first = path.read_text(encoding="utf-8").lstrip().splitlines()[0]
      assert first.startswith(('"""', 'r"""')), f"{path} does not say its subject in its first line"
