"""Flags and answers of `kling rollout`; imports nothing heavy until it runs."""

import argparse
import sys
from typing import Any

from kling_jax import answers
from kling_jax.errors import UsageError

SCALES = {"state": "state and text", "history": "the clip before", "rescale": "rescale, 0 to 1"}


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", required=True, help="work directory of an owl run")
  parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
  parser.add_argument("--prompt", required=True, help="what the world is")
  parser.add_argument("--image", help="picture that it starts from (default: one frame filmed from the prompt)")
  parser.add_argument("--clips", type=int, help="how many clips; or --length")
  parser.add_argument("--length", help="ready lengths: 2s, 8s, or 24s with two scene cuts")
  parser.add_argument("--dynamics", action="append", default=[],
                      help="text that leads to the next clip, in order; '' lets the model write it")  # fmt: skip
  parser.add_argument("--repeat_prompt", action="store_true", help="the prompt as dynamics of all other clips")
  parser.add_argument("--cut", action="append", type=int, help="number of a clip that opens a new scene")
  parser.add_argument("--interactive", action="store_true",
                      help="asks before each clip: a text, nothing, /cut [text], /back or /quit")  # fmt: skip
  parser.add_argument("--serve", action="store_true",
                      help="a page on this machine that plays clips as they come: act, cut, go back, fork")  # fmt: skip
  parser.add_argument("--port", type=int, default=0, help="of --serve (default: a free one)")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--steps", type=int, help="sampler steps")
  parser.add_argument("--sampler", help="euler, heun, ddim, dpmpp_2m")
  parser.add_argument("--context_noise", type=float, help="noise on the last latents of the clip before, 0 to 1")
  for name, what in SCALES.items():
    parser.add_argument(f"--guidance_{name}", type=float, help=f"guidance: {what}")
  parser.add_argument("--history_form", help="vanilla, stabilised, fractional")
  parser.add_argument("--history_level", type=float, help="noise level of the history in the last two, 0 to 1")
  parser.add_argument("--temperature", type=float, help="of written dynamics; 0 = the likeliest")
  parser.add_argument("--top_p", type=float, help="sample among the likeliest tokens with this much probability")
  parser.add_argument("--repetition", type=float, help="penalty of tokens that were said, 1 = none")
  parser.add_argument("--out", required=True, help="folder of the clips, the whole film and rollout.json")
  answers.add_flag(parser)


def run(args: argparse.Namespace) -> int:
  from kling_jax.generate import rollout

  settings = rollout.Settings(
    steps=args.steps, method=args.sampler, context_noise=args.context_noise, state=args.guidance_state,
    history=args.guidance_history, rescale=args.guidance_rescale, form=args.history_form, level=args.history_level,
    temperature=args.temperature, top_p=args.top_p, repetition=args.repetition,
  )  # fmt: skip
  if args.serve:
    return _serve(args, settings)
  report = rollout.run(
    args.workdir, args.prompt, args.out, clips=args.clips, length=args.length, image=args.image,
    dynamics=args.dynamics, repeat_prompt=args.repeat_prompt, cuts=args.cut, seed=args.seed, step=args.step,
    settings=settings, ask=input if args.interactive else None, tell=(lambda _: None) if args.json else print,
  )  # fmt: skip
  if args.json:
    answers.show(report)
  elif report["clips"]:
    later = f", then {report['clip_s']} s a clip" if report["clip_s"] is not None else ""
    print(f"{args.out}: {len(report['clips'])} clips, the first after {report['first_clip_s']} s{later}")
  return 0


def _serve(args: argparse.Namespace, settings: Any) -> int:
  from kling_jax.generate import rollout_server

  for flag in ("clips", "length", "dynamics", "repeat_prompt", "cut", "interactive", "json"):
    if getattr(args, flag):
      raise UsageError(f"--{flag} and --serve do not go together: the page asks what happens, clip by clip")
  folders = rollout_server.serve(
    args.workdir, args.prompt, args.out, image=args.image, seed=args.seed, step=args.step, settings=settings,
    port=args.port,
  )  # fmt: skip
  print("films: " + " ".join(map(str, folders)), file=sys.stderr)
  return 0
