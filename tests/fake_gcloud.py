"""A `gcloud` for tests: a cloud whose state is a folder, whose hosts are folders, and which fails as it is told to.

Run as a program. FAKE_CLOUD names its folder:
  faults.json  [{"call": "ssh:status", "at": 3, "do": "preempt"}, ...]: what happens at which call of a kind
  state.json   queued resources; calls.jsonl: the words of all calls; hosts/: one home folder a host
  bin/         programs on the hosts' PATH; host_env.json: their variables, a list with one entry a host
"""

import contextlib
import json
import os
import signal
import sys
import time

CLOUD = os.environ["FAKE_CLOUD"]
ERRORS = {
  "quota": "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit "
  "'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 8 in zone us-west4-a.",
  "unavailable": "ERROR: gcloud crashed (HttpError): HTTPError 503: The service is currently unavailable.",
  "lost": "ERROR: (gcloud) There was a problem refreshing: HTTPSConnectionPool: Read timed out.",
  "ssh": "ERROR: (gcloud.compute.tpus.queued-resources.ssh) [/usr/bin/ssh] exited with return code [255].",
  "missing": "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource 'X' was not found",
  "exists": "ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: Resource 'X' already exists",
}


def fail(what, code=1):
  sys.stderr.write(ERRORS[what] + "\n")
  sys.exit(code)


def load(name, default):
  try:
    with open(f"{CLOUD}/{name}") as file:
      return json.load(file)
  except FileNotFoundError:
    return default


def save(name, value):
  with open(f"{CLOUD}/{name}.new", "w") as file:
    json.dump(value, file)
  os.replace(f"{CLOUD}/{name}.new", f"{CLOUD}/{name}")


def homes(resource):
  return [f"{CLOUD}/hosts/{resource['number']}-{n}" for n in range(resource["hosts"])]


def groups(resource):
  """The process groups of the jobs on the hosts of a resource."""
  for home in homes(resource):
    for folder, _, names in os.walk(f"{home}/kling"):
      if "pid" in names:
        with open(f"{folder}/pid") as file:
          text = file.read().strip()
        if text:
          yield int(text)


def alive(group):
  for name in os.listdir("/proc"):
    if name.isdigit():
      with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
        if int(fields[2]) == group and fields[0] != "Z":
          return True
  return False


def switch_off(resource, grace_s):
  """The end of hosts: SIGTERM, some time, SIGKILL; then their disks are gone."""
  ending = list(groups(resource))
  for number in (signal.SIGTERM, signal.SIGKILL) if grace_s else (signal.SIGKILL,):
    for group in ending:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
    with open(f"{CLOUD}/told-{resource['number']}", "w"):  # the test's jobs may wait for this
      pass
    last = time.monotonic() + grace_s
    while number == signal.SIGTERM and time.monotonic() < last and any(map(alive, ending)):
      time.sleep(0.05)
  import shutil

  for home in homes(resource):
    shutil.rmtree(home, ignore_errors=True)


def preempt(resource):
  grace_s = load("grace.json", 0)
  switch_off(resource, grace_s)
  resource["node"] = "PREEMPTED"
  resource["state"] = "SUSPENDING"


def flags(words):
  return dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))


def describe(name, resource):
  node = {"acceleratorType": resource["accelerator"], "labels": resource["labels"]}
  state = {"state": resource["state"]}
  if resource["state"] == "FAILED":
    state["failedData"] = {"error": {"code": 8, "message": "There is no more capacity in the zone us-west4-a"}}
  return {"name": f"projects/p/locations/z/queuedResources/{name}", "state": state,
          "tpu": {"nodeSpec": [{"nodeId": name, "node": node}]}}  # fmt: skip


def ssh(resource, given, silent):
  import subprocess

  places = homes(resource)
  if given["worker"] == "0":
    places = places[:1]
  variables = load("host_env.json", [{}] * len(places))
  code = 0
  for n, home in enumerate(places):
    if n == silent:
      code = 255
      continue
    environ = {"HOME": home, "PATH": f"{CLOUD}/bin:/usr/bin:/bin", "FAKE_CLOUD": CLOUD, "FAKE_HOST": f"host-{n}"}
    done = subprocess.run(["bash", "-c", given["command"]], cwd=home, env=environ | variables[n])
    code = code or done.returncode
  if code:
    fail("ssh", code)


def scp(resource, words, given):
  import shutil

  sources, target = words[:-1], words[-1]
  places = homes(resource) if given["worker"] == "all" else homes(resource)[:1]
  for home in places:
    for source in sources:
      if ":" in source:
        shutil.copy(f"{home}/{source.partition(':')[2]}", target)
      else:
        shutil.copy(source, home)


def main(words):
  state = load("state.json", {"resources": {}, "created": 0, "count": {}})
  with open(f"{CLOUD}/calls.jsonl", "a") as calls:
    calls.write(json.dumps(words) + "\n")
  plain = [word for word in words if not word.startswith("--") and word != "alpha"]
  given = flags(words)
  kind, verb, names = plain[2], plain[3], plain[4:]
  call = "node" if kind == "tpu-vm" else verb
  if verb == "ssh":
    call = "ssh:" + given["command"].partition("kling-host.sh ")[2].replace("|| bash kling-host.sh ", "").split()[0]
    if "bash kling-host.sh status" in given["command"]:
      call = "ssh:status"
  state["count"][call] = state["count"].get(call, 0) + 1
  fault = next((f["do"] for f in load("faults.json", []) if f["call"] == call and f["at"] == state["count"][call]), "")
  save("state.json", state)
  resources = state["resources"]
  name = (
    names[-1].partition(":")[0] if verb == "scp" and ":" in names[-1] else names[0].partition(":")[0] if names else ""
  )
  resource = resources.get(name)

  if fault in ("quota", "unavailable"):
    fail(fault)
  if fault == "hang":
    time.sleep(3600)
  if fault == "preempt" and resource:
    preempt(resource)
  if fault == "preempt, noticed late" and resource:
    preempt(resource)
    resource["state"], resource["late"] = "ACTIVE", 2
  save("state.json", state)

  if kind == "tpu-vm":
    if resource is None:
      fail("missing")
    print(json.dumps({"state": resource["node"]}))
  elif verb == "list":
    print(json.dumps([describe(*item) for item in resources.items()]))
  elif verb == "create":
    if resource:
      fail("exists")
    state["created"] += 1
    labels = dict(pair.split("=") for pair in given["labels"].split(","))
    resources[name] = {
      "state": "FAILED" if fault == "stockout" else "WAITING_FOR_RESOURCES", "node": "READY", "hosts": 2,
      "number": state["created"], "accelerator": given["accelerator-type"], "labels": labels,
    }  # fmt: skip
  elif resource is None:
    fail("missing")
  elif verb == "describe":
    print(json.dumps(describe(name, resource)))
    following = {"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE", "SUSPENDING": "SUSPENDED"}
    resource["state"] = following.get(resource["state"], resource["state"])
    if resource["state"] == "ACTIVE" and resource["node"] == "READY":
      for home in homes(resource):
        os.makedirs(home, exist_ok=True)
    if resource.get("late"):
      resource["late"] -= 1
      if not resource["late"]:
        resource["state"] = "SUSPENDED"
  elif verb == "delete":
    switch_off(resource, 0)
    del resources[name]
  elif resource["state"] != "ACTIVE" or resource["node"] != "READY":
    fail("ssh", 255)
  elif verb == "ssh":
    ssh(resource, given, int(fault.split()[1]) if fault.startswith("silent") else None)
  elif verb == "scp":
    scp(resource, names, given)
  save("state.json", state)
  if fault == "lost":
    fail("lost")
  if fault == "kill":
    os.kill(os.getppid(), signal.SIGKILL)


main(sys.argv[1:])
