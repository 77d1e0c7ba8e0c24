#!/usr/bin/env bash
# Installs this checkout and its dependencies on all hosts of a TPU VM.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/install.sh NAME --zone ZONE [options]

Copies the last commit of this checkout to ~/$checkout on every host of NAME, and runs
launch/tpu_vm_setup.sh there. Changes that are not committed are left out. Run it again to install
a newer commit; files that runs have written there are kept. With several hosts, gcloud wants its
ssh key in the agent: ssh-add ~/.ssh/google_compute_engine

  NAME                Name of the TPU VM.
  --zone ZONE         Zone, such as us-east5-b. The default is \$CLOUDSDK_COMPUTE_ZONE.
  --project PROJECT   Project. The default is that of gcloud's configuration.
  --dry-run           Print the commands and run none.
  --help              Print this text."

parse_arguments "" "" "$@"
check_target
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
git -C "$root" rev-parse --verify --quiet HEAD >/dev/null || usage_error "this is no git checkout: $root"
if [ -n "$(git -C "$root" status --porcelain)" ]; then
  echo "note: changes that are not committed are left out" >&2
fi

if [ -n "$dry_run" ]; then
  folder=/tmp
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
archive=$checkout.tar.gz
run git -C "$root" archive --format=tar.gz "--prefix=$checkout/" "--output=$folder/$archive" HEAD
gcloud_tpus tpu-vm scp "$folder/$archive" "$name:$archive" --worker=all
# The folders of code are replaced, so that no file of an older commit remains.
job=$checkout/launch/job.sh
old=""
for part in llava_cot_jax configs launch tests; do old+=" $checkout/$part"; done
run_on_hosts all "{ ! [ -e $job ] || bash $job idle; } && rm -rf$old && tar -xzf $archive &&\
 bash $checkout/launch/tpu_vm_setup.sh"
