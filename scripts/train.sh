#!/usr/bin/env bash
# Trains a recipe. Run the same command again to resume.
#   scripts/train.sh TASK [OVERRIDES]          for example: scripts/train.sh gsm8k algo=gspo hardware=fsdp_1gpu
# Makes .venv in the clone and installs (scripts/setup.sh; EXTRA=gpu by default if nvidia-smi is found), then runs
# `verl-sspo train`, see --help. SETUP=0 uses the Python of the shell and installs nothing.
# Environment: RUN_DIR (run folder), FORCE=1 (train despite errors), RAY_ADDRESS (join a Ray cluster: docs/clusters.md).
set -euo pipefail
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ "${SETUP:-1}" != 0 ]; then
  # Not quoted: an empty EXTRA must give no argument.
  # shellcheck disable=SC2046
  "$clone/scripts/setup.sh" ${EXTRA-$(command -v nvidia-smi >/dev/null && echo gpu)}
  # shellcheck disable=SC1091
  source "$(cd "$clone" && cd "${VENV:-.venv}" && pwd)/bin/activate"
fi
# exec: Ctrl-C and kill reach Python itself, which ends its processes.
exec python -m verl_sspo train "$@"
