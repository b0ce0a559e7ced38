#!/usr/bin/env bash
# Installs what the tests need and runs all of them: static checks, unit tests, end-to-end tests.
#   scripts/test.sh [PYTEST ARGUMENTS]     for example: scripts/test.sh -m "not e2e" -k loss
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test

# The sandbox tests need bubblewrap; without it they skip and say so.
if ! command -v bwrap >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "Installing bubblewrap, the sandbox of model-written programs"
  (apt-get update -qq && apt-get install -y -qq bubblewrap) >/dev/null
fi

# shellcheck disable=SC1091
source "${VENV:-.venv}/bin/activate"
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
