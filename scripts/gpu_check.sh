#!/usr/bin/env bash
# Checks the loss's Triton kernel; on a GPU it also measures it beside verl's losses and writes docs/results/gpu.
#   scripts/gpu_check.sh [--without-gpu] [--quick]
# Takes the Python of the shell as it is; --help explains it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python -m verl_sspo gpu-check "$@"
