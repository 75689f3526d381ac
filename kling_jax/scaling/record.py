"""The record of a run: everything that a reader of the ledger needs to use its loss, whoever ran it wherever."""

import ast
import functools
import hashlib
import pathlib
import platform
import subprocess
from typing import Any

import jax

from kling_jax import __version__
from kling_jax.models.flop_rules import EXACT
from kling_jax.scaling import cost as cost_lib
from kling_jax.scaling.sweep import Run
from kling_jax.train import metrics
from kling_jax.train.defaults import RECIPE

PACKAGE = pathlib.Path(__file__).parents[1]
ROOMS = ("nn", "models", "diffusion", "data", "train")  # what a loss depends on


def of(run: Run, workdir: pathlib.Path) -> dict[str, Any]:
  """The record of what lies in `workdir`: plan, size, compute, losses at every validation, time, device, versions.

  `points` are the validations that the config asks for (a run that was stopped and resumed made more): step, tokens,
  flops, loss and its standard error over the table; `loss` is the last.
  """
  c, size = run.config, cost_lib.of(run.config)
  rows = metrics.read(workdir / "metrics.jsonl")
  read = [row for row in rows if "val_loss" in row and row["step"] in _horizons(c.steps, c.validation.every)]
  points = [
    {"step": row["step"], "tokens": row["tokens"], "flops": row["flops"], "loss": row["val_loss"],
     "stderr": row["val_stderr"]}
    for row in read
  ]  # fmt: skip
  last = rows[-1] if rows else {}
  return {
    **plan(run),
    "steps": last.get("step", 0),
    "tokens": last.get("tokens", 0),
    "flops": last.get("flops", 0.0),
    "flop_rule": EXACT,
    "params": size.params,
    "params_by_part": size.params_by_part,
    "width": size.width,
    "depth": size.depth,
    "context": size.clip_tokens,
    "batch_tokens": c.data.batch * size.clip_tokens,
    "lr": c.optimizer.lr,
    "schedule": c.optimizer.schedule,
    "warmup": c.optimizer.warmup,
    "ema_decay": c.ema.decay,
    "seed": c.seed,
    "loss": points[-1]["loss"] if points else None,
    "stderr": points[-1]["stderr"] if points else None,
    "table_id": read[-1]["table_id"] if read else None,
    "table_rows": c.validation.rows,
    "train_loss": last.get("loss"),
    "skipped": last.get("skipped", 0),
    "points": points,
    "wall_s": last.get("seconds", 0.0),
    **environment(),
  }


def _horizons(steps: int, every: int) -> set[int]:
  return {steps, *range(every, steps + 1, every)} if every else {steps}


def plan(run: Run) -> dict[str, Any]:
  """What the sweep asked for."""
  return {
    "arms": list(run.arms),
    "split": run.split,
    "overrides": {key: list(value) if isinstance(value, tuple) else value for key, value in run.overrides.items()},
  }


@functools.cache
def environment() -> dict[str, Any]:
  """Devices, machine and versions of this process."""
  devices = jax.devices()
  return {
    "device": devices[0].device_kind,
    "devices": len(devices),
    "machine": f"{platform.system()} {platform.machine()}",
    "recipe": RECIPE,
    "code": code(),
    "commit": commit(),
    "versions": {"kling_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
  }


@functools.cache
def code() -> str:
  """Twelve digits over the syntax trees of what a loss depends on: comments and docstrings do not change it."""
  digest = hashlib.sha256()
  for room in ROOMS:
    for path in sorted((PACKAGE / room).rglob("*.py")):
      tree = ast.parse(path.read_text(encoding="utf-8"))
      for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
          value = body[0].value
          if isinstance(value, ast.Constant) and isinstance(value.value, str):
            body.pop(0)
      digest.update(f"{path.relative_to(PACKAGE)}\n{ast.dump(tree)}\n".encode())
  return digest.hexdigest()[:12]


@functools.cache
def commit() -> str:
  """The commit of a checkout, with "+" where files of the package differ from it; "" for an installed wheel."""
  if not (PACKAGE.parent / ".git").exists():
    return ""
  git = ["git", "-C", str(PACKAGE.parent)]
  try:
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run(
      [*git, "status", "--porcelain", "--untracked-files=no", "kling_jax"], capture_output=True, text=True, check=True
    )
  except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or a checkout of another user
    return ""
  return head.stdout.strip() + "+" * bool(changed.stdout.strip())
