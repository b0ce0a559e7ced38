"""Prepares data sets for verl: verl-sspo prepare-data TASK [TASK ...] [--source ...] [--output DIR]

    verl-sspo prepare-data gsm8k
    verl-sspo prepare-data math --levels all
    verl-sspo prepare-data math500 --source /data/MATH-500/test.jsonl --output data/math500
    verl-sspo prepare-data code --source likaixin/TACO-verified
    verl-sspo prepare-data gsm8k deepmath --shares 0.5 0.5 --output data/gsm8k_deepmath
    verl-sspo prepare-data word-problems --levels two-steps

Writes one parquet file per split, all or none. Several tasks are mixed: their first splits, into one file. A row that
cannot be used ends the command with its file, its line and the reason; --skip-bad leaves such rows out.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from verl_sspo.data import word_problems
from verl_sspo.data.prepare import Split, listed, mix
from verl_sspo.data.schema import write_splits
from verl_sspo.data.sources import SourceError
from verl_sspo.data.tasks import LEVELS, MIXES, TASKS, prepare


def parse(arguments: list[str]) -> argparse.Namespace:
    names = [*TASKS, *MIXES, word_problems.TASK]
    parser = argparse.ArgumentParser(
        prog="verl-sspo prepare-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="+", metavar="TASK", choices=names, help=", ".join(names))
    parser.add_argument(
        "--source",
        nargs="+",
        metavar="PATH_OR_HUB_ID",
        help="file (json, jsonl, parquet, arrow, csv), folder, or data set on the Hugging Face hub, one per task "
        "(default: the original on the hub)",
    )
    parser.add_argument("--config", help="configuration of the data set: a name on the hub, or a subfolder")
    parser.add_argument("--split", help="the only split to read; also the name of the split in a single file")
    parser.add_argument("--output", metavar="DIR", help="folder to write to (default: data/TASK in this folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run in that folder")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out rows that cannot be used and rows that repeat a problem"
    )
    parser.add_argument(
        "--template",
        help="prompt: boxed, think (<think> and <answer> tags) or hashes (####) for mathematics, code for code, or "
        "your own text with {problem} in it",
    )
    parser.add_argument(
        "--levels",
        nargs="+",
        help=f"levels to keep of math (1 to 5, or all; default: 3 4 5) or to make of {word_problems.TASK} "
        f"({', '.join(word_problems.LEVELS)}; default: the first)",
    )
    parser.add_argument("--shares", nargs="+", type=float, help="fraction of each task in a mix (default: equal)")
    parser.add_argument("--limit", type=int, help="keep only the first rows of each split")
    parser.add_argument("--seed", type=int, default=0, help="draws the rows of a mix, their order, and word problems")
    options = parser.parse_args(arguments)
    name = "_".join(options.tasks)
    if len(options.tasks) == 1 and options.tasks[0] in MIXES:
        options.tasks, shares = MIXES[options.tasks[0]]
        options.shares = options.shares or list(shares)
    elif len(options.tasks) > 1 and not {*MIXES, word_problems.TASK}.isdisjoint(options.tasks):
        parser.error(f"{', '.join(MIXES)} and {word_problems.TASK} cannot be mixed: name data sets")
    count = len(options.tasks)
    options.source = options.source or [None] * count
    options.shares = options.shares or [1 / count] * count
    if len(options.source) != count or len(options.shares) != count:
        parser.error(f"{count} tasks need {count} sources and {count} shares")
    if not all(0 < share < math.inf for share in options.shares):
        parser.error("shares must be positive numbers")
    if options.split is not None and (not options.split or Path(options.split).name != options.split):
        parser.error(f"{options.split!r} is no name of a split")  # it becomes the name of a file
    if options.limit is not None and options.limit < 1:
        parser.error("--limit must be at least 1")
    if options.levels and options.tasks[0] == word_problems.TASK:
        if unknown := [level for level in options.levels if level not in word_problems.LEVELS]:
            parser.error(f"no level {unknown[0]!r} of {word_problems.TASK}: {', '.join(word_problems.LEVELS)}")
    elif options.levels and "math" not in options.tasks:
        parser.error(f"--levels belongs to the tasks math and {word_problems.TASK}")
    elif options.levels not in (None, ["all"]) and not set(options.levels) <= set("12345"):
        parser.error("--levels of math takes numbers from 1 to 5, or `all`")
    if options.output == "":
        parser.error("--output is empty: name a folder")
    options.output = Path(options.output or Path("data") / name)
    existing = next(each for each in (options.output, *options.output.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        parser.error(f"cannot write to {options.output}: {existing} is not a folder to write to")
    options.there = sorted(path.name for path in options.output.glob("*.parquet"))
    if options.there and not options.overwrite:
        parser.error(f"{options.output} holds {', '.join(options.there)}: --overwrite replaces, --output names another")
    return options


def build(options: argparse.Namespace) -> list[Split]:
    """The splits to write. Bad rows are told on stderr.

    Raises:
        SourceError, ValueError: There are bad rows, and --skip-bad does not say to leave them out; or none is left.
    """
    if options.tasks[0] == word_problems.TASK:
        prepared = [word_problems.make_splits(options.levels or list(word_problems.LEVELS)[:1], options.seed)]
    else:
        levels = {None: LEVELS, ("all",): None}.get(options.levels and tuple(options.levels), options.levels)
        prepared = [
            prepare(
                task,
                source=source,
                config=options.config,
                split=options.split,
                template=options.template,
                levels=levels and frozenset(map(int, levels)),
                keep_repeated=not options.skip_bad,
            )
            for task, source in zip(options.tasks, options.source, strict=True)
        ]
    bad = False
    for task, splits in zip(options.tasks, prepared, strict=True):
        for split in splits:
            done = "left out" if options.skip_bad else "kept"
            if split.bad:
                bad = True
                print(f"{task} {split.name}: rows that cannot be used:\n{listed(split.bad)}", file=sys.stderr)
            if split.repeated:
                print(f"{task} {split.name}: repeated rows, {done}:\n{listed(split.repeated)}", file=sys.stderr)
        if not any(split.rows for split in splits) and (options.skip_bad or not bad):
            left_out = ", ".join(f"{count} {reason}" for split in splits for reason, count in split.dropped.items())
            raise ValueError(f"no row of {task} is left" + (f" (left out: {left_out})" if left_out else ""))
    if bad and not options.skip_bad:
        raise ValueError("nothing is written: correct these rows, or leave them out with --skip-bad")
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
        # A split of which nothing is left (Eurus has no code in its validation split) is no error: others are.
        kept = {options.output / f"{split.name}.parquet": split.rows for split in splits if split.rows}
        write_splits(kept)
    except (SourceError, ValueError) as error:
        print(f"prepare-data: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"prepare-data: cannot write to {options.output}, nothing is changed there: {error}", file=sys.stderr)
        return 1
    lines = [*(split.summary() for split in splits), *(f"wrote {path}" for path in kept)]
    lines += [f"left as it was: {options.output / name}" for name in options.there if options.output / name not in kept]
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # `| head`: the reader has seen enough, and the interpreter must not try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
