"""The two feed-forward layers in use: GELU (Wan 2.1) and SwiGLU (LLaMA)."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kling_jax.nn.linear import Linear
from kling_jax.nn.partition import constrain, of


class GeluMLP(nnx.Module):
  """down(gelu(up(x))), with GELU's tanh form; `tokens` is the logical name of the tokens (see MultiHeadAttention)."""

  def __init__(self, width: int, hidden: int, *, tokens: str = "tokens", rngs: nnx.Rngs):
    self.tokens, self.columns = tokens, of(tokens, "mlp")
    self.up = Linear(width, hidden, axes=("embed", self.columns), rngs=rngs)
    self.down = Linear(hidden, width, axes=(self.columns, "embed"), rngs=rngs)

  def __call__(self, x_BND: jax.Array) -> jax.Array:
    h_BNF = checkpoint_name(constrain(self.up(x_BND), ("batch", self.tokens, self.columns)), "mlp_hidden")
    return self.down(jax.nn.gelu(h_BNF, approximate=True))


class SwiGLU(nnx.Module):
  """down(silu(gate(x)) * up(x)), without biases as a rule (Shazeer 2020, "GLU variants improve Transformer")."""

  def __init__(self, width: int, hidden: int, *, tokens: str = "tokens", use_bias: bool = False, rngs: nnx.Rngs):
    self.tokens, self.columns = tokens, of(tokens, "mlp")
    self.gate = Linear(width, hidden, axes=("embed", self.columns), use_bias=use_bias, rngs=rngs)
    self.up = Linear(width, hidden, axes=("embed", self.columns), use_bias=use_bias, rngs=rngs)
    self.down = Linear(hidden, width, axes=(self.columns, "embed"), use_bias=use_bias, rngs=rngs)

  def __call__(self, x_BND: jax.Array) -> jax.Array:
    axes = ("batch", self.tokens, self.columns)
    gate_BNF = checkpoint_name(constrain(self.gate(x_BND), axes), "mlp_hidden")
    up_BNF = checkpoint_name(constrain(self.up(x_BND), axes), "mlp_hidden")
    return self.down(jax.nn.silu(gate_BNF) * up_BNF)
