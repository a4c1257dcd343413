#!/usr/bin/env bash
# Tells the machine's state and, of every worker, whether jaxrft runs and the last line of its log.
#   tpu_scripts/status.sh --name rl --zone us-central2-b --accelerator-type v4-32

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
parse "" "" "$@"
now=$(state) || die "no state of $name, a $accelerator_type in $zone: see create.sh"
echo "$now"
[[ $dry_run || $now == ACTIVE || $now == READY ]] || exit 0
on_workers all "echo \"\$(hostname): \$(systemctl is-active jaxrft), \$(tail -n 1 ~/jaxrft.log)\""
