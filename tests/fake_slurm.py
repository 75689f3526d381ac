"""`sbatch`, `squeue`, `scancel`, `srun` and `scontrol` for tests: a queue in a folder, which fails as it is told to.

Run as a program. FAKE_CLOUD names its folder; faults.json, calls.jsonl and state.json are as in fake_gcloud.py. Each
look at the queue takes every job one step on: pending, running (its batch script runs then), gone. `srun` makes
checkpoints and leaves with the codes that the file `codes` holds, in turn.
"""

import json
import os
import re
import signal
import sys

CLOUD = os.environ["FAKE_CLOUD"]
PROGRAM = os.environ["FAKE_PROGRAM"]


def load(name, default):
  try:
    with open(f"{CLOUD}/{name}") as file:
      return json.load(file)
  except FileNotFoundError:
    return default


def save(name, value):
  with open(f"{CLOUD}/{name}", "w") as file:
    json.dump(value, file)


def step(job):
  """One step in the life of a job; False when it is over."""
  import subprocess

  if job["state"] == "PENDING":
    job["state"] = "RUNNING"
    return True
  output = re.search(r"--output=(\S+)", job["script"])[1]
  tasks = range(job["tasks"]) if job["tasks"] else [None]
  for task in tasks:
    environ = os.environ | {"SLURM_JOB_ID": job["id"], "SLURM_RESTART_COUNT": str(job["restarts"])}
    if task is not None:
      environ |= {"SLURM_ARRAY_JOB_ID": job["id"], "SLURM_ARRAY_TASK_ID": str(task)}
    os.makedirs(os.path.dirname(output), exist_ok=True)
    with open(output.replace("%a", str(task)), "a") as log:
      subprocess.run(["bash", "-c", job["script"]], env=environ, stdout=log, stderr=log)
  if os.path.exists(f"{CLOUD}/requeued"):
    os.remove(f"{CLOUD}/requeued")
    job["state"], job["restarts"] = "PENDING", job["restarts"] + 1
    return True
  return False


def srun(words):
  codes = load("codes", [0])
  save("codes", codes[1:] or codes)
  if "--workdir" in words:
    work = words[words.index("--workdir") + 1]
    if codes[0] == 0 or os.path.exists(f"{CLOUD}/progress"):
      os.makedirs(f"{work}/checkpoints", exist_ok=True)
      os.mkdir(f"{work}/checkpoints/{len(os.listdir(f'{work}/checkpoints')) + 1}")
  print("training", " ".join(words[words.index("kling_jax.launch.attempt") + 1 :]), flush=True)
  sys.exit(codes[0])


def main(words):
  with open(f"{CLOUD}/calls.jsonl", "a") as calls:
    calls.write(json.dumps([PROGRAM, *words]) + "\n")
  if PROGRAM == "srun":
    srun(words)
  if PROGRAM == "scontrol":
    save("requeued", words)
    return
  state = load("state.json", {"resources": {}, "created": 0, "count": {}})
  state["count"][PROGRAM] = state["count"].get(PROGRAM, 0) + 1
  wanted = [f["do"] for f in load("faults.json", []) if f["call"] == PROGRAM and f["at"] == state["count"][PROGRAM]]
  fault, jobs = (wanted or [""])[0], state["resources"]
  save("state.json", state)
  if fault == "away":
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
  if fault == "quota":
    sys.exit("sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)")
  if PROGRAM == "sbatch":
    with open(words[-1]) as file:
      script = file.read()
    state["created"] += 1
    name = re.search(r"--job-name=(\S+)", script)[1]
    array = re.search(r"--array=0-(\d+)", script)
    jobs[name] = {"script": script, "state": "PENDING", "restarts": 0, "id": str(4000 + state["created"]),
                  "tasks": int(array[1]) + 1 if array else 0}  # fmt: skip
    if fault != "lost":
      print(jobs[name]["id"])
  elif PROGRAM == "squeue":
    for name, job in list(jobs.items()):
      if "%j" in words[-1]:
        print(f"{name}|{job['state']}|1:00:00|{'kling' if '--comment=kling' in job['script'] else '(null)'}")
      elif name == words[words.index("--name") + 1]:
        print("\n".join([job["state"]] * max(1, job["tasks"])))
        if not step(job):
          del jobs[name]
  elif PROGRAM == "scancel":
    jobs.pop(words[-1], None)
  save("state.json", state)
  if fault == "lost":
    sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
  if fault == "kill":
    os.kill(os.getppid(), signal.SIGKILL)


main(sys.argv[1:])
