#!/usr/bin/env bash
# Makes the virtual environment .venv and installs verl_sspo into it. Installs again when pyproject.toml has changed.
#   scripts/setup.sh [EXTRAS]     default: all (tables, pictures, data); for GPUs: gpu,all; for tests: dev
# PYTHON=/path/to/python chooses the interpreter (3.10 to 3.12), VENV=/path another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-all} venv=${VENV:-.venv}
log=$venv/install.log stamp=$venv/.installed-$extras-$(cksum <pyproject.toml | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0
fail() { echo "$1" >&2 && exit 1; }
# pip builds in the clone.
[ -w . ] || fail "$PWD is not writable: clone to another place, or install elsewhere and start with SETUP=0"

for python in "$venv/bin/python" ${PYTHON:-python3.12 python3.11 python3.10 python3} ""; do
  [ -z "$python" ] && fail "verl_sspo needs Python 3.10, 3.11 or 3.12: set PYTHON=/path/to/python"
  "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && break
done
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" ||
  fail "$python could not make $venv; on Debian and Ubuntu: apt-get install python3-venv"

install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >>"$log" 2>&1 ||
    { tail -n 20 "$log" >&2 && fail "pip install $* failed; its output is in $log"; }
}
echo "Installing verl_sspo[$extras] into $venv (a few minutes the first time; log: $log)"
# The pip of Python 3.10 and 3.11 resolves this very slowly.
install --upgrade 'pip>=25'
# verl's GPU stack pins its own torch. Otherwise install this one first, or pip may choose a newer build.
[[ ,$extras, == *,gpu,* ]] || "$venv/bin/python" -c 'import torch' 2>/dev/null || install torch==2.13.0
install -e ".[$extras]"
touch "$stamp"
