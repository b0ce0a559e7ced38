"""Checks of machines and files: packages, registration, accelerators, cluster, sandbox, data, model, checkpoints."""

import difflib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from omegaconf import DictConfig
from packaging.requirements import Requirement

from verl_sspo.cpu.instructions import has_bf16
from verl_sspo.doctor.finding import Finding, error, ok, warning
from verl_sspo.doctor.memory import memory_findings
from verl_sspo.doctor.rules import rollout_gpus, trainer_gpus
from verl_sspo.run import settings
from verl_sspo.run.task import data_files

NAMES = ("verl", "torch", "transformers", "ray", "transferqueue", "omegaconf", "hydra-core")
#: One of these is in every folder that `AutoTokenizer` can read.
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
#: A socket's path has at most 107 bytes on Linux. To its temporary folder Ray appends this path and the process id.
LONGEST_SOCKET, OF_RAY = 107, "/ray/session_2026-01-01_00-00-00_000000_/sockets/plasma_store"
#: From this hidden size on, bfloat16 is faster on a CPU that has it. SmolLM2-135M has 576, the quickstart's model 64.
WIDE = 512
#: verl reads parquet with `datasets.load_dataset`, which does not take these as the name of a file.
PATTERN = re.compile(r"[*?]|\[.+\]|::")
#: A head node with ~/.ray/auth_token asks for the token. Ray sends it to a given address only with this setting.
TOKEN = "set RAY_AUTH_MODE=token here and before each `ray start`, with the head's ~/.ray/auth_token on all nodes"
#: Seconds that a node has to answer: the first `import verl` from a network file system is slow.
PATIENCE = 120


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_findings(config: DictConfig | None = None) -> Iterator[Finding]:
    """Compares installed versions with the tested ones, and checks what else this configuration needs."""
    yield ok("python", platform.python_version())
    yield ok("verl-sspo", version("verl-sspo"))
    for requirement in map(Requirement, requires("verl-sspo") or ()):
        name = requirement.name
        if requirement.marker is None and name.lower() in NAMES:
            present = installed(name)
            if present is None:
                yield error(name, "is not installed", f"pip install '{requirement}'")
            elif not requirement.specifier.contains(present, prereleases=True):
                yield warning(name, f"{present}; tested with {requirement.specifier}", f"pip install '{requirement}'")
            else:
                yield ok(name, present)
    if config is not None:
        yield from _needed_by(config)


def _needed_by(config: DictConfig) -> Iterator[Finding]:
    rollout, on_cpu = config.actor_rollout_ref.rollout.get("name"), config.trainer.device == "cpu"
    needs = []
    if rollout in ("vllm", "sglang"):
        remedy = "scripts/setup_cpu_vllm.sh, then VENV=.venv-vllm" if on_cpu else "scripts/setup.sh gpu"
        needs.append((error, rollout, f"rollout.name={rollout} needs it", remedy))
    if rollout in ("vllm", "sglang") and not on_cpu:
        remedy = "install flash-attn, or set +actor_rollout_ref.model.override_config.attn_implementation=sdpa"
        needs.append((warning, "flash-attn", "verl's FSDP engine asks transformers for flash_attention_2", remedy))
    if config.model_engine == "megatron":
        needs.append((error, "megatron-core", "model_engine=megatron needs it", "pip install 'verl[mcore]'"))
        needs.append((error, "transformer-engine", "Megatron needs it", "pip install 'transformer-engine[pytorch]'"))
    for kind, name, why, remedy in needs:
        present = installed(name)
        yield ok(name, present) if present else kind(name, f"is not installed; {why}", remedy)


def accelerator_findings(config: DictConfig) -> Iterator[Finding]:
    """Compares this machine's GPUs with those that trainer and rollout want on a node. On a CPU none are needed."""
    import torch

    if config.trainer.device == "cpu":
        yield ok("accelerator", f"none needed: trainer.device=cpu on {os.cpu_count()} CPU cores")
        return
    count, trainer = torch.cuda.device_count(), config.trainer.n_gpus_per_node
    wanted = trainer + (rollout_gpus(config) if config.trainer.nnodes == 1 else 0)
    if count < wanted:
        beside = f", and the rollout needs {wanted - trainer} besides" if wanted > trainer else ""
        message = f"{count} CUDA devices are visible here, trainer.n_gpus_per_node={trainer}{beside}"
        yield error("accelerator", message, "lower trainer.n_gpus_per_node, or give --address of the Ray cluster")
        return
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    name = torch.cuda.get_device_name(0)
    yield ok("accelerator", f"{count} x {name}, {memory:.0f} GiB, CUDA {torch.version.cuda}")


def registration_findings(address: str | None = None, config: DictConfig | None = None) -> Iterator[Finding]:
    """Checks that verl knows `sspo` in this process and, with an address, on every node of that Ray cluster.

    On a cluster, this also checks data, model and GPUs. Without an address, Ray is not started.
    """
    here = node_report()
    yield from node_findings("this process", here, here["versions"])
    if not address:
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    started = not ray.is_initialized()
    try:
        if started:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        paths = [] if config is None else local_paths(config)
        # No retries: that a worker dies at import is a result.
        probe = ray.remote(num_cpus=0, max_retries=0)(node_report)
        for node in nodes:
            where = f"node {node['NodeManagerHostname']}"
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            try:
                report = ray.get(probe.options(scheduling_strategy=strategy).remote(paths), timeout=PATIENCE)
            except Exception as failure:
                yield error("registered", f"{where}: {_last_line(failure)}", "install the same environment there")
            else:
                yield from node_findings(where, report, here["versions"])
        if config is not None:
            yield gpu_finding([node["Resources"].get("GPU", 0) for node in nodes], config)
    except Exception as failure:  # whatever Ray raises, keep the findings so far
        why, remedy = _last_line(failure), "see `ray status`"
        if "InvalidAuthToken" in str(failure.__cause__):
            why, remedy = "it asks for a token", TOKEN
        yield error("cluster", f"no Ray cluster answers at {address}: {why}", remedy)
    finally:
        if started:
            ray.shutdown()


def _last_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[-1]


def node_report(paths: Iterable[str] = ()) -> dict[str, Any]:
    """Runs on any node: whether `import verl` alone registers `sspo`, versions, and which paths are missing."""
    import verl  # noqa: F401  loads the plugin
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

    return {
        "registered": "sspo" in POLICY_LOSS_REGISTRY and "sspo" in ADV_ESTIMATOR_REGISTRY,
        "versions": {name: installed(name) for name in ("verl", "verl-sspo", "torch")},
        "missing": [path for path in paths if not Path(path).expanduser().exists()],
    }


def node_findings(where: str, report: dict[str, Any], expected: dict[str, str | None]) -> Iterator[Finding]:
    """The findings from a `node_report`; `expected` are the versions of the process that starts the run."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    if not report["registered"]:
        remedy = "install verl-sspo there; `python -c 'import verl_sspo.plugin'` shows what fails"
        yield error("registered", f"{where}: verl does not know `sspo` ({versions})", remedy)
    elif other := [name for name in expected if report["versions"][name] != expected[name]]:
        here = ", ".join(f"{name} {expected[name]}" for name in other)
        yield error("registered", f"{where}: {versions}, but {here} here", "install one version everywhere")
    else:
        yield ok("registered", f"{where}: {versions}")
    for path in report["missing"]:
        yield error("paths", f"{where}: there is no {path}", "copy it there, or use a folder that all nodes share")


def gpu_finding(gpus: list[float], config: DictConfig) -> Finding:
    """Compares the GPUs of a cluster's nodes with those that the configuration needs."""
    wanted, per_node, nodes = trainer_gpus(config) + rollout_gpus(config), config.trainer.n_gpus_per_node, len(gpus)
    fit = sum(count >= per_node for count in gpus)
    found = f"{sum(gpus):g} GPUs on {nodes} nodes"
    if sum(gpus) < wanted:
        return error(
            "cluster", f"the cluster has {found}, {wanted} are asked for", "lower trainer.nnodes, or add nodes"
        )
    if fit < config.trainer.nnodes:
        message = f"{fit} nodes have {per_node} GPUs, trainer.nnodes={config.trainer.nnodes} are asked for ({found})"
        return error("cluster", message, "lower trainer.n_gpus_per_node, and raise trainer.nnodes")
    return ok("cluster", found)


def local_paths(config: DictConfig) -> list[str]:
    """Paths of data and model, if they are local files and not names on a hub or URLs."""
    model = str(config.actor_rollout_ref.model.path)
    paths = [name for key in ("train_files", "val_files") for name in data_files(config, key) if "://" not in name]
    return [*paths, *([model] if model.startswith(("/", "~", ".")) or Path(model).exists() else [])]


def _did_you_mean(path: Path) -> str:
    """For a missing path: the most similar name beside it, or the missing folder."""
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    return f": did you mean {close[0]}?" if close else ""


def _nearest(path: Path) -> Path:
    """The path itself if it exists, otherwise its nearest parent that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def data_findings(config: DictConfig) -> Iterator[Finding]:
    """Checks that the parquet files exist, have the columns that are read, and enough rows for one batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    abilities: set[str] = set()
    rows, batch = 0, config.data.train_batch_size
    # A custom data set class may read any columns.
    own = config.data.get("custom_cls", {}).get("path")
    needed = [] if own else [config.data.prompt_key, config.data.reward_fn_key, "reward_model"]
    for key in ("train_files", "val_files"):
        if not data_files(config, key):
            yield error("data", f"data.{key} is not set", f"set data.{key} to a parquet file")
        for name in data_files(config, key):
            path = Path(name).expanduser()
            if "://" in name or name.endswith((".json", ".jsonl")):
                yield warning("data", f"{name} is not checked", "only local parquet files are")
            elif not path.is_file():
                made = str(path).startswith(str(config.task.folder)) if "task" in config else False
                remedy = "`verl-sspo quickstart` makes it" if made else f"set data.{key} (verl-sspo prepare-data)"
                yield error("data", f"data.{key}: there is no {path}{_did_you_mean(path)}", remedy)
            elif PATTERN.search(str(path)):
                message = f"data.{key}: verl's reader treats the name {path} as a pattern or a chain of files"
                yield error("data", message, "rename the folder: no *, ? or :: and no [...] in it")
            else:
                try:
                    columns = pq.read_schema(path).names
                    has_ability = [column for column in ("ability",) if column in columns]
                    table = pq.read_table(path, columns=has_ability)
                except (OSError, pa.ArrowException) as failure:
                    yield error("data", f"{path} is not readable as parquet: {_last_line(failure)}", "make it again")
                    continue
                if missing := [column for column in needed if column not in columns]:
                    message = f"{path} has no column {', '.join(missing)}; it has {', '.join(columns)}"
                    yield error("data", message, "rename its columns, or let verl-sspo prepare-data write them")
                    continue
                abilities.update(*(table[column].unique().to_pylist() for column in has_ability))
                rows += table.num_rows if key == "train_files" else 0
                yield ok("data", f"{path}: {table.num_rows} rows")
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets").expanduser().absolute()
    if not os.access(_nearest(cache), os.W_OK):
        message = f"verl's reader copies the data to {cache}, and {_nearest(cache)} is not writable"
        yield error("data", message, "set HF_HOME to a writable folder")
    if 0 < rows < batch:
        message = f"{rows} training rows do not fill one batch of data.train_batch_size={batch}"
        yield error("data", message, "lower data.train_batch_size and ppo_mini_batch_size")
    grader = config.reward.custom_reward_function
    remote = (grader.get("reward_kwargs") or {}).get("sandbox_fusion_url")
    if "code" in abilities and grader.path == "pkg://verl_sspo.rewards" and not remote:
        yield sandbox_finding()


def sandbox_finding() -> Finding:
    """Checks that programs written by the model can run in bubblewrap here."""
    executable = shutil.which("bwrap")
    if executable is None:
        remedy = "apt install bubblewrap on the nodes of the reward workers, or use SandboxFusion (recipes/code.yaml)"
        return error("bubblewrap", "is not installed, and programs are not run without it", remedy)
    from verl_sspo.rewards import sandbox

    try:
        sandbox.check()
    except (sandbox.SandboxError, TimeoutError) as failure:
        remedy = "containers often forbid user namespaces: allow them, or use SandboxFusion (recipes/code.yaml)"
        return error("bubblewrap", f"cannot make a sandbox here: {failure or 'it takes too long'}", remedy)
    number = subprocess.run([executable, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return ok("bubblewrap", number)


def model_findings(config: DictConfig) -> Iterator[Finding]:
    """Checks that the model is a local folder with a tokenizer, cached, or on the hub, and has enough positions."""
    model = config.actor_rollout_ref.model
    name, path = str(model.path), Path(str(model.path)).expanduser()
    if path.is_dir():
        tokenizer = Path(str(model.get("tokenizer_path") or path)).expanduser()
        if not (path / "config.json").is_file():
            remedy = "set actor_rollout_ref.model.path to a Hugging Face model folder"
            yield error("model", f"{path} has no config.json", remedy)
            return
        if tokenizer.is_dir() and not any((tokenizer / each).is_file() for each in TOKENIZERS):
            remedy = "save the tokenizer there, or set actor_rollout_ref.model.tokenizer_path"
            yield error("model", f"{tokenizer} has no tokenizer", remedy)
            return
        settings_of_model = (path / "config.json").read_text()
        yield ok("model", str(path))
    elif name.count("/") != 1 or name.startswith((".", "~", "/")):
        made = "task" in config and name.startswith(str(config.task.folder))
        remedy = "`verl-sspo quickstart` makes it" if made else "set actor_rollout_ref.model.path"
        yield error("model", f"there is no folder {name}{_did_you_mean(path)}", remedy)
        return
    else:
        try:
            settings_of_model, where = _from_hub(name)
        except Exception as failure:  # from httpx or from the hub
            message = f"{name} is neither a folder nor cached nor reachable: {str(failure).splitlines()[0]}"
            yield error("model", message, "`hf download` it with network access, log in if gated, or give a folder")
            return
        yield ok("model", f"{name} ({where})")
    described = json.loads(settings_of_model)
    yield from memory_findings(config, described)
    positions = described.get("max_position_embeddings")
    longest = config.data.max_prompt_length + config.data.max_response_length
    if positions is not None and positions < longest:
        message = f"prompt and response may have {longest} tokens, the model has {positions} positions"
        yield error("model", message, "lower data.max_prompt_length or data.max_response_length")
    yield from _number_format_findings(config, described.get("hidden_size") or 0)


def _number_format_findings(config: DictConfig, width: int) -> Iterator[Finding]:
    """Checks that a CPU trains in the faster of bfloat16 and float32. A narrow model is equally fast in both."""
    if config.trainer.device != "cpu":
        return
    in_bf16 = config.actor_rollout_ref.actor.fsdp_config.dtype == "bfloat16"
    if in_bf16 and not has_bf16():
        message = "hardware=cpu_bf16, but this CPU has no bf16 instructions: float32 is faster"
        yield warning("bf16", message, "set hardware=cpu")
    elif not in_bf16 and has_bf16() and width >= WIDE:
        message = "this CPU has bf16 instructions, which train a model of this size in two thirds of the time"
        yield warning("bf16", message, "set hardware=cpu_bf16")


def _from_hub(name: str) -> tuple[str, str]:
    """The text of a model's config.json, and where it was found. Sends one request, without retries."""
    from huggingface_hub import get_session, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached).read_text(), "cached"
    url = hf_hub_url(name, "config.json")
    answer = get_session().get(url, headers=build_hf_headers(), timeout=10, follow_redirects=True)
    answer.raise_for_status()
    return answer.text, "Hugging Face hub"


def checkpoint_findings(config: DictConfig) -> Iterator[Finding]:
    """Checks whether a run would resume, and with the same settings and algorithm."""
    folder = Path(config.trainer.default_local_dir)
    latest = folder / "latest_checkpointed_iteration.txt"
    recorded = latest.read_text().strip() if latest.is_file() else ""
    # Without verl's record a restart may still find a checkpoint: verl_sspo.run.checkpoints.
    if not recorded and not any(folder.glob("global_step_*")):
        return
    step = f"step {recorded}" if recorded else "the last step"
    anew = "set another trainer.experiment_name or trainer.default_local_dir to start anew"
    if config.trainer.resume_mode == "disable":
        message = f"{folder} has checkpoints up to {step}, which resume_mode=disable would overwrite"
        yield error("resume", message, anew)
    elif config.trainer.resume_mode != "auto":
        return
    elif changed := settings.changed(config, folder):
        message = f"would resume from {step} in {folder}, which was trained with other settings"
        yield error("resume", f"{message}: {', '.join(changed[:5])}", anew)
    elif config.actor_rollout_ref.actor.policy_loss.loss_mode == "sspo" and not (folder / settings.KEPT).exists():
        message = f"resumes from {step} in {folder}, and nothing there says which algorithm trained it"
        yield warning("resume", message, anew)
    else:
        yield ok("resume", f"resumes from {step} in {folder}")


def folder_findings(config: DictConfig) -> Iterator[Finding]:
    """Checks that a bare main_ppo can write checkpoints, and make Ray's sockets, in the folders that it would use."""
    folder = Path(config.trainer.default_local_dir).expanduser().absolute()
    there = _nearest(folder)
    if not os.access(there, os.W_OK):
        yield error("folder", f"{there} is not writable", "set trainer.default_local_dir")
    elif shutil.disk_usage(there).free < 2**30:
        yield warning("folder", f"less than 1 GiB is free in {there}", "set trainer.default_local_dir")
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if len(temporary + OF_RAY) + len(str(os.getpid())) > LONGEST_SOCKET:
        message = f"the temporary folder {temporary} is too long for Ray's sockets"
        yield error("folder", message, "export RAY_TMPDIR=/tmp")
