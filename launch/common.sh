# shellcheck shell=bash
# What the launch scripts share: arguments and their checks, calls of gcloud, what is known of capacity and commands.
# A script that sources this sets `usage`, and its own variables for options before it calls parse_arguments.
set -euo pipefail
LC_ALL=C # ranges such as [a-z] mean ASCII

checkout=llava_cot_jax # on the hosts, in the home folder

usage="" zone=${CLOUDSDK_COMPUTE_ZONE:-} project="" dry_run="" yes=""
place="zone project" # the options that say where, of all scripts that call gcloud
name="" words=() command=() create_flags=()

# One line, whatever is in it.
complain() { echo "error: ${*//[[:cntrl:]]/ }" >&2; }

mistake() {
  complain "$@"
  exit 2
}

fail() {
  complain "$@"
  exit 1
}

say() { echo "[$(date +%H:%M:%S)] $*"; }

# --- arguments

# parse_arguments "OPTIONS" "FLAGS" ARGUMENTS...: an option, which takes a value, and a flag, which becomes "yes", set
# the variable of their name, with underscores. Other words go to `words`, all that follows -- to `command`.
parse_arguments() {
  local options=" $place $1 " flags=" dry-run $2 " given option value
  shift 2
  while [ $# -gt 0 ]; do
    given=$1
    shift
    case $given in
      --) command=("$@") && break ;;
      -h | --help) echo "$usage" && exit 0 ;;
      --*) ;;
      -*) mistake "unknown option $given (see --help)" ;;
      *) words+=("$given") && continue ;;
    esac
    option=${given#--} option=${option%%=*}
    [[ $option =~ ^[a-z-]+$ ]] || mistake "unknown option $given (see --help)"
    if [[ $flags == *" $option "* ]]; then
      [[ $given != *=* ]] || mistake "--$option takes no value"
      value=yes
    elif [[ $options != *" $option "* ]]; then
      mistake "unknown option --$option (see --help)"
    elif [[ $given == *=* ]]; then
      value=${given#*=}
    else
      [ $# -gt 0 ] || mistake "--$option needs a value"
      value=$1
      shift
    fi
    if [ "$option" = create-flag ]; then
      [[ $value =~ ^--[a-z] ]] || mistake "--create-flag: not like --network=NAME: $value"
      create_flags+=("$value")
    else
      printf -v "${option//-/_}" %s "$value"
    fi
  done
}

check() { # WHAT VALUE PATTERN EXAMPLE
  [ -n "$2" ] || mistake "$1 is missing, as in $4"
  [[ $2 =~ ^($3)$ ]] || mistake "$1: $(quoted "$2") is not like $4"
}

check_place() {
  check --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z0-9]+' us-east5-b
  [ -z "$project" ] || check --project "$project" '[a-z][-a-z0-9.:]*[a-z0-9]' my-project
}

check_name() { # [LONGEST]
  [ ${#words[@]} -gt 0 ] || mistake "a name is missing (see --help)"
  [ ${#words[@]} -eq 1 ] || mistake "one name is expected, and a command comes after -- (see --help)"
  name=${words[0]}
  check "the name" "$name" "[a-z]([-a-z0-9]{0,$((${1:-63} - 2))}[a-z0-9])?" "my-tpu (small letters, digits, dashes)"
}

# One word, the TPU's name; the place; and no command, but for the scripts that take one.
check_target() { # [command]
  check_name
  check_place
  if [ "${1:-}" = command ]; then
    check_command
  elif [ ${#command[@]} -gt 0 ]; then
    mistake "no command is expected: launch/run.sh runs one"
  fi
}

# Prints the runtime version for an accelerator type that exists: the given one, or Google's for the type.
runtime_of() { # TYPE [VERSION]
  local size=${1#*-} runtime
  check --accelerator-type "$1" '(v5litepod|v5p|v6e)-[1-9][0-9]{0,4}' "v5litepod-64, v5p-16 or v6e-16"
  case $1 in
    v5p-*) [ $((size % 8)) -eq 0 ] || mistake "--accelerator-type: v5p counts cores, in eights: $1" ;;
    *) [[ " 1 4 8 16 32 64 128 256 " == *" $size "* ]] || mistake "--accelerator-type: no such size: $1" ;;
  esac
  case $1 in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
  esac
  [ -z "$2" ] || check --runtime-version "$2" '[a-z0-9][-a-z0-9.]*' "$runtime"
  echo "${2:-$runtime}"
}

check_bucket() {
  check "a bucket path" "$1" 'gs://[a-z0-9][-a-z0-9_.]{1,61}[a-z0-9](/[^[:space:]]*)?' gs://bucket/folder
}

# A command is there, and each bucket path in it is one.
check_command() {
  local word
  [ ${#command[@]} -gt 0 ] || mistake "a command is missing: it comes after --"
  for word in "${command[@]}"; do
    case $word in gs:* | -*=gs:*) check_bucket "${word#-*=}" ;; esac
  done
}

# The command writes to a bucket: what is on a machine goes with it.
check_output() {
  local output="" i
  for i in "${!command[@]}"; do
    case ${command[i]} in
      --output) output=${command[i + 1]:-} ;;
      --output=*) output=${command[i]#--output=} ;;
    esac
  done
  [[ $output == gs://* ]] || mistake "the command needs --output gs://bucket/folder: what is on a taken machine is gone"
}

# Before anything is deleted, the name is typed by whoever is there, or --yes is given.
check_confirmable() {
  [ -n "$yes$dry_run" ] || [ -t 0 ] || mistake "there is no terminal to ask on before a deletion: give --yes"
}

confirm() { # QUESTION
  local answer=""
  [ -z "$yes" ] || return 0
  read -r -p "$1 Type its name: " answer || true
  [ "$answer" = "$name" ] || fail "not confirmed: nothing is deleted"
}

# --- calls

quoted() {
  local word text="" single="'" escaped="'\\''" plain='^[A-Za-z0-9_./:=@%+,-]+$'
  for word in "$@"; do
    [[ $word =~ $plain ]] || word="'${word//$single/$escaped}'"
    text+="${text:+ }$word"
  done
  printf '%s\n' "$text"
}

# Run a command, or print it where this is a rehearsal. Nothing here reads from the terminal.
call() {
  local code=0
  if [ -n "$dry_run" ]; then
    quoted "$@"
    return
  fi
  "$@" </dev/null || code=$?
  [ $code -eq 0 ] && return
  complain "this ended with code $code: $(quoted "$@")"
  return 1
}

tpu() { call gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"} --quiet; }

# Run a command on a worker, or on all. gcloud runs it again where the connection breaks: it must bear that. It tries
# ten times, and a machine that is gone must not hold each of them up for minutes.
on_hosts() { # WORKER COMMAND
  tpu tpu-vm ssh "$name" "--worker=$1" --ssh-flag=-oConnectTimeout=10 --ssh-flag=-oServerAliveInterval=30 "--command=$2"
}

# A line `job HOST STATE` from each host, also from those where nothing is installed yet.
job_states() { # COMMAND, quoted, or nothing
  local job=$checkout/launch/job.sh
  on_hosts all "if [ -e $job ]; then bash $job status${1:+ $1}; else echo job \$HOSTNAME none; fi"
}

on_hosts_job() { # WORKER VERB ARGUMENTS...
  local worker=$1
  shift
  on_hosts "$worker" "bash $checkout/launch/job.sh $(quoted "$@")"
}

# --- capacity

request_capacity() { # ACCELERATOR RUNTIME FLAGS...
  local accelerator=$1 runtime=$2
  shift 2
  tpu queued-resources create "$name" "--node-id=$name" "--accelerator-type=$accelerator" "--runtime-version=$runtime" \
    "$@" ${create_flags[@]+"${create_flags[@]}"}
}

release_capacity() { tpu queued-resources delete "$name" --force; }

# Prints the state of the queued resource: ABSENT where there is none. It is looked up in a list, which tells one that
# is not there from a question that got no answer.
request_state() {
  local state
  state=$(tpu queued-resources list "--filter=name ~ \"/$name\$\"" "--format=value(state.state)") || return 1
  echo "${state:-ABSENT}"
}

machine_state() { tpu tpu-vm describe "$name" "--format=value(state)"; }

# Prints the same, but for an ACTIVE one whose machine is not READY the state of that.
capacity_state() {
  local state machine
  state=$(request_state) || return 1
  if [ "$state" = ACTIVE ]; then
    machine=$(machine_state) || return 1
    [ "$machine" = READY ] || state=${machine:-UNKNOWN}
  fi
  echo "$state"
}
