#!/usr/bin/env bash
# Create a TPU VM, or queue for one, and wait until it is there.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/create.sh NAME --accelerator-type TYPE --zone ZONE [options]

Creates a TPU VM and waits until it is there. It costs money until launch/delete.sh.

  --accelerator-type TYPE   v5litepod-N or v6e-N, N chips; v5p-N, N cores, which are N/2 chips
  --zone ZONE               as in us-east5-b; or \$CLOUDSDK_COMPUTE_ZONE
  --project PROJECT         otherwise that of gcloud's configuration
  --spot                    cheaper, and taken away when others need it: see launch/spot.sh
  --queued                  ask for it as a queued resource: where there is no capacity, wait for it
  --valid-until DURATION    with --queued: give up after that time, as in 6h
  --runtime-version NAME    otherwise Google's for this type
  --create-flag=FLAG        for gcloud's create, as in --create-flag=--network=NAME; may be repeated
  --dry-run                 print the commands, run none"

accelerator_type="" runtime_version="" spot="" queued="" valid_until=""
parse_arguments "accelerator-type runtime-version valid-until create-flag" "spot queued" "$@"
check_target
runtime=$(runtime_of "$accelerator_type" "$runtime_version")
if [ -n "$valid_until" ]; then
  [ -n "$queued" ] || mistake "--valid-until is for --queued"
  check --valid-until "$valid_until" '[1-9][0-9]*[smhd]' 6h
fi

if [ -z "$queued" ]; then
  tpu tpu-vm create "$name" "--accelerator-type=$accelerator_type" "--version=$runtime" ${spot:+--spot} \
    ${create_flags[@]+"${create_flags[@]}"}
  exit
fi

request_capacity "$accelerator_type" "$runtime" ${spot:+--spot} ${valid_until:+"--valid-until-duration=$valid_until"}
if [ -n "$dry_run" ]; then
  echo "# until it is ACTIVE:"
  request_state
  exit
fi
before=""
while :; do
  state=$(request_state) || state="no answer"
  [ "$state" = "$before" ] || say "$name: $state"
  before=$state
  case $state in
    ACTIVE) exit ;;
    ABSENT | FAILED | SUSPENDING | SUSPENDED | DELETING)
      fail "no capacity: the request is $state; launch/delete.sh $name removes it, and gcloud's describe says more"
      ;;
  esac
  sleep "${LAUNCH_POLL:-30}"
done
