"""The recipes for asynchronous modes and for staleness: they compose, and verl reads them as intended."""

import itertools
from pathlib import Path

import pytest
import verl  # noqa: F401  loads the plugin

from verl_sspo.compose import compose_config
from verl_sspo.doctor.configuration import configuration_findings

RECIPES = Path(__file__).parents[2] / "recipes"
MODES = ("colocate_async", "separate_async")


@pytest.mark.parametrize(("mode", "staleness"), itertools.product(MODES, ("bypass", "decoupled")))
def test_recipe_is_sound(mode, staleness):
    config = compose_config("quickstart", [f"+mode={mode}", f"+staleness={staleness}"], RECIPES)
    # The doctor says what each does to the loss, and finds nothing wrong.
    (finding,) = configuration_findings(config)
    assert (finding.severity, finding.check) == ("ok", "rollout_correction")

    v1, data, actor = config.trainer.v1, config.data, config.actor_rollout_ref.actor
    assert v1.trainer_mode == mode
    # Both modes train on the same amount per step, and separate_async requires this equality.
    assert data.train_batch_size == v1.separate_async.parameter_sync_step * actor.ppo_mini_batch_size
    # Both need the rollout's log-probs, and neither changes the algorithm.
    assert config.actor_rollout_ref.rollout.calculate_log_probs
    assert actor.policy_loss.loss_mode == "sspo"
    # A weight in addition to the gate would correct the same lag twice.
    correction = config.algorithm.rollout_correction
    expected = {"bypass": (True, None), "decoupled": (False, "token")}[staleness]
    assert (correction.bypass_mode, correction.rollout_is) == expected
    # bypass has no forward pass that logs the entropy, so the update logs it.
    assert actor.calculate_entropy == (staleness == "bypass")


def test_on_gpus_the_weights_need_another_way():
    command = ["hardware=fsdp_8gpu", "model=qwen2.5_7b_instruct", "+mode=separate_async", "+staleness=bypass"]
    findings = configuration_findings(compose_config("gsm8k", command, RECIPES))
    errors = {finding.check: finding for finding in findings if finding.severity == "error"}
    # The mode sets two logical GPUs, for machines without one. They are too few for eight real GPUs and a replica.
    assert set(errors) == {"weight_transfer", "gpus"}
    # The remedy is what to add to the command line, and it fixes both errors.
    remedy = errors["weight_transfer"].remedy.removeprefix("on GPUs set ").split()
    config = compose_config("gsm8k", [*command, *remedy], RECIPES)
    assert {finding.severity for finding in configuration_findings(config)} == {"ok"}


def test_the_engine_of_separate_async_is_what_verl_finds():
    from verl.checkpoint_engine import CheckpointEngineRegistry
    from verl.utils.import_utils import import_external_libs

    config = compose_config("quickstart", ["+mode=separate_async", "+staleness=bypass"], RECIPES)
    engine = config.actor_rollout_ref.rollout.checkpoint_engine
    # As verl's workers do it.
    import_external_libs(engine.custom_backend_module)
    assert CheckpointEngineRegistry.get(engine.backend).__name__ == "GlooCheckpointEngine"
