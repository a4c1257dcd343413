#!/usr/bin/env bash
# Shows the end of the workers' logs.
#   tpu_scripts/logs.sh --name rl --zone us-central2-b --accelerator-type v4-32 --follow
# --worker N  a worker's number, or all (0 by default)
# --lines N   how many lines (100 by default)
# --follow    goes on until Ctrl-C, which does not touch the run

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
worker=0 lines=100 follow=''
parse "worker lines" follow "$@"
check worker "$worker" '[0-9]+|all' 'a number or all'
check lines "$lines" '[1-9][0-9]*' 'a positive number'

show="tail -n $lines ${follow:+-F }~/jaxrft.log"
[[ $worker != all ]] || show+=" | sed -u \"s/^/\$(hostname): /\""
on_workers "$worker" "$show"
