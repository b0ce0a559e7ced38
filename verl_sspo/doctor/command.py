"""`verl-sspo doctor`: preflight with the command line of `verl.trainer.main_ppo`."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from verl_sspo.compose import compose_config, reference_config, verl_config_dir
from verl_sspo.doctor.finding import Finding, error, warning


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="verl-sspo doctor",
        description="Checks a run before it starts. Takes the arguments of verl.trainer.main_ppo; without any, checks "
        "only the installation. The exit status is 1 if there is an error.",
    )
    parser.add_argument("--config-dir", "-cd", help="folder of recipes")
    parser.add_argument("--config-path", "-cp", default="config", help="folder in place of verl's own configurations")
    parser.add_argument("--config-name", "-cn", help="a recipe, or one of verl's own configurations")
    parser.add_argument("--address", help="address of a running Ray cluster, or `auto`: checks every node")
    parser.add_argument("--config-only", action="store_true", help="check only the configuration, not this machine")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("overrides", nargs="*", default=[], help="Hydra overrides, such as algo=gspo")
    return parser.parse_intermixed_args(argv)


def _composed(arguments: argparse.Namespace) -> DictConfig | Finding | None:
    """The configuration, or a finding that says why there is none; None to check only the installation."""
    name = (arguments.config_name or "ppo_trainer").removesuffix(".yaml")
    if not arguments.config_name and not arguments.overrides:
        return None
    keys = {override.lstrip("+~").split("=")[0].split(".")[0] for override in arguments.overrides}
    for path in verl_config_dir().parents[1].glob("experimental/*/config/*.yaml"):
        own = yaml.safe_load(path.read_text()).keys() - {"hydra", "defaults"} - reference_config("dp").keys()
        if name == path.stem or keys & own:
            program = f"verl.experimental.{path.parents[1].name}"
            remedy = "pass only the arguments that it shares with verl.trainer.main_ppo"
            return warning("entry_point", f"these arguments are for {program}, which the doctor does not check", remedy)
    try:
        return compose_config(name, arguments.overrides, arguments.config_dir, arguments.config_path)
    except (HydraException, OmegaConfBaseException, FileNotFoundError, ValueError) as wrong:
        return error("compose", " ".join(str(wrong).split()), "correct the command line")


def _findings(arguments: argparse.Namespace, config: DictConfig | None) -> Iterator[Finding]:
    # These import verl, which is slow. Errors in the command line were reported before.
    from verl_sspo.doctor import configuration, environment

    found = [] if config is None else configuration.configuration_findings(config)
    yield from found
    # The checks of the machine compute with these values.
    if arguments.config_only or any(finding.check in ("value", "interpolation") for finding in found):
        return
    yield from environment.package_findings(config)
    yield from environment.registration_findings(arguments.address, config)
    if config is None:
        sandbox = environment.sandbox_finding()
        # Only code tasks need it, and the task is not known.
        yield sandbox if sandbox.severity == "ok" else replace(sandbox, severity="warning")
        return
    if not arguments.address:
        yield from environment.accelerator_findings(config)
    yield from environment.data_findings(config)
    yield from environment.model_findings(config)
    yield from environment.checkpoint_findings(config)
    yield from environment.folder_findings(config)


def main(argv: list[str] | None = None) -> int:
    """Prints the findings and returns the exit status: 1 if one of them is an error."""
    arguments = _arguments(argv)
    config, seen = _composed(arguments), []
    try:
        for finding in [config] if isinstance(config, Finding) else _findings(arguments, config):
            seen.append(finding)
            if not arguments.json:
                print(finding, flush=True)
    finally:
        if arguments.json:
            print(json.dumps([asdict(finding) for finding in seen], indent=2))
    errors, warnings = (sum(f.severity == severity for f in seen) for severity in ("error", "warning"))
    if not arguments.json:
        print(f"\n{errors} errors, {warnings} warnings")
        if (
            isinstance(config, DictConfig)
            and not errors
            and config.actor_rollout_ref.actor.policy_loss.loss_mode == "sspo"
        ):
            from verl_sspo.algorithm.description import describe

            print(f"\n{describe(config.actor_rollout_ref.actor)}")
    return int(errors > 0)
