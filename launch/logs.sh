#!/usr/bin/env bash
# Follow the log of the command that runs on a TPU VM, until it ends.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/logs.sh NAME --zone ZONE [options]

Prints the log of the command that launch/run.sh or launch/spot.sh started, follows it until the
command ends, and ends with its exit code: of several hosts, the first that is not 0. Ctrl-C leaves
the command alone.

  --zone ZONE         as in us-east5-b; or \$CLOUDSDK_COMPUTE_ZONE
  --project PROJECT   otherwise that of gcloud's configuration
  --worker N          another host's than 0; or all, each line with the host's name
  --lines N           begin with the last N lines of the log
  --dry-run           print the commands, run none"

worker=0 lines=""
parse_arguments "worker lines" "" "$@"
check_target
check --worker "$worker" 'all|0|[1-9][0-9]{0,3}' "0 or all"
[ -z "$lines" ] || check --lines "$lines" '[0-9]{1,9}' 100

prefix=""
[ "$worker" != all ] || prefix=yes
trap 'echo; echo "the command goes on; to follow it again: launch/logs.sh $name --zone=$zone"; exit 130' INT
on_hosts_job "$worker" follow "${lines:-+1}" $prefix || fail "$name is out of reach, or no command was started there"
[ -z "$dry_run" ] || echo "# until no host says that it runs:"
for ((tries = 0; tries < 12; tries++)); do
  states=$(job_states "")
  if [ -n "$dry_run" ]; then
    echo "$states"
    exit
  fi
  [[ $states == *running* ]] || break
  sleep "${LAUNCH_POLL:-5}" # the other hosts may take a moment longer
done
[[ $states == *"job "* ]] || fail "no host of $name said how the command ended"
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
