#!/usr/bin/env bash
# Delete a TPU VM, or a queued resource with its TPU VM.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/delete.sh NAME --zone ZONE [options]

Deletes what launch/create.sh or launch/spot.sh created, and all that lies on its disks. Asks for
its name first. A launch/spot.sh that still runs would ask for new capacity: end it before.

  --zone ZONE         as in us-east5-b; or \$CLOUDSDK_COMPUTE_ZONE
  --project PROJECT   otherwise that of gcloud's configuration
  --yes               do not ask
  --dry-run           print the commands, run none"

parse_arguments "" "yes" "$@"
check_target
check_confirmable
if [ -n "$dry_run" ]; then
  request_state
  echo "# where it is a queued resource:"
  release_capacity
  echo "# where it is not:"
  tpu tpu-vm delete "$name"
  exit
fi

state=$(request_state)
if [ "$state" = ABSENT ]; then
  confirm "Delete the TPU VM $name in $zone?"
  tpu tpu-vm delete "$name"
else
  confirm "Delete the queued resource $name in $zone ($state) and its TPU VM?"
  release_capacity
fi
