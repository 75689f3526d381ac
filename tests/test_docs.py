"""Pages tell the truth: every code block runs or says why not, every command parses, every link leads somewhere."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import code_blocks
import pytest
from code_blocks import PAGES, ROOT, blocks

from kling_jax import doctor

BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN = [page for page in PAGES if any(block.language != "text" and not block.reason for block in blocks(page))]
QUICK = "--xla_backend_optimization_level=0"  # runs of seconds, whose cost is compiling
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"], ids=lambda block: block.where)
def test_every_command_parses_and_its_config_loads(block: code_blocks.Block, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(ROOT)
  for words in code_blocks.commands(block.code):
    code_blocks.check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_name_what_there_is(page: pathlib.Path) -> None:
  modules: dict[str, pathlib.Path] = {}
  for block in blocks(page):
    if block.language == "python":
      code_blocks.check_python(block.code, modules)


def test_every_block_says_what_it_is() -> None:
  assert len(BLOCKS) > 90
  for block in BLOCKS:
    assert block.language in code_blocks.LANGUAGES, f"{block.where}: write ```python, ```sh or ```text"


@pytest.mark.parametrize(
  ("command", "match"),
  [
    ("kling trian --config configs/video_dit.py --workdir w", "did you mean 'train'"),
    ("kling train --config configs/video_dit.py --workdir w --config.stpes=3", "did you mean 'steps'"),
    ("kling train --config configs/nowhere.py --workdir w", "no config file"),
    ("kling sample --workdir w --promt x --out x.mp4", "unknown argument '--promt'"),
    ("python -m kling_jax.train.nothing", "no module"),
    ("python benchmarks/rollout.py --nothing 3", "knows no --nothing"),
    ("make supper", "no target supper"),
    ("pip install 'kling_jax[supper]'", "no extra supper"),
    ("rm -rf x", "neither ours"),
  ],
)
def test_the_checker_would_see_a_stale_command(command: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(ROOT)
  (words,) = code_blocks.commands(f"# comment\nA=1 {command}  # comment\n")
  with pytest.raises(Exception, match=re.escape(match)):
    code_blocks.check_command(words)


def test_the_checker_would_see_a_stale_name() -> None:
  for code in (
    "from kling_jax.data import nothing",
    "from kling_jax.nothing import x",
    "from kling_jax.data import films\nfilms.render_movies()",
  ):
    with pytest.raises(ValueError, match="has no"):
      code_blocks.check_python(code, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: pathlib.Path) -> None:
  """Files and anchors; addresses of other sites are never called, `make docs` lists them."""
  for target in LINK.findall(page.read_text(encoding="utf-8")):
    if re.match(r"[a-z]+:", target):
      continue
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), f"{page.name} links to {target}"
    assert file.is_relative_to(ROOT), f"{page.name} links out of the repository: {target}"
    if page.is_relative_to(ROOT / "docs"):
      assert file.is_relative_to(ROOT / "docs"), f"the site does not hold {target}"
    if anchor:
      assert anchor in anchors(file), f"{target}: {file.name} has no such heading"


def anchors(page: pathlib.Path) -> set[str]:
  """The anchors of a page's headings, as the site makes them."""
  titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
  return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_the_site_has_every_page_and_every_room() -> None:
  project = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
  listed = set(re.findall(r"'([^']+\.md)'", str(project["nav"])))
  pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
  assert listed == pages, "the nav of zensical.toml and docs/ differ"
  rooms = {path.parent.name for path in (ROOT / "kling_jax").glob("*/__init__.py")} - {"assets"}
  assert rooms <= {page.removeprefix("api/").removesuffix(".md") for page in pages}


def test_every_extra_is_told_by_the_page_and_by_the_doctor() -> None:
  page = (ROOT / "docs" / "guide" / "install.md").read_text(encoding="utf-8")
  told = {name for row in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page, re.M) for name in re.findall(r"\w+", row)}
  users = code_blocks.extras() - {"bench", "parity"}  # the other side of comparisons
  assert told == users <= set(doctor.EXTRAS)


def test_troubleshooting_quotes_messages_that_exist() -> None:
  sources = [*(ROOT / "kling_jax").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
  said = "\n".join(text for path in sources for text in constants(ast.parse(path.read_text(encoding="utf-8"))))
  rows = re.findall(r"^\| `([^`]+)`(.*?) \|", (ROOT / "docs/guide/troubleshooting.md").read_text(), re.M)
  assert len(rows) > 30
  for message, note in rows:
    if "(XLA's own)" in note:
      continue
    for part in filter(None, map(str.strip, message.split("..."))):
      assert part in said, f"nothing says {part!r}"


def constants(tree: ast.AST) -> list[str]:
  """The string constants of a module; an f-string is one, with a gap for each value."""
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.JoinedStr):
      found.append("\0".join(str(part.value) if isinstance(part, ast.Constant) else "" for part in node.values))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      found.append(node.value)
  return found


def proofs() -> list[str]:
  """The node ids that the page of completeness names; a row says yes with a proof, or no without."""
  found = []
  for line in (ROOT / "docs" / "completeness.md").read_text(encoding="utf-8").splitlines():
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if not line.startswith("| ") or cells[1] in ("", "kling_jax"):
      continue
    assert len(cells) == 10, line
    named = re.findall(r"`(test_\w+)::(test_\w+)`", cells[9])
    assert bool(named) == cells[1].startswith("yes") and (named or cells[1].startswith("**no**")), line
    assert all(re.fullmatch(r"yes|part|no|\?|–", cell) for cell in cells[2:9]), line
    found += [f"tests/{file}.py::{name}" for file, name in named]
  return found


def test_every_yes_names_a_test_that_exists() -> None:
  named = proofs()
  assert len(named) > 60
  for node in named:
    file, _, name = node.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = {part.name: part for part in tree.body if isinstance(part, ast.FunctionDef)}
    assert name in functions, f"there is no {node}"
    marks = [ast.unparse(mark) for mark in functions[name].decorator_list]
    assert not any(mark.startswith("pytest.mark.skip(") for mark in marks), f"{node} is skipped"


@pytest.mark.drill
def test_every_proof_is_collected() -> None:
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "drill or not drill", *sorted(set(proofs()))],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.drill
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_code_blocks_run_in_order(page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  names: dict[str, object] = {"__name__": "page"}
  environment = {
    **os.environ,
    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    "XLA_FLAGS": QUICK,
  }
  for block in blocks(page):
    if block.reason or block.language == "text":
      continue
    if block.language == "python":
      exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
    else:
      done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
      assert done.returncode == 0, f"{block.where}:\n{done.stdout}"


@pytest.mark.drill
def test_the_site_builds_without_a_broken_link(tmp_path: pathlib.Path) -> None:
  zensical = pathlib.Path(sys.executable).parent / "zensical"
  if not zensical.exists():
    pytest.skip("no Zensical: pip install 'kling_jax[docs]'")
  done = subprocess.run([str(zensical), "build", "--strict"], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  page = (ROOT / "build" / "site" / "api" / "diffusion.html").read_text()
  assert "mse_per_sample" in page and "SHAPES" not in page
