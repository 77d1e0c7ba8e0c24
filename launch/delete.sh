#!/usr/bin/env bash
# Deletes a TPU VM, or a queued resource with its TPU VM.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/delete.sh NAME --zone ZONE [options]

Deletes the TPU VM or queued resource that launch/create.sh or launch/spot.sh created, with
everything on its disks. Asks you to type the name first. End a running launch/spot.sh before, since
it would ask for new capacity.

  NAME                Name of the TPU VM.
  --zone ZONE         Zone, such as us-east5-b. The default is \$CLOUDSDK_COMPUTE_ZONE.
  --project PROJECT   Project. The default is that of gcloud's configuration.
  --yes               Do not ask for the name.
  --dry-run           Print the commands and run none.
  --help              Print this text."

parse_arguments "" "yes" "$@"
check_target
check_confirmable
if [ -n "$dry_run" ]; then
  print_request_state
  echo "# if it is a queued resource:"
  release_capacity
  echo "# if it is not:"
  gcloud_tpus tpu-vm delete "$name"
  exit
fi

state=$(print_request_state)
if [ "$state" = ABSENT ]; then
  confirm "Delete the TPU VM $name in $zone?"
  gcloud_tpus tpu-vm delete "$name"
else
  confirm "Delete the queued resource $name in $zone ($state) and its TPU VM?"
  release_capacity
fi
