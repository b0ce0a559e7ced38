#!/usr/bin/env bash
# A tiny model learns to carry with SSPO, in verl's own main_ppo, in minutes and without a GPU. Needs only Python 3.10 to 3.12.
#   scripts/quickstart.sh [OVERRIDES]          for example: scripts/quickstart.sh algo=gspo task.seed=1
#   scripts/quickstart.sh --model smollm2-135m [OVERRIDES]        a pretrained language model instead
# Makes .venv in the clone and installs (scripts/setup.sh), then runs `verl-sspo quickstart`, see --help.
# SETUP=0 uses the Python of the shell and installs nothing.
set -euo pipefail
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ "${SETUP:-1}" != 0 ]; then
  "$clone/scripts/setup.sh"
  # shellcheck disable=SC1091
  source "$(cd "$clone" && cd "${VENV:-.venv}" && pwd)/bin/activate"
fi
# exec: Ctrl-C and kill reach Python itself, which ends its processes.
exec python -m verl_sspo quickstart "$@"
