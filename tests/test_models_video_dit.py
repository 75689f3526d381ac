"""The Video DiT against a NumPy restatement of Wan's block, and against what must hold: causality, caches, no-ops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kling_jax.errors import ConfigError
from kling_jax.models.video_dit import PRESETS, Packing, VideoDiT, VideoDiTConfig, preset
from kling_jax.nn import params

CONFIG = VideoDiTConfig(
  width=32, depth=2, heads=2, mlp_width=48, latent_channels=3, text_width=12, fps=True, state_width=10
)
BATCH, FRAMES, HEIGHT, WIDTH, TEXT = 2, 4, 4, 6, 5

# Programs here run for a millisecond and take seconds to compile at full optimisation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def describe(config):
  return params.abstract(lambda: VideoDiT(config, rngs=nnx.Rngs(0)))


GRAPH, SHAPES, AXES = describe(CONFIG)


def random_weights(seed=0) -> dict[str, np.ndarray]:
  """Every parameter away from its initial value, so that nothing is a no-op."""
  rng = np.random.default_rng(seed)
  draw = {}
  for name, leaf in SHAPES.items():
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    draw[name] = noise / np.sqrt(leaf.shape[-2]) if name.endswith("kernel") else 0.3 * noise + name.endswith("scale")
  return draw


def draw_inputs() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(1)
  x = {
    "x_BTHWC": rng.standard_normal((BATCH, FRAMES, HEIGHT, WIDTH, CONFIG.latent_channels)),
    "time": rng.uniform(size=(BATCH, FRAMES)),
    "text_BLD": rng.standard_normal((BATCH, TEXT, CONFIG.text_width)),
  }
  return {name: value.astype(np.float32) for name, value in x.items()}


WEIGHTS, INPUTS = random_weights(), draw_inputs()
TOLD = {
  "text_mask_BL": np.arange(TEXT) < np.array([[3], [5]]),
  "scores_BM": np.array([[10, 500, 990], [0, np.nan, 300]], np.float32),
  "scores_known_BM": np.array([[True, True, True], [True, False, True]]),
  "fps_B": np.array([16.0, 24.0], np.float32),
}
STATE = np.random.default_rng(2).standard_normal((BATCH, 3, CONFIG.state_width)).astype(np.float32)
ALL = {**INPUTS, **TOLD, "state_BQD": STATE}


@functools.cache
def program(causal_frames=None):
  """The compiled network; JAX keeps one program for each set of inputs."""
  return quick_jit(lambda weights, inputs: params.merge(GRAPH, weights)(**inputs, causal_frames=causal_frames))


def run(inputs, weights=WEIGHTS, causal_frames=None):
  return jax.tree.map(np.asarray, program(causal_frames)(weights, inputs))


# ---- Wan 2.1's network once more, in NumPy and float64, written from the paper's figures and its released code's order


class NumpyWan:
  def __init__(self, weights, config):
    self.w = {name: np.asarray(leaf, np.float64) for name, leaf in weights.items()}
    self.config = config

  def linear(self, name, x, layer=...):
    return x @ self.w[f"{name}.kernel"][layer] + self.w[f"{name}.bias"][layer]

  @staticmethod
  def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

  @staticmethod
  def silu(x):
    return x / (1 + np.exp(-x))

  @staticmethod
  def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  @staticmethod
  def sinusoid(value):
    angle = value * 10_000.0 ** (-np.arange(128) / 128)
    return np.concatenate([np.cos(angle), np.sin(angle)])

  def embed(self, name, value):
    return self.linear(f"{name}.out", self.silu(self.linear(f"{name}.into", self.sinusoid(value))))

  def rope(self, x, grid):
    """Complex turn of one head (N, E): a third of the pairs for each axis, what is left over to the frame."""
    pairs = x.shape[-1] // 2
    sizes = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    places = np.stack(np.unravel_index(np.arange(len(x)), grid), axis=1)
    phase = np.concatenate(
      [places[:, [axis]] * 10_000.0 ** (-np.arange(size) / size) for axis, size in enumerate(sizes)], axis=1
    )
    turned = (x[:, ::2] + 1j * x[:, 1::2]) * np.exp(1j * phase)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

  def attend(self, name, layer, x, asked, seen, grid=None):
    rms = lambda y: y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-6)
    q = rms(self.linear(f"{name}.q", x, layer)) * self.w[f"{name}.q_norm.scale"][layer]
    k = rms(self.linear(f"{name}.k", asked, layer)) * self.w[f"{name}.k_norm.scale"][layer]
    v = self.linear(f"{name}.v", asked, layer)
    out = []
    for q_head, k_head, v_head in zip(*(np.split(y, self.config.heads, axis=1) for y in (q, k, v)), strict=True):
      if grid is not None:
        q_head, k_head = self.rope(q_head, grid), self.rope(k_head, grid)
      p = np.exp(q_head @ k_head.T / np.sqrt(q_head.shape[1])) * seen
      out.append(p / p.sum(1, keepdims=True) @ v_head)
    return self.linear(f"{name}.out", np.concatenate(out, axis=1), layer)

  def __call__(self, x, time, text, text_mask, scores, known, fps, state):
    """One sample: x (T, H, W, C), a time a frame."""
    frames, height, width, channels = x.shape
    grid = (frames, height // 2, width // 2)
    cut = x.reshape(frames, grid[1], 2, grid[2], 2, channels).transpose(0, 1, 3, 2, 4, 5)
    h = self.linear("patch.project", cut.reshape(-1, 4 * channels))
    e = np.stack([self.embed("time", 1000 * t) for t in time]) + self.embed("fps", fps)
    for name, score, is_known in zip(self.config.conditions, scores, known, strict=True):
      e = e + (self.embed(f"conditions.{name}", score) if is_known else self.w[f"conditions.{name}.null"])
    rows = self.linear("modulation.out", self.silu(e)).reshape(frames, 6, -1)
    tokens = lambda row: np.repeat(row, grid[1] * grid[2], axis=0)
    text, state = (
      self.linear(f"{n}.out", self.gelu(self.linear(f"{n}.into", y))) for n, y in (("text", text), ("state", state))
    )
    for layer in range(self.config.depth):
      s1, c1, g1, s2, c2, g2 = (tokens(row) for row in (rows + self.w["blocks.modulation.table"][layer]).swapaxes(0, 1))
      y = self.norm(h) * (1 + c1) + s1
      h = h + g1 * self.attend("blocks.self_attn", layer, y, y, 1.0, grid)
      y = self.norm(h) * self.w["blocks.cross_norm.scale"][layer] + self.w["blocks.cross_norm.bias"][layer]
      h = h + self.attend("blocks.cross_attn", layer, y, text, text_mask)
      h = h + self.attend("blocks.state_attn", layer, y, state, 1.0)
      y = self.gelu(self.linear("blocks.mlp.up", self.norm(h) * (1 + c2) + s2, layer))
      h = h + g2 * self.linear("blocks.mlp.down", y, layer)
    shift, scale = (tokens(e + row) for row in self.w["head.modulation.table"])
    y = self.linear("head.project", self.norm(h) * (1 + scale) + shift)
    return y.reshape(*grid, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)


def test_network_is_wans_restated_in_numpy():
  ours = run(ALL)
  wan = NumpyWan(WEIGHTS, CONFIG)
  for b in range(BATCH):
    given = (*(v[b] for v in INPUTS.values()), *(v[b] for v in TOLD.values()), STATE[b])
    np.testing.assert_allclose(ours[b], wan(*given), rtol=2e-4, atol=2e-4)


def test_one_time_a_sample_is_that_time_in_each_frame():
  time = np.array([0.3, 0.8], np.float32)
  by_frame = run({**ALL, "time": np.tile(time[:, None], (1, FRAMES))})
  np.testing.assert_allclose(run({**ALL, "time": time}), by_frame, atol=1e-5)


def test_hidden_text_does_not_matter_and_shown_text_does():
  before = run(ALL)
  text = INPUTS["text_BLD"].copy()
  text[0, 3:] = 1e3
  np.testing.assert_array_equal(run({**ALL, "text_BLD": text}), before)
  text[0, 2] += 1
  assert np.abs(run({**ALL, "text_BLD": text}) - before)[0].max() > 1e-3


# ---- zero initial values


@pytest.fixture(scope="module")
def fresh():
  """Parameters as they are born."""
  build = lambda: {
    name: leaf[...] for name, leaf in params.flatten(nnx.state(VideoDiT(CONFIG, rngs=nnx.Rngs(0)))).items()
  }
  return jax.tree.map(np.asarray, quick_jit(build)())


def test_scores_and_state_are_no_ops_at_step_zero_and_only_then(fresh):
  """The other layers are moved first, since a fresh network predicts zero whatever it is given."""
  moved = {
    k: WEIGHTS[k] if not k.startswith(("conditions", "fps")) and "state_attn" not in k else fresh[k] for k in fresh
  }
  silent = {**ALL, "scores_known_BM": np.zeros((BATCH, 3), bool), "state_BQD": 0 * STATE}
  plain = run(silent, moved)
  np.testing.assert_array_equal(run(ALL, moved), plain)
  np.testing.assert_allclose(run(INPUTS | {"text_mask_BL": TOLD["text_mask_BL"]}, moved), plain, atol=1e-5)
  for name in (
    "conditions.motion.out.bias",
    "conditions.aesthetic.null",
    "fps.out.bias",
    "blocks.state_attn.out.kernel",
  ):
    assert np.abs(run(ALL, {**moved, name: WEIGHTS[name]}) - plain).max() > 1e-3, name


def test_fresh_blocks_have_closed_gates_and_the_prediction_is_zero(fresh):
  for name in (
    "modulation.out.kernel",
    "blocks.modulation.table",
    "head.project.kernel",
    "blocks.state_attn.out.kernel",
  ):
    assert not fresh[name].any()
  np.testing.assert_array_equal(run(ALL, fresh), 0)
  assert fresh["blocks.self_attn.q.kernel"][0].std() > 0.1
  assert not np.array_equal(*fresh["blocks.self_attn.q.kernel"])  # each layer draws its own


# ---- time: causality, context, cache


def test_block_causal_gradients_reach_back_and_never_ahead():
  weigh = lambda x, g: jnp.vdot(g, params.merge(GRAPH, WEIGHTS)(**(INPUTS | {"x_BTHWC": x}), causal_frames=2))
  slope = quick_jit(jax.grad(weigh))
  reached = np.zeros((FRAMES, FRAMES), bool)
  for frame in range(FRAMES):
    g = np.zeros_like(INPUTS["x_BTHWC"])
    g[:, frame] = 1
    reached[frame] = np.abs(slope(INPUTS["x_BTHWC"], g)).max(axis=(0, 2, 3, 4)) > 0
  np.testing.assert_array_equal(reached, np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], bool))


def _frames(start, stop):
  return {**INPUTS, "x_BTHWC": INPUTS["x_BTHWC"][:, start:stop], "time": INPUTS["time"][:, start:stop]}


def test_cache_and_context_continue_the_whole_forward():
  whole = run(INPUTS, causal_frames=2)
  cache = jax.tree.map(np.asarray, params.merge(GRAPH, WEIGHTS).init_cache(BATCH, FRAMES, HEIGHT, WIDTH))
  first, cache = run({**_frames(0, 2), "cache": cache})
  second, cache = run({**_frames(2, 4), "cache": cache})
  np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-5)
  assert cache.length == FRAMES * (HEIGHT // 2) * (WIDTH // 2)

  past = {"context_BTHWC": INPUTS["x_BTHWC"][:, :2], "context_time": INPUTS["time"][:, :2]}
  np.testing.assert_allclose(run({**_frames(2, 4), **past}, causal_frames=2), whole[:, 2:], atol=1e-5)

  over, _ = run({**_frames(2, 4), "cache": cache})
  assert np.isnan(over).all()  # a full cache says so


def test_several_causal_blocks_go_through_the_cache_at_once():
  empty = params.merge(GRAPH, WEIGHTS).init_cache(BATCH, FRAMES, HEIGHT, WIDTH)
  at_once, _ = run({**INPUTS, "cache": empty}, causal_frames=2)
  np.testing.assert_allclose(at_once, run(INPUTS, causal_frames=2), atol=1e-5)


def test_a_cut_hides_the_context_and_stops_its_gradient():
  """Row 0 is cut: it is a clip without a past. Row 1 shows the second of its two context frames only."""
  mask = np.array([[False, False], [False, True]])
  past = {"context_BTHWC": INPUTS["x_BTHWC"][:, :2], "context_time": INPUTS["time"][:, :2]}
  cut = run({**_frames(2, 4), **past, "context_mask_BT": mask}, causal_frames=2)
  np.testing.assert_allclose(cut[0], run(_frames(2, 4), causal_frames=2)[0], atol=1e-5)
  late = {name: value[:, 1:] for name, value in past.items()}
  np.testing.assert_allclose(cut[1], run({**_frames(2, 4), **late}, causal_frames=2)[1], atol=1e-5)

  cache = params.merge(GRAPH, WEIGHTS).init_cache(BATCH, FRAMES, HEIGHT, WIDTH)
  _, cache = run({**_frames(0, 2), "cache": cache, "context_mask_BT": mask}, causal_frames=2)
  cached, _ = run({**_frames(2, 4), "cache": cache, "context_mask_BT": mask}, causal_frames=2)
  np.testing.assert_allclose(cached, cut, atol=1e-5)

  def weigh(context):
    given = _frames(2, 4) | past | {"context_BTHWC": context, "context_mask_BT": mask}
    return jnp.sum(jnp.square(params.merge(GRAPH, WEIGHTS)(**given)))  # frames see ahead: the harder case

  slope = np.abs(quick_jit(jax.grad(weigh))(past["context_BTHWC"])).max(axis=(2, 3, 4))
  np.testing.assert_array_equal(slope > 0, mask)
  assert np.all(slope[~mask] == 0)


def test_a_fresh_state_stream_is_the_base_network_to_the_bit(fresh):
  """The same weights in a network without state stream and frame rate; other layers are moved off zero."""
  moved = {k: fresh[k] if k.startswith(("state", "fps", "blocks.state_attn.out")) else WEIGHTS[k] for k in fresh}
  base_graph, base_shapes, _ = describe(dataclasses.replace(CONFIG, fps=False, state_width=None))
  base = {name: moved[name] for name in base_shapes}
  given = INPUTS | {"text_mask_BL": TOLD["text_mask_BL"]}
  plain = quick_jit(lambda weights: params.merge(base_graph, weights)(**given))(base)
  np.testing.assert_array_equal(run(given | {"state_BQD": STATE, "fps_B": TOLD["fps_B"]}, moved), plain)


# ---- how it is run must not matter


def _loss(remat, scan=True):
  config = dataclasses.replace(CONFIG, conditions=(), fps=False, state_width=None, remat=remat)
  graph, shapes, _ = describe(config)
  loss = lambda weights: jnp.mean(jnp.square(params.merge(graph, weights)(**INPUTS, scan=scan)))
  return loss, {name: WEIGHTS[name] for name in shapes}


@functools.cache
def _loss_and_grads(remat, scan):
  loss, weights = _loss(remat, scan)
  return quick_jit(jax.value_and_grad(loss))(weights)


@pytest.mark.parametrize(
  ("remat", "scan"), [("full", True), ("names:attention", False), ("offload:block,attention", True)]
)
def test_remat_and_unrolling_change_neither_loss_nor_gradients(remat, scan):
  loss, grads = _loss_and_grads("none", True)
  other_loss, other_grads = _loss_and_grads(remat, scan)
  np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
  for name, leaf in grads.items():
    np.testing.assert_allclose(other_grads[name], leaf, rtol=1e-4, atol=1e-5, err_msg=name)


def test_remat_keeps_for_the_backward_pass_just_what_it_names():
  def saved(remat):  # what the scan stacks, layer by layer: (S, B, ...)
    loss, weights = _loss(remat)
    residuals = jax.tree.leaves(jax.eval_shape(lambda w: jax.vjp(loss, w)[1], weights))
    return sum(leaf.size for leaf in residuals if leaf.shape[:2] == (CONFIG.depth, BATCH))

  stack = CONFIG.depth * BATCH * FRAMES * (HEIGHT // 2) * (WIDTH // 2)
  full = saved("full")
  assert saved("names:mlp_hidden") - full == stack * CONFIG.mlp_width
  assert saved("names:attention") - full == stack * 2 * CONFIG.width  # self and cross
  assert saved("names:attention,mlp_hidden") - full == stack * (2 * CONFIG.width + CONFIG.mlp_width)
  text = CONFIG.depth * BATCH * TEXT * 2 * CONFIG.width
  assert saved("names:qkv") - full == stack * 4 * CONFIG.width + text  # three and one on video tokens, two on text
  assert saved("none") > saved("names:qkv,attention,mlp_hidden") > full


def test_bfloat16_computes_in_bfloat16_and_predicts_float32():
  exact = run(ALL)
  half = run({**ALL, "x_BTHWC": INPUTS["x_BTHWC"].astype(jnp.bfloat16)})
  assert half.dtype == np.float32
  assert 0 < np.abs(half - exact).max() < 0.1 * np.abs(exact).max()


# ---- shapes and sizes


def _count(config, prefix=""):
  return sum(leaf.size for name, leaf in describe(config)[1].items() if name.startswith(prefix))


@pytest.mark.parametrize(("size", "wan"), [("1.3b", 1_418_996_800), ("14b", 14_288_491_584)])
def test_wan_sizes_have_wans_parameters_to_the_last(size, wan):
  """Without the scores, which are ours: the numbers that Wan 2.1 reports on loading its text-to-video models."""
  assert _count(preset(size, conditions=())) == wan
  assert wan < _count(preset(size)) < 1.01 * wan


def test_30b_is_thirty_billion():
  assert _count(preset("30b")) == pytest.approx(30e9, rel=0.005)


@pytest.mark.parametrize("size", [name for name in PRESETS if name.startswith("n")])
def test_scaling_family_has_width_cubed_kernel_parameters(size):
  """N counts the kernels of the blocks alone: no biases, norms, modulation or embeddings (arXiv 2411.17470)."""
  config = preset(size)
  kernels = [
    s.size for name, s in describe(config)[1].items() if name.startswith("blocks.") and name.endswith("kernel")
  ]
  assert sum(kernels) == config.width**3
  assert sum(kernels) / 1e9 == pytest.approx(float(size[1:-1]), rel=0.05)
  assert config.head_size == 64


@pytest.mark.parametrize(("size", "head_size"), [("d32", 32), ("d96", 96), ("d256", 64), ("d144", 72)])
def test_any_width_has_a_member_of_the_scaling_family(size, head_size):
  config = preset(size)
  kernels = [
    s.size for name, s in describe(config)[1].items() if name.startswith("blocks.") and name.endswith("kernel")
  ]
  assert sum(kernels) == int(size[1:]) ** 3
  assert config.head_size == head_size
  assert preset("d640") == preset("n0.26b")
  assert preset("d32x2") == preset("d32") and preset("d48x2") == dataclasses.replace(preset("d48"), depth=2)


def test_every_parameter_names_its_axes_and_blocks_are_stacked():
  for name, axes in AXES.items():
    assert len(axes) == len(SHAPES[name].shape)
    assert (axes[0] == "layers") == name.startswith("blocks.")
    assert any(axes) or name in ("text.out.bias", "state.out.bias")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"x_BTHWC": np.zeros((2, 4, 4, 6, 5), np.float32)}, "latent_channels=3"),
    ({"x_BTHWC": np.zeros((2, 4, 5, 6, 3), np.float32)}, "5 x 6 do not divide"),
    ({"time": np.zeros((2, 3), np.float32)}, r"time \(2, 3\) is neither"),
    ({"time": np.float32(0.5)}, r"time \(\) is neither"),
    ({"scores_BM": np.zeros((2, 2), np.float32)}, "scores have 2 columns"),
    ({"context_mask_BT": np.ones((2, 1), bool)}, "without context frames or a cache"),
    (
      {"context_BTHWC": INPUTS["x_BTHWC"], "context_mask_BT": np.ones((2, 1), bool)},
      r"context_mask_BT \(2, 1\) is not \(B, context frames\)=\(2, 4\)",
    ),
  ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
  with pytest.raises(ConfigError, match=message):
    jax.eval_shape(lambda: params.merge(GRAPH, WEIGHTS)(**(INPUTS | change)))


def test_configs_that_cannot_be_are_named():
  with pytest.raises(ConfigError, match=r"did you mean '1\.3b'"):
    preset("1.3B")
  with pytest.raises(ConfigError, match="multiple of 16"):
    preset("d100")
  with pytest.raises(ConfigError, match="did you mean 'attention'"):
    preset("XS", remat="names:atention")
  with pytest.raises(ConfigError, match="known: none, full"):
    preset("XS", remat="some")
  with pytest.raises(ConfigError, match="whole, even size"):
    preset("XS", heads=3)


# ---- packed clips


def test_packed_clips_are_what_each_is_alone():
  """Three frames of one clip and one of another in a row, with three and two text tokens and scores of their own."""
  repeat = lambda *values: np.tile(np.repeat(np.arange(2, dtype=np.int32), values), (BATCH, 1))
  packing = Packing(repeat(3, 1), np.tile(np.array([0, 1, 2, 0], np.int32), (BATCH, 1)), repeat(3, 2))
  scores_B2M = np.stack([np.nan_to_num(TOLD["scores_BM"]), np.full((BATCH, 3), 700, np.float32)], 1)
  scores_BTM = np.take(scores_B2M, [0, 0, 0, 1], axis=1)
  packed = run({**INPUTS, "scores_BM": scores_BTM, "packing": packing})
  for clip, (frames, text) in enumerate([(slice(0, 3), slice(0, 3)), (slice(3, 4), slice(3, 5))]):
    alone = run({
      "x_BTHWC": INPUTS["x_BTHWC"][:, frames], "time": INPUTS["time"][:, frames],
      "text_BLD": INPUTS["text_BLD"][:, text], "scores_BM": scores_B2M[:, clip],
    })  # fmt: skip
    np.testing.assert_allclose(packed[:, frames], alone, rtol=2e-4, atol=2e-5)
  with pytest.raises(ConfigError, match="packing.place_BT is"):
    run({**INPUTS, "packing": packing._replace(place_BT=packing.place_BT[:, :2])})
  with pytest.raises(ConfigError, match="neither context nor cache nor state"):
    run({**INPUTS, "state_BQD": STATE, "packing": packing})
