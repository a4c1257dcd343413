#!/usr/bin/env bash
# Runs jaxrft on all NVIDIA GPUs of this machine, in one process; installs jaxrft[cuda] from this repository if need be.
#   tpu_scripts/gpu_node.sh -- train configs/gsm8k.py
#   tpu_scripts/gpu_node.sh --gpus 0,1 --detach -- train configs/gsm8k.py
# --gpus L   only these GPUs
# --detach   goes on after logging out; logs to jaxrft.log. kill -TERM the number it prints: saves and ends
# --venv V   where it is installed (.venv in the repository by default)
# --dry-run  prints the commands
# In the foreground Ctrl-C saves and ends. The same command goes on where it ended.

set -euo pipefail
die() { echo "gpu_node.sh: $*" >&2 && exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
gpus='' detach='' dry_run='' venv=$here/.venv
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --help) sed -n '2,/^$/{s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    --gpus | --venv) [[ ${2:-} && $2 != --* ]] || die "$1 needs a value" ;;&
    --gpus) gpus=$2 && shift ;;
    --venv) venv=$2 && shift ;;
    --detach) detach=yes ;;
    --dry-run) dry_run=yes ;;
    *) die "no option $1: see --help" ;;
  esac
  shift
done
shift $(($# > 0))
[[ ${1:-} =~ ^(train|eval|prepare)$ ]] || die "say after -- what to run, such as -- train configs/gsm8k.py"
[[ $gpus =~ ^([0-9]+(,[0-9]+)*)?$ ]] || die "--gpus is '$gpus': it must be numbers such as 0,1"

quote() { printf -v quoted ' %q' "$@" && echo "${quoted# }"; }
run() { if [[ $dry_run ]]; then quote "$@"; else "$@"; fi; }
if [[ ! $dry_run ]]; then # for CUDA 13, which the extra brings
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader) || die "nvidia-smi finds no GPU here"
  ((${driver%%.*} >= 580)) || die "the NVIDIA driver is ${driver%%$'\n'*}: 580 or newer is needed"
fi
[[ -x $venv/bin/jaxrft ]] || { run python3 -m venv "$venv" && run "$venv/bin/pip" install --quiet "${here}[cuda]"; }
run export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}" # JAX takes 0.75 of a GPU by itself
[[ ! $gpus ]] || run export CUDA_VISIBLE_DEVICES="$gpus"
if [[ ! $detach ]]; then
  run exec "$venv/bin/jaxrft" "$@"
elif [[ $dry_run ]]; then
  echo "$(quote setsid nohup "$venv/bin/jaxrft" "$@") >>jaxrft.log 2>&1 </dev/null &"
else
  setsid nohup "$venv/bin/jaxrft" "$@" >>jaxrft.log 2>&1 </dev/null &
  echo $!
fi
