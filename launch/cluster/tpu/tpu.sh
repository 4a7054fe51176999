#!/usr/bin/env bash
# A Cloud TPU slice by queued resources, and a run on all its hosts:
#
#   export NAME=dpo ZONE=us-west4-a ACCELERATOR=v5litepod-16 SPOT=1
#   export CONFIG=configs/hh_pythia_2_8b.py WORKDIR=/mnt/runs/hh
#   launch/cluster/tpu/tpu.sh babysit
#
#   create    ask for the slice
#   wait      until it is there; one that was taken away is asked for again
#   install   the commit that is checked out, on all hosts
#   train     one attempt; ends with its exit status
#   babysit   wait, install and train, until the run is done
#   stop      save and stop the run (end babysit first)
#   delete    the slice
#
# WORKDIR is a folder that every host sees. What follows train or babysit goes to launch/train.py.
# RUNTIME is the hosts' image (by ACCELERATOR if not set). Needs gcloud, with a project set, and
# `ssh-add ~/.ssh/google_compute_engine`. Several slices: k8s/jobset-tpu.yaml.
set -euo pipefail
cd "$(dirname "$0")/../../.."

self=launch/cluster/tpu/tpu.sh
RETRIES=3 # of failures; neither a stop after a save nor a slice taken away is one
POLL=${POLL:-30}

mistake() {
  echo "error: $1" >&2
  exit 2
}

required() {
  local key
  for key; do [ -n "${!key:-}" ] || mistake "$key is not set; see the head of $0"; done
}

queue() { gcloud compute tpus queued-resources "$@" --zone="$ZONE"; }

# A host that is gone is noticed in a minute and a half, not when TCP gives up.
on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1" \
    --ssh-flag=-oServerAliveInterval=30
}

image() {
  case $ACCELERATOR in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

create() {
  local spot=()
  if [ "${SPOT:-}" = 1 ]; then spot=(--spot); fi
  required ACCELERATOR
  queue create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
    --runtime-version="${RUNTIME:-$(image)}" "${spot[@]}"
}

delete() { queue delete "$NAME" --force --quiet; }

# ACTIVE, WAITING_FOR_RESOURCES, ...; nothing where there is no such slice.
state() { queue list --filter="name~/$NAME\$" --format='value(state.state)'; }

wait_for_slice() {
  local now
  while true; do
    now=$(state) || now=unknown # the network's fault: asked again
    case $now in
      ACTIVE) return ;;
      "") create ;;
      SUSPENDED) delete ;; # preempted
      FAILED)
        queue describe "$NAME" >&2
        return 1
        ;;
      *) sleep "$POLL" ;;
    esac
  done
}

install() {
  local tree
  tree=$(mktemp)
  git archive --format=tar.gz --output="$tree" HEAD
  gcloud compute tpus tpu-vm scp "$tree" "$NAME:jaxdpo.tar.gz" --zone="$ZONE" --worker=all
  rm "$tree"
  # uv, because the hosts' own Python is too old.
  on_all_hosts 'set -e; mkdir -p jaxdpo; tar -xzf jaxdpo.tar.gz -C jaxdpo; cd jaxdpo
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
    python3 -m uv pip install --quiet -r requirements.txt -e ".[tpu]"'
}

train() {
  required CONFIG WORKDIR
  on_all_hosts "exec jaxdpo/launch/cluster/tpu/worker.sh$(
    printf ' %q' --config "$CONFIG" --workdir "$WORKDIR" "$@"
  )"
}

babysit() {
  local failures=0 status
  required CONFIG WORKDIR ACCELERATOR
  while true; do
    wait_for_slice
    status=1
    # As programs of their own: in a condition, a function would not stop at its first error.
    if "$self" install; then
      status=0
      "$self" train "$@" || status=$?
    fi
    case $status in
      0 | 2 | 130) return "$status" ;;
      143) continue ;;
    esac
    sleep "$POLL" # what was taken away is ACTIVE for a while
    if [ "$(state)" = ACTIVE ] && ((++failures > RETRIES)); then return "$status"; fi
    echo "ended with $status; failures: $failures, of which $RETRIES are tried again" >&2
  done
}

command=${1:-}
required NAME ZONE
case $command in
  create | install | delete) "$command" ;;
  wait) wait_for_slice ;;
  stop) on_all_hosts 'xargs kill -TERM < jaxdpo/train.pid' ;;
  train | babysit) "$command" "${@:2}" ;;
  *) mistake "'$command' is no command: create, wait, install, train, babysit, stop or delete" ;;
esac
