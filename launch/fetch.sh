#!/usr/bin/env bash
# Fetch a file or folder from a host of a TPU VM, or from a bucket.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/fetch.sh NAME:PATH FOLDER --zone ZONE [options]
       launch/fetch.sh gs://BUCKET/PATH FOLDER [options]

Copies a file or folder into FOLDER; what is there already under its name is never overwritten. On a
host, PATH is relative to ~/$checkout, or begins with / or ~/. Logs lie in ~/llava_cot_jax_job.

  launch/fetch.sh my-tpu:runs/lora results
  launch/fetch.sh gs://bucket/runs/lora results

  --zone ZONE         as in us-east5-b; or \$CLOUDSDK_COMPUTE_ZONE
  --project PROJECT   otherwise that of gcloud's configuration
  --worker N          from another host than 0
  --dry-run           print the commands, run none"

worker=0
parse_arguments "worker" "" "$@"
[ ${#words[@]} -eq 2 ] || mistake "what to fetch and a folder are expected (see --help)"
from=${words[0]} folder=${words[1]}
check --worker "$worker" '0|[1-9][0-9]{0,3}' 0
[ -n "$folder" ] || mistake "the folder is missing"
if [[ $from == gs:* ]]; then
  check_bucket "$from"
else
  [[ $from == *:* ]] || mistake "what to fetch is NAME:PATH or gs://BUCKET/PATH: $(quoted "$from")"
  path=${from#*:} words=("${from%%:*}")
  check_target
  check "the path on the host" "$path" '[A-Za-z0-9._~/][-A-Za-z0-9._/=+@]*' runs/lora
  case $path in
    /*) ;;
    [~]/*) path=${path#??} ;; # scp begins in the home folder
    *) path=$checkout/$path ;;
  esac
fi
target=${folder%/}/$(basename "${from#*:}")
[ ! -e "$target" ] || mistake "$target is there already"

call mkdir -p -- "$folder"
if [[ $from == gs:* ]]; then
  call gcloud storage cp --recursive "${from%/}" "${folder%/}/" ${project:+"--project=$project"} --quiet
else
  tpu tpu-vm scp "$name:$path" "${folder%/}/" --recurse "--worker=$worker"
fi
