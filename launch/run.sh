#!/usr/bin/env bash
# Runs one command on all hosts of a TPU VM, and follows its log.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/run.sh NAME --zone ZONE [options] -- COMMAND...

Starts COMMAND on every host of NAME, in ~/$checkout with its environment activated. It goes on
when the connection breaks or this script ends. Then follows the log of host 0, and ends with the
command's exit code. If the same command runs already, only follows it.

  launch/run.sh my-tpu -- llava-cot train --config FILE.yaml --output gs://bucket/run

  NAME                Name of the TPU VM.
  COMMAND...          Command and its arguments.
  --zone ZONE         Zone, such as us-east5-b. The default is \$CLOUDSDK_COMPUTE_ZONE.
  --project PROJECT   Project. The default is that of gcloud's configuration.
  --detach            Do not follow the log. See launch/logs.sh and launch/stop.sh.
  --dry-run           Print the commands and run none.
  --help              Print this text."

detach=""
parse_arguments "" "detach" "$@"
check_target command
run_job_script all start "${command[@]}"
[ -z "$detach" ] || exit 0
exec "$BASH" "$(dirname "${BASH_SOURCE[0]}")/logs.sh" "$name" "--zone=$zone" ${project:+"--project=$project"} \
  ${dry_run:+--dry-run}
