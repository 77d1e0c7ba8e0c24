#!/usr/bin/env bash
# Creates a TPU VM, or queues for one, and waits until it is ready.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/create.sh NAME --accelerator-type TYPE --zone ZONE [options]

Creates a TPU VM and waits until it is ready. It costs money until launch/delete.sh deletes it.

  NAME                      Name of the new TPU VM.
  --accelerator-type TYPE   v5litepod-N or v6e-N with N chips, or v5p-N with N cores (N/2 chips).
  --zone ZONE               Zone, such as us-east5-b. The default is \$CLOUDSDK_COMPUTE_ZONE.
  --project PROJECT         Project. The default is that of gcloud's configuration.
  --spot                    Use spot capacity, which is cheaper and may be taken away at any time.
  --queued                  Create a queued resource, which waits until there is capacity.
  --valid-until DURATION    Time after which a queued resource is given up, such as 6h.
  --runtime-version NAME    Runtime version. The default is Google's for the accelerator type.
  --create-flag=FLAG        Flag for gcloud's create, such as --network=NAME. May be repeated.
  --dry-run                 Print the commands and run none.
  --help                    Print this text."

accelerator_type="" runtime_version="" spot="" queued="" valid_until=""
parse_arguments "accelerator-type runtime-version valid-until create-flag" "spot queued" "$@"
check_target
runtime=$(print_runtime_version "$accelerator_type" "$runtime_version")
if [ -n "$valid_until" ]; then
  [ -n "$queued" ] || usage_error "--valid-until needs --queued"
  check --valid-until "$valid_until" '[1-9][0-9]*[smhd]' 6h
fi

if [ -z "$queued" ]; then
  gcloud_tpus tpu-vm create "$name" "--accelerator-type=$accelerator_type" "--version=$runtime" ${spot:+--spot} \
    ${create_flags[@]+"${create_flags[@]}"}
  exit
fi

request_capacity "$accelerator_type" "$runtime" ${spot:+--spot} ${valid_until:+"--valid-until-duration=$valid_until"}
if [ -n "$dry_run" ]; then
  echo "# repeated until it is ACTIVE:"
  print_request_state
  exit
fi
before=""
while :; do
  state=$(print_request_state) || state="no answer"
  [ "$state" = "$before" ] || log "$name: $state"
  before=$state
  case $state in
    ACTIVE) exit ;;
    ABSENT | FAILED | SUSPENDING | SUSPENDED | DELETING)
      fail "there is no capacity: the request is $state; launch/delete.sh $name removes it"
      ;;
  esac
  sleep "${LAUNCH_POLL:-30}"
done
