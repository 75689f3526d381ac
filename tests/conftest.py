"""Settings that every test shares: eight fake CPU devices, a persistent compilation cache, the shared data folder."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import pytest
from absl import flags

hypothesis.settings.register_profile("shared", deadline=None)  # a loaded machine is no failure
hypothesis.settings.load_profile("shared")
flags.FLAGS.mark_as_parsed()  # Grain's worker processes refuse unparsed absl flags.


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """The folder of real footage and reference numbers that lies beside the repository."""
  folder = ROOT.parent / "shared"
  if not folder.is_dir():
    pytest.skip(f"no shared data at {folder}")
  return folder
