#!/usr/bin/env bash
# Set up this package on one host of a TPU VM: run it there, in a checkout of the repository.
#
#   bash launch/tpu_vm_setup.sh
#
# Makes .venv with the package and JAX for TPUs, then prints the chips that JAX sees.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: Python 3.11 or later is needed; this is $(python3 --version)" >&2
  exit 2
}
python3 -m venv .venv
.venv/bin/pip install --quiet -e '.[tpu]'
.venv/bin/python -c 'import jax; print(f"{jax.device_count()} devices: {jax.devices()[0].device_kind}")'
