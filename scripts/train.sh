#!/usr/bin/env bash
# Trains a recipe in a run folder; the same command again resumes.
#   scripts/train.sh TASK [OVERRIDES]          for example: scripts/train.sh gsm8k algo=gspo hardware=fsdp_1gpu
# Makes the clone's .venv and installs (scripts/setup.sh; EXTRA=gpu by default where nvidia-smi is found), then runs
# `verl-sspo train`; --help explains it. SETUP=0 takes the Python of the shell as it is.
# Environment: RUN_DIR (run folder), FORCE=1 (train despite errors), RAY_ADDRESS (join a Ray cluster: docs/clusters.md).
set -euo pipefail
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ "${SETUP:-1}" != 0 ]; then
  # Word splitting is meant: no argument at all where EXTRA is empty.
  # shellcheck disable=SC2046
  "$clone/scripts/setup.sh" ${EXTRA-$(command -v nvidia-smi >/dev/null && echo gpu)}
  # shellcheck disable=SC1091
  source "$(cd "$clone" && cd "${VENV:-.venv}" && pwd)/bin/activate"
fi
# exec: Ctrl-C and kill reach Python itself, which ends what it started.
exec python -m verl_sspo train "$@"
