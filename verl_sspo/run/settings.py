"""Stores a run's settings beside its checkpoints, so that a run with different settings never resumes from them."""

import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_sspo.compose import flat
from verl_sspo.run.folder import write_atomically

KEPT = "settings.yaml"

# What is trained, and how. `ray_kwargs` and the rest of `trainer` only say how long, how often and where.
SECTIONS = ("actor_rollout_ref.", "algorithm.", "critic.", "data.", "reward.", "trainer.v1.")

# These trade memory for time and do not change the update. After running out of memory, change them and resume. Loss
# and gradient do not depend on micro-batches (docs/trust), nor on where tensors are stored.
RESOURCES = re.compile(
    r"""micro_batch_size | max_token_len_per_gpu | use_dynamic_bsz | offload | checkpointing | reshard_after_forward
    | sequence_parallel_size | tensor_model_parallel_size | data_parallel_size | remove_padding | fused_kernels
    | torch_compile | gpu_memory_utilization | enforce_eager | free_cache_engine | enable_chunked_prefill
    | enable_prefix_caching | enable_sleep_mode | max_num_(batched_tokens|seqs) | engine_kwargs | cudagraph
    | num_workers | bucket_megabytes | layered_summon | profiler | nccl_timeout""",
    re.VERBOSE,
)


def keep(config: DictConfig, checkpoints: Path) -> None:
    """Writes the settings of a run that is about to start, replacing those of an earlier start."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_atomically(checkpoints / KEPT, resolved(config))


def changed(config: DictConfig, checkpoints: Path) -> list[str]:
    """Settings that change the training compared with the run that saved these checkpoints; empty if unknown."""
    kept = checkpoints / KEPT
    if not kept.exists():
        return []
    found = differences(kept.read_text(), resolved(config))
    return [each for each in found if each.startswith(SECTIONS) and not RESOURCES.search(each.split(":")[0])]


def resolved(config: DictConfig) -> str:
    """A configuration as YAML, with interpolations resolved."""
    return OmegaConf.to_yaml(config, resolve=True)


def differences(old: str, new: str) -> list[str]:
    """Keys in which two resolved configurations differ, with both values."""
    if old == new:
        return []
    old_values, new_values = (dict(flat(OmegaConf.to_container(OmegaConf.create(text)))) for text in (old, new))
    keys = [key for key in {**old_values, **new_values} if old_values.get(key) != new_values.get(key)]
    return [f"{key}: {old_values.get(key)} there, {new_values.get(key)} now" for key in keys]
