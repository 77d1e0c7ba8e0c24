#!/usr/bin/env bash
# Stop the command that runs on a TPU VM.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/stop.sh NAME --zone ZONE [options]

Sends SIGTERM to the command on every host of NAME: a training run saves a checkpoint and ends. What
still runs after the grace is killed. The capacity stays, and costs money, until launch/delete.sh.

  --zone ZONE         as in us-east5-b; or \$CLOUDSDK_COMPUTE_ZONE
  --project PROJECT   otherwise that of gcloud's configuration
  --grace SECONDS     600 by default
  --dry-run           print the commands, run none"

grace=600
parse_arguments "grace" "" "$@"
check_target
check --grace "$grace" '[0-9]{1,5}' 600
on_hosts_job all stop "$grace"
