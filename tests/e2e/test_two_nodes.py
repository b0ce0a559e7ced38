"""verl's main_ppo on a Ray cluster of two nodes: two raylets on this machine, each with a logical GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from verl_sspo.quickstart.model import prepare_arithmetic

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]

RECIPES = Path(__file__).parents[2] / "recipes"

# Different for every prompt, and known before the run.
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return len(set(ground_truth + solution_str)) / 12
"""

# hardware=cpu describes a cluster of its own. These belong to the one that runs already.
ON_THE_CLUSTER = (
    "trainer.nnodes=2",
    "ray_kwargs.ray_init.num_cpus=null",
    "~ray_kwargs.ray_init.num_gpus",
    "~ray_kwargs.ray_init.include_dashboard",
)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("task")
    return prepare_arithmetic(root, digits=1, train_size=48, val_size=16, warm_up_steps=20, warm_up_batch=16)


@pytest.fixture
def cluster():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 1})
    cluster.add_node(num_cpus=8, num_gpus=1)
    yield cluster
    cluster.shutdown()


def start(task: Path, directory: Path, *overrides: str, address: str | None = None) -> subprocess.Popen:
    """main_ppo, with greedy rollouts: a run's updates do not depend on which replica answers which prompt."""
    directory.mkdir(exist_ok=True)
    (directory / "reward.py").write_text(REWARD)
    # The driver's environment does not reach the processes of a running cluster: see docs/clusters.md.
    metrics = f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={directory / 'metrics.jsonl'}"
    command = [
        *(sys.executable, "-m", "verl.trainer.main_ppo"),
        *("--config-dir", str(RECIPES), "--config-name", "ppo_trainer", "+algo=sspo", "+hardware=cpu", metrics),
        f"data.train_files={task / 'train.parquet'}",
        f"data.val_files={task / 'val.parquet'}",
        f"actor_rollout_ref.model.path={task / 'model'}",
        *("data.train_batch_size=8", "data.max_prompt_length=4", "data.max_response_length=12", "data.seed=0"),
        "data.dataloader_num_workers=0",
        *("actor_rollout_ref.rollout.n=1", "actor_rollout_ref.rollout.top_k=1"),
        # An advantage without a group of responses.
        "algorithm.adv_estimator=reinforce_plus_plus",
        *("actor_rollout_ref.actor.ppo_mini_batch_size=8", "actor_rollout_ref.actor.optim.lr=1e-3"),
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        f"reward.custom_reward_function.path={directory / 'reward.py'}",
        "trainer.logger=[console,file]",
        f"trainer.default_local_dir={directory / 'checkpoints'}",
        *("trainer.test_freq=-1", "trainer.val_before_train=false", "trainer.save_freq=1"),
        *overrides,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if address is not None:
        environment["RAY_ADDRESS"] = address
    with (directory / "main_ppo.log").open("a") as log:
        return subprocess.Popen(command, env=environment, cwd=directory, stdout=log, stderr=subprocess.STDOUT)


def run(task: Path, directory: Path, *overrides: str, address: str | None = None) -> dict[int, dict[str, float]]:
    """Metrics of each step."""
    process = start(task, directory, *overrides, address=address)
    assert process.wait(timeout=1500) == 0, (directory / "main_ppo.log").read_text()[-8000:]
    return metrics_of(directory)


def metrics_of(directory: Path) -> dict[int, dict[str, float]]:
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["step"]: line["data"] for line in map(json.loads, lines)}


def weights(directory: Path, step: int) -> dict:
    folder = directory / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface"
    return load_file(folder / "model.safetensors")


def test_two_nodes_train_like_one_node_with_two_ranks_and_resume(task, tmp_path, cluster):
    two, one = tmp_path / "two", tmp_path / "one"
    steps = run(task, two, *ON_THE_CLUSTER, "trainer.total_training_steps=2", address=cluster.address)
    expected = run(task, one, "trainer.n_gpus_per_node=2", "trainer.total_training_steps=2")
    assert steps.keys() == expected.keys() == {1, 2}
    for step in (1, 2):
        assert steps[step]["actor/grad_norm"] > 0
        assert steps[step]["training/rollout_probs_diff_max"] < 1e-5
        for name in ("critic/score/mean", "actor/grad_norm", "actor/pg_loss"):
            assert steps[step][name] == pytest.approx(expected[step][name], rel=1e-3, abs=1e-6)
    first, same, last = weights(two, 1), weights(one, 1), weights(two, 2)
    for name, weight in first.items():
        # Adam divides by the gradient's size: where that is near 0, rounding shows in the update of 1e-3.
        assert ((weight - same[name]).abs() < 1e-5).float().mean() > 0.999
    assert any((first[name] - last[name]).abs().max() > 1e-4 for name in first)
    shards = {path.name for path in (two / "checkpoints" / "global_step_2" / "actor").glob("model_*.pt")}
    assert shards == {"model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"}

    (two / "metrics.jsonl").unlink()
    resumed = run(task, two, *ON_THE_CLUSTER, "trainer.total_training_steps=3", address=cluster.address)
    assert resumed.keys() == {3}

    ray.init(address=cluster.address)
    try:
        actors = ray._private.state.actors().values()
        nodes = {actor["Address"]["NodeID"] for actor in actors if "HFServer" in actor["ActorClassName"]}
    finally:
        ray.shutdown()
    assert len(nodes) == 2


def test_a_dead_node_ends_the_run_and_the_message_names_it(task, tmp_path, cluster):
    node = cluster.add_node(num_cpus=8, num_gpus=1)
    cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=True)
    process = start(task, tmp_path, *ON_THE_CLUSTER, "trainer.total_epochs=1000", address=cluster.address)
    try:
        while 2 not in metrics_of(tmp_path):
            assert process.poll() is None, (tmp_path / "main_ppo.log").read_text()[-8000:]
            time.sleep(1)
        cluster.remove_node(node, allow_graceful=False)
        killed = time.monotonic()
        assert process.wait(timeout=300) != 0
        print(f"main_ppo ended {time.monotonic() - killed:.0f} s after the death of a node")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    assert "node" in (tmp_path / "main_ppo.log").read_text()[-8000:]
