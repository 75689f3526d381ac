#!/usr/bin/env bash
# What a launcher runs on each host of a slice: bash host.sh VERB JOB [ARGUMENT...]. Every verb may be repeated.
set -euo pipefail

verb=$1 job=$2
shift 2
root=$HOME/kling/$job
mkdir -p "$root"

# Whether the process of this host's part of the job runs; a number that a reboot gave to another process is not it.
runs() {
  [ -s "$root/pid" ] && tr '\0' ' ' 2>/dev/null <"/proc/$(cat "$root/pid")/cmdline" | grep -qF "work $job "
}

# The state of this host's part of the job, in one line that the launcher counts: attempt, state, exit code, checkpoint.
state() {
  local attempt=0 state=none code=- step=0
  if [ -s "$root/attempt" ]; then
    attempt=$(cat "$root/attempt")
    if [ -s "$root/exit-$attempt" ]; then
      state=ended code=$(cat "$root/exit-$attempt")
    elif runs; then
      state=running
    else
      state=lost # it runs no more and left no code: the host was started anew
    fi
  fi
  if [ -s "$root/workdir" ] && [ -x "$root/code/venv/bin/python" ]; then
    step=$("$root/code/venv/bin/python" -m kling_jax.launch.attempt --newest "$(cat "$root/workdir")") || step=0
  fi
  echo "kling-host $(hostname) attempt=$attempt state=$state code=$code step=$step"
}

case $verb in
  start | status) # one at a time: what is half started is not lost
    exec 9>"$root/lock"
    flock 9
    ;;
esac

case $verb in
  install) # DIGEST PACKAGE EXTRAS: the package that was copied here, in an environment of its own
    code=$HOME/kling/code-$1
    if [ ! -e "$code/ready" ]; then
      rm -rf "$code"
      mkdir -p "$code"
      python3 -m venv "$code/venv"
      case $2 in
        *.tar.gz)
          mkdir "$code/src"
          tar -xzf "$HOME/$2" -C "$code/src"
          "$code/venv/bin/pip" install --quiet "$code/src[$3]"
          ;;
        *) "$code/venv/bin/pip" install --quiet "$HOME/$2[$3]" ;;
      esac
      touch "$code/ready"
    fi
    ln -sfn "$code" "$root/code"
    echo "kling-ready $(hostname)"
    ;;

  mount) # KIND WHAT WHERE: nfs HOST:/PATH, or bucket NAME
    if ! mountpoint -q "$3"; then
      sudo mkdir -p "$3"
      sudo chown "$(id -u)" "$3"
      if [ "$1" = nfs ]; then
        command -v mount.nfs >/dev/null || sudo apt-get install -y -qq nfs-common
        sudo mount -t nfs -o hard "$2" "$3"
      else
        command -v gcsfuse >/dev/null || {
          echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
            sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
          curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
          sudo apt-get update -qq
          sudo apt-get install -y -qq gcsfuse
        }
        gcsfuse --implicit-dirs --rename-dir-limit 1000000 "$2" "$3"
      fi
    fi
    ;;

  start) # ATTEMPT WORKDIR WORD...: starts an attempt, if it was not started before
    attempt=$1 folder=$2
    shift 2
    if [ "$(cat "$root/attempt" 2>/dev/null || echo 0)" -lt "$attempt" ]; then
      echo "$folder" >"$root/workdir"
      rm -f "$root/pid"
      echo "$attempt" >"$root/attempt"
      nohup setsid bash "$0" work "$job" "$attempt" "$@" >"$root/log-$attempt" 2>&1 </dev/null 9>&- &
      echo $! >"$root/pid"
    fi
    state
    ;;

  work) # ATTEMPT WORD...: runs in the background, and leaves the exit code in a file
    attempt=$1
    shift
    cd "$root/code/src" 2>/dev/null || cd "$root"
    trap : TERM # the child gets it as well, saves and leaves; this shell stays to write its code down
    "$root/code/venv/bin/python" -m kling_jax.launch.attempt "$@" &
    child=$!
    while :; do
      code=0
      wait "$child" || code=$?
      kill -0 "$child" 2>/dev/null || break
    done
    echo "$code" >"$root/exit.new"
    mv "$root/exit.new" "$root/exit-$attempt"
    ;;

  status)
    state
    ;;

  log) # ATTEMPT OFFSET: what was written since
    echo "kling-log"
    tail -c "+$(($2 + 1))" "$root/log-$1" 2>/dev/null | head -c 200000 || true
    ;;

  stop) # asks the job to save and leave
    if runs; then
      kill -TERM -- "-$(cat "$root/pid")" || true
    fi
    state
    ;;

  pack) # NAME...: those files and folders of the work directory that are there, for the launcher to copy
    cd "$(cat "$root/workdir")"
    here=()
    for name in "$@"; do
      if [ -e "$name" ]; then here+=("$name"); fi
    done
    tar -czf "$HOME/$job-fetched.tar.gz" -T /dev/null "${here[@]}"
    ;;

  *)
    echo "host.sh: unknown verb $verb" >&2
    exit 2
    ;;
esac
