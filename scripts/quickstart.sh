#!/usr/bin/env bash
# A tiny model learns to add with SSPO, in verl's own main_ppo, in minutes and without a GPU. Needs Python alone.
#   scripts/quickstart.sh [OVERRIDES]          for example: scripts/quickstart.sh algo=gspo task.seed=1
# Makes .venv, installs, makes the task and its model (each once), trains, and prints a table and the place of a picture
# of the learning curves. Everything stands in runs/quickstart; the folder of an earlier run is renamed, not lost.
# A run with checkpoints (trainer.save_freq=8) that was broken off goes on with the same command and --resume.
# SETUP=0 takes the Python of the shell as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${SETUP:-1}" != 0 ]; then
  scripts/setup.sh
  # shellcheck disable=SC1091
  source "${VENV:-.venv}/bin/activate"
fi
# exec: Ctrl-C and kill reach Python itself, which ends what it started.
exec python -m verl_sspo.quickstart "$@"
