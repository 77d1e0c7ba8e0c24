#!/usr/bin/env bash
# Follows the log of the command that runs on a TPU VM, until the command ends.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/logs.sh NAME --zone ZONE [options]

Prints the log of the command that launch/run.sh or launch/spot.sh started, and follows it until the
command ends. Ends with the command's exit code: that of the first host whose code is not 0. Ctrl-C
does not stop the command.

  NAME                Name of the TPU VM.
  --zone ZONE         Zone, such as us-east5-b. The default is \$CLOUDSDK_COMPUTE_ZONE.
  --project PROJECT   Project. The default is that of gcloud's configuration.
  --worker N          Number of the host, 0 by default, or all, which names the host in each line.
  --lines N           Begin with the last N lines of the log. By default, all are printed.
  --dry-run           Print the commands and run none.
  --help              Print this text."

worker=0 lines=""
parse_arguments "worker lines" "" "$@"
check_target
check --worker "$worker" 'all|0|[1-9][0-9]{0,3}' "0 or all"
[ -z "$lines" ] || check --lines "$lines" '[0-9]{1,9}' 100

prefix=""
[ "$worker" != all ] || prefix=yes
trap 'echo; echo "the command goes on; follow it again with: launch/logs.sh $name --zone=$zone"; exit 130' INT
run_job_script "$worker" follow "${lines:-+1}" $prefix ||
  fail "$name cannot be reached, or no command was started there"
[ -z "$dry_run" ] || echo "# repeated until the command runs on no host:"
for ((tries = 0; tries < 12; tries++)); do
  states=$(print_job_states "")
  if [ -n "$dry_run" ]; then
    echo "$states"
    exit
  fi
  [[ $states == *running* ]] || break
  sleep "${LAUNCH_POLL:-5}" # Other hosts may take a moment longer.
done
[[ $states == *"job "* ]] || fail "no host of $name reported how the command ended"
code=0
while read -r _ host state; do
  case $state in
    ended:0) continue ;;
    ended:*) found=${state#ended:} ;;
    *) found=1 ;;
  esac
  echo "$host: $state" >&2
  [ "$code" -ne 0 ] || code=$found
done < <(grep '^job ' <<<"$states")
exit "$code"
