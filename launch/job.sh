#!/usr/bin/env bash
# Runs one command at a time on one host of a TPU VM, detached from the connection that starts it.
#
# The folder ~/llava_cot_jax_job has the log of the command, the log of the command before, and the exit code. A command
# that was asked to stop has finished only its own shutdown, not its work, so its exit code 0 is stored as 143.
locale=${LC_ALL-}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [ -n "$locale" ]; then LC_ALL=$locale; else unset LC_ALL; fi # The command runs in the locale of its user.

usage="Usage: launch/job.sh VERB [arguments]

Runs one command at a time on this host of a TPU VM. The other launch scripts call it over ssh.

  start COMMAND...      Start COMMAND. If the same command runs already, do nothing.
  status [COMMAND...]   Print 'job HOST STATE'. STATE: none, running, ended:CODE, lost (it vanished,
                        as when the host restarts), or busy (a command other than COMMAND runs).
  follow [LINES [yes]]  Print the log, or its last LINES, until the command ends. With yes, lines
                        begin with the name of the host.
  stop [SECONDS]        Send SIGTERM, and SIGKILL after SECONDS, 600 by default.
  idle                  Fail if a command runs.
  watch COMMAND...      Run COMMAND and store its exit code. This is for start alone.
  --help                Print this text."
shared_options="" shared_flags=""
parse_arguments "" "" "${@:1:2}" # All further words belong to the command.
cd "$(dirname "$0")/.."

folder=$HOME/llava_cot_jax_job
script=launch/job.sh
export PATH=$PWD/.venv/bin:$PATH PYTHONUNBUFFERED=1

fail() {
  echo "error: $HOSTNAME: $*" >&2
  exit 1
}

# Whether a command runs. The process that watches over it holds this lock; others hold it for a moment at most.
running() { ! flock --nonblock --shared "$folder/lock" true; }

same() { [ "$(printf '%q ' "$@")" = "$(cat "$folder/command" 2>/dev/null)" ]; }

start() {
  if running; then
    same "$@" || fail "another command runs: $(cat "$folder/command")"
    echo "$HOSTNAME: the command runs already"
    return
  fi
  rm -f "$folder/code"
  [ ! -e "$folder/log" ] || mv "$folder/log" "$folder/log.before"
  printf '%q ' "$@" >"$folder/command"
  nohup setsid bash "$script" watch "$@" </dev/null >"$folder/log" 2>&1 8>&- &
  until running || [ -e "$folder/code" ] || ! kill -0 $! 2>/dev/null; do sleep 0.05; done
  echo "$HOSTNAME: started"
}

watch() {
  local child="" code=0 stopped=""
  trap 'stopped=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM
  echo $$ >"$folder/pid"
  exec 9>"$folder/lock"
  flock 9
  "$@" 9>&- &
  child=$!
  [ -z "$stopped" ] || kill -TERM "$child" 2>/dev/null || true
  # A signal ends `wait`, but not the command.
  while :; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  if [ -n "$stopped" ] && [ $code -eq 0 ]; then code=143; fi
  finish $code
}

finish() {
  echo "$1" >"$folder/code.part"
  mv "$folder/code.part" "$folder/code"
}

status() {
  local state
  if [ ! -e "$folder/command" ]; then
    state=none
  elif running; then
    state=running
    [ $# -eq 0 ] || same "$@" || state=busy
  elif [ $# -gt 0 ] && ! same "$@"; then
    state=none
  elif [ -e "$folder/code" ]; then
    state=ended:$(cat "$folder/code")
  else
    state=lost
  fi
  echo "job $HOSTNAME $state"
}

follow() {
  local lines=${1:-+1} prefix=""
  [ -e "$folder/log" ] || fail "no command was started"
  [ -z "${2:-}" ] || prefix="$HOSTNAME: "
  flock --shared "$folder/lock" true & # This process ends when the command does.
  tail --lines="$lines" --follow --sleep-interval=0.2 --pid=$! "$folder/log" | sed --unbuffered "s/^/$prefix/"
}

stop() {
  local pid waited
  running || return 0
  pid=$(cat "$folder/pid")
  kill -TERM "$pid" 2>/dev/null || true
  for ((waited = 0; waited < ${1:-600} * 10; waited++)); do
    running || return 0
    sleep 0.1
  done
  kill -KILL -- "-$pid" 2>/dev/null || true # Its process group has the command and its children.
  finish 137
}

[ $# -gt 0 ] || usage_error "a verb is missing (see --help)"
verb=$1
shift
[[ " start status follow stop idle watch " == *" $verb "* ]] || usage_error "unknown verb $verb (see --help)"
mkdir -p "$folder"
case $verb in
  start) # This lock lets one start at a time through: gcloud may try again while its first try is under way.
    exec 8>"$folder/starting"
    flock 8
    start "$@"
    ;;
  status | follow | stop | watch) "$verb" "$@" ;;
  idle) ! running || fail "a command runs: $(cat "$folder/command")" ;;
esac
