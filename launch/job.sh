#!/usr/bin/env bash
# On one host of a TPU: one command at a time, which outlives the connection that started it.
#
#   bash launch/job.sh start COMMAND...     start it; where this very command runs already, leave it alone
#   bash launch/job.sh status [COMMAND...]  print `job HOST STATE`: none, running, ended:CODE, lost (it vanished, as in
#                                           a restart of the host), or busy (with another command than the given one)
#   bash launch/job.sh follow [LINES] [yes] print the log, its last LINES or all, until the command ends; yes: each
#                                           line with the host's name
#   bash launch/job.sh stop [SECONDS]       SIGTERM, and after SECONDS the end of it and its children
#   bash launch/job.sh idle                 fail where a command runs
#
# ~/llava_cot_jax_job has its log, that of the one before, and its exit code. A command that was asked to stop has ended
# well only for itself: its code 0 is written as 143.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$HOME/llava_cot_jax_job
script=launch/job.sh
export PATH=$PWD/.venv/bin:$PATH PYTHONUNBUFFERED=1
mkdir -p "$folder"

fail() {
  echo "error: $HOSTNAME: $*" >&2
  exit 1
}

# The process that watches over the command holds this lock, and nothing else does for longer than a moment.
running() { ! flock --nonblock --shared "$folder/lock" true; }

same() { [ "$(printf '%q ' "$@")" = "$(cat "$folder/command" 2>/dev/null)" ]; }

start() {
  if running; then
    same "$@" || fail "another command runs: $(cat "$folder/command")"
    echo "$HOSTNAME: runs already"
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
  # A signal ends `wait`, not the command.
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
  flock --shared "$folder/lock" true & # until the command ends
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
  kill -KILL -- "-$pid" 2>/dev/null || true # it leads a group: the command and its children are in it
  finish 137
}

verb=${1:-}
[ $# -eq 0 ] || shift
case $verb in
  start) # one at a time: gcloud may try again while the first try is under way
    exec 8>"$folder/starting"
    flock 8
    start "$@"
    ;;
  status | follow | stop | watch) "$verb" "$@" ;;
  idle) ! running || fail "a command runs: $(cat "$folder/command")" ;;
  *) fail "unknown: $verb" ;;
esac
