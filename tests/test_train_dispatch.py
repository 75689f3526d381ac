"""What the host does in a step of the loop: one program, no waiting."""

import pathlib

import jax
import pytest

from kling_jax import config as config_lib
from kling_jax.train import loop
from kling_jax.train.state import Update


@pytest.mark.drill
def test_the_host_never_waits_for_a_step(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """A step is one call, of which JAX makes one program; numbers are fetched, in one go, under the next step."""
  order: list[str] = []
  step, get = Update.step, jax.device_get
  monkeypatch.setattr(jax, "devices", lambda *_: [jax.local_devices()[0]])
  monkeypatch.setattr(Update, "step", lambda *args: order.append("step") or step(*args))
  monkeypatch.setattr(jax, "device_get", lambda *args: order.append("numbers") or get(*args))
  c = config_lib.load("video_dit:runlocal")
  c.update_from_flattened_dict({
    "model.size": "d16", "text.width": 16, "text.tokens": 24, "data.batch": 2, "steps": 6, "validation.every": 0,
    "checkpoint.every": 0, "log.profile": (2, 5), "data.sources": ("worlds:shapes-v1?count=12&seed=0",),
  })  # fmt: skip
  loop.run(c, tmp_path)
  assert order[:9] == ["step", *["step", "numbers"] * 4] and order.count("step") == 6
  (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
  planes = jax.profiler.ProfileData.from_file(str(trace)).planes
  events = [event.name for plane in planes for line in plane.lines for event in line.events]
  assert {name for name in events if name.startswith("PjitFunction(")} == {"PjitFunction(_step)"}
