"""Runs an experiment suite of recipes/suites, cell by cell, each as its own main_ppo run.

    verl-sspo reproduce tiny                                     everything, into runs/tiny
    verl-sspo reproduce tiny --list                              what there is and how far it is
    verl-sspo reproduce tiny --only algo=sspo,grpo variant=lr1e-4 --seeds 0 1
    verl-sspo reproduce tiny --jobs 2                            two cells side by side

The same command again skips what is finished and goes on with what is not. `verl-sspo report runs/tiny --output
runs/tiny/report` makes tables and pictures of it, also while it runs.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from verl_sspo.experiments import cell as cells_
from verl_sspo.experiments.runner import run
from verl_sspo.experiments.suite import Cell, expand, load_suite
from verl_sspo.run.compose import RECIPES


def chosen(only: list[str]) -> dict[str, list[str]]:
    """`algo=a,b variant=c` as arguments of `expand`."""
    names = {"algo": "algorithms", "variant": "variants"}
    result = {}
    for each in only:
        key, separator, values = each.partition("=")
        if not separator or key not in names:
            raise ValueError(f"--only {each}: use algo=NAME,... or variant=NAME,...")
        result[names[key]] = values.split(",")
    return result


def print_states(cells: list[Cell], root: Path, console: Console) -> None:
    table = Table("cell", "state")
    states = [cells_.state(root / cell.name) for cell in cells]
    for cell, state in zip(cells, states, strict=True):
        table.add_row(cell.name, state)
    console.print(table)
    console.print(", ".join(f"{count} {state}" for state, count in Counter(states).items()), highlight=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", help="a name in recipes/suites, or a YAML file")
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY=NAMES", help="algo=a,b and/or variant=c,d")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="instead of the suite's")
    parser.add_argument("--output", type=Path, help="default: runs/SUITE")
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="show the cells and their states, run nothing")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    path = Path(arguments.suite).resolve() if arguments.suite.endswith(".yaml") else None
    path = path or RECIPES / "suites" / f"{arguments.suite}.yaml"
    root = (arguments.output or Path("runs") / path.stem).resolve()
    console = Console(stderr=True)
    try:
        suite = load_suite(path)
        cells = expand(suite, path.stem, seeds=arguments.seeds, **chosen(arguments.only))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))

    if arguments.list:
        print_states(cells, root, Console())
        return 0
    started = [cell for cell in cells if (root / cell.name / cells_.CONFIG).exists()]
    if started:
        console.print(f"comparing the settings of {len(started)} cells that have run here", highlight=False)
    try:
        for cell in started:
            cells_.check_settings(cell, root / cell.name, RECIPES)
    except ValueError as error:
        parser.error(str(error))
    root.mkdir(parents=True, exist_ok=True)
    # The report reads titles, measures and published numbers from this copy.
    (root / "suite.yaml").write_text(path.read_text())
    console.print(f"{suite.title}: {len(cells)} cells, into {root}", highlight=False)
    try:
        outcome = run(cells, root, RECIPES, jobs=arguments.jobs, console=console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here", highlight=False)
        return 130
    for name, reason in outcome.failed.items():
        console.print(f"failed: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    counts = f"{len(outcome.finished)} finished, {len(outcome.skipped)} were, {len(outcome.failed)} failed"
    console.print(f"{counts}, {len(outcome.busy)} left to another process", highlight=False)
    console.print(f"report: verl-sspo report {root} --output {root / 'report'}", highlight=False, soft_wrap=True)
    return 1 if outcome.failed or outcome.busy else 0


if __name__ == "__main__":
    sys.exit(main())
