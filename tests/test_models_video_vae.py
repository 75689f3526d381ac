"""The causal video VAE: chunks equal the whole, both equal Wan 2.1's chunk rule written down apart, and it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kling_jax import errors
from kling_jax.models import video_vae
from kling_jax.nn import params

CONFIG = dataclasses.replace(video_vae.PRESETS["xs"], base=4, channels=2)
FRAMES = 13


@pytest.fixture(scope="module")
def fresh():
  """Graph and weights, none of them zero or an identity, so that no path is hidden."""
  graph, shapes, _ = params.abstract(lambda: video_vae.VideoVAE(CONFIG, rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(1)
  draw = lambda shape: rng.normal(scale=np.prod(shape[:-1]) ** -0.5, size=shape).astype(np.float32)
  return graph, {
    name: draw(leaf.shape) if leaf.ndim > 1 else name.endswith("scale") + 0.2 * draw(leaf.shape)
    for name, leaf in shapes.items()
  }


@pytest.fixture(scope="module")
def model(fresh):
  graph, weights = fresh
  return params.merge(graph, jax.tree.map(jnp.asarray, weights))


@pytest.fixture(scope="module")
def video():
  return jax.random.uniform(jax.random.key(2), (1, FRAMES, 16, 16, 3), minval=-1, maxval=1)


@pytest.fixture(scope="module")
def whole(model, video):
  """(latents, frames) of one pass each over the whole video."""
  latents, _ = jax.jit(model.encode_chunk)(video)
  frames, _ = jax.jit(model.decode_chunk)(latents)
  return latents, frames


# ---- chunks ----------------------------------------------------------------------------------------------------------


def test_streaming_equals_whole(model, video, whole):
  latents, frames = whole
  assert latents.shape == (1, *model.latent_shape(FRAMES, 16, 16)) == (1, 4, 2, 2, 2)
  assert frames.shape == video.shape
  np.testing.assert_allclose(jax.jit(model.encode)(video), latents, atol=1e-5)
  np.testing.assert_allclose(jax.jit(model.decode)(latents), frames, atol=1e-5)


def test_the_host_may_stream_any_chunks_and_the_first_frame_is_an_image(model, video, whole):
  for call, given, expected in ((model.encode_chunk, video, whole[0]), (model.decode_chunk, *whole)):
    call = jax.jit(call)
    image, cache = call(given[:, :1])
    rest, _ = call(given[:, 1:], cache)
    np.testing.assert_allclose(jnp.concatenate([image, rest], 1), expected, atol=1e-5)


def test_memory_of_streaming_does_not_grow_with_the_video(model):
  def temporary(function, frames, shape):
    return jax.jit(function).lower(jnp.zeros((1, frames, *shape))).compile().memory_analysis().temp_size_in_bytes

  once = lambda latents: model.decode_chunk(latents)[0]
  latent, frame = (4, 4, 2), 32 * 32 * 3 * 4
  short, long = (temporary(model.decode, t, latent) for t in (3, 9))
  assert long - short <= 3 * 6 * 4 * frame  # the output itself (and copies of it), no activations
  assert temporary(once, 9, latent) > 3 * long


def test_the_future_has_no_say(model, video, whole):
  changed, _ = jax.jit(model.encode_chunk)(video.at[:, 5:].set(0))
  np.testing.assert_allclose(changed[:, :2], whole[0][:, :2], atol=1e-5)
  assert np.abs(changed[:, 2:] - whole[0][:, 2:]).max() > 1e-3
  changed, _ = jax.jit(model.decode_chunk)(whole[0].at[:, 2:].set(0))
  np.testing.assert_allclose(changed[:, :5], whole[1][:, :5], atol=1e-5)
  assert np.abs(changed[:, 5:] - whole[1][:, 5:]).max() > 1e-3


# ---- Wan 2.1's rule, chunk by chunk ----------------------------------------------------------------------------------


class Reference:
  """The forward pass in Wan's terms: lists of remembered frames, "repeat" marks, native 3-D convolutions."""

  def __init__(self, model):
    self.model, self.memory = model, {}

  def conv(self, layer, x, pad_time, spatial=1, stride=(1, 1, 1)):
    kernel, bias = layer.kernel[...], layer.bias[...]
    kernel = kernel if kernel.ndim == 5 else kernel[None]
    padding = (
      ((pad_time, 0), (spatial, spatial), (spatial, spatial)) if isinstance(spatial, int) else ((0, 0), *spatial)
    )
    layout = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=layout) + bias

  def causal(self, name, layer, x, spatial=1):
    held = self.memory.get(name)
    keep = x[:, -2:]
    if keep.shape[1] < 2 and held is not None:
      keep = jnp.concatenate([held[:, -1:], keep], 1)
    self.memory[name] = keep
    pad = 2
    if held is not None:
      x, pad = jnp.concatenate([held, x], 1), 2 - held.shape[1]
    return self.conv(layer, x, pad, spatial)

  def norm(self, layer, x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True) * np.sqrt(x.shape[-1]) * layer.scale[...]

  def residual(self, name, block, x):
    kept = x if block.shortcut is None else self.conv(block.shortcut, x, 0, 0)
    x = self.causal(f"{name}1", block.conv1, jax.nn.silu(self.norm(block.norm1, x)))
    return kept + self.causal(f"{name}2", block.conv2, jax.nn.silu(self.norm(block.norm2, x)))

  def attention(self, name, block, x):
    flat = self.norm(block.norm, x).reshape(*x.shape[:2], -1, x.shape[-1])
    q, k, v = jnp.split(flat @ block.qkv.kernel[0, 0] + block.qkv.bias[...], 3, -1)
    weights = jax.nn.softmax(jnp.einsum("btnc,btmc->btnm", q, k) / np.sqrt(x.shape[-1]))
    mixed = jnp.einsum("btnm,btmc->btnc", weights, v) @ block.out.kernel[0, 0] + block.out.bias[...]
    return x + mixed.reshape(x.shape)

  def down(self, name, block, x):
    x = self.conv(block.frame, x, 0, ((0, 1), (0, 1)), (1, 2, 2))
    if block.time is None:
      return x
    held, self.memory[name] = self.memory.get(name), x[:, -1:]
    return x if held is None else self.conv(block.time, jnp.concatenate([held, x], 1), 0, 0, (2, 1, 1))

  def up(self, name, block, x):
    if block.time is not None:
      held = self.memory.get(name)
      if held is None:
        self.memory[name] = "repeat"
      else:
        if isinstance(held, str):
          y, before = self.conv(block.time, x, 2, 0), jnp.zeros_like(x[:, :1])
        else:
          y, before = self.conv(block.time, jnp.concatenate([held, x], 1), 0, 0), held[:, -1:]
        self.memory[name] = jnp.concatenate([before, x], 1)[:, -2:]
        channels = x.shape[-1]
        x = jnp.stack([y[..., :channels], y[..., channels:]], 2).reshape(x.shape[0], -1, *x.shape[2:])
    return self.conv(block.frame, x.repeat(2, 2).repeat(2, 3), 0, 1)

  def run(self, coder, x):
    kinds = {
      video_vae.ResidualBlock: self.residual,
      video_vae.FrameAttention: self.attention,
      video_vae.Downsample: self.down,
      video_vae.Upsample: self.up,
    }
    x = self.causal("stem", coder.stem, x)
    for number, block in enumerate(coder.blocks):
      x = kinds[type(block)](f"block{number}", block, x)
    return self.causal("head", coder.head, jax.nn.silu(self.norm(coder.norm, x)))


def test_both_ways_equal_wans_chunk_rule(model, video, whole):
  def wan(video, latents):
    encoder, decoder = Reference(model), Reference(model)
    chunks = [video[:, :1], *(video[:, start : start + 4] for start in range(1, FRAMES, 4))]
    moments = encoder.conv(model.quant, jnp.concatenate([encoder.run(model.encoder, x) for x in chunks], 1), 0, 0)
    raw = decoder.conv(model.post_quant, model.normalisation.undo(latents), 0, 0)
    frames = [decoder.run(model.decoder, raw[:, t : t + 1]) for t in range(raw.shape[1])]
    return moments, jnp.concatenate(frames, 1)

  moments, frames = jax.jit(wan)(video, whole[0])
  mean, log_variance, _ = jax.jit(model.encode_moments)(video)
  np.testing.assert_allclose(mean, moments[..., :2], atol=2e-5)
  np.testing.assert_allclose(log_variance, moments[..., 2:], atol=2e-5)
  np.testing.assert_allclose(whole[1], frames, atol=2e-5)


def test_wan_2_1_has_its_released_shape():
  """Totals and a few shapes of the released Wan2.1_VAE (194 tensors, 126,892,531 parameters)."""
  build = lambda: video_vae.VideoVAE.preset("wan2.1", rngs=nnx.Rngs(0))
  _, shapes, axes = params.abstract(build)
  own = {name: shape for name, shape in shapes.items() if not name.startswith("normalisation.")}
  assert params.count(own) == 126_892_531 and len(own) == 194
  assert shapes["encoder.stem.kernel"].shape == (3, 3, 3, 3, 96)
  assert shapes["encoder.head.kernel"].shape == (3, 3, 3, 384, 32)
  assert shapes["decoder.head.kernel"].shape == (3, 3, 3, 96, 3)
  assert axes["encoder.stem.kernel"] == (None, None, None, "conv_in", None)
  assert video_vae.VideoVAE.geometry("wan2.1").latent_shape(81, 480, 832) == (21, 60, 104, 16)


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_fresh_kernels_have_unit_gain_and_the_stated_starts():
  weights = params.create(lambda: video_vae.VideoVAE(CONFIG, rngs=nnx.Rngs(0)))
  stem = weights["decoder.stem.kernel"]
  np.testing.assert_allclose(np.std(stem) * np.sqrt(np.prod(stem.shape[:-1])), 1, rtol=0.1)
  times = [leaf for name, leaf in weights.items() if name.endswith(".time.kernel")]
  assert len(times) == 4 and all(np.sum(leaf) == leaf.shape[-1] for leaf in times)  # one tap, one input each
  assert not any(np.any(leaf) for name, leaf in weights.items() if name.endswith(".out.kernel"))
  np.testing.assert_array_equal(weights["quant.bias"], [0, 0, -6, -6])


def test_normalisation_undoes_itself_and_wan_has_its_constants():
  normalisation = video_vae.Normalisation(jnp.asarray(video_vae.WAN_MEAN), jnp.asarray(video_vae.WAN_STD))
  raw = jax.random.normal(jax.random.key(0), (1, 2, 2, 2, 16))
  np.testing.assert_allclose(normalisation.undo(normalisation.apply(raw)), raw, atol=1e-5)
  expected = (raw - np.array(video_vae.WAN_MEAN)) / np.array(video_vae.WAN_STD)
  np.testing.assert_allclose(normalisation.apply(raw), expected, atol=1e-5)


def test_remat_changes_no_gradient(fresh, video):
  graph, weights = fresh
  remat_config = dataclasses.replace(CONFIG, remat=True)
  again = params.abstract(lambda: video_vae.VideoVAE(remat_config, rngs=nnx.Rngs(0)))[0]

  def loss(graph, weights):
    model = params.merge(graph, weights)
    return jnp.mean(jnp.square(model.decode_raw(model.encode_moments(video[:, :5])[0])[0] - video[:, :5]))

  plain, remat = (jax.jit(jax.grad(functools.partial(loss, graph)))(weights) for graph in (graph, again))
  for name in weights:
    np.testing.assert_allclose(plain[name], remat[name], atol=1e-5, err_msg=name)


def test_a_video_of_zeros_has_finite_gradients(fresh):
  graph, weights = fresh
  loss = lambda weights, video: jnp.sum(params.merge(graph, weights).encode_moments(video)[0] ** 2)
  gradient = jax.jit(jax.grad(loss))(weights, jnp.zeros((1, 1, 8, 8, 3)))
  assert all(np.isfinite(leaf).all() for leaf in gradient.values())


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(model, video, whole):
  latents = jax.jit(model.encode)(video.astype(jnp.bfloat16))
  assert latents.dtype == jnp.float32
  assert 1e-4 < np.abs(latents - whole[0]).max() < 0.1 * np.abs(whole[0]).max()


def test_flops_count_the_products_of_the_jaxpr():
  config = video_vae.PRESETS["xs"]
  graph, shapes, _ = params.abstract(lambda: video_vae.VideoVAE(config, rngs=nnx.Rngs(0)))
  encode = jax.make_jaxpr(lambda weights, x: params.merge(graph, weights).encode_moments(x))(
    shapes, jnp.zeros((1, 9, 16, 24, 3))
  )
  decode = jax.make_jaxpr(lambda weights, x: params.merge(graph, weights).decode_raw(x))(
    shapes, jnp.zeros((1, 3, 2, 3, 4))
  )
  expected = video_vae.forward_flops(config, 9, 16, 24)
  assert expected == (products(encode.jaxpr), products(decode.jaxpr))


def products(jaxpr) -> float:
  """2 x output size x contraction size over all dots and convolutions."""
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      ((contracting, _), _) = equation.params["dimension_numbers"]
      lengths = [equation.invars[0].aval.shape[axis] for axis in contracting]
      total += 2.0 * equation.outvars[0].aval.size * np.prod(lengths)
    elif equation.primitive.name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      total += 2.0 * equation.outvars[0].aval.size * np.prod(kernel[:-1])
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", None)
      total += products(inner) if inner is not None else 0
  return total


@pytest.mark.parametrize(
  ("size", "nearest"), [((16, 64, 64), "17 x 64 x 64"), ((1, 60, 64), "1 x 64 x 64"), ((0, 64, 64), "1 x 64 x 64")]
)
def test_sizes_that_do_not_divide_name_the_nearest_that_do(model, size, nearest):
  with pytest.raises(errors.ConfigError, match=nearest):
    model.latent_shape(*size)


def test_presets_and_shapes_are_checked():
  with pytest.raises(errors.ConfigError, match=r"did you mean 'wan2\.1'"):
    video_vae.preset("wan21")
  with pytest.raises(errors.ConfigError, match="halve_time names 1"):
    video_vae.VideoVAEConfig(base=8, halve_time=(True,))
