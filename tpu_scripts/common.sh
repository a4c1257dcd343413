#!/usr/bin/env bash
# Sourced by the scripts beside it: options and their checks, the machine's state, and commands that --dry-run prints.
# All take --name, --zone and --accelerator-type (or TPU_NAME, TPU_ZONE, TPU_TYPE), --dry-run and --help. A mistake
# costs one sentence and exit code 2, before anything is done. The project is gcloud's: gcloud config set project ID.
set -euo pipefail
name=${TPU_NAME:-} zone=${TPU_ZONE:-} accelerator_type=${TPU_TYPE:-} dry_run='' rest=()

die() { echo "${0##*/}: $*" >&2 && exit 2; }

quote() { # its arguments as a shell reads them back
  local words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    words+=("$word")
  done
  echo "${words[*]}"
}

run() { if [[ $dry_run ]]; then quote "$@"; else "$@"; fi; }

check() { # option, its value, the pattern that it must match, what that is in words
  [[ $2 =~ ^($3)$ ]] || die "--$1 is '$2': it must be $4"
}

parse() { # "OPTIONS WITH A VALUE" "FLAGS" "$@": sets the variables of their names; rest is what follows --
  local option valued=" name zone accelerator-type $1 " flags=" dry-run $2 "
  shift 2
  while (($#)); do
    option=${1#--}
    if [[ $1 == --help ]]; then
      sed -n '2,/^$/{s/^# \{0,1\}//p}' "$0" && exit 0
    elif [[ $1 == -- ]]; then
      rest=("${@:2}") && break
    elif [[ $1 == --* && $valued == *" $option "* ]]; then
      [[ ${2:-} && $2 != --* ]] || die "$1 needs a value"
      printf -v "${option//-/_}" %s "$2" && shift
    elif [[ $1 == --* && $flags == *" $option "* ]]; then
      printf -v "${option//-/_}" yes
    else
      die "no option $1: see --help"
    fi
    shift
  done
  check name "$name" '[a-z]([-a-z0-9]{0,60}[a-z0-9])?' 'a letter, then letters, digits and hyphens'
  check zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' 'such as us-central2-b'
  check accelerator-type "$accelerator_type" '(v[234]|v5p|v5litepod|v6e)-[1-9][0-9]*' 'such as v5litepod-16 or v6e-8'
  [[ $dry_run ]] || command -v gcloud >/dev/null || die "no gcloud here: install the Google Cloud CLI"
}

slice() { ((${accelerator_type##*-} > 8)); } # several hosts, of up to 8 chips (v5e, v6e) or 8 cores (the others)

state() { # a slice is a queued resource, one host a TPU VM
  local kind=tpu-vm field=state
  ! slice || kind=queued-resources field=state.state
  run gcloud compute tpus "$kind" describe "$name" --zone="$zone" --format="value($field)"
}

on_workers() { run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"; }
