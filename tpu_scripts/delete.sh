#!/usr/bin/env bash
# Deletes the machine and its disks; what a run wrote to shared storage stays. Fetch the rest first.
#   tpu_scripts/delete.sh --name rl --zone us-central2-b --accelerator-type v4-32
# --yes  does not ask

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
yes=''
parse "" yes "$@"
if slice; then # --force: its node as well
  run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force ${yes:+--quiet}
else
  run gcloud compute tpus tpu-vm delete "$name" --zone="$zone" ${yes:+--quiet}
fi
