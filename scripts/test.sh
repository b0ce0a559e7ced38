#!/usr/bin/env bash
# Installs what the tests need and runs them.
#   scripts/test.sh                      static checks, unit tests, end-to-end tests: all but those marked `slow`
#   scripts/test.sh --fast               static checks and the quick unit tests, for every commit
#   scripts/test.sh PYTEST_ARGUMENTS     one run of pytest, for example: scripts/test.sh -k loss
#   scripts/setup_cpu_vllm.sh && scripts/test.sh tests/e2e -m vllm     verl's own rollout, on vLLM's CPU build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh dev
# shellcheck disable=SC1091
source "${VENV:-.venv}/bin/activate"
ruff check .
ruff format --check .
mypy
if [ "${1:-}" = --fast ]; then exec python -m pytest tests/unit -n 2 -m "not long and not slow" "${@:2}"; fi

# The sandbox needs bubblewrap; without it, its tests are skipped and say why.
missing=()
command -v bwrap >/dev/null || missing+=(bubblewrap)
if [ ${#missing[@]} -gt 0 ] && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  (apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}") >/dev/null ||
    echo "Could not install ${missing[*]}: their tests are skipped" >&2
fi
if [ $# -gt 0 ]; then exec python -m pytest "$@"; fi
# The files of the end-to-end tests first, since they take longest. Two workers need about 7 GB of memory.
exec python -m pytest tests/e2e tests/unit -n 2 --dist loadfile --no-loadscope-reorder
