#!/usr/bin/env bash
# Copies a file or folder from a host of a TPU VM, or from a bucket, to this machine.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/fetch.sh NAME:PATH FOLDER --zone ZONE [options]
       launch/fetch.sh gs://BUCKET/PATH FOLDER [options]

Copies a file or folder into FOLDER. Nothing that is there already is overwritten.

  launch/fetch.sh my-tpu:runs/lora results
  launch/fetch.sh gs://bucket/runs/lora results

  NAME:PATH           Path on a host of the TPU VM NAME. It is relative to ~/$checkout unless it
                      begins with / or ~/. Logs are in ~/llava_cot_jax_job.
  gs://BUCKET/PATH    Path in a bucket.
  FOLDER              Folder on this machine, which is created if it does not exist.
  --zone ZONE         Zone, such as us-east5-b. The default is \$CLOUDSDK_COMPUTE_ZONE.
  --project PROJECT   Project. The default is that of gcloud's configuration.
  --worker N          Number of the host. The default is 0.
  --dry-run           Print the commands and run none.
  --help              Print this text."

worker=0
parse_arguments "worker" "" "$@"
[ ${#positionals[@]} -eq 2 ] || usage_error "the path to fetch and a folder are needed (see --help)"
from=${positionals[0]} folder=${positionals[1]}
check --worker "$worker" '0|[1-9][0-9]{0,3}' 0
[ -n "$folder" ] || usage_error "the folder is missing"
if [[ $from == gs:* ]]; then
  check_bucket "$from"
else
  [[ $from == *:* ]] || usage_error "the path to fetch must be NAME:PATH or gs://BUCKET/PATH: $(quoted "$from")"
  path=${from#*:} positionals=("${from%%:*}")
  check_target
  check "the path on the host" "$path" '[A-Za-z0-9._~/][-A-Za-z0-9._/=+@]*' runs/lora
  case $path in
    /*) ;;
    [~]/*) path=${path#??} ;; # Paths of scp are relative to the home folder.
    *) path=$checkout/$path ;;
  esac
fi
target=${folder%/}/$(basename "${from#*:}")
[ ! -e "$target" ] || usage_error "$target already exists"

run mkdir -p -- "$folder"
if [[ $from == gs:* ]]; then
  run gcloud storage cp --recursive "${from%/}" "${folder%/}/" ${project:+"--project=$project"} --quiet
else
  gcloud_tpus tpu-vm scp "$name:$path" "${folder%/}/" --recurse "--worker=$worker"
fi
