"""Small weights that ship with the package: <name>/model.safetensors, and card.json that says how they came about."""

import pathlib

from kling_jax.errors import WeightsError


def folder(name: str) -> pathlib.Path:
  """The folder of an asset.

  Raises:
    WeightsError: the installation lacks it.
  """
  path = pathlib.Path(__file__).parent / name
  if not (path / "model.safetensors").is_file():
    raise WeightsError(f"{path} holds no weights; install kling_jax again")
  return path
