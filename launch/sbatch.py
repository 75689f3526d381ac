"""SLURM batch scripts."""

import shlex
from collections.abc import Mapping, Sequence

TRANSIENT = (
  r"socket timed out", r"unable to contact slurm controller", r"connection refused", r"communication connection",
  r"slurm_load_jobs error: (?!invalid job id)", r"resource temporarily unavailable", r"zero bytes were transmitted",
)  # fmt: skip
ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def script(options: Sequence[str], environment: Mapping[str, str], folder: str, body: str) -> str:
  """A batch script: #SBATCH lines, exported variables, then `body` in `folder`."""
  head = "\n".join(f"#SBATCH {line}" for line in options)
  exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items())
  return f"#!/bin/bash\n{head}\n\n{exports}\ncd {shlex.quote(folder)} || exit 2\n{body}\n"


def clock(hours: float) -> str:
  """A wall time as SLURM writes it: hours:minutes:seconds."""
  minutes = max(1, round(hours * 60))
  return f"{minutes // 60}:{minutes % 60:02d}:00"


def resources(cores: int, gpus: int, memory_gib: int) -> list[str]:
  """Options for what a task needs; 0 = the system's default."""
  return [
    *([f"--cpus-per-task={cores}"] if cores else []), *([f"--gpus-per-task={gpus}"] if gpus else []),
    *([f"--mem={memory_gib}G"] if memory_gib else []),
  ]  # fmt: skip
