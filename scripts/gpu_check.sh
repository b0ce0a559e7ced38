#!/usr/bin/env bash
# Checks the loss's Triton kernel; on a GPU it also measures it beside verl's losses and writes docs/results/gpu.
#   scripts/gpu_check.sh [--without-gpu] [--quick]
# Uses the Python of the shell. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python -m verl_sspo gpu-check "$@"
