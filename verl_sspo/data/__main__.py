"""Prepares data sets for verl: verl-sspo prepare-data TASK [TASK ...] [--source ...] [--output DIR]

    verl-sspo prepare-data gsm8k
    verl-sspo prepare-data math --levels all
    verl-sspo prepare-data math500 --source /data/MATH-500/test.jsonl --output data/math500
    verl-sspo prepare-data code --source likaixin/TACO-verified
    verl-sspo prepare-data gsm8k deepmath --shares 0.5 0.5 --output data/gsm8k_deepmath

Writes one parquet file a split. Several tasks are mixed: their first splits, with the given shares, into one file.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from verl_sspo.data.prepare import SourceError, Split, mix
from verl_sspo.data.schema import write_rows
from verl_sspo.data.tasks import LEVELS, MIXES, TASKS, prepare


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", metavar="TASK", choices=[*TASKS, *MIXES], help=", ".join([*TASKS, *MIXES]))
    parser.add_argument(
        "--source",
        nargs="+",
        metavar="PATH_OR_HUB_ID",
        help="file (json, jsonl, parquet, arrow, csv), folder, or data set on the Hugging Face hub, one a task "
        "(default: the original on the hub)",
    )
    parser.add_argument("--config", help="configuration of the data set on the hub")
    parser.add_argument("--split", help="the only split to read; also what a single file is taken for")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write to (default: data/TASK)")
    parser.add_argument(
        "--template",
        help="prompt: boxed, think (<think> and <answer> tags) or hashes (####) for mathematics, code for code, or "
        "your own text with {problem} in it",
    )
    parser.add_argument("--levels", nargs="+", help="levels of MATH to keep, or `all` (default: 3 4 5)")
    parser.add_argument("--shares", nargs="+", type=float, help="share of each task in a mix (default: equal)")
    parser.add_argument("--limit", type=int, help="keep only the first rows of each split")
    parser.add_argument("--seed", type=int, default=0, help="draws the rows of a mix and their order")
    options = parser.parse_args(arguments)
    options.name = "_".join(options.tasks)
    if len(options.tasks) == 1 and options.tasks[0] in MIXES:
        options.tasks, shares = MIXES[options.tasks[0]]
        options.shares = options.shares or list(shares)
    elif not MIXES.keys().isdisjoint(options.tasks):
        parser.error("a mix cannot be mixed again: name the sets it is made of")
    count = len(options.tasks)
    options.source = options.source or [None] * count
    options.shares = options.shares or [1 / count] * count
    if len(options.source) != count or len(options.shares) != count:
        parser.error(f"{count} tasks need {count} sources and {count} shares")
    if not all(0 < share < math.inf for share in options.shares):
        parser.error("shares must be positive numbers")
    if options.split and Path(options.split).name != options.split:  # it becomes the name of a file
        parser.error(f"{options.split!r} is no name of a split")
    if options.limit is not None and options.limit < 1:
        parser.error("--limit must be at least 1")
    if options.levels == ["all"]:
        options.levels = None
    elif options.levels is None:
        options.levels = LEVELS
    elif set(options.levels) <= set("12345"):
        options.levels = frozenset(map(int, options.levels))
    else:
        parser.error("--levels takes numbers from 1 to 5, or `all`")
    options.output = options.output or Path("data") / options.name
    existing = next(each for each in (options.output, *options.output.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        parser.error(f"cannot write to {options.output}: {existing} is not a folder to write to")
    return options


def build(options: argparse.Namespace) -> list[Split]:
    prepared = [
        prepare(
            task,
            source=source,
            config=options.config,
            split=options.split,
            template=options.template,
            levels=options.levels,
        )
        for task, source in zip(options.tasks, options.source, strict=True)
    ]
    splits = prepared[0] if len(prepared) == 1 else [mix([s[0] for s in prepared], options.shares, options.seed)]
    for split in splits:
        if options.limit is not None and len(split.rows) > options.limit:
            split.dropped["beyond --limit"] = len(split.rows) - options.limit
            del split.rows[options.limit :]
    return splits


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        splits = build(options)
    except (SourceError, ValueError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    for split in splits:
        print(split.summary())
    # A split of which nothing is left (Eurus without code in its validation, say) is an error only if all are.
    kept = [split for split in splits if split.rows]
    if not kept:
        print("prepare_data: no rows left, nothing is written", file=sys.stderr)
        return 1
    for split in kept:
        try:
            print(f"wrote {write_rows(split.rows, options.output / f'{split.name}.parquet')}")
        except OSError as error:
            print(f"prepare_data: cannot write to {options.output}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
