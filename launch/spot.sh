#!/usr/bin/env bash
# Trains on spot capacity: asks for it, installs, runs, and begins again whenever it is taken away.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/spot.sh NAME --accelerator-type TYPE --zone ZONE [options] -- COMMAND...

Trains on spot capacity: queues for it, installs the last commit, and runs COMMAND on all hosts. If
the capacity is taken away, asks for it again, and the command resumes from the newest checkpoint in
its --output, which must be in a bucket. A command that fails is started again, except after exit
code 2. Deletes the capacity at the end, and ends with the command's exit code. This script must
keep running. If it is interrupted, the same call asks for confirmation and continues.

  NAME                      Name of the TPU VM.
  COMMAND...                Command and its arguments.
  --accelerator-type TYPE   v5litepod-N or v6e-N with N chips, or v5p-N with N cores (N/2 chips).
  --zone ZONE               Zone, such as us-east5-b. The default is \$CLOUDSDK_COMPUTE_ZONE.
  --project PROJECT         Project. The default is that of gcloud's configuration.
  --attempts N              Number of failures, without loss of capacity, that end it. Default: 3.
  --keep                    Do not delete the capacity at the end. It goes on costing money.
  --runtime-version NAME    Runtime version. The default is Google's for the accelerator type.
  --create-flag=FLAG        Flag for gcloud's create, such as --network=NAME. May be repeated.
  --yes                     Do not ask before using, and finally deleting, a NAME that exists.
  --dry-run                 Print the commands and run none.
  --help                    Print this text.
  \$LAUNCH_POLL              Seconds between two looks at the state. The default is 60.
  \$LAUNCH_PATIENCE          Number of failed requests, or looks at silent hosts, that end it: 10."

accelerator_type="" runtime_version="" attempts=3 keep=""
parse_arguments "accelerator-type runtime-version attempts create-flag" "keep yes" "$@"
check_target command
check_output
runtime=$(print_runtime_version "$accelerator_type" "$runtime_version")
check --attempts "$attempts" '[1-9][0-9]{0,2}' 3
poll=${LAUNCH_POLL:-60} patience=${LAUNCH_PATIENCE:-10}
check LAUNCH_POLL "$poll" '[0-9]{1,5}([.][0-9]{1,3})?' 60
check LAUNCH_PATIENCE "$patience" '[1-9][0-9]{0,4}' 10

# With several hosts, gcloud refuses a key that is not in the agent. Without this check, that would show only after the
# capacity was created.
key=$HOME/.ssh/google_compute_engine
if [ "${accelerator_type#*-}" -gt 8 ] && held=$(ssh-add -l 2>/dev/null); then
  [ -e "$key" ] || usage_error "the ssh agent lacks gcloud's key: ssh-keygen -t rsa -f $key && ssh-add $key"
  print=$(ssh-keygen -lf "$key" | cut -d ' ' -f 2)
  [[ $held == *"$print"* ]] || usage_error "the ssh agent lacks gcloud's key: ssh-add $key"
fi

location=("--zone=$zone" ${project:+"--project=$project"})
failures=0 refusals=0 silent=0 asked="" taken_up="" before=""

install() { "$BASH" "$(dirname "${BASH_SOURCE[0]}")/install.sh" "$name" "${location[@]}" ${dry_run:+--dry-run}; }
start() { run_job_script all start "${command[@]}"; }

report() {
  [ "$1" = "$before" ] || log "$name: $1"
  before=$1
}

finish() { # CODE
  if [ -n "$keep" ]; then
    log "$name is kept, and costs money until you run: launch/delete.sh $name ${location[*]}"
  else
    release_capacity ||
      fail "$name MAY STILL BE THERE, and cost money; delete it with: launch/delete.sh $name ${location[*]}"
    log "$name is deleted"
  fi
  exit "$1"
}

# Counts a request that failed. It costs nothing, so many are allowed.
refused() { # WHY
  refusals=$((refusals + 1))
  log "$name: $1 ($refusals of $patience)"
  [ $refusals -lt "$patience" ] || finish 1
}

request() {
  silent=0
  if request_capacity "$accelerator_type" "$runtime" --spot; then
    asked=yes
  elif [ -z "$asked" ]; then
    fail "nothing was created"
  else
    refused "gcloud did not accept the request"
  fi
}

# Succeeds if something failed although the capacity is still there. Capacity that is being taken away fails in many
# ways, so the state is looked up again first.
failed() { # WHAT
  log "$name: $1"
  sleep "$poll"
  [ "$(print_capacity_state)" = ACTIVE ] || return 1
  failures=$((failures + 1))
  log "$name: failure $failures of $attempts"
}

# Starts the command again after it failed, or vanished, on some host. The other hosts would wait for that host forever.
restart() { # STATES
  local code=1
  [[ ! $1 =~ ended:([1-9][0-9]*) ]] || code=${BASH_REMATCH[1]}
  failed "${1//$'\n'/, }" || return 0
  run_job_script all stop 30 || log "the command was not stopped on every host"
  run_job_script all follow 20 yes || log "no answer from the hosts"
  [ $failures -lt "$attempts" ] || finish "$code"
  before=""
  start || log "the command was not started on every host"
}

# Looks at the command on its hosts and acts on its state. An answer that some host did not give leads to no action.
tend() {
  local answer states
  refusals=0
  answer=$(print_job_states "$(quoted "${command[@]}")" 2>&1) || answer=""
  states=$(sed -n 's/^job //p' <<<"$answer")
  if [ -z "$states" ]; then
    report "no answer from the hosts"
    silent=$((silent + 1))
    if [ $silent -ge "$patience" ] && failed "the hosts are given up"; then
      [ $failures -lt "$attempts" ] || finish 1
      release_capacity || log "$name is not deleted yet"
    fi
    return
  fi
  silent=0
  # A command that failed before this call may succeed with the commit of today.
  [ -z "$taken_up" ] || states=$(sed -E 's/ (lost|ended:[1-9][0-9]*)$/ none/' <<<"$states")
  taken_up=""
  if grep -q ' busy$' <<<"$states"; then
    fail "another command runs on $name and is left alone; launch/stop.sh ends it"
  elif grep -q ' ended:2$' <<<"$states"; then
    run_job_script 0 follow 20 || true
    finish 2
  elif grep -q ' none$' <<<"$states"; then
    report installing
    if install && start; then
      report "started; follow it with: launch/logs.sh $name ${location[*]}"
    elif failed "the command was not started"; then
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
  print_request_state
  echo "# if it is ABSENT:"
  request_capacity "$accelerator_type" "$runtime" --spot
  echo "# every $poll s, until it is ACTIVE and its machine is READY:"
  print_request_state
  print_machine_state
  echo "# then:"
  install
  start
  echo "# every $poll s, after the state:"
  print_job_states "$(quoted "${command[@]}")"
  echo "# if it is taken away, before all of this is repeated, and at the end:"
  release_capacity
  exit
fi

state=$(print_request_state) || fail "gcloud does not say whether $name exists"
if [ "$state" != ABSENT ]; then
  check_confirmable
  confirm "$name exists already ($state). Use it, and delete it at the end?"
  asked=yes taken_up=yes
fi
trap 'print_error "interrupted: $name goes on, and costs money; the same call continues with it"; exit 130' INT TERM
while :; do
  state=$(print_capacity_state) || state="no answer from gcloud"
  case $state in
    ABSENT) request ;;
    ACTIVE) tend ;;
    FAILED)
      why=$(gcloud_tpus queued-resources describe "$name" "--format=value(state.failedData)" || true)
      refused "the request FAILED: $why"
      release_capacity || log "$name is not deleted yet"
      ;;
    SUSPENDED | PREEMPTED | TERMINATED)
      report "$state: the capacity was taken away"
      release_capacity || log "$name is not deleted yet"
      ;;
    *) report "$state" ;;
  esac
  sleep "$poll"
done
