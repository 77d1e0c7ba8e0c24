#!/usr/bin/env bash
# Set up this package on one host of a TPU VM: run it there, in a checkout of the repository.
#
#   bash launch/tpu_vm_setup.sh
#
# Makes .venv with the package and JAX for TPUs, then prints the chips that JAX sees.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x .venv/bin/pip ]; then
  if python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python3 -m venv --clear .venv
  else # Ubuntu 22.04 has Python 3.10: uv fetches a later one
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --clear --seed --python 3.12 .venv
  fi
fi
.venv/bin/pip install --quiet -e '.[tpu]'
.venv/bin/python -c 'import jax; print(f"{jax.device_count()} devices: {jax.devices()[0].device_kind}")'
