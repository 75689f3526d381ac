"""Code blocks of the pages: found, told apart, and held against the parser, the configs and the sources they name.

A block is ```python, ```sh or ```text. The first two are run by `make drill`, a page at a time and from top to bottom,
unless the line above says why they cannot be: <!-- not run: REASON -->. Those are still parsed.
"""

import ast
import dataclasses
import importlib.util
import pathlib
import re
import shlex
from collections.abc import Iterator

from kling_jax import cli
from kling_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "sh", "text")
FENCE = re.compile(r"^( *)```(\S*) *$")
MARK = re.compile(r"^ *<!-- not run: (.+) -->$")
PLACES = re.compile(r"\b\w+=(DIR|FILE|SET)\b,?")  # arguments of configs that stand for files of the reader
FOREIGN = ("export", "jupytext", "vllm")  # programs of others, which have no parser here


@dataclasses.dataclass(frozen=True)
class Block:
  """One fenced block of a page.

  Attributes:
    line: of its first line of code, from 1.
    reason: why it is not run; "" = it is.
  """

  page: pathlib.Path
  line: int
  language: str
  code: str
  reason: str

  @property
  def where(self) -> str:
    return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: pathlib.Path) -> list[Block]:
  """The fenced blocks of a page, in order."""
  found, opened = [], None
  lines = page.read_text(encoding="utf-8").splitlines()
  for number, line in enumerate(lines):
    fence = FENCE.match(line)
    if fence is None:
      continue
    if opened is None:
      mark = MARK.match(lines[number - 1])
      opened = (number, fence[2], len(fence[1]), mark[1] if mark else "")
      continue
    start, language, indent, reason = opened
    code = "\n".join(inside[indent:] for inside in lines[start + 1 : number])
    found.append(Block(page, start + 2, language, code + "\n", reason))
    opened = None
  if opened is not None:
    raise ValueError(f"{page}:{opened[0] + 1}: a block without an end")
  return found


def commands(code: str) -> Iterator[list[str]]:
  """The words of each command of a shell block; continued lines are one, comments are left out."""
  for line in code.replace("\\\n", " ").splitlines():
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables of one command
      words = words[1:]
    if words:
      yield words[: words.index(">")] if ">" in words else words


def check_command(words: list[str]) -> None:
  """Holds one command against what would read it.

  Raises:
    KlingError: the command line or a config of ours refuses it. ValueError: it names what is not there.
  """
  program, rest = words[0], words[1:]
  if program == "kling":
    _check_kling([word for word in rest if word != "..."])
  elif program == "python" and rest[0] == "-m":
    spec = importlib.util.find_spec(rest[1])
    if spec is None or spec.origin is None:
      raise ValueError(f"there is no module {rest[1]}")
    _check_flags(pathlib.Path(spec.origin), rest[2:])
  elif program == "python":
    _check_flags(ROOT / rest[0], rest[1:])
  elif program == "make":
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    unknown = [word for word in rest if "=" not in word and word not in targets]
    if unknown:
      raise ValueError(f"the Makefile has no target {unknown[0]}")
  elif program == "pytest":
    for word in rest:
      if word.startswith("tests/") and not (ROOT / word.partition("::")[0]).exists():
        raise ValueError(f"there is no {word}")
  elif program == "pip":
    known = extras()
    for name in re.findall(r"\[([a-z,]+)\]", " ".join(rest)):
      for extra in name.split(","):
        if extra not in known:
          raise ValueError(f"setup.py has no extra {extra}")
  elif program not in FOREIGN:
    raise ValueError(f"{program!r} is neither ours nor known here")


def extras() -> set[str]:
  """The names of setup.py's extras."""
  found: set[str] = set()
  for node in ast.parse((ROOT / "setup.py").read_text()).body:
    if not isinstance(node, ast.Assign):
      continue
    target = node.targets[0]
    if ast.unparse(target) == "EXTRAS" and isinstance(node.value, ast.Dict):
      found |= {ast.literal_eval(key) for key in node.value.keys if key is not None}
    elif isinstance(target, ast.Subscript) and ast.unparse(target.value) == "EXTRAS":
      found.add(ast.literal_eval(target.slice))
  return found


def _check_kling(words: list[str]) -> None:
  try:
    args = cli.parse(words)
  except SystemExit:  # --help, --version
    return
  spec = getattr(args, "config", None)
  if spec is None or not _is_ours(spec):
    return
  config_lib.load(PLACES.sub("", spec).rstrip(":,"), args.overrides)


def _is_ours(spec: str) -> bool:
  """Whether a config is one of the repository; run.py and the like are files of the reader's."""
  path = spec.partition(":")[0]
  return path.startswith("configs/") or path in {file.stem for file in (ROOT / "configs").glob("*.py")}


def _check_flags(file: pathlib.Path, words: list[str]) -> None:
  if not file.is_file():
    raise ValueError(f"there is no {file.name}")
  source = file.read_text(encoding="utf-8")
  for word in words:
    if word == "--":
      return  # what follows is for another program
    if word.startswith("--") and word.partition("=")[0] not in source:
      raise ValueError(f"{file.name} knows no {word}")


def check_python(code: str, modules: dict[str, pathlib.Path]) -> None:
  """Parses a block and holds what it names of kling_jax against the sources, without running either.

  Args:
    code: the block. modules: those that earlier blocks of the page imported, by their names there; is added to.

  Raises:
    SyntaxError: it is no Python. ValueError: it names a module or a member that is not there.
  """
  tree = ast.parse(code)
  for node in ast.walk(tree):
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("kling_jax"):
      continue
    for alias in node.names:
      file = _module(f"{node.module}.{alias.name}")
      if file is not None:
        modules[alias.asname or alias.name] = file
        continue
      parent = _module(node.module or "")
      if parent is None or alias.name not in _members(parent):
        raise ValueError(f"{node.module} has no {alias.name}")
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
      file = modules[node.value.id]
      if node.attr not in _members(file):
        raise ValueError(f"{file.relative_to(ROOT)} has no {node.attr}")


def _module(name: str) -> pathlib.Path | None:
  base = ROOT / name.replace(".", "/")
  candidates = (base.with_suffix(".py"), base / "__init__.py")
  return next((file for file in candidates if file.is_file()), None)


def _members(file: pathlib.Path) -> set[str]:
  """Names that a module's top level defines or imports, and its submodules."""
  names = {path.stem for path in file.parent.glob("*.py")} if file.name == "__init__.py" else set()
  for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      names.add(node.name)
    elif isinstance(node, ast.Import | ast.ImportFrom):
      names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      names.add(node.id)
  return names
