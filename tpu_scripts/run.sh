#!/usr/bin/env bash
# Starts jaxrft on every worker and returns: the run outlives the connection. Each worker logs to its ~/jaxrft.log.
#   tpu_scripts/run.sh --name rl --zone us-east5-b --accelerator-type v6e-8 -- train configs/gsm8k.py
#   tpu_scripts/run.sh --name rl --zone us-central2-b --accelerator-type v4-32 --mount 10.0.0.2:/share=/mnt/runs \
#     -- train configs/gsm8k.py --output-dir /mnt/runs/gsm8k
# --mount SOURCE=/mnt/NAME  shared storage for the output directory, see mount.sh; needed on several hosts
# On several hosts --distributed is added. Of prepare pass-rates and embeddings it is --out that must be on the shared
# storage; prepare dataset runs on worker 0 alone, and fills a --data-dir there. The run is a systemd service, jaxrft:
# when a VM is taken away or shut down, the trainer gets SIGTERM, finishes its step, saves and leaves; only then are its
# graders ended and the storage is unmounted. A Spot VM is gone after some 30 s: when a step takes longer, --save-steps
# decides what is lost. To stop:
#   gcloud compute tpus tpu-vm ssh rl --zone us-central2-b --worker=all --command 'sudo systemctl stop jaxrft'

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
mount='' output=''
parse mount "" "$@"
[[ ${rest[0]:-} =~ ^(train|eval|prepare)$ ]] || die "say after -- what to run, such as -- train configs/gsm8k.py"
workers=all written=output-dir
case ${rest[*]:0:2} in
  'prepare dataset') workers=0 written=data-dir ;;
  prepare\ *) written=out ;;
esac
for i in "${!rest[@]}"; do
  [[ ${rest[i]} != --${written/-/[-_]} ]] || output=${rest[i + 1]:-}
  [[ ${rest[i]} != --${written/-/[-_]}=* ]] || output=${rest[i]#*=}
done
[[ $output != *://* ]] || die "--$written $output is a URL: name one in the /mnt/NAME of --mount SOURCE=/mnt/NAME"
if slice || [[ $mount ]]; then
  [[ $mount && $output == "${mount##*=}"/?* ]] ||
    die "--$written is '$output': on several hosts, or with --mount SOURCE=/mnt/NAME, it must be in that /mnt/NAME"
fi

machine=(--name "$name" --zone "$zone" --accelerator-type "$accelerator_type" ${dry_run:+--dry-run})
[[ ! $mount ]] || "$(dirname "$0")/mount.sh" "${machine[@]}" --mount "$mount"
! slice || [[ $workers == 0 || " ${rest[*]} " == *" --distributed "* ]] || rest+=(--distributed)
on_workers "$workers" "sudo systemd-run --unit=jaxrft --collect --uid=\$(id -un) --working-directory=\$HOME/jaxrft \
--property=KillMode=mixed --property=TimeoutStopSec=900 --property=After=network-online.target \
--property=After=jaxrft-mount.service ${mount:+--property=RequiresMountsFor=${mount##*=} }\
--property=StandardOutput=append:\$HOME/jaxrft.log --property=StandardError=append:\$HOME/jaxrft.log \
\$HOME/.jaxrft/bin/jaxrft $(quote "${rest[@]}")"
