#!/usr/bin/env bash
# Creates one TPU VM or, for a type of several hosts (v4-32, v5litepod-16), a queued resource with a node of its name.
#   tpu_scripts/create.sh --name rl --zone us-east5-b --accelerator-type v6e-8
#   tpu_scripts/create.sh --name rl --zone us-central2-b --accelerator-type v4-32 --spot
# --spot       cheaper, and may be taken away at any time: go on with resume.sh
# --version V  software of the VMs; by default what Google names for JAX on this type
# Returns when the machine is there, however long it queues; after Ctrl-C the same command waits on.

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
version='' spot=''
parse version spot "$@"
case ${accelerator_type%-*} in
  v6e) version=${version:-v2-alpha-tpuv6e} ;;
  v5p) version=${version:-v2-alpha-tpuv5} ;;
  v5litepod) version=${version:-v2-alpha-tpuv5-lite} ;;
  *) version=${version:-tpu-ubuntu2204-base} ;;
esac
check version "$version" '[a-z][a-z0-9.-]+' 'a TPU software version such as v2-alpha-tpuv6e'

machine=(--zone="$zone" --accelerator-type="$accelerator_type" ${spot:+--spot})
if [[ ! $dry_run ]] && state >/dev/null 2>&1; then
  echo "$name is there already"
elif slice; then
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${machine[@]}" --runtime-version="$version"
else
  run gcloud compute tpus tpu-vm create "$name" "${machine[@]}" --version="$version"
fi
while true; do
  now=$(state)
  echo "$now"
  [[ ! $dry_run ]] || exit 0
  case $now in
    ACTIVE | READY) exit 0 ;;
    FAILED | SUSPEND* | PREEMPTED | TERMINATED | STOP*) echo "that ends nowhere: see resume.sh" >&2 && exit 1 ;;
  esac
  sleep "${TPU_POLL_SECONDS:-30}"
done
