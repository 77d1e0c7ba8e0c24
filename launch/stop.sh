#!/usr/bin/env bash
# Stops the command that runs on a TPU VM.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/stop.sh NAME --zone ZONE [options]

Sends SIGTERM to the command on every host of NAME. A training run then saves a checkpoint and ends.
A command that does not end in time is killed. The TPU VM costs money until launch/delete.sh.

  NAME                Name of the TPU VM.
  --zone ZONE         Zone, such as us-east5-b. The default is \$CLOUDSDK_COMPUTE_ZONE.
  --project PROJECT   Project. The default is that of gcloud's configuration.
  --grace SECONDS     Seconds from SIGTERM to SIGKILL. The default is 600.
  --dry-run           Print the commands and run none.
  --help              Print this text."

grace=600
parse_arguments "grace" "" "$@"
check_target
check --grace "$grace" '[0-9]{1,5}' 600
run_job_script all stop "$grace"
