"""Scaling laws in print, as objects that state their units, source and contradictions.

Constants are as printed. `get(name)` finds one; `law("lr", params=1e9, tokens=4e9)` takes and gives raw counts.

Why (LR, B) laws have the form they have (reconstruction from standard results; the exact equations 5 to 13 of arXiv
2411.17470 were not readable). Training at a constant rate eta for S = T / B steps of B tokens has a mean squared
gradient of at most 2 D0 B / (eta T) + eta l s^2 / B, with D0 the loss to go, l the curvature, s^2 the gradient noise of
a token, and eta <= 1 / l. The first term says too few updates (it grows with B), the second is a noise floor that a
constant rate never anneals away. Minimising fixes eta / B = sqrt(2 D0 / (l s^2 T)) up to the cap eta = 1 / l, which
then fixes B. So B rises with T, eta / B falls with T, and eta falls with the curvature of larger models: signs and
form, not numbers. Decay or averaged weights lower the noise floor, so these laws belong to a constant rate.
"""

from kling_jax.errors import UsageError, nearest
from kling_jax.models.flop_rules import FlopRule
from kling_jax.scaling.laws import KaplanSurface, Law, PowerLaw, Surface

GIGA = {"params": 1e9, "tokens": 1e9}
PF_DAY = 8.64e19

_YIN_LOSS = Surface.in_units(0.4856, 0.0082, 0.0373, 0.3188, 0.2917, params_unit=1e9, tokens_unit=1e9)
_YIN_HYPER = {
  "lr": PowerLaw(0.0002, {"tokens": -0.0453, "params": -0.1619}, GIGA),
  "batch_tokens": PowerLaw(2.1797e4, {"tokens": 0.8080, "params": 0.1906}, GIGA),
}
_YIN_BOX = {"params": (0.017e9, 0.26e9), "tokens": (2e9, 12e9), "flops": (3e17, 6e18)}

LAWS = {
  law.name: law
  for law in (
    Law(
      "yin2024",
      "Yin et al., Towards Precise Scaling Laws for Video Diffusion Transformers, arXiv 2411.17470: eqs. 10, 13, 14, "
      "15, Table 3",
      "N, T in 1e9; B in tokens; N_opt(C) in parameters and FLOPs",
      _YIN_HYPER
      | {
        "loss": _YIN_LOSS,
        "params": PowerLaw(1.5787, {"flops": 0.4146}),
      },
      _YIN_BOX,
      (
        "The paper prints (Tc/T)^aT, but its Tc and Nc are already the prefactors Tc^aT and Nc^aN: inside the power "
        "they would give losses near 0.9 instead of 0.51.",
        "N_opt here is eq. 14, the fit to IsoFLOP minima (exponent 0.4146). Minimising the paper's own L(T, N) gives "
        "0.478, and eq. 18 prints 0.4294; see yin2024-eq18.",
        "The prefactor of the learning rate has one digit: 1.5e-4 to 2.5e-4, so +-25 % from rounding alone.",
        "C is T * 3/4 * N * (7 + n_ctx / d), not 6 N T (rule cross_dit).",
        "Constant learning rate; with decay or averaged weights the laws may differ.",
        "The curvature in (log lr, log B) is not the paper's: it was fitted here to the 18 runs of its Fig. 4 with "
        "1.07e9 parameters and 1e10 tokens, read off to four digits.",
      ),
      rule=FlopRule("cross_dit", 640),
      residual=9e-4,
      curvature=((0.0031, -0.0023), (-0.0023, 0.0060)),
    ),
    Law(
      "yin2024-eq18",
      "arXiv 2411.17470, eq. 18: N_opt 'predicted from L(T, N)'",
      "parameters, FLOPs",
      {"params": PowerLaw(0.8705, {"flops": 0.4294}), "loss": _YIN_LOSS} | _YIN_HYPER,
      _YIN_BOX,
      (
        "It cannot be derived from Table 3: that surface has the exponent aT / (aT + aN) = 0.478 and 3.35e9 "
        "parameters at 1e22 FLOPs under 6NT, where eq. 18 has 0.4294 and 2.43e9.",
        "The abstract's 40.1 % smaller model is 2.43e9 against 4.04e9 at 1e22; the law behind 4.04e9 is not printed "
        "and does not fit the sub-optimal exponent of 0.5225.",
      ),
      rule=FlopRule("cross_dit", 640),
      residual=9e-4,
    ),
    Law(
      "kaplan2020",
      "Kaplan et al. 2020, arXiv 2001.08361: eqs. 1.4, 1.5, Tables 5 and 6, appendix A",
      "N non-embedding parameters, T tokens, C in PF-days (8.64e19 FLOPs) at the critical batch",
      {
        "loss": KaplanSurface(8.8e13, 5.4e13, 0.076, 0.095),
        "critical_batch_tokens": PowerLaw(2.1e8, {"loss": -4.76}),
        "params": PowerLaw(1.3e9, {"flops": 0.73}, {"flops": PF_DAY}),
        "tokens": PowerLaw(2e10, {"flops": 0.27}, {"flops": PF_DAY}),
        "batch_tokens": PowerLaw(2.0e6, {"flops": 0.24}, {"flops": PF_DAY}),
      },
      notes=("The exponent 0.73 shrinks to 0.50 when the head is counted, warm-up and decay fit the length, and the "
             "hyper-parameters are tuned (Porian et al. 2024, arXiv 2406.19146).",),
    ),
    Law(
      "hoffmann2022",
      "Hoffmann et al. 2022, arXiv 2203.15556, approach 3",
      "parameters, tokens",
      {"loss": Surface(1.69, 406.4, 410.7, 0.34, 0.28)},
      {"params": (4.4e7, 1.6e10), "tokens": (5e9, 5e11)},
      (
        "Rounded to two digits in print; see hoffmann2022-unrounded.",
        "Rejected by a refit of the same runs (law epoch2024): their optimiser stopped early on a mean of losses.",
        "N_opt exponents of their approaches 1, 2, 3: 0.50, 0.49, 0.46.",
      ),
    ),
    Law(
      "hoffmann2022-unrounded",
      "the same constants before rounding, from the source of arXiv 2203.15556, as used by arXiv 2404.10102",
      "parameters, tokens",
      {"loss": Surface(1.69337, 406.401, 410.723, 0.33917, 0.28491)},
      {"params": (4.4e7, 1.6e10), "tokens": (5e9, 5e11)},
    ),
    Law(
      "epoch2024",
      "Besiroglu et al. 2024, Chinchilla Scaling: A replication attempt, arXiv 2404.10102",
      "parameters, tokens",
      {"loss": Surface(1.8172, 482.01, 2085.43, 0.3478, 0.3658)},
      {"params": (4.4e7, 1.6e10), "tokens": (5e9, 5e11)},
      ("From a scale-fitted objective that is near L1; log-Huber with delta 1e-3 on the same points gives 477.8, "
       "2143, 1.81722, 0.34731, 0.36717.",),
    ),
    Law(
      "deepseek2024",
      "DeepSeek LLM, arXiv 2401.02954, eqs. 1 and 4",
      "C in FLOPs = flops_per_token * T; B in tokens",
      {
        "lr": PowerLaw(0.3118, {"flops": -0.1250}),
        "batch_tokens": PowerLaw(0.2920, {"flops": 0.3271}),
        "flops_per_token": PowerLaw(0.1715, {"flops": 0.5243}),
        "tokens": PowerLaw(5.8316, {"flops": 0.4757}),
      },
      notes=("Model size is counted in non-embedding FLOPs a token, attention included.",
             "The exponent of the model's size is 0.450, 0.524 or 0.578 by quality of the data."),
    ),
    Law(
      "steplaw2025",
      "Li et al. 2025, Predictable Scale: Step Law, arXiv 2503.04715",
      "N non-embedding parameters, T and B in tokens",
      {
        "lr": PowerLaw(1.79, {"params": -0.713, "tokens": 0.307}),
        "batch_tokens": PowerLaw(0.58, {"tokens": 0.571}),
      },
      notes=("Language models: the learning rate rises with T, where the video law has it fall.",),
    ),
    Law(
      "liang2024",
      "Liang et al. 2024, Scaling Laws for Diffusion Transformers, arXiv 2410.08184 (images)",
      "parameters, tokens, FLOPs",
      {
        "params": PowerLaw(0.0009, {"flops": 0.5681}),
        "tokens": PowerLaw(186.8535, {"flops": 0.4319}),
        "loss": PowerLaw(2.3943, {"flops": -0.0273}),
        "fid": PowerLaw(2.2566e6, {"flops": -0.234}),
      },
      {"flops": (1e17, 6e18)},
      ("The loss is that at the optimum of the budget: a function of C alone.",),
    ),
    Law(
      "hunyuan2024-image",
      "HunyuanVideo, arXiv 2412.03603: DiT-T2X on images at 256 px",
      "N, T in 1e9; C in PFLOP (1e15)",
      {
        "params": PowerLaw(5.48e-4, {"flops": 0.5634}, {"flops": 1e15}, 1e9),
        "tokens": PowerLaw(0.324, {"flops": 0.4325}, {"flops": 1e15}, 1e9),
      },
      {"params": (9.2e7, 6.6e9)},
    ),
    Law(
      "hunyuan2024-video",
      "HunyuanVideo, arXiv 2412.03603: DiT-T2X on video, started from the image models",
      "N, T in 1e9; C in PFLOP (1e15)",
      {
        "params": PowerLaw(0.0189, {"flops": 0.3618}, {"flops": 1e15}, 1e9),
        "tokens": PowerLaw(0.0108, {"flops": 0.6289}, {"flops": 1e15}, 1e9),
      },
      {"params": (9.2e7, 6.6e9)},
      ("Started from image checkpoints, so its compute is not that of training from scratch.",),
    ),
  )
}  # fmt: skip


def get(name: str) -> Law:
  """The published law of that name; UsageError with the nearest name where there is none."""
  if name not in LAWS:
    raise UsageError(f"no published law {name!r}{nearest(name, LAWS)}")
  return LAWS[name]
