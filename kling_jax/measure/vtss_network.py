"""The networks of suitability models in JAX: shapes, loading, and one clip at a time through one compiled program."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kling_jax.interop import safetensors
from kling_jax.measure import fragments
from kling_jax.measure.vtss import Spec
from kling_jax.models import tsa
from kling_jax.nn import params as params_lib

Rate = Callable[[Mapping[str, np.ndarray], str | None], float]


def shape(preset: str, branches: tuple[str, ...], fusion: str, features: int) -> tsa.Shape:
  """The sizes of the network."""
  return dataclasses.replace(tsa.preset(preset), branches=branches, fusion=fusion, features=features)


def of_spec(spec: Spec) -> tsa.Shape:
  return shape(spec.preset, spec.branches, spec.fusion, len(spec.features))


@functools.cache
def described(sizes: tsa.Shape) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
  """Graph definition and parameters of the network, without making an array."""
  graph, shapes, _ = params_lib.abstract(lambda: tsa.TSA(sizes, rngs=nnx.Rngs(params=jax.random.key(0))))
  return graph, shapes


def rater(folder: pathlib.Path, spec: Spec) -> Rate:
  """(inputs of one clip, branch that is to be the usual one or None) -> raw score.

  Raises:
    WeightsError: weights of another network.
  """
  graph, shapes = described(of_spec(spec))
  loaded, _ = safetensors.load_into(shapes, folder)
  loaded = jax.device_put(loaded)

  @functools.partial(jax.jit, static_argnames="usual")
  def raw(params: params_lib.Params, inputs: dict[str, jax.Array], usual: str | None) -> jax.Array:
    vectors = branches(params_lib.merge(graph, params), inputs)
    if usual is not None:
      vectors[usual] = jnp.asarray(spec.usual[usual], jnp.float32)[None]
    return params_lib.merge(graph, params).fused(vectors)[0]

  return lambda inputs, usual: float(raw(loaded, prepared(inputs), usual))


def branches(model: tsa.TSA, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
  """The branches' vectors (1, width) of one clip."""
  vectors = {}
  if "fragments" in inputs:
    vectors["dynamic"] = model.dynamic(inputs["fragments"], None)
  if "image" in inputs:
    vectors["static"] = model.static_head(model.convnext(inputs["image"]), None)
  if "features" in inputs:
    vectors["label"] = model.label(inputs["features"], None, jnp.float32)
  return vectors


def prepared(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Inputs of one clip as the network takes them: with a batch of one, pixels normalised."""
  return {name: (value if name == "features" else fragments.normalised(value))[None] for name, value in inputs.items()}
