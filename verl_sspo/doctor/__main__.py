"""`python -m verl_sspo.doctor`: preflight with the command line of `verl.trainer.main_ppo`."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from verl_sspo.algorithm.description import describe
from verl_sspo.doctor import Finding, environment
from verl_sspo.doctor.configuration import configuration_findings
from verl_sspo.run.compose import compose_config


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m verl_sspo.doctor",
        description="Checks a run before a GPU is touched. Takes the arguments of verl.trainer.main_ppo; without any, "
        "checks the installation alone. Exit status 1 on errors.",
    )
    parser.add_argument("--config-dir", "-cd", help="folder of recipes")
    parser.add_argument("--config-name", "-cn", help="a recipe, or one of verl's own configurations")
    parser.add_argument("--address", help="address of a running Ray cluster, or `auto`: checks every node")
    parser.add_argument("--config-only", action="store_true", help="check the configuration alone, not this machine")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as algo=gspo")
    return parser.parse_intermixed_args(argv)


def _machine_findings(arguments: argparse.Namespace, config: DictConfig | None) -> Iterator[Finding]:
    yield from environment.package_findings(config)
    yield from environment.registration_findings(arguments.address, config)
    if config is not None:
        if not arguments.address:
            yield from environment.accelerator_findings(config)
        yield from environment.data_findings(config)
        yield from environment.model_findings(config)
        yield from environment.checkpoint_findings(config)
    else:
        sandbox = environment.sandbox_finding()
        # Only code needs it, and nothing says that code will be trained.
        yield sandbox if sandbox.severity == "ok" else replace(sandbox, severity="warning")


def main(argv: list[str] | None = None) -> int:
    """Prints the findings and returns the exit status: 1 if one of them is an error."""
    arguments = _arguments(argv)
    config, of_config = None, []
    if arguments.config_name or arguments.overrides:
        try:
            config = compose_config(arguments.config_name or "ppo_trainer", arguments.overrides, arguments.config_dir)
        except (HydraException, OmegaConfBaseException, FileNotFoundError, ValueError) as error:
            return _report([Finding("error", "compose", str(error), "correct the command line")], arguments.json)
        of_config = configuration_findings(config)
    # What the machine has to say is computed from values that may be wrong.
    unusable = any(finding.check in ("value", "interpolation") for finding in of_config)
    of_machine = [] if arguments.config_only or unusable else _machine_findings(arguments, config)
    status = _report(itertools.chain(of_config, of_machine), arguments.json)
    if config is None or arguments.json or any(finding.severity == "error" for finding in of_config):
        return status
    if config.actor_rollout_ref.actor.policy_loss.loss_mode == "sspo":
        print(f"\n{describe(config.actor_rollout_ref.actor)}")
    return status


def _report(findings: Iterable[Finding], as_json: bool) -> int:
    seen = []
    for finding in findings:
        seen.append(finding)
        if not as_json:
            print(finding, flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in seen], indent=2))
    else:
        counts = {severity: sum(f.severity == severity for f in seen) for severity in ("error", "warning")}
        print(f"\n{counts['error']} errors, {counts['warning']} warnings")
    return int(any(finding.severity == "error" for finding in seen))


if __name__ == "__main__":
    sys.exit(main())
