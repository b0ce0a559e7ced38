"""Finds the checkpoint that a restart resumes from, whatever verl was doing when it was killed.

verl writes `global_step_<n>/actor`, then `global_step_<n>/data.pt`, and finally records `n` in
`latest_checkpointed_iteration.txt`. If it is killed or the disk is full before that, the folder is not recorded, and
verl never uses it. But verl empties the record before it writes it, and with max_actor_ckpt_to_keep=1 it removes the
recorded weights before it records the new ones. Killed there, it cannot restart until the record is repaired.
"""

import re
import zipfile
from pathlib import Path

from verl_sspo.run.folder import write_atomically

RECORD = "latest_checkpointed_iteration.txt"

# The file of a Megatron checkpoint that verl writes last.
_MANIFEST = "actor/ckpt_contents.json"
_FOLDER = re.compile(r"global_step_(\d+)")
_SHARD = re.compile(r"(\w+)_world_size_(\d+)_rank_\d+\.pt")


def is_complete(folder: Path) -> bool:
    """Whether verl has finished writing this `global_step_<n>` and, with FSDP, has not begun to remove it.

    torch.save writes zip archives, which end with their directory: a partial file is not valid.
    """
    if (folder / _MANIFEST).is_file():
        return zipfile.is_zipfile(folder / "data.pt")
    files = list(folder.rglob("*.pt"))
    # Shards of each part of the state (model, optim, extra_state), one per rank.
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    parts = {match[1] for match in shards}
    ranks = [int(match[2]) for match in shards]
    return (
        (folder / "data.pt").is_file()
        and "model" in parts
        and all(sum(match[1] == part for match in shards) % ranks[0] == 0 for part in parts)
        and all(zipfile.is_zipfile(file) for file in files)
    )


def last(root: Path) -> int | None:
    """The step to resume from, or None if `root` (trainer.default_local_dir) has no complete checkpoint.

    This is the recorded step if its checkpoint is complete, otherwise the newest complete one.
    """
    record = root / RECORD
    recorded = record.read_text().strip() if record.exists() else ""
    folder = root / f"global_step_{recorded}"
    # Megatron's shards are not files of torch.save and cannot be checked: their record is trusted.
    if recorded and (is_complete(folder) or any(folder.rglob("dist_ckpt"))):
        return int(recorded)
    steps = [int(match[1]) for path in root.glob("global_step_*") if (match := _FOLDER.fullmatch(path.name))]
    return max((step for step in steps if is_complete(root / f"global_step_{step}")), default=None)


def settle(root: Path) -> int | None:
    """Repairs verl's record, so that resume_mode=auto resumes from `last`, and returns it. No run may be writing.

    Raises:
        ValueError: the recorded checkpoint is not complete on this machine, and no other is. Starting anew would
            overwrite its files.
    """
    step, record = last(root), root / RECORD
    if step is None:
        recorded = record.read_text().strip() if record.exists() else ""
        if recorded and any(root.glob(f"global_step_{recorded}/**/*.pt")):
            raise ValueError(
                f"{root}/global_step_{recorded} is recorded but not complete on this machine, and no other "
                "checkpoint is: if its other shards are on other machines, collect them in one folder that all "
                f"machines see; to start anew, move {root} away"
            )
        record.unlink(missing_ok=True)
    else:
        write_atomically(record, str(step))
    return step
