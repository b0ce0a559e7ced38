"""Writes tables and pictures of a suite's runs as Markdown, also while they run.

    verl-sspo report runs/tiny --output runs/tiny/report
    verl-sspo report --theory --output docs/results/theory

--theory needs no runs: it shows trust regions, gates, bias and variance of the losses, in about a minute.

The folder --output gets report.md and pictures/ (SVG, and PDF for LaTeX). For a suite it also gets runs.csv (a row per
run), differences.csv (the comparisons), curves.csv.gz (the metrics drawn over steps) and, if the suite measures
staleness, staleness.csv (a row per step).
"""

import argparse
from pathlib import Path

from verl_sspo.cli import output_folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="verl-sspo report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="?", type=Path, help="the folder that verl-sspo reproduce wrote to")
    parser.add_argument("--theory", action="store_true", help="report on the losses instead, without runs")
    parser.add_argument("--output", type=output_folder, required=True, help="folder of the report")
    arguments = parser.parse_args(argv)
    if arguments.theory == (arguments.runs is not None):
        parser.error("give the folder of the runs, or --theory")
    try:
        if arguments.theory:
            from verl_sspo.analysis.report import write_theory_report

            print(write_theory_report(arguments.output))
        else:
            from verl_sspo.experiments.suite_report import write_suite_report

            print(write_suite_report(arguments.runs, arguments.output))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0
