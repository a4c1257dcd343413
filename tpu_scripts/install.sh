#!/usr/bin/env bash
# Installs jaxrft[tpu] on every worker: Python 3.12 and packages in ~/.jaxrft, the repository's files in ~/jaxrft.
#   tpu_scripts/install.sh --name rl --zone us-east5-b --accelerator-type v6e-8 --model Qwen/Qwen2.5-0.5B-Instruct
# --source S  a checked-out repository, whose commit HEAD is installed (this script's by default); a git URL; or a
#             wheel, beside which the configs of this script's repository are copied
# --model M   also downloads a model of the Hugging Face hub to every worker
# Again, it updates. Before the first connection to a slice: ssh-add ~/.ssh/google_compute_engine

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
here=$(cd "$(dirname "$0")/.." && pwd)
source=$here model=''
parse "source model" "" "$@"
[[ ! $model ]] || check model "$model" '[A-Za-z0-9._-]+/[A-Za-z0-9._-]+' 'a hub id such as Qwen/Qwen2.5-0.5B-Instruct'

copy() { run gcloud compute tpus tpu-vm scp "$@" "$name:" --zone="$zone" --worker=all; }
case $source in
  *://* | git@*)
    package=./jaxrft unpack="git -C jaxrft pull --quiet || git clone --quiet $(quote "$source") jaxrft"
    ;;
  *.whl)
    [[ -f $source ]] || die "no wheel $source: build one with pip wheel --no-deps ."
    package=./${source##*/} unpack='mkdir -p jaxrft && cp -r configs jaxrft'
    copy --recurse "$source" "$here/configs"
    ;;
  *)
    git -C "$source" rev-parse --quiet HEAD &>/dev/null || die "--source $source is no git repository, git URL or wheel"
    [[ $dry_run || -z $(git -C "$source" status --porcelain) ]] || echo "what is not committed stays behind" >&2
    package=./jaxrft unpack='mkdir -p jaxrft && tar -xzf jaxrft.tar.gz -C jaxrft'
    archive=${TMPDIR:-/tmp}/jaxrft.tar.gz
    run git -C "$source" archive --format=tar.gz --output="$archive" HEAD
    copy "$archive"
    ;;
esac
# The images' own Python is 3.10; uv brings another.
on_workers all "set -e
! systemctl is-active --quiet jaxrft || { echo \"jaxrft runs on \$(hostname): stop it first\" >&2; exit 1; }
$unpack
python3 -m pip install --quiet --user --upgrade uv
~/.local/bin/uv venv --quiet --clear --python 3.12 ~/.jaxrft
~/.local/bin/uv pip install --quiet --python ~/.jaxrft/bin/python '${package}[tpu]'
~/.jaxrft/bin/jaxrft --help >/dev/null${model:+
~/.jaxrft/bin/hf download --quiet $model}
echo \"installed on \$(hostname)\""
