"""Progress bars are drawn on a terminal, and neither in a file nor behind `!` in a notebook."""

import os
import pty
import subprocess
import sys

import pytest

SCRIPT = "from kling_jax import progress\nfor _ in progress.track(range(3), 'counting'): pass\n"


@pytest.mark.parametrize(
  ("terminal", "notebook", "drawn"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_bars_are_for_terminals(terminal: bool, notebook: bool, drawn: bool) -> None:
  environment = {name: value for name, value in os.environ.items() if name != "JPY_PARENT_PID"}
  environment |= {"JPY_PARENT_PID": "1"} if notebook else {}
  ours, theirs = pty.openpty() if terminal else os.pipe()
  command = [sys.executable, "-c", SCRIPT]
  done = subprocess.run(command, env=environment | {"TERM": "xterm"}, stdin=subprocess.DEVNULL, stderr=theirs)
  os.write(theirs, b"end")  # so that there is something to read
  said = os.read(ours, 65536)
  os.close(ours), os.close(theirs)
  assert done.returncode == 0 and (b"counting" in said) == drawn
