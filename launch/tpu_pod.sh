#!/usr/bin/env bash
# One run on one or more TPU pod slices, with gcloud's queued resources:
#
#   export TPU_NAME=r0 TPU_ZONE=us-west4-a TPU_TYPE=v5litepod-16
#   launch/tpu_pod.sh create wait copy install run -- \
#     --config=configs/sdxl_r0.py --workdir=gs://bucket/runs/sdxl --config.pretrained=gs://...
#   launch/tpu_pod.sh logs        # of the first worker, until Ctrl-C; this does not stop the run
#   launch/tpu_pod.sh stop        # saves and ends; `run` with the same flags resumes
#   launch/tpu_pod.sh delete
#
# Several actions run one after the other. --dry-run before them only prints their commands.
# The flags after -- are those of r0_jax.main.
#
# Environment, besides gcloud's project:
#   TPU_NAME    name of the queued resource
#   TPU_ZONE    zone
#   TPU_TYPE    accelerator type: v4-*, v5litepod-*, v5p-*, v6e-*
#   TPU_SLICES  number of slices (1); the data center's network joins several (mesh.data). Set it
#               for all actions.
#   TPU_SPOT    yes: cheaper, but Google may take it away; then delete, create and run again
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' launch/tpu_pod.sh >&2
  exit 2
}

do_run() { # or print the command
  local word words=() quote="'\\''"
  [[ -n $dry_run ]] || { "$@"; return; }
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%,-]+$ ]] || word="'${word//\'/$quote}'"
    words+=("$word")
  done
  echo "${words[*]}"
}

runtime() { # the VM image of a type of TPU
  case $TPU_TYPE in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo "error: TPU_TYPE=$TPU_TYPE is not v4-*, v5litepod-*, v5p-* or v6e-*" >&2; exit 2 ;;
  esac
}

slices() { # the names of the slices' VMs
  if ((slices == 1)); then
    echo "$TPU_NAME"
  else
    seq -f "$TPU_NAME-%g" 0 $((slices - 1))
  fi
}

on_every_worker() {
  local name
  for name in $(slices); do
    do_run gcloud compute tpus tpu-vm ssh "$name" --zone="$TPU_ZONE" --worker=all --command="$1"
  done
}

create() {
  local image options
  image=$(runtime)
  if ((slices == 1)); then
    options=(--node-id="$TPU_NAME")
  else
    options=(--node-prefix="$TPU_NAME" --node-count="$slices")
  fi
  [[ ${TPU_SPOT-} != yes ]] || options+=(--spot)
  do_run gcloud compute tpus queued-resources create "$TPU_NAME" --zone="$TPU_ZONE" \
    --accelerator-type="$TPU_TYPE" --runtime-version="$image" "${options[@]}"
}

wait_until_active() {
  local state
  local ask=(gcloud compute tpus queued-resources describe "$TPU_NAME" --zone="$TPU_ZONE"
    "--format=value(state.state)")
  [[ -z $dry_run ]] || { do_run "${ask[@]}"; return; }
  while state=$("${ask[@]}"); do
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING)
        echo "error: $TPU_NAME is $state: delete it and create it again" >&2
        exit 1
        ;;
    esac
    echo "$(date +%T) $TPU_NAME is $state"
    sleep 30
  done
  exit 1 # gcloud has printed the reason
}

copy() { # the working tree without files that git ignores
  local archive=${TMPDIR:-/tmp}/r0_jax-$TPU_NAME.tar.gz name
  do_run bash -o pipefail -c "git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -czf $(printf %q "$archive")"
  for name in $(slices); do
    do_run gcloud compute tpus tpu-vm scp "$archive" "$name:r0_jax.tar.gz" --zone="$TPU_ZONE" \
      --worker=all
  done
  on_every_worker "mkdir -p r0_jax && tar -xzf r0_jax.tar.gz -C r0_jax"
}

install() { # uv installs Python 3.12, since the VM has 3.10; gcsfs is for paths in gs://
  on_every_worker "cd r0_jax && python3 -m pip install --quiet --user uv \
&& ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv \
&& ~/.local/bin/uv pip install --quiet -r requirements.txt -r requirements-tpu.txt gcsfs"
}

run() { # in the background: it outlives the connection
  local flags
  printf -v flags '%q ' "${flags_of_run[@]}"
  on_every_worker "cd r0_jax && test -x .venv/bin/python \
|| { echo 'error: first do copy and install' >&2; exit 1; }; \
! kill -0 \$(cat ~/r0_jax.pid 2> /dev/null) 2> /dev/null \
|| { echo 'error: a run is active here: stop it first' >&2; exit 1; }; \
nohup .venv/bin/python -m r0_jax.main $flags\
>> ~/r0_jax.log 2>&1 < /dev/null & echo \$! > ~/r0_jax.pid"
}

logs() {
  local first
  read -r first < <(slices)
  do_run gcloud compute tpus tpu-vm ssh "$first" --zone="$TPU_ZONE" --worker=0 \
    --command="tail -n 50 -f r0_jax.log"
}

stop() { # send SIGTERM, and wait until all have saved
  # The first process to get it tells the others, so a process may have ended before its signal.
  on_every_worker "pid=\$(cat r0_jax.pid); kill -TERM \$pid; tail --pid=\$pid -f /dev/null"
}

delete() {
  do_run gcloud compute tpus queued-resources delete "$TPU_NAME" --zone="$TPU_ZONE" --force --quiet
}

dry_run=''
actions=()
flags_of_run=()
while (($#)); do
  case $1 in
    --dry-run) dry_run=yes ;;
    --) shift; flags_of_run=("$@"); break ;;
    create | copy | install | run | logs | stop | delete) actions+=("$1") ;;
    wait) actions+=(wait_until_active) ;;
    *) usage ;;
  esac
  shift
done
((${#actions[@]})) || usage
slices=${TPU_SLICES:-1}
[[ $slices =~ ^[1-9][0-9]*$ ]] || { echo "error: TPU_SLICES=$slices is not a number of at least 1" >&2; exit 2; }
for name in TPU_NAME TPU_ZONE TPU_TYPE; do
  [[ -n ${!name-} ]] || { echo "error: $name is not set (see the head of $0)" >&2; exit 2; }
done
if [[ " ${actions[*]} " == *" run "* ]] && ((!${#flags_of_run[@]})); then
  echo "error: run needs -- --config=... --workdir=..." >&2
  exit 2
fi
for action in "${actions[@]}"; do
  "$action"
done
