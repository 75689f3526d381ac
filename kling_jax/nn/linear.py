"""Dense layers: kernels (in, out) with logical axis names, and the product form that is fast on CPU."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.nn import lowering, quantized, weights
from kling_jax.nn.weights import Axes, Placement

Initializer = jax.nn.initializers.Initializer

xavier = jax.nn.initializers.xavier_uniform()
zeros = jax.nn.initializers.zeros


def normal(std: float) -> Initializer:
  """Normal initial values of standard deviation `std`."""
  return jax.nn.initializers.normal(std)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _affine(
  how: Placement | None, axes: Axes, mode: str, x: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> jax.Array:
  return _affine_plain(how, axes, mode, x, kernel, bias)


def _affine_plain(how, axes, mode, x, kernel, bias):
  kernel = weights.gathered(how, kernel, axes, x.dtype)
  y = x @ kernel if mode == "none" else quantized.forward(mode, x, kernel)
  return y if bias is None else y + weights.gathered(how, bias, axes[1:], x.dtype)


def _affine_forward(how, axes, mode, x, kernel, bias):
  # The kernel is kept as it is stored and gathered again in the backward pass: kept as used, it would stand whole.
  return _affine_plain(how, axes, mode, x, kernel, bias), (x, kernel, bias)


def _affine_backward(how, axes, mode, residuals, g):
  """Gradients of x in its dtype, of kernel and bias in float32: summed in float32 over rows and over devices.

  Were the kernel's gradient left in bfloat16, each device's partial sum would be rounded to 8 bits before the devices
  add theirs; `Placement.gradient` may ask for just that, for half of the traffic.
  """
  x, kernel, bias = residuals
  rows = tuple(range(x.ndim - 1))
  dbias = None if bias is None else weights.scattered(how, jnp.sum(g.astype(jnp.float32), axis=rows), axes[1:])
  whole = weights.gathered(how, kernel, axes, x.dtype)
  if mode == "fp8":
    dx, product = quantized.backward(mode, x, whole, g)
    return dx, weights.scattered(how, product, axes), dbias
  dx = g @ whole.T
  turned = jnp.moveaxis(x, -1, 0)
  if lowering.platform() == "cpu":
    # XLA's CPU products contract slowly over the first dimension of the left side. The barrier keeps it from folding
    # this transpose back into such a product. A small DiT's training step takes an eighth to a quarter less with it.
    turned = jax.lax.optimization_barrier(turned)
  dtype = jnp.float32 if how is None or x.dtype == jnp.float32 else how.gradient
  product = jax.lax.dot_general(
    turned, g, ((tuple(axis + 1 for axis in rows), rows), ((), ())), preferred_element_type=dtype
  )
  return dx, weights.scattered(how, product, axes), dbias


_affine.defvjp(_affine_forward, _affine_backward)


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, axes: Axes) -> jax.Array:
  """x (..., in) @ kernel (in, out) + bias (out,), in the dtype of `x`; float32 masters are cast at use.

  `axes` are the logical names of the kernel's dimensions.
  """
  how, mode = weights.placement(), quantized.mode_of(axes)
  return (_affine_plain if lowering.in_forward_mode() else _affine)(how, axes, mode, x, kernel, bias)


class Linear(nnx.Module):
  """y = x @ kernel + bias, with kernel (inputs, outputs) and logical names `axes` for its two dimensions."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    axes: Axes,
    use_bias: bool = True,
    init: Initializer = xavier,
    rngs: nnx.Rngs,
  ):
    self.axes = axes
    self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32), axes=axes)
    self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32), axes=axes[1:]) if use_bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (..., inputs) to (..., outputs) in the dtype of `x`."""
    return affine(x, self.kernel[...], None if self.bias is None else self.bias[...], self.axes)
