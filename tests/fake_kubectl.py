"""A `kubectl`, `docker` and `xpk` for tests: JobSets in a folder, which fail as they are told to.

Run as a program. FAKE_CLOUD names its folder; faults.json, calls.jsonl and state.json are as in fake_gcloud.py. A
JobSet is looked at three times before it is over.
"""

import itertools
import json
import os
import signal
import sys

CLOUD = os.environ["FAKE_CLOUD"]


def load(name, default):
  try:
    with open(f"{CLOUD}/{name}") as file:
      return json.load(file)
  except FileNotFoundError:
    return default


def save(state):
  with open(f"{CLOUD}/state.json", "w") as file:
    json.dump(state, file)


def status(found, fault):
  """What the cluster says of a JobSet at its next look."""
  found["looks"] += 1
  if fault == "node taken away":
    found["restarts"] += 1
  if fault.startswith("failed"):
    found["over"] = {"type": "Failed", "status": "True", "reason": "FailedJobs", "message": fault}
  elif found["looks"] >= 3:
    found["over"] = {"type": "Completed", "status": "True", "reason": "AllJobsCompleted"}
  return {"restarts": found["restarts"], "conditions": [found["over"]] if found["over"] else []}


def main(words):
  program = os.environ["FAKE_PROGRAM"]
  with open(f"{CLOUD}/calls.jsonl", "a") as calls:
    calls.write(json.dumps([program, *words]) + "\n")
  if words[0] == "logs":  # it runs beside others, and changes nothing
    print(f"{words[2]}: training", flush=True)
    return
  state = load("state.json", {"resources": {}, "created": 0, "count": {}})
  call = " ".join([program, *(word for word in words[:2] if not word.startswith("-"))][: 3 if program == "xpk" else 2])
  state["count"][call] = state["count"].get(call, 0) + 1
  fault = next((f["do"] for f in load("faults.json", []) if f["call"] == call and f["at"] == state["count"][call]), "")
  save(state)
  if fault == "unavailable":
    sys.exit("Unable to connect to the server: net/http: TLS handshake timeout")
  if fault == "no controller":
    sys.exit('error: resource mapping not found: no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"')
  if fault == "quota":
    sys.exit('Error from server (Forbidden): jobsets "kling-me-a" is forbidden: exceeded quota: team')
  resources = state["resources"]
  given = dict(itertools.pairwise(words))
  name = given.get("--workload", "")

  if program == "docker":
    print("done")
  elif program == "xpk" and words[1] == "create":
    resources[name] = {"looks": 0, "restarts": 0, "over": None}
  elif program == "xpk" and words[1] == "delete":
    del resources[name]
  elif program == "xpk":
    print("Jobset Name        Created Time", *resources, sep="\n")
  elif words[0] == "apply":
    with open(words[1].partition("=")[2]) as file:
      text = file.read()
    name = next(line.split()[1] for line in text.splitlines() if line.startswith("  name:"))
    labels = {"app.kubernetes.io/managed-by": "kling"} if "managed-by: kling" in text else {}
    state["created"] += name not in resources
    resources[name] = {"looks": 0, "restarts": 0, "over": None, "labels": labels}
  elif words[:2] == ["get", "jobset"]:
    found = resources.get(words[2])
    if found:
      said = {"metadata": {"name": words[2], "labels": found["labels"]}, "status": status(found, fault)}
      print(json.dumps(said))
  elif words[:2] == ["get", "jobsets"]:
    rows = [{"metadata": {"name": name}, "status": {}} for name, found in resources.items() if found["labels"]]
    print(json.dumps({"items": rows}))
  elif words[:2] == ["get", "pods"]:
    pods = [f"pod-{found['restarts']}" for found in resources.values()]
    print(json.dumps({"items": [{"metadata": {"name": pod}, "status": {"phase": "Running"}} for pod in pods]}))
  elif words[0] == "delete":
    resources.pop(words[2], None)
  save(state)
  if fault == "lost":
    sys.exit("Unable to connect to the server: read tcp: i/o timeout")
  if fault == "kill":
    os.kill(os.getppid(), signal.SIGKILL)


main(sys.argv[1:])
