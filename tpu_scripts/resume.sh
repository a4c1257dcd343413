#!/usr/bin/env bash
# Goes on with a run after a preemption: makes the machine again if it is gone, installs, and runs the same command,
# which goes on from the newest checkpoint. Its options are those of create.sh, install.sh and run.sh together.
#   tpu_scripts/resume.sh --name rl --zone us-central2-b --accelerator-type v4-32 --spot \
#     --mount 10.0.0.2:/share=/mnt/runs -- train configs/gsm8k.py --output-dir /mnt/runs/gsm8k
# A machine that is made again has new disks, hence --mount. Exit code 3: its state is changing, try again later.

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
version='' spot='' source='' model='' mount=''
parse "version source model mount" spot "$@"
[[ $mount ]] || die "a machine made again has new disks: give --mount SOURCE=/mnt/NAME and an --output-dir in it"

go() { # makes the machine unless it is there, installs, runs
  local scripts machine=(--name "$name" --zone "$zone" --accelerator-type "$accelerator_type" "$@")
  scripts=$(dirname "$0")
  "$scripts/create.sh" "${machine[@]}" ${spot:+--spot} ${version:+--version "$version"}
  "$scripts/install.sh" "${machine[@]}" ${source:+--source "$source"} ${model:+--model "$model"}
  "$scripts/run.sh" "${machine[@]}" --mount "$mount" -- "${rest[@]}"
}
go --dry-run >/dev/null # tells what is wrong with the options before anything is done

if [[ $dry_run ]]; then
  state && echo '# and if it says PREEMPTED, SUSPENDED, FAILED or TERMINATED:' && now=PREEMPTED
else
  now=$(state 2>/dev/null) || now=GONE
  echo "$name is $now"
fi
case $now in
  PREEMPTED | SUSPENDED | FAILED | TERMINATED)
    delete=("$(dirname "$0")/delete.sh" --name "$name" --zone "$zone" --accelerator-type "$accelerator_type")
    "${delete[@]}" --yes ${dry_run:+--dry-run}
    ;;
  STOPPED) gcloud compute tpus tpu-vm start "$name" --zone="$zone" ;;
  ACTIVE | READY) ! on_workers all 'systemctl is-active jaxrft' || { echo "the run goes on" && exit 0; } ;;
  GONE) ;;
  *) exit 3 ;;
esac
go ${dry_run:+--dry-run}
