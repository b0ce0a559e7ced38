"""`verl-sspo train` on a Ray cluster of two nodes: two raylets on this machine, each with a logical GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from verl_sspo.quickstart.model import prepare_arithmetic
from verl_sspo.run import checkpoints

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]

NODE = {"num_cpus": 8, "num_gpus": 1}

# Scores differ between the responses to a prompt, whatever the model has learned.
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return len(set(solution_str)) / 12
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """The quickstart's task, with a model trained for a tenth of the time: these tests do not depend on learning."""
    folder = prepare_arithmetic(tmp_path_factory.mktemp("arithmetic"), digits=2, warm_up_steps=60)
    record = folder / "made_with.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"warm_up_steps": 600}))
    return folder


@pytest.fixture
def cluster():
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    yield cluster
    cluster.shutdown()


def start(task: Path, run: Path, *overrides: str, address: str | None = None) -> subprocess.Popen:
    """Starts a run. With one mini-batch per rollout, updates do not depend on the order of the responses."""
    reward = run.with_name("reward.py")
    reward.write_text(REWARD)
    command = [
        *(sys.executable, "-m", "verl_sspo", "train", "quickstart", f"--run-dir={run}"),
        *(f"task.folder={task}", "task.digits=2", f"reward.custom_reward_function.path={reward}"),
        *("data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8", "actor_rollout_ref.rollout.n=4"),
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        *("trainer.save_freq=1", "trainer.test_freq=-1", "trainer.val_before_train=false"),
        *overrides,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if address is not None:
        environment["RAY_ADDRESS"] = address
    with shown(run).open("w") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def shown(run: Path) -> Path:
    """The file with the output of the last start in a run folder."""
    return run.with_suffix(".shown")


def metrics_of(run: Path) -> dict[int, dict[str, float]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["step"]: line["data"] for line in map(json.loads, lines)}


def weights(run: Path, step: int) -> dict:
    return load_file(run / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface" / "model.safetensors")


def test_two_nodes_train_like_two_ranks_and_after_a_dead_node_the_same_command_resumes(task, tmp_path, cluster):
    node, two, one = cluster.add_node(**NODE), tmp_path / "two", tmp_path / "one"
    started = []

    def start_and_wait_for(step: int) -> subprocess.Popen:
        process = start(task, two, "trainer.nnodes=2", "trainer.total_training_steps=1000", address=cluster.address)
        started.append(process)
        while step not in metrics_of(two):
            assert process.poll() is None, shown(two).read_text()
            time.sleep(1)
        return process

    try:
        process = start_and_wait_for(2)
        assert len(nodes_with("HFServer", cluster.address)) == 2
        cluster.remove_node(node, allow_graceful=False)
        killed = time.monotonic()
        assert process.wait(timeout=300) == 1
        print(f"ended {time.monotonic() - killed:.0f} s after the death of a node:\n{shown(two).read_text()}")
        assert "a node of the Ray cluster died" in shown(two).read_text()
        saved = checkpoints.last(two / "checkpoints")
        assert f"This command resumes from step {saved}:" in shown(two).read_text()
        steps = metrics_of(two)

        started.append(start(task, one, "trainer.n_gpus_per_node=2", "trainer.total_training_steps=2"))
        assert started[-1].wait(timeout=1500) == 0, shown(one).read_text()
        check_equal(two, steps, one, metrics_of(one))

        cluster.add_node(**NODE)
        process = start_and_wait_for(saved + 1)
        assert f"Resuming from the checkpoint of step {saved}\n" in shown(two).read_text()
        process.terminate()
        assert process.wait(timeout=120) == 130
    finally:
        for process in started:
            # The launcher then ends its run.
            process.terminate()
            process.wait()


def nodes_with(actor: str, address: str) -> set[str]:
    """The nodes that have actors of a class."""
    ray.init(address=address, log_to_driver=False)
    try:
        actors = ray._private.state.actors().values()
        return {each["Address"]["NodeID"] for each in actors if actor in each["ActorClassName"]}
    finally:
        ray.shutdown()


def check_equal(two: Path, steps: dict, one: Path, expected: dict) -> None:
    """Checks that the first two steps (same samples) and the first update are equal up to float32 rounding."""
    for step in (1, 2):
        assert expected[step]["actor/grad_norm"] > 0
        assert steps[step]["training/rollout_probs_diff_max"] < 1e-5
        for name in ("critic/score/mean", "actor/grad_norm", "actor/pg_loss"):
            print(step, name, steps[step][name], expected[step][name])
            assert steps[step][name] == pytest.approx(expected[step][name], rel=1e-3, abs=1e-6)
    first, same, last = weights(two, 1), weights(one, 1), weights(two, 2)
    moved = max((first[name] - last[name]).abs().max() for name in first)
    apart = {name: (first[name] - same[name]).abs() for name in first}
    print("largest move", moved, "largest difference", max(each.max() for each in apart.values()))
    assert moved > 5e-5
    for name, difference in apart.items():
        # Adam divides by the gradient's size. Where that is near 0, rounding changes the update of 1e-4.
        assert (difference < 1e-6).float().mean() > 0.999, name
    shards = {path.name for path in (two / "checkpoints" / "global_step_2" / "actor").glob("model_*.pt")}
    assert shards == {"model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"}
