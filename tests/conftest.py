"""Settings that every test shares: eight fake CPU devices, a persistent compilation cache, the shared data folder."""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import pytest
from absl import flags

# The same examples in every run, so that a red one is the change's; --hypothesis-profile=explore looks for new ones. A
# loaded machine is no failure.
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.register_profile("shared", deadline=None, derandomize=True)
hypothesis.settings.load_profile("shared")
flags.FLAGS.mark_as_parsed()  # Grain's worker processes refuse unparsed absl flags.


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """The folder of real footage and reference numbers that lies beside the repository."""
  folder = ROOT.parent / "shared"
  if not folder.is_dir():
    pytest.skip(f"no shared data at {folder}")
  return folder


@pytest.fixture(scope="session")
def tpu_compiler() -> dict[str, str]:
  """The environment of a process that may compile for TPU; `make tpu` installs the compiler beside the interpreter."""
  folder = pathlib.Path(sys.prefix) / "libtpu"
  if not folder.is_dir():
    pytest.skip(f"no TPU compiler at {folder}: run `make tpu`")
  return {
    **os.environ,
    "PYTHONPATH": str(folder),
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs on a TPU here, so processes need not take turns
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
  }
