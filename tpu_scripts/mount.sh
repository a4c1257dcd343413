#!/usr/bin/env bash
# Mounts storage that all hosts of a slice share, on every worker. run.sh --mount calls it; alone, to put data there.
#   tpu_scripts/mount.sh --name rl --zone us-central2-b --accelerator-type v4-32 --mount 10.0.0.2:/share=/mnt/runs
# --mount SOURCE=/mnt/NAME  SOURCE is an NFS share (Filestore; the best fit) or gs://BUCKET[/PATH], by gcsfuse
# A checkpoint is committed by renaming its folder, in one piece on NFS and on a bucket with a hierarchical namespace:
#   gcloud storage buckets create gs://bucket --location=us-central2 --uniform-bucket-level-access \
#     --enable-hierarchical-namespace
# Other buckets are refused: gcsfuse renames their folders a file at a time, or not at all. metrics.jsonl, which grows
# by a line a step, it uploads anew each time.

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
mount=''
parse mount "" "$@"
kinds='gs://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9._/-]+)?|[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*'
check mount "$mount" "($kinds)=/mnt/[A-Za-z0-9_-]+" 'HOST:/SHARE=/mnt/NAME or gs://BUCKET[/PATH]=/mnt/NAME'
source=${mount%=*} folder=${mount##*=}

if [[ $source == gs://* ]]; then
  bucket=${source#gs://} path=''
  [[ $bucket != */* ]] || path=${bucket#*/} bucket=${bucket%%/*}
  whole=$(run gcloud storage buckets describe "gs://$bucket" --format='value(hierarchical_namespace.enabled)')
  [[ ! $dry_run ]] || echo "$whole"
  [[ $dry_run || $whole == True ]] ||
    die "gs://$bucket has no hierarchical namespace, without which checkpoints cannot be saved whole: see --help"
  apt=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  list=/etc/apt/sources.list.d/gcsfuse.list
  # Nothing about files is cached: what one host writes the others must see. A service outlives this connection.
  commands="command -v gcsfuse >/dev/null || {
  curl -fsS $apt/doc/apt-key.gpg | sudo tee $key >/dev/null
  echo \"deb [signed-by=$key] $apt gcsfuse-\$(lsb_release -cs) main\" | sudo tee $list >/dev/null
  sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
}
sudo systemd-run --unit=jaxrft-mount --collect gcsfuse --foreground -o allow_other --uid=\$(id -u) --gid=\$(id -g) \
--implicit-dirs --metadata-cache-ttl-secs=0 ${path:+--only-dir=$path }$bucket $folder
for _ in \$(seq 60); do ! mountpoint -q $folder || break; sleep 1; done"
else
  commands="command -v mount.nfs >/dev/null || { sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common; }
sudo mount -t nfs -o hard $source $folder
[ -w $folder ] || sudo chmod a+rwx $folder"
fi
on_workers all "set -e
! mountpoint -q $folder || exit 0
sudo mkdir -p $folder
$commands
mountpoint $folder"
