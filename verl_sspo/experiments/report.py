"""Tables and pictures of a suite's runs, as Markdown and as one HTML file; also while they run.

    verl-sspo report runs/tiny --output docs/results/tiny
    verl-sspo report --theory --output docs/results/theory

With --theory there are no runs: what the losses do by themselves, in seconds.

Besides report.md and report.html, the folder --output gets runs.csv (a row a run), curves.csv.gz (every metric drawn)
and pictures/ (SVG, and PDF for LaTeX).
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from verl_sspo.analysis.report import write_theory_report
from verl_sspo.experiments.suite_report import write_suite_report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, help="the folder that verl-sspo reproduce wrote to")
    parser.add_argument("--theory", action="store_true", help="the report of the losses instead, without runs")
    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    arguments = parser.parse_args(argv)
    if arguments.theory == (arguments.runs is not None):
        parser.error("give the folder of the runs, or --theory")
    try:
        if arguments.theory:
            files = write_theory_report(arguments.output)
        else:
            files = write_suite_report(arguments.runs, arguments.output)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    for file in files:
        Console().print(str(file), highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
