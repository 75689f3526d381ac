"""A `ray` for tests: a cluster and its jobs in a folder, which fail as they are told to.

Run as a program. FAKE_CLOUD names its folder; faults.json, calls.jsonl and state.json are as in fake_gcloud.py. A job
is asked for twice before it is over; the file `codes` says how (FAILED or SUCCEEDED), in turn.
"""

import json
import os
import shlex
import signal
import sys

CLOUD = os.environ["FAKE_CLOUD"]


def load(name, default):
  try:
    with open(f"{CLOUD}/{name}") as file:
      return json.load(file)
  except FileNotFoundError:
    return default


def save(name, value):
  with open(f"{CLOUD}/{name}", "w") as file:
    json.dump(value, file)


def job(words, jobs):
  """A `ray job` command."""
  verb, words = words[0], words[3:]
  if verb == "submit":
    name = words[words.index("--submission-id") + 1]
    if name in jobs:
      sys.exit(f"Job with submission_id {name} already exists. Please use a different submission_id.")
    jobs[name] = {"looks": 0, "state": "PENDING"}
    print(f"Job '{name}' submitted successfully")
    return
  if words[0] not in jobs:
    sys.exit(f"RuntimeError: Request failed with status code 404: Job {words[0]} does not exist.")
  found = jobs[words[0]]
  if verb == "logs":
    print("\n".join(f"{words[0]}: line {n}" for n in range(found["looks"])))
    return
  found["looks"] += 1
  if found["looks"] == 2:
    ends = load("codes", ["SUCCEEDED"])
    save("codes", ends[1:] or ends)
    found["state"] = ends[0]
  elif found["looks"] == 1:
    found["state"] = "RUNNING"
  print(f"Status for job '{words[0]}': {found['state']}\nStatus message: Job supervisor says hello")


def main(words):
  with open(f"{CLOUD}/calls.jsonl", "a") as calls:
    calls.write(json.dumps(["ray", *words]) + "\n")
  state = load("state.json", {"resources": {}, "created": 0, "count": {}, "jobs": {}})
  inner = shlex.split(words[2])[1:] if words[0] == "exec" else words
  call = " ".join(inner[:2]) if inner[0] == "job" else inner[0]
  state["count"][call] = state["count"].get(call, 0) + 1
  fault = next((f["do"] for f in load("faults.json", []) if f["call"] == call and f["at"] == state["count"][call]), "")
  save("state.json", state)
  if fault == "quota":
    sys.exit("googleapiclient.errors.HttpError: <HttpError 403: Quota 'N2_CPUS' exceeded. Limit: 200.0 in region>")
  if fault == "silent":
    sys.exit("ssh: connect to host 10.0.0.1 port 22: Connection refused")
  if inner[0] == "up":
    state["created"] += words[1] not in state["resources"]
    state["resources"][words[1]] = "up"
  elif inner[0] == "down":
    state["resources"].pop(words[1], None)
    state["jobs"] = {}
  elif words[0] == "exec" and words[1] not in state["resources"]:
    sys.exit("RuntimeError: Head node of cluster not found!")
  else:
    job(inner[1:], state["jobs"])
  save("state.json", state)
  if fault == "lost":
    sys.exit("ssh: Connection reset by peer")
  if fault == "kill":
    os.kill(os.getppid(), signal.SIGKILL)


main(sys.argv[1:])
