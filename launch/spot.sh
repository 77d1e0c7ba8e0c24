#!/usr/bin/env bash
# Train on spot capacity: ask for it, install, run, and begin again whenever it is taken away.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/spot.sh NAME --accelerator-type TYPE --zone ZONE [options] -- COMMAND...

Queues for spot capacity, installs the last commit, runs COMMAND on all hosts and looks after it:
capacity that is taken away is deleted and asked for again, and the same command goes on from the
newest checkpoint in its --output, which must be in a bucket. A command that fails is started again,
a few times; one that ends with code 2, a mistake in its arguments, is not. At the end the capacity
is deleted, and the command's exit code is this one's.

This script must run all the while; launch/logs.sh follows the command. Where this was interrupted,
the same call takes up what is there, and asks first.

  --accelerator-type TYPE   v5litepod-N or v6e-N, N chips; v5p-N, N cores, which are N/2 chips
  --zone ZONE               as in us-east5-b; or \$CLOUDSDK_COMPUTE_ZONE
  --project PROJECT         otherwise that of gcloud's configuration
  --attempts N              stop after N failures while the capacity was there, 3 by default
  --keep                    leave the capacity at the end; it costs money until launch/delete.sh
  --runtime-version NAME    otherwise Google's for this type
  --create-flag=FLAG        for gcloud's create, as in --create-flag=--network=NAME; may be repeated
  --yes                     take up, and at the end delete, what is there under NAME without asking
  --dry-run                 print the commands, run none
  \$LAUNCH_POLL              seconds between looks, 60 by default
  \$LAUNCH_PATIENCE          give up after so many requests in vain, or looks at silent hosts; 10"

accelerator_type="" runtime_version="" attempts=3 keep=""
parse_arguments "accelerator-type runtime-version attempts create-flag" "keep yes" "$@"
check_target command
check_output
runtime=$(runtime_of "$accelerator_type" "$runtime_version")
check --attempts "$attempts" '[1-9][0-9]{0,2}' 3
poll=${LAUNCH_POLL:-60} patience=${LAUNCH_PATIENCE:-10}
check LAUNCH_POLL "$poll" '[0-9]{1,5}([.][0-9]{1,3})?' 60
check LAUNCH_PATIENCE "$patience" '[1-9][0-9]{0,4}' 10

# With several hosts gcloud refuses a key that is not in the agent, which would show only after the capacity is there.
key=$HOME/.ssh/google_compute_engine
if [ "${accelerator_type#*-}" -gt 8 ] && held=$(ssh-add -l 2>/dev/null); then
  [ -e "$key" ] || mistake "the ssh agent lacks gcloud's key: ssh-keygen -t rsa -f $key && ssh-add $key"
  print=$(ssh-keygen -lf "$key" | cut -d ' ' -f 2)
  [[ $held == *"$print"* ]] || mistake "the ssh agent lacks gcloud's key: ssh-add $key"
fi

place=("--zone=$zone" ${project:+"--project=$project"})
failures=0 refusals=0 silent=0 asked="" taken_up="" before=""

install() { "$BASH" "$(dirname "${BASH_SOURCE[0]}")/install.sh" "$name" "${place[@]}" ${dry_run:+--dry-run}; }
start() { on_hosts_job all start "${command[@]}"; }

report() {
  [ "$1" = "$before" ] || say "$name: $1"
  before=$1
}

finish() { # CODE
  if [ -n "$keep" ]; then
    say "$name is kept, and costs money until: launch/delete.sh $name ${place[*]}"
  else
    release_capacity || fail "$name MAY STILL BE THERE, and cost money: launch/delete.sh $name ${place[*]}"
    say "$name is deleted"
  fi
  exit "$1"
}

# A request in vain costs nothing, so there may be many.
refused() { # WHY
  refusals=$((refusals + 1))
  say "$name: $1 ($refusals of $patience)"
  [ $refusals -lt "$patience" ] || finish 1
}

request() {
  silent=0
  if request_capacity "$accelerator_type" "$runtime" --spot; then
    asked=yes
  elif [ -z "$asked" ]; then
    fail "nothing was created"
  else
    refused "gcloud did not take the request"
  fi
}

# Whether something failed on its own: capacity that is being taken away fails in many ways, so look again first.
failed() { # WHAT
  say "$name: $1"
  sleep "$poll"
  [ "$(capacity_state)" = ACTIVE ] || return 1
  failures=$((failures + 1))
  say "$name: failure $failures of $attempts"
}

# The command ended with a code that is not 0, or vanished, on some host: the others wait for that one in vain.
restart() { # STATES
  local code=1
  [[ ! $1 =~ ended:([1-9][0-9]*) ]] || code=${BASH_REMATCH[1]}
  failed "${1//$'\n'/, }" || return 0
  on_hosts_job all stop 30 || say "not stopped everywhere"
  on_hosts_job all follow 20 yes || say "no answer from the hosts"
  [ $failures -lt "$attempts" ] || finish "$code"
  before=""
  start || say "not started everywhere"
}

# Look at the command on its hosts, and do what is due. Nothing is concluded from an answer that not all hosts gave.
tend() {
  local answer states
  refusals=0
  answer=$(job_states "$(quoted "${command[@]}")" 2>&1) || answer=""
  states=$(sed -n 's/^job //p' <<<"$answer")
  if [ -z "$states" ]; then
    report "no answer from the hosts"
    silent=$((silent + 1))
    if [ $silent -ge "$patience" ] && failed "given up"; then
      [ $failures -lt "$attempts" ] || finish 1
      release_capacity || say "not deleted yet"
    fi
    return
  fi
  silent=0
  # What failed before this call may go well with the commit of today.
  [ -z "$taken_up" ] || states=$(sed -E 's/ (lost|ended:[1-9][0-9]*)$/ none/' <<<"$states")
  taken_up=""
  if grep -q ' busy$' <<<"$states"; then
    fail "another command runs on $name, which is left alone: launch/stop.sh ends it"
  elif grep -q ' ended:2$' <<<"$states"; then
    on_hosts_job 0 follow 20 || true
    finish 2
  elif grep -q ' none$' <<<"$states"; then
    report installing
    if install && start; then
      report "started; to follow it: launch/logs.sh $name ${place[*]}"
    elif failed "not started"; then
      [ $failures -lt "$attempts" ] || finish 1
    fi
  elif grep -q -E ' (lost|ended:[1-9][0-9]*)$' <<<"$states"; then
    restart "$states"
  elif grep -q ' running$' <<<"$states"; then
    report running
  else
    report "the command has ended well"
    finish 0
  fi
}

if [ -n "$dry_run" ]; then
  request_state
  echo "# where it is ABSENT:"
  request_capacity "$accelerator_type" "$runtime" --spot
  echo "# every $poll s, until it is ACTIVE and its machine READY:"
  request_state
  machine_state
  echo "# then:"
  install
  start
  echo "# every $poll s, besides the state:"
  job_states "$(quoted "${command[@]}")"
  echo "# where it is taken away, before all this begins again, and at the end:"
  release_capacity
  exit
fi

state=$(request_state) || fail "gcloud does not say whether $name is there"
if [ "$state" != ABSENT ]; then
  check_confirmable
  confirm "$name is there already ($state). Look after it, and delete it in the end?"
  asked=yes taken_up=yes
fi
trap 'complain "interrupted: $name goes on, and costs money: the same call takes it up"; exit 130' INT TERM
while :; do
  state=$(capacity_state) || state="no answer from gcloud"
  case $state in
    ABSENT) request ;;
    ACTIVE) tend ;;
    FAILED)
      refused "the request FAILED: $(tpu queued-resources describe "$name" "--format=value(state.failedData)" || true)"
      release_capacity || say "not deleted yet"
      ;;
    SUSPENDED | PREEMPTED | TERMINATED)
      report "$state: taken away"
      release_capacity || say "not deleted yet"
      ;;
    *) report "$state" ;;
  esac
  sleep "$poll"
done
