#!/usr/bin/env bash
# Makes the virtual environment .venv and installs verl_sspo into it, once for each change of pyproject.toml.
#   scripts/setup.sh [EXTRA]     EXTRA: test, gpu, or nothing
# PYTHON=/path/to/python chooses the interpreter (3.10 to 3.12), VENV=/path another place for the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:-}
venv=${VENV:-.venv}
log=$venv/install.log

supported='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
if [ ! -x "$venv/bin/python" ]; then
  for python in ${PYTHON:-python3.12 python3.11 python3.10 python3}; do
    command -v "$python" >/dev/null && "$python" -c "$supported" 2>/dev/null && break
    python=
  done
  if [ -z "$python" ]; then
    echo "verl_sspo needs Python 3.10, 3.11 or 3.12; set PYTHON=/path/to/python" >&2
    exit 1
  fi
  if ! "$python" -m venv "$venv" 2>&1; then
    echo "could not make $venv with $python; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
  fi
fi

stamp=$venv/.installed-${extra:-base}-$(cksum <pyproject.toml | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0

install() {
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >>"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "pip install $* failed; all of its output is in $log" >&2
    exit 1
  fi
}
echo "Installing verl_sspo${extra:+ with its extra '$extra'} into $venv (a few minutes the first time; log: $log)"
# The pip that comes with Python 3.10 and 3.11 goes astray where a newer one resolves in seconds.
install --upgrade 'pip>=25'
# The gpu extra brings the torch that verl's vLLM pins. Elsewhere torch first and exact, or a range that admits a newer
# release would be free to pull another build.
if [ "$extra" != gpu ] && ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  install torch==2.13.0
fi
install -e ".${extra:+[$extra]}"
touch "$stamp"
