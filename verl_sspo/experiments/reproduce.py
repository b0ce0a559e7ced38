"""Runs an experiment suite of recipes/suites. Each cell is a separate training run.

    verl-sspo reproduce tiny                                     everything, into runs/tiny
    verl-sspo reproduce tiny --list                              its cells and their states
    verl-sspo reproduce tiny --only algo=sspo,grpo variant=lr1e-4 --seeds 0 1
    verl-sspo reproduce tiny --jobs 2                            two cells at a time

Run the same command again to resume: finished cells are skipped. `verl-sspo report runs/tiny --output runs/tiny/report`
makes tables and pictures, also while the suite runs.
"""

import argparse
import shlex
from collections import Counter
from pathlib import Path

from verl_sspo.cli import at_least, output_folder


def chosen(only: list[str]) -> dict[str, list[str]]:
    """Turns `algo=a,b variant=c` into arguments of `expand`."""
    names = {"algo": "algorithms", "variant": "variants"}
    given = dict(each.split("=", 1) for each in only if "=" in each)
    if len(given) != len(only) or not given.keys() <= names.keys():
        raise ValueError(f"--only {' '.join(only)}: use algo=NAME,... and/or variant=NAME,...")
    return {names[key]: values.split(",") for key, values in given.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="verl-sspo reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", help="a name in recipes/suites, or a YAML file")
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY=NAMES", help="algo=a,b and/or variant=c,d")
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[], help="default: the suite's")
    parser.add_argument("--output", type=output_folder, help="default: runs/SUITE")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="cells at a time (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="show the cells and their states, run nothing")
    arguments = parser.parse_args(argv)

    from rich.console import Console

    from verl_sspo.compose import RECIPES
    from verl_sspo.experiments import cell as cells_
    from verl_sspo.experiments.runner import run
    from verl_sspo.experiments.suite import expand, load_suite
    from verl_sspo.run import launch

    path = Path(arguments.suite).resolve() if arguments.suite.endswith(".yaml") else None
    path = path or RECIPES / "suites" / f"{arguments.suite}.yaml"
    # The copy of a suite beside its runs is called suite.yaml.
    name = path.parent.name if path.name == "suite.yaml" else path.stem
    root = arguments.output or (Path("runs") / name).resolve()
    console = Console(stderr=True, highlight=False)
    try:
        suite = load_suite(path)
        cells = expand(suite, name, seeds=arguments.seeds, **chosen(arguments.only))
        if arguments.list:
            states = [cells_.state(root / cell.name) for cell in cells]
            width = max(len(cell.name) for cell in cells)
            for cell, state in zip(cells, states, strict=True):
                print(f"{cell.name:{width}}  {state}")
            print(", ".join(f"{count} {state}" for state, count in Counter(states).items()))
            return 0
        for cell in cells:
            if (root / cell.name / cells_.CONFIG).exists():
                cells_.check_settings(cell, root / cell.name, RECIPES)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    text = path.read_text()
    root.mkdir(parents=True, exist_ok=True)
    # The report reads titles, measures and published numbers from this copy.
    (root / "suite.yaml").write_text(text)
    console.print(f"{suite.title}: {len(cells)} cells, into {root}")
    try:
        train: cells_.Trainer = launch.train
        if suite.trainer == "plain":
            from verl_sspo.experiments.plain import train
        outcome = run(cells, root, RECIPES, jobs=arguments.jobs, console=console, train=train)
    except KeyboardInterrupt:
        console.print("interrupted; the same command resumes")
        return 130
    for failed, reason in outcome.failed.items():
        console.print(f"failed: {failed}: {reason}", markup=False, soft_wrap=True)
    counts = f"{len(outcome.finished)} finished, {len(outcome.skipped)} finished before, {len(outcome.failed)} failed"
    console.print(f"{counts}, {len(outcome.busy)} left to another process")
    report = shlex.join(["verl-sspo", "report", str(root), "--output", str(root / "report")])
    console.print(f"report: {report}", soft_wrap=True)
    return 1 if outcome.failed or outcome.busy else 0
