"""`kling doctor`: devices, versions, decoders, and what each optional extra would add."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import Any

PACKAGES = (
  "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "tensorflow-datasets",
  "ml-collections", "numpy", "av", "opencv-python-headless", "pyarrow", "safetensors",
)  # fmt: skip
# extra: (import names that tell whether it is there, what it adds)
EXTRAS = {
  "demo": (("plotly",), "charts in the report pages"),
  "eval": (("skimage",), "independent references of the metrics"),
  "sweep": (("matplotlib",), "plots of scaling laws"),
  "cloud": (("fsspec", "s3fs", "gcsfs"), "s3:// and gs:// wherever a path is taken"),
  "caption": (("tokenizers", "sentencepiece"), "tokenizers of pretrained text encoders"),
  "ray": (("ray",), "curation on many machines"),
  "tpu": (("libtpu",), "TPU devices"),
  "cuda": (("jax_cuda13_plugin",), "NVIDIA devices"),
  "quantize": (("qwix",), "int8 and float8 products"),
  "track": (("tensorboardX", "wandb"), "log.tensorboard and log.wandb"),
  "colab": (("jupytext", "nbclient", "ipykernel"), "executing the notebooks"),
  "docs": (("zensical", "mkdocstrings"), "the site of `make docs`"),
  "bench": (("torch",), "the PyTorch side of the benchmarks"),
  "test": (("pytest", "hypothesis", "mypy", "ruff"), "the test suite"),
}
CODECS = ("h264", "hevc", "av1", "vp8", "vp9", "mpeg2video", "mpeg4", "theora", "gif", "prores")


def examine() -> dict[str, Any]:
  """Facts about this machine, JSON-ready."""
  import av
  import jax

  from kling_jax.train import peak

  device = jax.devices()[0]
  flops = peak.device_peak(device)
  return {
    "python": platform.python_version(),
    "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    "packages": {name: _version(name) for name in PACKAGES},
    "devices": [f"{item.platform}: {item.device_kind}" for item in jax.devices()],
    "processes": jax.process_count(),
    "peak_flops_per_device": flops,
    "compilation_cache": jax.config.values["jax_compilation_cache_dir"],
    "decoders": {name: _has(av, name, "r") for name in CODECS},
    "encoders": {name: _has(av, name, "w") for name in ("libx264", "libx265", "libsvtav1", "libvpx-vp9", "aac")},
    "extras": {
      name: {"installed": all(map(_importable, modules)), "adds": adds} for name, (modules, adds) in EXTRAS.items()
    },
  }


def show(facts: dict[str, Any]) -> None:
  """Prints the facts as tables."""
  import rich.console
  import rich.table

  console = rich.console.Console()
  flops = facts["peak_flops_per_device"]
  console.print(f"Python {facts['python']} on {facts['system']}")
  console.print(f"Devices: {', '.join(facts['devices'])}" + (f"; {flops / 1e12:.2f} TFLOP/s each" if flops else ""))
  cache = facts["compilation_cache"] or "off (set JAX_COMPILATION_CACHE_DIR to keep compiled programs)"
  console.print(f"Compilation cache: {cache}")
  versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
  console.print(f"Packages: {versions}")
  for kind in ("decoders", "encoders"):
    missing = [name for name, present in facts[kind].items() if not present]
    console.print(f"Video {kind}: {', '.join(name for name, present in facts[kind].items() if present)}"
                  + (f"; missing: {', '.join(missing)}" if missing else ""))  # fmt: skip
  table = rich.table.Table("extra", "here", "adds", "get it by")
  for name, extra in facts["extras"].items():
    get = "" if extra["installed"] else f"pip install 'kling_jax[{name}]'"
    table.add_row(name, "yes" if extra["installed"] else "no", extra["adds"], rich.markup.escape(get))
  console.print(table)


def _version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return "missing"


def _importable(name: str) -> bool:
  return name in sys.modules or importlib.util.find_spec(name) is not None


def _has(av: Any, name: str, mode: str) -> bool:
  try:
    av.Codec(name, mode)
  except ValueError:  # av.codec.UnknownCodecError
    return False
  return True
