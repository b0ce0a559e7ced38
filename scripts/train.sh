#!/usr/bin/env bash
# Trains a recipe: environment, doctor, verl's main_ppo. Works from any folder; relative paths are the repository's.
#   scripts/train.sh TASK [OVERRIDES]          for example: scripts/train.sh gsm8k algo=gspo hardware=fsdp_1gpu
# TASK is a recipe of recipes/ (gsm8k, math, gsm8k_deepmath, code, quickstart). The run folder is runs/TASK/ALGO; set
# RUN_DIR for another one. It holds
#   checkpoints/             the same command again goes on from the last one; with other settings it is refused
#   START/train.log          what was printed, one folder for each start of the command
#   START/metrics.jsonl      verl's metrics, a JSON object a line
#   START/doctor.json        versions and findings
#   START/hydra/             the configuration as it ran
# RAY_ADDRESS=auto joins a running Ray cluster, whose nodes are then checked too. SETUP=0 takes the Python of the shell
# as it is; otherwise .venv is made and used (scripts/setup.sh; EXTRA=gpu by default where nvidia-smi is found).
# FORCE=1 trains although the doctor found errors. Slurm and Ray clusters: docs/clusters.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ $# -eq 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
  sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
if [ ! -f "recipes/$1.yaml" ]; then
  echo "There is no recipe $1: there are $(cd recipes && echo *.yaml | sed 's/\.yaml//g') (scripts/train.sh --help)" >&2
  exit 2
fi
task=$1
shift

if [ "${SETUP:-1}" != 0 ]; then
  # Word splitting is meant: no argument at all where EXTRA is empty.
  # shellcheck disable=SC2046
  scripts/setup.sh ${EXTRA-$(command -v nvidia-smi >/dev/null && echo gpu)}
  # shellcheck disable=SC1091
  source "${VENV:-.venv}/bin/activate"
fi

algo=sspo
for override in "$@"; do
  case $override in algo=*) algo=${override#algo=} ;; esac
done
run=${RUN_DIR:-runs/$task/$algo}
start=$run/$(date +%Y%m%d-%H%M%S)
mkdir -p "$start"
# Absolute: Ray's workers may have another working folder.
run=$(cd "$run" && pwd)
start=$(cd "$start" && pwd)
# In Hydra's quotes, whatever the folder is called.
quoted() { printf "'%s'" "${1//\'/\\\'}"; }
arguments=(--config-dir "$PWD/recipes" --config-name "$task" "trainer.default_local_dir=$(quoted "$run/checkpoints")" "$@")

address=()
if [ "${RAY_ADDRESS:-local}" != local ]; then address=(--address "$RAY_ADDRESS"); fi
python -m verl_sspo.doctor "${address[@]}" --json "${arguments[@]}" >"$start/doctor.json" || doctor=failed
python - "$start/doctor.json" <<'PYTHON'
import json, sys
from verl_sspo.doctor import Finding
# Empty where the doctor itself failed, and said so.
for finding in json.loads(open(sys.argv[1]).read() or "[]"):
    if finding["severity"] != "ok":
        print(Finding(**finding))
PYTHON
if [ "${doctor:-passed}" = failed ] && [ "${FORCE:-0}" != 1 ]; then
  echo "Not started: correct the errors above, or set FORCE=1 (all findings: $start/doctor.json)" >&2
  exit 1
fi

# Without an address, a cluster of the run's own, whatever other Ray there is on this host.
export RAY_ADDRESS=${RAY_ADDRESS:-local}
# A start that was killed may have left half a checkpoint.
python -m verl_sspo.run.checkpoints "$run" "${arguments[@]}"
# verl writes this file anew at each start.
export VERL_FILE_LOGGER_PATH=$start/metrics.jsonl PYTHONUNBUFFERED=1
echo "Run folder: $run (log: $start/train.log)"
python -m verl.trainer.main_ppo "${arguments[@]}" "hydra.run.dir=$(quoted "$start/hydra")" 2>&1 | tee "$start/train.log"
