"""The run folder, and functions that write and move its files.

Example: the run folder `runs/quickstart/sspo`
train.log      everything that verl, Ray and the workers print
metrics.jsonl  verl's metrics, one JSON object {"step": ..., "data": {...}} per line
doctor.json    versions and findings, only from `verl-sspo train` and `quickstart`
hydra/         the configuration as it ran
ray/           the logs of Ray's processes, kept when a run fails
attempt-1/     the files above from an earlier start, after a later start resumed; then attempt-2/ and so on
checkpoints/   checkpoints, and `settings.yaml`, the settings they were trained with
answers/       verl's dump of each validation, `<step>.jsonl`
summary.json   the final figures of a complete run
curves.png, report.md   only from `verl-sspo quickstart`: learning curves, and a report with them and with answers
"""

import re
import time
from pathlib import Path

from verl_sspo.report.summary import METRICS

LOG = "train.log"
DOCTOR = "doctor.json"
ANSWERS = "answers"
SUMMARY = "summary.json"


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, replacing an existing one. If the process is killed, the old file stays as it was."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.rename(path)


def move_aside(run_dir: Path) -> Path | None:
    """Renames the folder of an earlier run to `<name>-<time it was last written>`.

    Returns:
        The new place, or None if there was no such folder.
    """
    if not run_dir.exists():
        return None
    newest = max(path.stat().st_mtime for path in (run_dir, *run_dir.iterdir()))
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(newest))
    names = (f"{run_dir.name}-{stamp}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    aside = next(path for name in names if not (path := run_dir.with_name(name)).exists())
    run_dir.rename(aside)
    return aside


def attempts(run_dir: Path) -> list[Path]:
    """The folders `attempt-<n>` of a run, oldest first. Each start resumed from a checkpoint of the previous one."""
    paths = run_dir.glob("attempt-*")
    found = [(int(match[1]), path) for path in paths if (match := re.fullmatch(r"attempt-(\d+)", path.name))]
    return [path for _, path in sorted(found)]


def keep_attempt(run_dir: Path) -> None:
    """Moves the files of the last start to `attempt-<n>`, so that another start can resume in this run folder."""
    there = [run_dir / name for name in (LOG, METRICS, DOCTOR, "hydra", "ray") if (run_dir / name).exists()]
    if there:
        attempt = run_dir / f"attempt-{len(attempts(run_dir)) + 1}"
        attempt.mkdir()
        for path in there:
            path.rename(attempt / path.name)
