#!/usr/bin/env bash
# Copies a run, or a part of it, to this machine.
#   tpu_scripts/fetch.sh --name rl --zone us-east5-b --accelerator-type v6e-8 --from runs/gsm8k/policy --to policy
#   tpu_scripts/fetch.sh --name rl --zone us-central2-b --accelerator-type v4-32 --from gs://bucket/gsm8k --to gsm8k
# --from F  a folder on worker 0 (relative ones are in ~/jaxrft), or gs://BUCKET/PATH, even when the machine is gone
# --to T    a folder here; from a bucket, what has not changed is not copied again

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
from='' to=''
parse "from to" "" "$@"
check from "$from" '(gs://)?[A-Za-z0-9_./-]+' 'a folder on worker 0 or gs://BUCKET/PATH'
[[ $to ]] || die "--to is missing: name a folder on this machine"

if [[ $from == gs://* ]]; then
  run mkdir -p "$to"
  run gcloud storage rsync "$from" "$to" --recursive
else
  [[ ! -e $to ]] || die "--to $to is there already: name a new folder"
  [[ $from == /* ]] || from=jaxrft/$from
  run gcloud compute tpus tpu-vm scp "$name:$from" "$to" --recurse --zone="$zone" --worker=0
fi
