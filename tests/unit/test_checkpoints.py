"""Which checkpoint a restart resumes from, for every point at which verl can be killed while it saves."""

import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl_sspo.compose import compose_config
from verl_sspo.run import checkpoints, settings
from verl_sspo.run.checkpoints import RECORD, last, settle

RECIPES = Path(__file__).parents[2] / "recipes"


def save(root, step, ranks=1, record=True):
    """A checkpoint as verl's FSDP engine writes it; torch.save writes zip archives."""
    actor = root / f"global_step_{step}" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    for part in ("model", "optim", "extra_state"):
        for rank in range(ranks):
            write(actor / f"{part}_world_size_{ranks}_rank_{rank}.pt")
    write(root / f"global_step_{step}" / "data.pt")
    if record:
        (root / RECORD).write_text(str(step))
    return actor.parent


def write(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", "0" * 100)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_nothing_there(tmp_path):
    assert last(tmp_path / "checkpoints") is None
    assert settle(tmp_path / "checkpoints") is None
    (tmp_path / RECORD).write_text("")
    assert settle(tmp_path) is None
    # If the file exists, verl reads a number from it.
    assert not (tmp_path / RECORD).exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_recorded_one_is_taken(tmp_path, ranks):
    save(tmp_path, 8, ranks)
    save(tmp_path, 16, ranks)
    # Complete, but killed before it was recorded. With verl's asynchronous trainers a part may still be missing.
    save(tmp_path, 24, ranks, record=False)
    assert last(tmp_path) == 16
    assert settle(tmp_path) == 16
    assert (tmp_path / RECORD).read_text() == "16"


def test_half_a_checkpoint_is_not_taken(tmp_path):
    save(tmp_path, 8)
    for step, damage in {
        16: lambda folder: halve(folder / "actor" / "model_world_size_1_rank_0.pt"),
        17: lambda folder: halve(folder / "data.pt"),
        18: lambda folder: (folder / "data.pt").unlink(),
        19: lambda folder: (folder / "actor" / "model_world_size_1_rank_0.pt").unlink(),
        20: lambda folder: (folder / "data.pt").write_text(""),
    }.items():
        damage(save(tmp_path, step, record=False))
    (tmp_path / "global_step_21").mkdir()
    assert last(tmp_path) == 8
    # Not even if it is the recorded one.
    for step in range(16, 23):
        (tmp_path / RECORD).write_text(str(step))
        assert last(tmp_path) == 8


def test_a_rank_without_its_part_is_missed(tmp_path):
    save(tmp_path, 8, ranks=2)
    folder = save(tmp_path, 16, ranks=2)
    (folder / "actor" / "optim_world_size_2_rank_1.pt").unlink()
    assert last(tmp_path) == 8


@pytest.mark.parametrize("record", ["", "\n", "nonsense", None])
def test_a_damaged_record_is_repaired_with_the_newest_complete_one(tmp_path, record):
    save(tmp_path, 9)
    save(tmp_path, 10)
    halve(save(tmp_path, 11) / "data.pt")
    if record is None:
        (tmp_path / RECORD).unlink()
    else:
        (tmp_path / RECORD).write_text(record)
    assert settle(tmp_path) == 10
    assert (tmp_path / RECORD).read_text() == "10"
    assert {path.name for path in tmp_path.iterdir()} == {RECORD, "global_step_9", "global_step_10", "global_step_11"}


def test_megatrons_checkpoints_are_left_to_its_record(tmp_path):
    (tmp_path / "global_step_4" / "actor" / "model" / "dist_ckpt").mkdir(parents=True)
    (tmp_path / RECORD).write_text("4")
    assert settle(tmp_path) == 4
    assert (tmp_path / RECORD).read_text() == "4"


def test_megatrons_checkpoints_are_found_by_their_manifest(tmp_path):
    for step in (4, 5, 6):
        actor = tmp_path / f"global_step_{step}" / "actor"
        (actor / "model" / "dist_ckpt").mkdir(parents=True)
        write(actor.parent / "data.pt")
        # verl writes this file last.
        if step < 6:
            (actor / "ckpt_contents.json").write_text("{}")
    halve(tmp_path / "global_step_5" / "data.pt")
    (tmp_path / RECORD).write_text("")
    assert settle(tmp_path) == 4
    assert (tmp_path / RECORD).read_text() == "4"


def test_shards_that_lie_elsewhere_are_not_trained_over(tmp_path):
    root = tmp_path / "checkpoints"
    folder = save(root, 8, ranks=2)
    (folder / "actor" / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(ValueError, match=r"recorded but not complete.*other machines"):
        settle(root)
    assert (root / RECORD).read_text() == "8"
    # verl had not finished an unrecorded checkpoint, so nothing is lost.
    (root / RECORD).write_text("")
    assert settle(root) is None


def test_what_torch_saves_is_recognised(tmp_path):
    torch = pytest.importorskip("torch")
    folder = save(tmp_path, 8)
    for path in folder.rglob("*.pt"):
        torch.save({"weights": torch.arange(1000.0)}, path)
    assert checkpoints.is_complete(folder)
    halve(folder / "data.pt")
    assert not checkpoints.is_complete(folder)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A function: what an override changes, compared with the settings kept at the start of a run."""
    folder, config = tmp_path_factory.mktemp("kept"), compose_config("gsm8k", [], RECIPES)
    settings.keep(config, folder)
    return lambda override: settings.changed(OmegaConf.merge(config, OmegaConf.from_dotlist([override])), folder)


@pytest.mark.parametrize(
    "override",
    [
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.actor.fsdp_config.param_offload=true",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.3",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=8",
        "actor_rollout_ref.model.enable_gradient_checkpointing=false",
        "data.dataloader_num_workers=1",
        "trainer.total_epochs=9",
    ],
)
def test_what_saves_memory_or_time_may_change(changed, override):
    assert changed(override) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "actor_rollout_ref.actor.policy_loss.tau_pos=3",
            "actor_rollout_ref.actor.policy_loss.tau_pos: 10.0 there, 3 now",
        ),
        (
            "actor_rollout_ref.actor.ppo_mini_batch_size=32",
            "actor_rollout_ref.actor.ppo_mini_batch_size: 64 there, 32 now",
        ),
        ("data.train_batch_size=64", "data.train_batch_size: 256 there, 64 now"),
        ("actor_rollout_ref.actor.optim.lr=1e-5", "actor_rollout_ref.actor.optim.lr: 1e-06 there, 1e-05 now"),
    ],
)
def test_what_is_trained_may_not(changed, override, said):
    assert changed(override)[0] == said
