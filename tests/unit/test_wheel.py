"""The wheel works without the clone: it is built, installed in a new environment and used in an empty folder."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
# An ordinary GRPO command line for verl, without anything from this project.
GRPO = (
    *("algorithm.adv_estimator=grpo", "data.train_batch_size=256", "actor_rollout_ref.rollout.n=8"),
    *("actor_rollout_ref.actor.ppo_mini_batch_size=64", "actor_rollout_ref.model.path=some/model"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that nothing is written into the clone."""
    source, output = tmp_path_factory.mktemp("source") / "clone", tmp_path_factory.mktemp("wheel")
    generated = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("verl_sspo", "hydra_plugins", "recipes"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=generated)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(output), str(source)], check=True, capture_output=True, timeout=600)
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Runs a program in an empty folder, from a new environment with the wheel and the packages of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # Python ignores .pth files inside these folders, so an editable install there does not count.
    shared = [path for path in sys.path if path.endswith("-packages")]
    (site_packages / "shared.pth").write_text("\n".join(shared))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True, capture_output=True, timeout=600)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command, cwd=None):
        done = subprocess.run(
            [str(folder / "bin" / command[0]), *command[1:]],
            cwd=cwd or tmp_path_factory.mktemp("empty"),
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "is not available" not in done.stderr  # Hydra's warning about a search path
        return done.stdout

    code = "import verl_sspo, verl_sspo.compose as c; print(verl_sspo.__file__, c.RECIPES)"
    for path in run("python", "-c", code).split():
        assert Path(path).is_relative_to(folder)
    return run


def composed(run, *arguments):
    """The configuration that verl's main_ppo would run."""
    printed = run("python", "-m", "verl.trainer.main_ppo", *arguments, "--cfg", "job")
    return yaml.safe_load(printed[printed.index("model_engine:") :])


def name_of(run, tmp_path, *arguments):
    """The experiment's name as composed by a program that uses verl's configurations but does not import verl."""
    main = tmp_path / "main.py"
    main.write_text(
        "import hydra, importlib.util\n"
        "folder = importlib.util.find_spec('verl').submodule_search_locations[0] + '/trainer/config'\n"
        "@hydra.main(config_path=folder, config_name='ppo_trainer', version_base=None)\n"
        "def main(config):\n"
        "    print(config.trainer.experiment_name)\n"
        "main()\n"
    )
    return run("python", str(main), *arguments, cwd=tmp_path).split()[-1]


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    tracked = {
        str(path.relative_to(REPOSITORY))
        for folder in ("verl_sspo", "hydra_plugins")
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    tracked |= {
        f"verl_sspo/{path.relative_to(REPOSITORY)}"
        for path in (REPOSITORY / "recipes").rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    held = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == tracked


def test_a_grpo_command_line_runs_sspo_with_typed_settings(run):
    config = composed(run, *GRPO, "+algo=sspo", "actor_rollout_ref.actor.policy_loss.tau_pos=6")
    loss = config["actor_rollout_ref"]["actor"]["policy_loss"]
    assert (loss["loss_mode"], loss["tau_pos"]) == ("sspo", 6)
    assert loss["_target_"] == "verl_sspo.config.SSPOPolicyLossConfig"
    assert config["actor_rollout_ref"]["actor"]["loss_agg_mode"] == "seq-mean-token-mean"
    # What the command line sets is kept, including the estimator.
    assert config["algorithm"]["adv_estimator"] == "grpo"
    assert config["data"]["train_batch_size"] == 256


def test_a_recipe_runs_from_any_folder(run):
    config = composed(run, "--config-name", "gsm8k", "algo=gspo", "hardware=fsdp_1gpu", "model=qwen2.5_0.5b_instruct")
    assert config["actor_rollout_ref"]["actor"]["policy_loss"]["loss_mode"] == "gspo"
    assert config["trainer"]["n_gpus_per_node"] == 1
    assert config["actor_rollout_ref"]["model"]["path"] == "Qwen/Qwen2.5-0.5B-Instruct"


def test_recipes_of_a_clone_come_before_the_installed_ones(run, tmp_path):
    shutil.copytree(REPOSITORY / "recipes", tmp_path / "recipes")
    gspo = tmp_path / "recipes" / "algo" / "gspo.yaml"
    gspo.write_text(gspo.read_text().replace("experiment_name: gspo", "experiment_name: changed"))
    clone = ("--config-dir", "recipes", "--config-name", "gsm8k")
    assert name_of(run, tmp_path, *clone, "algo=gspo") == "changed"
    assert name_of(run, tmp_path, *clone, "algo=sspo_v1") == "sspo_v1"


def test_an_algo_group_of_the_users_own(run, tmp_path):
    """In --config-dir its files win over ours, file by file; in hydra.searchpath ours win."""
    (tmp_path / "algo").mkdir()
    for name in ("grpo", "mine"):
        text = f"# @package _global_\ntrainer:\n  experiment_name: user_{name}\n"
        (tmp_path / "algo" / f"{name}.yaml").write_text(text)
    assert name_of(run, tmp_path, "--config-dir", ".", "+algo=grpo") == "user_grpo"
    assert name_of(run, tmp_path, "--config-dir", ".", "+algo=sspo") == "sspo"
    searched = f"hydra.searchpath=[file://{tmp_path}]"
    assert name_of(run, tmp_path, searched, "+algo=grpo") == "grpo"
    assert name_of(run, tmp_path, searched, "+algo=mine") == "user_mine"


def test_entry_points_load(run):
    code = (
        "import verl; from importlib.metadata import entry_points as e; import verl_sspo\n"
        "from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn\n"
        "[p.load() for g in ('verl.plugins', 'vllm.general_plugins') for p in e(group=g) if 'sspo' in p.value]\n"
        "print(get_policy_loss_fn('sspo').__module__, get_adv_estimator_fn('sspo').__module__, verl_sspo.__version__)"
    )
    version = REPOSITORY.joinpath("pyproject.toml").read_text().split('\nversion = "')[1].split('"')[0]
    assert run("python", "-c", code).split()[-3:] == [*["verl_sspo.algorithm.registration"] * 2, version]


def test_the_command_is_installed(run):
    assert "prepare-data" in run("verl-sspo", "--help")
    assert "0 errors" in run("verl-sspo", "doctor", "--config-only", "--config-name", "gsm8k", "algo=sspo")
