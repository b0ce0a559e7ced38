#!/usr/bin/env bash
# Installs what the tests need and runs all of them: static checks, unit tests, end-to-end tests.
#   scripts/test.sh [PYTEST ARGUMENTS]     for example: scripts/test.sh -m "not e2e" -k loss
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test
# The real vLLM in an environment of its own. Where there is no build of it its test skips and says so.
if [ "$(uname -sm)" = "Linux x86_64" ]; then VENV=${VERL_SSPO_VLLM_VENV:-.venv-vllm} scripts/setup_cpu_vllm.sh; fi

# bubblewrap is the sandbox of model-written programs, Chromium opens a report: without them their tests skip and say so.
missing=()
command -v bwrap >/dev/null || missing+=(bubblewrap)
command -v chromium >/dev/null || missing+=(chromium)
if [ ${#missing[@]} -gt 0 ] && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "Installing ${missing[*]}"
  (apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}") >/dev/null ||
    echo "Could not install ${missing[*]}: their tests are skipped" >&2
fi

# shellcheck disable=SC1091
source "${VENV:-.venv}/bin/activate"
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
