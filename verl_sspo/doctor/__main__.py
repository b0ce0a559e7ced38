"""`verl-sspo doctor`: preflight with the command line of `verl.trainer.main_ppo`."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from verl_sspo.doctor import Finding
from verl_sspo.run.compose import compose_config, reference_config, verl_config_dir


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="verl-sspo doctor",
        description="Checks a run before it starts. Takes the arguments of verl.trainer.main_ppo; without any, checks "
        "the installation alone. The exit status is 1 if there is an error.",
    )
    parser.add_argument("--config-dir", "-cd", help="folder of recipes")
    parser.add_argument("--config-path", "-cp", default="config", help="folder in place of verl's own configurations")
    parser.add_argument("--config-name", "-cn", help="a recipe, or one of verl's own configurations")
    parser.add_argument("--multirun", "-m", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--run", "-r", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--address", help="address of a running Ray cluster, or `auto`: checks every node")
    parser.add_argument("--config-only", action="store_true", help="check the configuration alone, not this machine")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as algo=gspo")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.multirun:
        parser.error("--multirun starts several runs: check them one by one")
    return arguments


def _other_program(arguments: argparse.Namespace) -> str:
    """The trainer of `verl.experimental` that these arguments are for, if they are for one."""
    name = (arguments.config_name or "").removesuffix(".yaml")
    keys = {override.lstrip("+~").split("=")[0].split(".")[0] for override in arguments.overrides}
    for path in sorted(verl_config_dir().parents[1].glob("experimental/*/config/*.yaml")):
        own = yaml.safe_load(path.read_text()).keys() - {"hydra", "defaults"} - reference_config("dp").keys()
        if name == path.stem or keys & own:
            return path.parents[1].name
    return ""


def _machine_findings(arguments: argparse.Namespace, config: DictConfig | None) -> Iterator[Finding]:
    from verl_sspo.doctor import environment

    yield from environment.package_findings(config)
    yield from environment.registration_findings(arguments.address, config)
    if config is not None:
        if not arguments.address:
            yield from environment.accelerator_findings(config)
        yield from environment.data_findings(config)
        yield from environment.model_findings(config)
        yield from environment.checkpoint_findings(config)
        yield from environment.folder_findings(config)
    else:
        sandbox = environment.sandbox_finding()
        # Only code needs it, and nothing says that code will be trained.
        yield sandbox if sandbox.severity == "ok" else replace(sandbox, severity="warning")


def main(argv: list[str] | None = None) -> int:
    """Prints the findings and returns the exit status: 1 if one of them is an error, 130 after an interrupt."""
    arguments = _arguments(argv)
    seen: list[Finding] = []
    try:
        return _check(arguments, seen)
    except KeyboardInterrupt:
        print("interrupted: the checks are not complete", file=sys.stderr)
        return 130
    finally:
        if arguments.json:
            print(json.dumps([asdict(finding) for finding in seen], indent=2))


def _check(arguments: argparse.Namespace, seen: list[Finding]) -> int:
    config, of_config = None, []
    if arguments.config_name or arguments.overrides:
        if program := _other_program(arguments):
            message = f"these arguments are for verl.experimental.{program}, which is outside what the doctor checks"
            remedy = "check what it shares with verl.trainer.main_ppo by the arguments of the latter"
            return _report([Finding("warning", "entry_point", message, remedy)], seen, arguments.json)
        try:
            name = arguments.config_name or "ppo_trainer"
            config = compose_config(name, arguments.overrides, arguments.config_dir, arguments.config_path)
        except (HydraException, OmegaConfBaseException, FileNotFoundError, ValueError) as error:
            message = " ".join(str(error).split())
            return _report([Finding("error", "compose", message, "correct the command line")], seen, arguments.json)
        # Imports verl: a command line that does not compose is reported without waiting for it.
        from verl_sspo.doctor.configuration import configuration_findings

        of_config = configuration_findings(config)
    # What the machine has to say is computed from values that may be wrong.
    unusable = any(finding.check in ("value", "interpolation") for finding in of_config)
    of_machine = [] if arguments.config_only or unusable else _machine_findings(arguments, config)
    status = _report(itertools.chain(of_config, of_machine), seen, arguments.json)
    if config is not None and not arguments.json and not any(f.severity == "error" for f in of_config):
        if config.actor_rollout_ref.actor.policy_loss.loss_mode == "sspo":
            from verl_sspo.algorithm.description import describe

            print(f"\n{describe(config.actor_rollout_ref.actor)}")
    return status


def _report(findings: Iterable[Finding], seen: list[Finding], as_json: bool) -> int:
    for finding in findings:
        seen.append(finding)
        if not as_json:
            print(finding, flush=True)
    errors, warnings = (sum(f.severity == severity for f in seen) for severity in ("error", "warning"))
    if not as_json:
        print(f"\n{errors} errors, {warnings} warnings" if errors or warnings else "\nok: no errors, no warnings")
    return int(errors > 0)


if __name__ == "__main__":
    sys.exit(main())
