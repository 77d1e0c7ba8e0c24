#!/usr/bin/env bash
# Run one command on all hosts of a TPU VM, and follow it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/run.sh NAME --zone ZONE [options] -- COMMAND...

Starts COMMAND on every host of NAME, in ~/$checkout with its environment, detached: it goes on
when the connection or this script ends. Then follows the log of host 0, and ends with the command's
exit code. The same command again, while it runs, only follows.

  launch/run.sh my-tpu -- python -m llava_cot_jax.train --config FILE.yaml --output gs://bucket/run

  --zone ZONE         as in us-east5-b; or \$CLOUDSDK_COMPUTE_ZONE
  --project PROJECT   otherwise that of gcloud's configuration
  --detach            start it and leave; launch/logs.sh follows, launch/stop.sh stops
  --dry-run           print the commands, run none"

detach=""
parse_arguments "" "detach" "$@"
check_target command
on_hosts_job all start "${command[@]}"
[ -z "$detach" ] || exit 0
exec "$BASH" "$(dirname "${BASH_SOURCE[0]}")/logs.sh" "$name" "--zone=$zone" ${project:+"--project=$project"} \
  ${dry_run:+--dry-run}
