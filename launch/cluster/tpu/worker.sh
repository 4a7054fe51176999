#!/usr/bin/env bash
# Train, on one host of a Cloud TPU VM slice; tpu.sh starts it on all of them at once. Arguments go
# to launch/train.py. A run that an earlier call left here (the connection was lost, say) is stopped
# first, which saves it.
set -euo pipefail
cd "$(dirname "$0")/../../.."
exec > >(tee --output-error=warn --append train.log) 2>&1 # outlives the connection

if pid=$(cat train.pid 2> /dev/null) && grep -qs launch/train.py "/proc/$pid/cmdline"; then
  kill -TERM "$pid"
  for _ in {1..180}; do
    [ -d "/proc/$pid" ] || break
    sleep 1
  done
  kill -KILL "$pid" 2> /dev/null || true
fi

# A TPU VM's environment does not say that it is one of several; its metadata does.
metadata() {
  curl -sf --retry 5 -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
endpoints=$(metadata worker-network-endpoints)
JAX_PROCESS_ID=$(metadata agent-worker-number)
mapfile -t hosts < <(tr , '\n' <<< "$endpoints" | sed 's/.*://') # HOST, or NAME:ID:HOST
JAX_NUM_PROCESSES=${#hosts[@]}
JAX_COORDINATOR_ADDRESS=${hosts[0]}:8476
export JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID
already=$(export -p)
set -a
# shellcheck source=launch/cluster/env/tpu.env
. launch/cluster/env/tpu.env
set +a
eval "$already" # what was set before wins over the file

echo $$ > train.pid # which Python takes over, and the signals with it
exec "${PYTHON:-.venv/bin/python}" launch/train.py "$@"
