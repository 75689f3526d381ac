"""Products in int8 and float8: near the exact ones, the named kernels alone, and clear without qwix."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kling_jax.errors import ConfigError
from kling_jax.nn import quantized
from kling_jax.nn.linear import affine

AXES = ("embed", "mlp")


def arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
  """Tokens of very different sizes, a kernel whose columns are, and a gradient."""
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, 5, 32)) * jnp.logspace(-2, 2, 5)[:, None]
  kernel = jax.random.normal(keys[1], (32, 16)) * jnp.logspace(-1, 1, 16)
  return x, kernel, jax.random.normal(keys[2], (2, 5, 16))


def all_three(mode: str, axes: tuple[str, str] = AXES) -> list[np.ndarray]:
  x, kernel, g = arrays()
  with quantized.products(mode):
    y, back = jax.vjp(lambda x, kernel: affine(x, kernel, None, axes), x, kernel)
  return [np.asarray(array) for array in (y, *back(g))]


def test_int8_rounds_to_the_integers_of_each_token_and_column() -> None:
  """Whole multiples of the two steps, within what rounding may do; gradients are those of the exact product."""
  x, kernel, _ = (np.asarray(array, np.float64) for array in arrays())
  x_step, kernel_step = np.abs(x).max(-1, keepdims=True) / 127.5, np.abs(kernel).max(0) / 127.5
  (y, dx, dkernel), exact = all_three("int8"), all_three("none")
  count = y / (x_step * kernel_step)
  np.testing.assert_allclose(count, np.round(count), atol=0.2)
  sums = np.abs(x).sum(-1, keepdims=True) * kernel_step + x_step * np.abs(kernel).sum(0)
  bound = (sums + 16 * x_step * kernel_step) / 2
  assert (np.abs(y - exact[0]) <= bound).all() and np.abs(y - exact[0]).max() > 0
  np.testing.assert_array_equal(dx, exact[1])
  np.testing.assert_array_equal(dkernel, exact[2])


def test_fp8_rounds_gradients_too() -> None:
  for mine, exact in zip(all_three("fp8"), all_three("none"), strict=True):
    error = np.linalg.norm(mine - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 0.12


def test_other_kernels_are_exact() -> None:
  for mine, exact in zip(all_three("fp8", ("embed", "conv_out")), all_three("none"), strict=True):
    np.testing.assert_array_equal(mine, exact)


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
  with pytest.raises(ConfigError, match="'quantize' = 'int9' is unknown; did you mean 'int8'"):
    quantized.check("int9")
  real = builtins.__import__

  def missing(name, *args, **kwargs):
    if name == "qwix":
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", missing)
  with pytest.raises(ConfigError, match=r"needs qwix, .*pip install 'kling_jax\[quantize\]'"):
    quantized.check("int8")
