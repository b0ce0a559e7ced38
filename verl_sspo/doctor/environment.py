"""Checks of the machine: packages, registration in Ray, accelerators, sandbox, data files, model."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from packaging.requirements import Requirement

from verl_sspo.doctor.configuration import rollout_gpus, trainer_gpus
from verl_sspo.doctor.finding import Finding
from verl_sspo.run import settings

#: Columns of verl's parquet rows (verl_sspo.data.schema).
COLUMNS = ("data_source", "prompt", "ability", "reward_model", "extra_info")
NAMES = ("verl", "torch", "transformers", "ray", "transferqueue", "omegaconf", "hydra-core")


def package_findings(config: DictConfig | None = None) -> Iterator[Finding]:
    """Installed versions against what verl-sspo is tested with, and what this configuration needs besides."""
    yield Finding("ok", "python", platform.python_version())
    yield Finding("ok", "verl-sspo", version("verl-sspo"))
    for requirement in map(Requirement, requires("verl-sspo") or ()):
        name = requirement.name
        if requirement.marker is None and name.lower() in NAMES:
            installed = _installed(name)
            if installed is None:
                yield Finding("error", name, "is not installed", f"pip install '{requirement}'")
            elif not requirement.specifier.contains(installed, prereleases=True):
                yield Finding(
                    "warning", name, f"{installed}; tested with {requirement.specifier}", f"pip install '{requirement}'"
                )
            else:
                yield Finding("ok", name, installed)
    if config is not None:
        yield from _needed_by(config)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _needed_by(config: DictConfig) -> Iterator[Finding]:
    rollout = config.actor_rollout_ref.rollout.name
    on_cpu = config.trainer.device == "cpu"
    needs = {}
    if rollout in ("vllm", "sglang"):
        remedy = "scripts/setup_cpu_vllm.sh, then VENV=.venv-vllm" if on_cpu else "scripts/setup.sh gpu"
        needs[rollout] = ("error", f"rollout.name={rollout} needs it", remedy)
    if rollout in ("vllm", "sglang") and not on_cpu:
        needs["flash-attn"] = (
            "warning",
            "verl's FSDP engine asks transformers for flash_attention_2",
            "install flash-attn, or set +actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        )
    if config.model_engine == "megatron":
        needs["megatron-core"] = (
            "error",
            "model_engine=megatron needs it",
            "pip install 'verl[mcore]', see verl's docs",
        )
        needs["transformer-engine"] = ("error", "Megatron needs it", "pip install 'transformer-engine[pytorch]'")
    for name, (severity, why, remedy) in needs.items():
        installed = _installed(name)
        if installed is None:
            yield Finding("error" if severity == "error" else "warning", name, f"is not installed; {why}", remedy)
        else:
            yield Finding("ok", name, installed)


def accelerator_findings(config: DictConfig) -> Iterator[Finding]:
    """The GPUs of this machine against those that trainer and rollout want on a node. On a CPU none are needed."""
    import torch

    if config.trainer.device == "cpu":
        yield Finding("ok", "accelerator", f"none needed: trainer.device=cpu on {os.cpu_count()} CPU cores")
        return
    count, trainer = torch.cuda.device_count(), config.trainer.n_gpus_per_node
    wanted = trainer + (rollout_gpus(config) if config.trainer.nnodes == 1 else 0)
    if count < wanted:
        beside = f", and the rollout wants {wanted - trainer} beside them" if wanted > trainer else ""
        yield Finding(
            "error",
            "accelerator",
            f"{count} CUDA devices are visible here, trainer.n_gpus_per_node={trainer}{beside}",
            "start where the GPUs are, lower trainer.n_gpus_per_node, or give --address of the Ray cluster",
        )
        return
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    name = torch.cuda.get_device_name(0)
    yield Finding("ok", "accelerator", f"{count} x {name}, {memory:.0f} GiB, CUDA {torch.version.cuda}")


def registration_findings(address: str | None = None, config: DictConfig | None = None) -> Iterator[Finding]:
    """Whether verl knows `sspo` in this process, in a Ray worker, and with an address on every node of the cluster.

    Without an address a Ray of one CPU is started and stopped again.
    """
    yield _registration(registered_here(), "this process")

    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    started = not ray.is_initialized()
    if started:
        options: dict[str, Any] = {"address": address or "local"}
        if not address:
            options |= {"num_cpus": 1, "include_dashboard": False}
        try:
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            message = str(error).strip().splitlines()[0]
            yield Finding("error", "cluster", f"no Ray cluster at {options['address']}: {message}", "start it first")
            return
    try:
        probe = ray.remote(num_cpus=0, max_retries=0)(registered_here)
        nodes = [node for node in ray.nodes() if node["Alive"]] if address else [None]
        for node in nodes:
            strategy = None if node is None else NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            where = "a Ray worker" if node is None else f"node {node['NodeManagerHostname']}"
            try:
                answer = ray.get(probe.options(scheduling_strategy=strategy).remote(), timeout=120)
            except Exception as error:
                last = str(error).strip().splitlines()[-1]
                yield Finding("error", "registered", f"{where}: {last}", "install the same environment there")
                continue
            yield _registration(answer, where)
        if address and config is not None:
            yield from _cluster_gpus(len(nodes), ray.cluster_resources().get("GPU", 0), config)
    finally:
        if started:
            ray.shutdown()


def registered_here() -> dict[str, Any]:
    """Runs in any process: what `import verl` alone makes verl know."""
    import verl  # noqa: F401  loads the plugin
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

    return {
        "loss": "sspo" in POLICY_LOSS_REGISTRY,
        "estimator": "sspo" in ADV_ESTIMATOR_REGISTRY,
        "versions": {name: _installed(name) for name in ("verl", "verl-sspo", "torch")},
        "host": socket.gethostname(),
    }


def _registration(answer: dict[str, Any], where: str) -> Finding:
    versions = ", ".join(f"{name} {number}" for name, number in answer["versions"].items())
    missing = [name for name in ("loss", "estimator") if not answer[name]]
    if missing:
        return Finding(
            "error",
            "registered",
            f"{where}: verl does not know the {' and the '.join(missing)} `sspo` ({versions})",
            "pip install -e . in the project's clone there; `python -c 'import verl_sspo.plugin'` shows what fails",
        )
    here = _installed("verl-sspo")
    if answer["versions"]["verl-sspo"] != here:
        return Finding(
            "error", "registered", f"{where}: {versions}, but verl-sspo {here} here", "install one version everywhere"
        )
    return Finding("ok", "registered", f"{where}: {versions}")


def _cluster_gpus(nodes: int, gpus: float, config: DictConfig) -> Iterator[Finding]:
    wanted = trainer_gpus(config) + rollout_gpus(config)
    if gpus < wanted:
        yield Finding(
            "error",
            "cluster",
            f"the cluster has {gpus:g} GPUs on {nodes} nodes, {wanted} are asked for",
            "wait for the other nodes, or change nnodes and n_gpus_per_node of trainer and actor_rollout_ref.rollout",
        )
    else:
        yield Finding("ok", "cluster", f"{gpus:g} GPUs on {nodes} nodes")


def data_findings(config: DictConfig) -> Iterator[Finding]:
    """Whether the parquet files exist, have verl's columns and enough rows, and can be judged."""
    import pyarrow.parquet as pq

    abilities: set[str] = set()
    rows = 0
    for key in ("train_files", "val_files"):
        files = config.data[key]
        if not files:
            yield Finding("error", "data", f"data.{key} is not set", f"give data.{key} a parquet file")
            continue
        for name in files if isinstance(files, ListConfig) else [files]:
            if "://" in name or name.endswith((".json", ".jsonl")):
                yield Finding("warning", "data", f"{name} is not looked into: only parquet files of this machine are")
                continue
            path = Path(name).expanduser()
            if not path.is_file():
                yield Finding(
                    "error",
                    "data",
                    f"data.{key}: there is no {path}",
                    "scripts/quickstart.sh makes it"
                    if "task" in config
                    else "verl-sspo prepare-data makes it: see the head of the recipe; or set the path",
                )
                continue
            try:
                columns = pq.read_schema(path).names
                missing = [column for column in COLUMNS if column not in columns]
                if not missing:
                    abilities |= set(pq.read_table(path, columns=["ability"])["ability"].unique().to_pylist())
                count = pq.read_metadata(path).num_rows
            except Exception as error:
                yield Finding("error", "data", f"{path} is no readable parquet: {error}", "make it again")
                continue
            if missing:
                yield Finding(
                    "error",
                    "data",
                    f"{path} has no {', '.join(missing)}",
                    f"verl's rows have {', '.join(COLUMNS)}: verl-sspo prepare-data writes them",
                )
            else:
                rows += count if key == "train_files" else 0
                yield Finding("ok", "data", f"{path}: {count} rows")
    if 0 < rows < config.data.train_batch_size:
        yield Finding(
            "error",
            "data",
            f"{rows} training rows do not fill one batch of data.train_batch_size={config.data.train_batch_size}",
            "lower data.train_batch_size and ppo_mini_batch_size",
        )
    judge = config.reward.custom_reward_function
    remote = (judge.get("reward_kwargs") or {}).get("sandbox_fusion_url")
    if "code" in abilities and judge.path == "pkg://verl_sspo.rewards" and not remote:
        yield sandbox_finding()


def sandbox_finding() -> Finding:
    """Whether model-written programs can be run in bubblewrap here."""
    executable = shutil.which("bwrap")
    if executable is None:
        return Finding(
            "error",
            "bubblewrap",
            "is not installed, and programs are not run without it",
            "apt install bubblewrap on the nodes of the reward workers, or use SandboxFusion (recipes/code.yaml)",
        )
    from verl_sspo.rewards import sandbox

    try:
        sandbox.check()
    except (sandbox.SandboxError, TimeoutError) as error:
        return Finding(
            "error",
            "bubblewrap",
            f"cannot make a sandbox here: {error or 'it takes too long'}",
            "containers often forbid user namespaces: allow them, or use SandboxFusion (recipes/code.yaml)",
        )
    number = subprocess.run([executable, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return Finding("ok", "bubblewrap", number)


def model_findings(config: DictConfig) -> Iterator[Finding]:
    """Whether the model is a local folder, in the cache, or on the hub; and whether its positions suffice."""
    name = str(config.actor_rollout_ref.model.path)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            yield Finding("error", "model", f"{path} has no config.json", "give a Hugging Face model folder")
            return
        model = (path / "config.json").read_text()
        yield Finding("ok", "model", str(path))
    elif name.count("/") != 1 or name.startswith((".", "~", "/")):
        yield Finding("error", "model", f"there is no folder {name}", "set actor_rollout_ref.model.path")
        return
    else:
        from huggingface_hub import get_session, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.utils import build_hf_headers

        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            model = Path(cached).read_text()
            yield Finding("ok", "model", f"{name} (cached)")
        else:
            try:  # one request, without the retries of a download
                url = hf_hub_url(name, "config.json")
                answer = get_session().get(url, headers=build_hf_headers(), timeout=10, follow_redirects=True)
                answer.raise_for_status()
            except Exception as error:
                yield Finding(
                    "error",
                    "model",
                    f"{name} is neither a folder nor cached nor reachable: {str(error).splitlines()[0]}",
                    "download it where there is a network (hf download), log in if it is gated, or give a local folder",
                )
                return
            model = answer.text
            yield Finding("ok", "model", f"{name} (Hugging Face hub)")
    positions = json.loads(model).get("max_position_embeddings")
    longest = config.data.max_prompt_length + config.data.max_response_length
    if positions is not None and positions < longest:
        yield Finding(
            "error",
            "model",
            f"prompt and response may have {longest} tokens, the model has {positions} positions",
            "lower data.max_prompt_length or data.max_response_length",
        )


def checkpoint_findings(config: DictConfig) -> Iterator[Finding]:
    """Whether a run would resume, with the settings it had, or start over beside older checkpoints."""
    folder = Path(config.trainer.default_local_dir)
    latest = folder / "latest_checkpointed_iteration.txt"
    recorded = latest.read_text().strip() if latest.is_file() else ""
    # Where verl's record is lost a restart may still find a checkpoint: verl_sspo.run.checkpoints.
    if not recorded and not any(folder.glob("global_step_*")):
        return
    step = f"step {recorded}" if recorded else "the last step"
    if config.trainer.resume_mode == "auto":
        if changed := settings.changed(config, folder):
            yield Finding(
                "error",
                "resume",
                f"would go on from {step} in {folder}, which was trained with other settings: "
                + ", ".join(changed[:5]),
                "set another trainer.default_local_dir (RUN_DIR of scripts/train.sh) to start anew",
            )
        else:
            yield Finding("ok", "resume", f"goes on from {step} in {folder}")
    elif config.trainer.resume_mode == "disable":
        yield Finding(
            "error",
            "resume",
            f"{folder} has checkpoints up to {step}, and resume_mode=disable would write over them",
            "set another trainer.default_local_dir (RUN_DIR of scripts/train.sh), or trainer.resume_mode=auto",
        )
