# shellcheck shell=bash
# Functions of the launch scripts: they read and check arguments, call gcloud, and ask for the state of capacity and
# commands. A script sources this file, sets `usage` and the variables of its own options, and calls parse_arguments.
set -euo pipefail
LC_ALL=C # A range such as [a-z] means ASCII letters.

checkout=llava_cot_jax # Folder of the checkout in the home folder of a host.

usage="" zone=${CLOUDSDK_COMPUTE_ZONE:-} project="" dry_run="" yes=""
shared_options="zone project" # Options that every script has which calls gcloud.
shared_flags="dry-run"
name="" positionals=() command=() create_flags=()

# Prints one line, whatever the message contains.
print_error() { echo "error: ${*//[[:cntrl:]]/ }" >&2; }

usage_error() {
  print_error "$@"
  exit 2
}

fail() {
  print_error "$@"
  exit 1
}

log() { echo "[$(date +%H:%M:%S)] $*"; }

# --- arguments

# parse_arguments "OPTIONS" "FLAGS" ARGUMENTS... stores the value of an option in the variable of its name, written with
# underscores, and "yes" in the variable of a flag. Words that belong to no option go to the array `positionals`, and
# everything after -- goes to the array `command`. --help prints `usage` and exits.
parse_arguments() {
  local options=" $shared_options $1 " flags=" $shared_flags $2 " given option value
  shift 2
  while [ $# -gt 0 ]; do
    given=$1
    shift
    case $given in
      --) command=("$@") && break ;;
      -h | --help) echo "$usage" && exit 0 ;;
      --*) ;;
      -*) usage_error "unknown option $given (see --help)" ;;
      *) positionals+=("$given") && continue ;;
    esac
    option=${given#--} option=${option%%=*}
    [[ $option =~ ^[a-z-]+$ ]] || usage_error "unknown option $given (see --help)"
    if [[ $flags == *" $option "* ]]; then
      [[ $given != *=* ]] || usage_error "--$option takes no value"
      value=yes
    elif [[ $options != *" $option "* ]]; then
      usage_error "unknown option --$option (see --help)"
    elif [[ $given == *=* ]]; then
      value=${given#*=}
    else
      [ $# -gt 0 ] || usage_error "--$option needs a value"
      value=$1
      shift
    fi
    if [ "$option" = create-flag ]; then
      [[ $value =~ ^--[a-z] ]] || usage_error "--create-flag must be like --network=NAME: $value"
      create_flags+=("$value")
    else
      printf -v "${option//-/_}" %s "$value"
    fi
  done
}

check() { # WHAT VALUE PATTERN EXAMPLE
  [ -n "$2" ] || usage_error "$1 is missing, as in $4"
  [[ $2 =~ ^($3)$ ]] || usage_error "$1: $(quoted "$2") is not like $4"
}

check_place() {
  check --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z0-9]+' us-east5-b
  [ -z "$project" ] || check --project "$project" '[a-z][-a-z0-9.:]*[a-z0-9]' my-project
}

check_name() { # [LONGEST]
  [ ${#positionals[@]} -gt 0 ] || usage_error "a name is missing (see --help)"
  [ ${#positionals[@]} -eq 1 ] || usage_error "there must be one name, and a command comes after -- (see --help)"
  name=${positionals[0]}
  check "the name" "$name" "[a-z]([-a-z0-9]{0,$((${1:-63} - 2))}[a-z0-9])?" "my-tpu (small letters, digits, dashes)"
}

# Checks that there is one name, a zone, and a command after -- only where the script takes one.
check_target() { # [command]
  check_name
  check_place
  if [ "${1:-}" = command ]; then
    check_command
  elif [ ${#command[@]} -gt 0 ]; then
    usage_error "this script takes no command; launch/run.sh runs one"
  fi
}

# Checks an accelerator type, and prints the given runtime version, or else Google's for this type.
print_runtime_version() { # TYPE [VERSION]
  local size=${1#*-} runtime
  check --accelerator-type "$1" '(v5litepod|v5p|v6e)-[1-9][0-9]{0,4}' "v5litepod-64, v5p-16 or v6e-16"
  case $1 in
    v5p-*) [ $((size % 8)) -eq 0 ] || usage_error "--accelerator-type: v5p counts cores, a multiple of 8: $1" ;;
    *) [[ " 1 4 8 16 32 64 128 256 " == *" $size "* ]] || usage_error "--accelerator-type: there is no such size: $1" ;;
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

# Checks that there is a command, and that each bucket path in it is well formed.
check_command() {
  local word
  [ ${#command[@]} -gt 0 ] || usage_error "a command is missing; it comes after --"
  for word in "${command[@]}"; do
    case $word in gs:* | -*=gs:*) check_bucket "${word#-*=}" ;; esac
  done
}

# Checks that the command writes to a bucket, since the disks of a machine are lost with the machine.
check_output() {
  local output="" i
  for i in "${!command[@]}"; do
    case ${command[i]} in
      --output) output=${command[i + 1]:-} ;;
      --output=*) output=${command[i]#--output=} ;;
    esac
  done
  [[ $output == gs://* ]] || usage_error "the command needs --output gs://bucket/folder, as disks can be lost"
}

# Checks that a deletion can be confirmed: by typing the name on a terminal, or by --yes.
check_confirmable() {
  [ -n "$yes$dry_run" ] || [ -t 0 ] || usage_error "there is no terminal on which to confirm a deletion; add --yes"
}

confirm() { # QUESTION
  local answer=""
  [ -z "$yes" ] || return 0
  read -r -p "$1 Type its name: " answer || true
  [ "$answer" = "$name" ] || fail "not confirmed; nothing was deleted"
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

# Runs a command without input, or prints it with --dry-run.
run() {
  local code=0
  if [ -n "$dry_run" ]; then
    quoted "$@"
    return
  fi
  "$@" </dev/null || code=$?
  [ $code -eq 0 ] && return
  print_error "a command failed with exit code $code: $(quoted "$@")"
  return 1
}

gcloud_tpus() { run gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"} --quiet; }

# Runs a command on one host, or on all. gcloud tries up to ten times if the connection breaks, so the command may run
# more than once. The timeouts keep each try short when a machine is gone.
run_on_hosts() { # WORKER COMMAND
  gcloud_tpus tpu-vm ssh "$name" "--worker=$1" --ssh-flag=-oConnectTimeout=10 --ssh-flag=-oServerAliveInterval=30 \
    "--command=$2"
}

# Prints a line `job HOST STATE` for each host, including hosts where nothing is installed yet.
print_job_states() { # [COMMAND as one quoted string]
  local job=$checkout/launch/job.sh
  run_on_hosts all "if [ -e $job ]; then bash $job status${1:+ $1}; else echo job \$HOSTNAME none; fi"
}

run_job_script() { # WORKER VERB ARGUMENTS...
  local worker=$1
  shift
  run_on_hosts "$worker" "bash $checkout/launch/job.sh $(quoted "$@")"
}

# --- capacity

request_capacity() { # ACCELERATOR RUNTIME FLAGS...
  local accelerator=$1 runtime=$2
  shift 2
  gcloud_tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$accelerator" \
    "--runtime-version=$runtime" "$@" ${create_flags[@]+"${create_flags[@]}"}
}

release_capacity() { gcloud_tpus queued-resources delete "$name" --force; }

# Prints the state of the queued resource, or ABSENT if there is none. A list tells "there is none" from "gcloud gave no
# answer"; a description of one resource would fail in both cases.
print_request_state() {
  local state
  state=$(gcloud_tpus queued-resources list "--filter=name ~ \"/$name\$\"" "--format=value(state.state)") || return 1
  echo "${state:-ABSENT}"
}

print_machine_state() { gcloud_tpus tpu-vm describe "$name" "--format=value(state)"; }

# Prints the state of the queued resource. If it is ACTIVE but its machine is not READY, prints the machine's state.
print_capacity_state() {
  local state machine
  state=$(print_request_state) || return 1
  if [ "$state" = ACTIVE ]; then
    machine=$(print_machine_state) || return 1
    [ "$machine" = READY ] || state=${machine:-UNKNOWN}
  fi
  echo "$state"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then # This file was started instead of sourced.
  usage="Usage: source launch/common.sh

Defines functions for the other launch scripts. It does nothing by itself.

  --help   Print this text."
  shared_options="" shared_flags=""
  parse_arguments "" "" "$@"
  usage_error "launch/common.sh does nothing by itself (see --help)"
fi
