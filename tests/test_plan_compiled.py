"""What a plan reads from a compiled program, and the bound that it makes of it."""

import json
import math
import subprocess
import sys
import types

import numpy as np
import pytest

from kling_jax import cli
from kling_jax import config as config_lib
from kling_jax.errors import UsageError
from kling_jax.models import flops
from kling_jax.plan import collectives, compiled, roofline, work
from kling_jax.plan.topology import Topology
from kling_jax.train import sharding, task

MESH = {"replica": 1, "fsdp": 4, "context": 2, "tensor": 1}
# As the TPU compiler writes it: no trip count, a counter that is compared with a constant; layouts with tiles.
TEXT = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[30,8,128], bf16[8,128])) -> (s32[], bf16[30,8,128], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[30,8,128]{2,1,0:T(8,128)(2,1)}, bf16[8,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %stack = bf16[30,8,128]{2,1,0} get-tuple-element(%p), index=1
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %gather = bf16[32,128]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  %hop = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  %work = bf16[8,128]{1,0} fusion(%gather), kind=kOutput, calls=%fused
  %hopped = bf16[8,128]{1,0} collective-permute-done(%hop)
  %bare = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[], u32[]) collective-permute-start(%work), source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  %bared = bf16[8,128]{1,0} collective-permute-done(%bare)
  ROOT %out = (s32[], bf16[30,8,128], bf16[8,128]) tuple(%i, %stack, %bared)
}

%fused (a: bf16[32,128]) -> bf16[8,128] {
  %a = bf16[32,128] parameter(0)
  ROOT %cut = bf16[8,128] slice(%a), slice={[0:8], [0:128]}
}

%condition (p: (s32[], bf16[30,8,128], bf16[8,128])) -> pred[] {
  %thirty = s32[]{:T(128)} constant(30)
  %p = (s32[]{:T(128)}, bf16[30,8,128]{2,1,0}, bf16[8,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %thirty), direction=LT
}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128] parameter(0)
  %zero = s32[] constant(0)
  %room = bf16[30,8,128]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %start = (s32[], bf16[30,8,128], bf16[8,128]) tuple(%zero, %room, %x)
  %loop = (s32[], bf16[30,8,128], bf16[8,128]) while(%start), condition=%condition, body=%body, metadata={op_name="jit(_step)/jvp()/while"}
  ROOT %last = bf16[8,128] get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def test_loops_are_counted_and_transfers_that_overlap_are_told_apart() -> None:
  found = collectives.read(TEXT, MESH)
  assert [(one.kind, one.axes, one.trips, one.hidden) for one in found] == [
    ("all-gather", ("fsdp",), 30, False),
    ("collective-permute", ("context",), 30, True),
    ("collective-permute", ("context",), 30, False),
  ]


def test_what_a_loop_leaves_is_found_in_the_text() -> None:
  assert compiled.stacked(TEXT) == 30 * 8 * 128 * 2
  for other in ("transpose(jvp())/while", "jvp()/while/body/while"):
    assert compiled.stacked(TEXT.replace("jvp()/while", other)) == 0
  assert compiled.stacked(TEXT.replace("AllocateBuffer", "Sharding")) == 0


def test_transfers_take_the_links_that_their_group_spans() -> None:
  """fsdp spans two dimensions of the torus, context one: an all-gather and two hops of 2 KiB, 30 times."""
  topology = Topology.parse("v5p:2x2x2")
  coords = [(x, y, z) for x in range(2) for y in range(2) for z in range(2)]
  devices = np.array([types.SimpleNamespace(coords=place) for place in coords]).reshape(1, 4, 2, 1)
  mesh = types.SimpleNamespace(shape=MESH, devices=devices)
  moved = {(one.kind, one.hidden): one for one in roofline.transfers(collectives.read(TEXT, MESH), topology, mesh)}
  gather = moved["all-gather", False]
  assert gather.bytes == 30 * 0.75 * 32 * 128 * 2
  assert gather.seconds == pytest.approx(gather.bytes / (4 * topology.chip.link))
  hop = moved["collective-permute", True]
  assert hop.bytes == 30 * 8 * 128 * 2 and hop.seconds == pytest.approx(hop.bytes / topology.chip.link)
  assert sum(one.count for one in moved.values()) == 3


def test_the_bound_adds_what_is_exposed_to_the_longest_of_the_rest() -> None:
  v5p, v6e = Topology.parse("v5p:2x2x1"), Topology.parse("v6e:2x2")
  transfer = lambda hidden, seconds: roofline.Transfer("all-gather", ("fsdp",), hidden, True, 1, 1.0, seconds)
  done = roofline.Work(v5p.chip.flops, again=v5p.chip.flops / 3, attention=v5p.chip.flops / 2)
  bound = roofline.bound(v5p, done, [transfer(True, 0.5), transfer(False, 0.25)])
  assert bound.seconds == pytest.approx(4 / 3 + 0.25) and bound.mfu == pytest.approx(1 / bound.seconds)
  assert roofline.bound(v5p, done, [transfer(True, 5.0)]).seconds == pytest.approx(5)
  # Heads of 128 leave half of a matrix unit of 256 idle.
  assert roofline.bound(v6e, done, []).seconds == pytest.approx((4 / 3 + 1 / 2) * v5p.chip.flops / v6e.chip.flops)


def test_work_is_the_tasks_own_count_and_what_a_policy_computes_again() -> None:
  spec, mesh = "configs/video_dit.py:size=d128x2,res=128", dict(zip(sharding.AXES, (1, 2, 2, 2), strict=True))
  of = lambda remat: work.of("train", task.make(config_lib.load(spec, [f"--config.model.remat={remat}"])), mesh, 0, 0)
  job = task.make(config_lib.load(spec))
  batch = job.batch_spec()
  parts = flops.video_dit_parts(job.dit, *job.geometry.latent_shape(17, 128, 128)[:3], job.config.text.tokens)
  block = sum(parts[name] for name in work.BLOCK)
  per_device = job.config.data.batch / 8
  assert of("none") == roofline.Work(
    pytest.approx(job.step_cost(batch)[1] / 8), 0.0,
    pytest.approx(3 * (parts["self_attention"] + parts["cross_attention"]) * per_device), 64,
  )  # fmt: skip
  assert of("full").again == pytest.approx(block * per_device)
  attention = parts["self_attention"] + parts["cross_attention"]
  assert of("names:attention").again == pytest.approx((block - attention) * per_device)


def test_the_verb_predicts_in_json_and_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
  words = ["plan", "--config", "configs/video_dit.py:size=d128x2", "--predict", "--json"]
  assert cli.main([*words, "--topology", "v5p:2x2x1", "--search"]) == 0
  answer = json.loads(capsys.readouterr().out)
  assert answer["fits"] and math.prod(answer["mesh"].values()) == 4 and len(answer["searched"]) >= 1
  assert answer["predicted"]["hbm_bytes_per_device"] == sum(answer["predicted"]["by_kind"].values())
  assert cli.main([*words, "--topology", "v5p:2x2"]) == 2
  assert "3 dimensions" in capsys.readouterr().err
  assert cli.main([*words, "--topology", "v5p:2x2x1", "--xla", "fast"]) == 2
  assert "not of the form xla_flag=value" in capsys.readouterr().err


@pytest.mark.drill
def test_a_small_step_is_compiled_for_a_tpu_and_saved(tpu_compiler: dict[str, str], tmp_path) -> None:
  """The whole verb: the memory by kind is that of the compiler's own figures, what is given and saved as predicted."""
  command = [
    sys.executable, "-m", "kling_jax", "plan", "--config", "configs/video_dit.py:size=d256x6", "--topology",
    "v5p:2x2x1", "--programs", "train", "--json", "--save", str(tmp_path), "--config.precision=bfloat16",
    "--config.data.batch=8", "--config.model.remat=full", "--config.data.buckets=((9,128,128),)",
    "--config.text.width=128", "--config.text.tokens=128", "--config.text.depth=1",
  ]  # fmt: skip
  done = subprocess.run(command, env=tpu_compiler, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-3000:]
  answer = json.loads(done.stdout)
  assert answer["fits"] and 0 < answer["bound_mfu"] < 1 and answer["compile_s"] > 0
  assert {"all-gather", "reduce-scatter"} <= {one["kind"] for one in answer["collectives"]}
  kinds, predicted = answer["by_kind"], answer["predicted"]["by_kind"]
  for kind in ("params", "ema", "optimiser", "batch"):
    assert kinds[kind] == pytest.approx(predicted[kind], rel=0.001)
  assert 0 <= kinds["other arguments"] < 0.05 * sum(kinds.values())  # tiles
  assert kinds["activations"] == predicted["activations"]
  assert sum(kinds.values()) == answer["hbm_bytes_per_device"]
  # The fit of the workspace is one for large steps; here codec and text encoder take most of it.
  assert kinds["temporaries"] > predicted["gradients"] + predicted["casts"]
  assert answer["programs"][0]["flops_per_step"] > 0
  (saved,) = tmp_path.iterdir()
  assert saved.stat().st_size > 10_000


def test_a_program_that_a_task_lacks_is_refused() -> None:
  from kling_jax.plan import programs

  job = task.make(config_lib.load("configs/video_dit.py:size=d128x2"))
  assert programs.names(job) == ("train", "sample")
  with pytest.raises(UsageError, match="has no program 'rollout'"):
    programs.trace("rollout", job, None, "v5p")
