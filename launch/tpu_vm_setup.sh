#!/usr/bin/env bash
# Makes the environment .venv on one host of a TPU VM.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/tpu_vm_setup.sh

Run this on a host of a TPU VM, in a checkout of the repository. It makes .venv with the package and
JAX for TPUs, and prints the TPU chips that JAX finds.

  --help   Print this text."
shared_options="" shared_flags=""
parse_arguments "" "" "$@"
[ $((${#positionals[@]} + ${#command[@]})) -eq 0 ] || usage_error "no arguments are expected (see --help)"
cd "$(dirname "$0")/.."

if [ ! -x .venv/bin/pip ]; then
  if python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python3 -m venv --clear .venv
  else # Ubuntu 22.04 has Python 3.10, so uv fetches a later version.
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --clear --seed --python 3.12 .venv
  fi
fi
.venv/bin/pip install --quiet -e '.[tpu]'
.venv/bin/python -c '
import jax
if jax.devices()[0].platform != "tpu":
    raise SystemExit("error: JAX finds no TPU on this host")
print(f"{jax.device_count()} devices: {jax.devices()[0].device_kind}")'
